"""Teachers' checkpoints under Megatron's inference context, held to transformers' own models.

Catches: a step that sees the first keys alone, padding, or another rank's heads or group; angles of
another position; scores of a query's own number of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_hydra import cpu

cpu.install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.contexts import contexts_of  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.families import CASES  # noqa: E402
from kit.tiny_qwen3 import write_tiny_teacher  # noqa: E402
from megatron.core.inference.contexts import StaticInferenceContext  # noqa: E402

from megatron_hydra.model.generation import generate  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.selection.cost import cache_bytes_per_token  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint  # noqa: E402

LENGTHS, NUM_NEW = (20, 13, 3), 24
TOKENS = torch.randint(0, 257, (3, 40), generator=torch.Generator().manual_seed(1))
PROMPTS = TOKENS[:, :20]
PIECES = (13, 1, 1, 9, 1, 15)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case a checkpoint, and what transformers makes of its source: `logits`, `tokens`."""
    folder = tmp_path_factory.mktemp("teachers")
    for case, (family, fields) in CASES.items():
        source = write_tiny_teacher(folder / case / "source", family, **fields)
        words = ["convert", "--teacher", str(source), "--out", f"{folder}/{case}/checkpoint"]
        assert cli.main(words) == 0
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        torch.save(_transformers(model), folder / case / "expected.pt")
    return folder


@torch.no_grad()
def _transformers(model: Any) -> dict[str, Tensor]:
    """Logits of whole rows, and what each prompt alone goes on with, greedily."""
    logits = model(TOKENS).logits
    assert logits.std() > 0.5, "logits too small for the comparison to mean something"
    options = dict(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    new = []
    for row, length in zip(PROMPTS, LENGTHS, strict=True):
        prompt = row[None, :length]
        mask = torch.ones_like(prompt)
        new.append(model.generate(prompt, attention_mask=mask, **options)[:, length:])
    tokens = torch.cat(new)
    assert tokens.shape == (3, NUM_NEW) and len(tokens.unique()) > 5, "too dull to compare"
    return {"logits": logits, "tokens": tokens}


@torch.no_grad()
def _logits_in_pieces(model: Any) -> Tensor:
    context, found, start = StaticInferenceContext(*TOKENS.shape), [], 0
    context.materialize_only_last_token_logits = False
    for size in PIECES:
        piece = TOKENS[:, start : start + size]
        positions = torch.arange(start, start + size).expand(piece.shape)
        options = dict(inference_context=context, runtime_gather_output=True)
        found.append(model(piece, positions, None, **options))
        context.increment_sequence_len_offset(size)
        start += size
    assert start == TOKENS.shape[1]
    return torch.cat(found, dim=1)


def _check(case: Path, **fields: Any) -> Any:
    """On the ranks that there are."""
    expected = torch.load(case / "expected.pt")
    model = load_checkpoint(case / "checkpoint", **fields).model.eval()
    found = generate(model, PROMPTS, NUM_NEW, lengths=LENGTHS)
    assert torch.equal(found, expected["tokens"]), case
    if not model.config.sequence_parallel:
        logits = _logits_in_pieces(model)
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_teacher_goes_on_as_in_transformers(teachers: Path, case: str) -> None:
    initialize_model_parallel()
    _check(teachers / case)


@pytest.mark.dist
def test_two_ranks_hold_a_teacher_together(teachers: Path) -> None:
    """Also one query group on both, and vocabularies that they cannot share equally."""
    run_distributed(_check_on_ranks, 2, teachers)


def _check_on_ranks(folder: Path) -> None:
    initialize_model_parallel(2)
    for case in CASES:
        # Sequence parallelism is of layers that all families have.
        for sequence_parallel in (True, False) if case.startswith("qwen3") else (False,):
            model = _check(folder / case, sequence_parallel=sequence_parallel)
            assert model.config.sequence_parallel == sequence_parallel
        shape = ModelShape.from_config(model.config)
        num_bytes = torch.tensor(_kept_bytes(model))
        dist.all_reduce(num_bytes)
        # A group that both ranks need is kept by both.
        copies = 2 // min(2, shape.num_query_groups)
        per_token = int(cache_bytes_per_token(shape, "fp32").of(None))
        assert num_bytes == 3 * (20 + 5) * per_token * copies, case


def _kept_bytes(model: Any) -> int:
    """What this rank's context holds after five tokens."""
    (context,) = contexts_of(lambda: generate(model, PROMPTS, 5))
    kept = [tensor for pair in context.key_value_memory_dict.values() for tensor in pair]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
