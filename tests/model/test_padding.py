"""A vocabulary and an MLP width that ranks cannot share equally: padded, and nothing shows of it.

Catches: padded rows that a softmax sees or a token finds, padding that trains or starts at random,
a row counted on two ranks or none, unequal parts that collectives take for equal ones, padding
that gets into a checkpoint, and state of the optimizer that lands one row off.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# Of 2 ranks the last holds one less, of 4 ranks three less: 31 + 30, 16 + 16 + 16 + 13, and so on.
PADDED = {"vocab_size": 61, "ffn_hidden_size": 49}
FA_HEADS = {0: (1, 2, 5), 1: (0, 1, 6, 7)}
WANTED = {
    "tensor parallel, ranks of one kind: tp4 by_type",
    "tensor and context parallel: tp2 cp2 sp by_type",
    "tensor parallel and pipeline: tp2 pp2 sp by_type micro4",
    "distributed optimizer: tp4 sp by_type distopt",
}
# To one rank's layout and back; test_readers_and_checkpoints_see_no_padding has this way too.
THERE_AND_BACK = "checkpoint there and back: tp4 sp by_type"
# Untied, the output layer is a matrix of its own: on every rank, and on the last stage alone.
UNTIED = {
    "tensor parallel, ranks of one kind: tp4 by_type",
    "tensor parallel and pipeline: tp2 pp2 sp by_type micro4",
}


@pytest.mark.parametrize(
    ("tied", "wanted"),
    [
        pytest.param(True, WANTED, id="tied"),
        pytest.param(False, UNTIED, id="untied"),
        pytest.param(True, {THERE_AND_BACK}, id="tied_too", marks=pytest.mark.exhaustive),
        pytest.param(
            False, WANTED - UNTIED | {THERE_AND_BACK}, id="untied_too", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_layouts_train_the_same_model(tmp_path: Path, tied: bool, wanted: set[str]) -> None:
    """Logits, losses, gradients, weights and Adam's moments of one rank without padding."""
    run_distributed(_certify, 4, tmp_path, tied, wanted)
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    failed = [row for row in certificate["rows"] if not row["passed"]]
    assert certificate["passed"] and not failed, failed
    assert {f"{row['check']}: {row['layout']}" for row in certificate["rows"]} == wanted


def _certify(folder: Path, tied: bool, wanted: set[str]) -> None:
    from megatron_hydra.certify.certificate import certify
    from megatron_hydra.certify.checks import Limits
    from megatron_hydra.certify.layouts import Layout
    from megatron_hydra.certify.worlds import Ranks

    certificate = certify(
        _run(folder, tied),
        Limits(4, 2, 2),
        48,
        Ranks(),
        world_size=4,
        rank=int(os.environ["RANK"]),
        select=lambda check: (
            f"{check.name}: {check.layout.name}" in wanted and check.other in (None, Layout())
        ),
    )
    if os.environ["RANK"] == "0":
        (folder / "certificate.json").write_text(json.dumps(asdict(certificate.file)))


def _run(folder: Path, tied: bool) -> Any:
    from kit.tiny import tiny_fields

    from megatron_hydra.certify.certificate import WELL_CONDITIONED
    from megatron_hydra.certify.training import Run
    from megatron_hydra.head_plan import HeadPlan

    fields = tiny_fields(share_embeddings_and_output_weights=tied, **PADDED, **WELL_CONDITIONED)
    plan = HeadPlan.from_fa_heads(FA_HEADS, 2, 8, 4)
    return Run(fields, plan, folder / "weights", folder, num_steps=2)


def test_readers_and_checkpoints_see_no_padding(tmp_path: Path) -> None:
    run_distributed(_check_readers, 4, tmp_path)
    run_distributed(_check_moved_state, 4, tmp_path)


