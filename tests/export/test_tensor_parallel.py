"""What two tensor-parallel ranks compute and save is what the exported folder computes.

Catches: a head that the export takes for another once ranks hold unequal heads; a rank's part that
a save by all ranks leaves out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.exported import SWITCHES, UNEVEN, WINDOW, megatron_logits, twins  # noqa: E402
from kit.tiny_qwen3 import write_byte_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

pytestmark = pytest.mark.dist
VOCABULARY = 265  # not divisible by two ranks
TOKENS = torch.randint(0, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))
LAYOUTS: dict[str, dict[str, Any]] = {
    "balanced": {"placement": "balanced"},
    "by type, sequence parallel": {"placement": "by_type", "sequence_parallel": True},
}
FA_HEADS = {0: (), 1: (5,), 2: (1, 2, 6), 3: tuple(range(8))}
OTHER_KINDS = {1: {"kda": (0, 3), "sliding_window": (1,)}, 2: {"sliding_window": (0, 4, 5, 7)}}
PLANS = {
    "Gated DeltaNet": HeadPlan.from_fa_heads(FA_HEADS, 4, 8, 4),
    "all kinds": HeadPlan.from_fa_heads(FA_HEADS, 4, 8, 4, other_kinds=OTHER_KINDS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """By plan: checkpoint `one`, and by layout a checkpoint of two ranks with their logits.

    By number of :data:`SWITCHES`: checkpoint `one`, and the logits of two ranks.
    """
    folder = tmp_path_factory.mktemp("ranks")
    write_byte_tokenizer(folder / "tokenizer")
    for name, plan in PLANS.items():
        fields = {"num_layers": 4, "vocab_size": VOCABULARY, "fa_rope": True}
        model, _ = twins(plan, **fields)
        save_checkpoint(folder / name / "one", model, model.config, plan, folder / "tokenizer", {})
    for number, switches in enumerate(SWITCHES):
        model, _ = twins(UNEVEN, **switches)
        out = folder / f"{number}"
        save_checkpoint(out / "one", model, model.config, UNEVEN, folder / "tokenizer", {})
    run_distributed(_run_and_save, 2, folder)
    return folder


def _run_and_save(folder: Path) -> None:
    """What each of two ranks does."""
    initialize_model_parallel(2)
    for name, plan in PLANS.items():
        for layout, fields in LAYOUTS.items():
            loaded = load_checkpoint(folder / name / "one", **fields)
            model = loaded.model.eval()
            logits, out = _whole_logits(model, TOKENS), folder / name / layout
            save_checkpoint(out, model, loaded.config, plan, folder / "tokenizer", {})
            if dist.get_rank() == 0:
                torch.save(logits[..., :VOCABULARY], out / "logits.pt")
            heads = [
                layer.self_attention.placement.heads_per_rank for layer in model.decoder.layers
            ]
            assert all(len(ranks) == 2 for ranks in heads), "the heads are not on two ranks"
    for number in range(len(SWITCHES)):
        model = load_checkpoint(folder / f"{number}/one", placement="balanced").model.eval()
        logits = _whole_logits(model, TOKENS % 64)
        if dist.get_rank() == 0:
            torch.save(logits, folder / f"{number}/logits.pt")


def _whole_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    own = megatron_logits(model, tokens).contiguous()
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS)
def test_logits_of_two_ranks_are_the_exported_models(folder, tmp_path, plan, layout):
    saved = folder / plan / layout
    assert cli.main(["export", "--model", str(saved), "--out", f"{tmp_path}/hf"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    assert model.config.sliding_window_tokens == WINDOW
    with torch.no_grad():
        logits = model(TOKENS).logits
    expected = torch.load(saved / "logits.pt")
    assert expected.std() > 0.3, "logits too small for the comparison to mean something"
    # As the certificate measures: rounding alone moves a small logit of four layers by more.
    worst = (logits - expected).abs().max() / expected.abs().max()
    assert worst < 1e-5


@pytest.mark.parametrize("number", range(len(SWITCHES)), ids=lambda i: " ".join(SWITCHES[i]) or "-")
def test_logits_of_two_ranks_at_every_switch(folder, number):
    """Every family's too: tied and untied, with biases, without norms of queries and keys."""
    _, exported = twins(UNEVEN, **SWITCHES[number])
    with torch.no_grad():
        logits = exported(TOKENS % 64).logits
    expected = torch.load(folder / f"{number}/logits.pt")
    assert expected.std() > 0.3, "logits too small for the comparison to mean something"
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