def _check_readers(folder: Path) -> None:
    """Logits and losses of a teacher at TP 4 are those of one rank without padding."""
    from kit.tiny import tiny_config, token_batch
    from kit.tiny_qwen3 import write_byte_tokenizer

    from megatron_hydra.certify.layouts import Layout
    from megatron_hydra.certify.worlds import Ranks
    from megatron_hydra.evaluation.perplexity import mean_loss
    from megatron_hydra.model.build import build_model
    from megatron_hydra.selection.scorers.activations import read_logits
    from megatron_hydra.tasks.readout import answer_logits, log_probability
    from megatron_hydra.teachers.checkpoint import load_checkpoint, save_checkpoint

    config = tiny_config(share_embeddings_and_output_weights=False, init_method_std=0.3, **PADDED)
    tokens, _ = token_batch(config, batch=2, length=12)
    text, hidden = torch.arange(49) % 61, torch.randn(3, 32, generator=torch.manual_seed(0))

    def read(model: Any) -> dict[str, torch.Tensor]:
        logits = answer_logits(model.eval(), tokens, 3)
        return {
            "answers": logits,
            "log probability": log_probability(logits, tokens[:, :3]),
            "best": logits.argmax(-1),
            "states": read_logits(model, hidden),
            "loss": torch.tensor(mean_loss(model, text, 16)),
        }

    ranks, expected, is_first = Ranks(), folder / "expected.pt", os.environ["RANK"] == "0"
    ranks.enter(Layout(), alone=True)
    if is_first:
        write_byte_tokenizer(folder / "tokenizer")
        model = build_model(config, None)
        save_checkpoint(folder / "model", model, config, None, folder / "tokenizer", {})
        torch.save(read(model), expected)
    ranks.enter(Layout(tp=4))
    torch.distributed.barrier()
    loaded = load_checkpoint(folder / "model")
    assert loaded.config.vocab_size == 61 and loaded.config.ffn_hidden_size == 49
    found = read(loaded.model)
    assert found["answers"].shape == (2, 3, 61)
    torch.testing.assert_close(found, torch.load(expected), rtol=1e-4, atol=1e-5)
    own = loaded.model(tokens, torch.arange(12).expand(2, -1), None)
    number = 13 if torch.distributed.get_rank() == 3 else 16
    assert own.shape[-1] == 16 and own[..., :number].isfinite().all()
    assert (own[..., number:] == -torch.inf).all()


def _check_moved_state(folder: Path) -> None:
    """A checkpoint of TP 4 is that of TP 1 bit by bit, in true sizes; padding is 0 all along."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_hydra.certify.layouts import Layout, random_batch
    from megatron_hydra.certify.training import Trainer, save_first_weights
    from megatron_hydra.certify.worlds import Ranks

    run, ranks, is_first = _run(folder, True), Ranks(), os.environ["RANK"] == "0"
    ranks.enter(Layout(), alone=True)
    if is_first:
        save_first_weights(run)
    batch = random_batch([[16]] * 8, 61)
    here, there = Layout(tp=4, sequence_parallel=True), Layout()

    def trainer(layout: Layout) -> Trainer:
        ranks.enter(layout)
        return Trainer(run, layout, batch)

    first = trainer(here)
    first.load_weights(run.weights)
    for group in first.optimizer.param_groups:
        group["weight_decay"] = 0.1
    for _ in range(2):
        first.step()
    _check_padding_is_zero(first.chunks[0])
    first.save(folder / "first")
    expected = first.state_tensors()
    for layout, source, target in ((there, "first", "second"), (here, "second", "third")):
        moved = trainer(layout)
        moved.load(folder / source)
        moved.save(folder / target)
        found = moved.state_tensors()
        assert found.keys() == expected.keys()
        for name in expected:  # rank 0's alone
            assert torch.equal(found[name], expected[name]), name
    _check_padding_is_zero(moved.chunks[0])
    if is_first:
        sizes = []
        for name in ("first", "second"):
            stored = FileSystemReader(folder / name).read_metadata().state_dict_metadata
            sizes.append({key: tuple(x.size) for key, x in stored.items() if hasattr(x, "size")})
        assert sizes[0] == sizes[1]
        for prefix in ("", "optimizer.state.exp_avg."):
            assert sizes[0][f"{prefix}embedding.word_embeddings.weight"] == (61, 32)
            assert sizes[0][f"{prefix}decoder.layers.0.mlp.linear_fc1.weight"] == (2 * 49, 32)
            assert sizes[0][f"{prefix}decoder.layers.0.mlp.linear_fc2.weight"] == (32, 49)


def _check_padding_is_zero(model: Any) -> None:
    is_last = torch.distributed.get_rank() == 3
    rows, channels = (13, 10) if is_last else (16, 13)
    mlp = model.decoder.layers[0].mlp
    gate, up = mlp.linear_fc1.weight.chunk(2)
    parts = [(model.embedding.word_embeddings.weight, rows), (gate, channels), (up, channels)]
    for weight, number in [*parts, (mlp.linear_fc2.weight.t(), channels)]:
        assert (weight[number:] == 0).all() and (weight[:number] != 0).any(dim=-1).all()
