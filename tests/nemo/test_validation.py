"""The validation loss against a plain PyTorch loop, and the training that it must not touch.

Catches: a loss of other weights, samples or tokens than it says, one that counts ranks, a stage's
part or micro-batches wrongly, random numbers, samples or weights of the training that change with
it, also where a run goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.distributed import run_distributed
from kit.tiny_models import PLAN
from test_training import BATCH, END, LENGTH, NUM_STEPS, _documents, _sums_of_stage, write_inputs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NUM_SAMPLES = 2 * BATCH
RUNS = {
    "align": ["transfer.stage=align"],
    "align_packed": ["transfer.stage=align", "data.reset_at_document_end=true"],
    "distill": ["transfer.kl_weight=0.7", "transfer.ce_weight=0.3", "model.recompute=full"],
    "long_context": ["transfer.stage=long_context", "model.recompute=selective"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_inputs`, and `held_out`, which two steps of validation use up."""
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    folder = write_inputs(tmp_path_factory.mktemp("inputs"), PLAN)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(END, (NUM_SAMPLES * LENGTH + 1,), generator=generator)
    tokens[torch.arange(9) ** 2] = END  # unequal numbers of ends in the samples
    write_indexed_dataset(folder / "held_out", [tokens.tolist()], END + 1, {})
    (folder / "held_out.tokens.json").write_text(json.dumps(tokens.tolist()))
    return folder


def _overrides(inputs: Path, every: int) -> list[str]:
    return [
        f"data.validation_paths=[{inputs}/held_out]",
        f"trainer.validate_every_n_steps={every}",
        "trainer.validation_steps=2",
    ]


def _train(
    inputs: Path, folder: Path, overrides: list[str], stop_after: int = NUM_STEPS + 1
) -> dict[int, dict[str, float]]:
    """The scalars by step."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    shown: dict[int, dict[str, float]] = {}
    config = load_config(inputs / "run.yaml", [*overrides, f"log.folder={folder}"])
    asks = iter(range(1, NUM_STEPS + 2))
    TrainingRun(config).run(shown.__setitem__, asks_to_stop=lambda: next(asks) == stop_after)
    unset_num_microbatches_calculator()  # NeMo keeps the first run's
    return shown


def _weights(run: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(run / "hybrid/weights", run / "hybrid.pt")
    return torch.load(run / "hybrid.pt")


def test_it_is_the_stages_loss_and_touches_nothing(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_runs, 1, inputs, tmp_path)


def _check_runs(inputs: Path, folder: Path) -> None:
    for name, overrides in RUNS.items():
        with _drawing() as (trained, validated):
            quiet = _train(inputs, folder / f"{name}_without", overrides)
            assert validated == []
            expected_draws = list(trained)
            trained.clear()
            more = [*overrides, *_overrides(inputs, every=2)]
            shown = _train(inputs, folder / name, more)
            assert len(validated) == 2 * NUM_SAMPLES, "of one micro-batch each"
        assert trained == expected_draws
        steps = {step for step, scalars in shown.items() if "validation/loss" in scalars}
        assert steps == {2, NUM_STEPS}  # each second, and the last
        _check_same_run(shown, quiet, folder / name, folder / f"{name}_without")
        _check_loss(inputs, folder / name, shown[NUM_STEPS], more)
        _check_recorded(folder / name, shown)

        with _drawing():  # stopped after a step with a validation due, and gone on with
            stopped = _train(inputs, folder / f"{name}_stopped", more, stop_after=2)
            assert sorted(stopped) == [1, 2] and "validation/loss" not in stopped[2]
            rest = _train(inputs, folder / f"{name}_stopped", more)
        assert sorted(rest) == [3]
        _check_same_run(rest, {3: quiet[3]}, folder / f"{name}_stopped", folder / f"{name}_without")
        assert rest[3]["validation/loss"] == shown[3]["validation/loss"]
    _check_bf16(inputs, folder)


def _check_bf16(inputs: Path, folder: Path) -> None:
    """Where the optimizer has weights of its own, split over the ranks."""
    bf16 = ["trainer.precision=bf16", "strategy.use_distributed_optimizer=true"]
    quiet = _train(inputs, folder / "bf16_without", bf16)
    shown = _train(inputs, folder / "bf16", [*bf16, *_overrides(inputs, every=1)])
    losses = [shown[step]["validation/loss"] for step in range(1, NUM_STEPS + 1)]
    assert len(set(losses)) == NUM_STEPS, "each of other weights"
    _check_same_run(shown, quiet, folder / "bf16", folder / "bf16_without")


def _check_same_run(
    shown: dict[int, dict[str, float]], quiet: dict[int, dict[str, float]], run: Path, other: Path
) -> None:
    """Bit by bit: what was trained, and every number but the speed and the validation's."""
    for step, scalars in quiet.items():
        for name in set(scalars) - {"step_s", "tokens_per_s"}:
            assert shown[step][name] == scalars[name], (step, name)
    found, expected = _weights(run), _weights(other)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name


def _check_loss(inputs: Path, run: Path, scalars: dict[str, float], overrides: list[str]) -> None:
    """The trained hybrid's loss, by full logits, on all samples that there are."""
    from megatron_hydra.teachers.checkpoint import load_checkpoint
    from megatron_hydra.training.config import load_config

    config = load_config(inputs / "run.yaml", [*overrides, f"log.folder={run}"])
    student = load_checkpoint(run / "hybrid").model.train()
    teacher = load_checkpoint(inputs / "teacher").model
    sums_of = _sums_of_stage(student, teacher, config.transfer)
    tokens = torch.tensor(json.loads((inputs / "held_out.tokens.json").read_text()))
    rows = tokens[:-1].view(NUM_SAMPLES, LENGTH)
    batch = {
        "tokens": rows,
        "labels": tokens[1:].view(NUM_SAMPLES, LENGTH),
        "loss_mask": (rows != END).float(),
        "position_ids": torch.arange(LENGTH).expand(NUM_SAMPLES, LENGTH),
    }
    batches = [batch]
    if config.data.reset_at_document_end:
        row = {name: values.reshape(1, -1) for name, values in batch.items()}
        batches = _documents(row)
    with torch.no_grad():
        sums = [sums_of(each) for each in batches]
    num_tokens = float(sum(part["num_tokens"] for part in sums))
    expected = {
        f"validation/{name}": float(sum(part[name] for part in sums)) / num_tokens
        for name in ("loss", "kl", "ce")
        if name in sums[0]
    }
    found = {name: value for name, value in scalars.items() if name.startswith("validation/")}
    assert found == pytest.approx(expected, rel=1e-4)


def _check_recorded(run: Path, shown: dict[int, dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {step: scalars.get("validation/loss") for step, scalars in shown.items()}
    assert {line["step"]: line.get("validation/loss") for line in lines} == expected
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = {point.step: point.value for point in events.Scalars("validation/loss")}
    assert points == pytest.approx({s: value for s, value in expected.items() if value is not None})


@contextmanager
def _drawing() -> Iterator[tuple[list[Any], list[Any]]]:
    """Draw from every generator at each micro-batch; the draws of training and of validation."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_hydra.nemo.model import HydraModel

    trained: list[Any] = []
    validated: list[Any] = []
    data_step = HydraModel.data_step

    def drawing(self: Any, batches: Any) -> Any:
        batch = data_step(self, batches)
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        draws = (torch.rand(()).item(), np.random.rand(), random.random(), tracked)
        (trained if torch.is_grad_enabled() else validated).append(
            (draws, batch["tokens"].tolist())
        )
        return batch

    HydraModel.data_step = drawing
    try:
        yield trained, validated
    finally:
        HydraModel.data_step = data_step


TENSOR, PIPELINE = (f"strategy.{kind}_model_parallel_size" for kind in ("tensor", "pipeline"))


@pytest.fixture(scope="module")
def one_rank(inputs: Path) -> Path:
    """All runs on one rank."""
    run_distributed(_train_all, 1, inputs, inputs / "one", [])
    return inputs / "one"


@pytest.mark.exhaustive  # four runs on one rank, and four per layout
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="two_replicas"),
        pytest.param([f"{PIPELINE}=2"], id="pipeline"),
        pytest.param([f"{TENSOR}=2", "strategy.sequence_parallel=true"], id="tensor"),
        pytest.param(["strategy.context_parallel_size=2"], id="context"),
    ],
)
def test_layouts_find_the_same_loss(
    inputs: Path, one_rank: Path, tmp_path: Path, layout: list[str]
) -> None:
    run_distributed(_train_all, 2, inputs, tmp_path, layout)
    for name in RUNS:
        one, two = (json.loads((run / f"{name}.json").read_text()) for run in (one_rank, tmp_path))
        keys = {key for key in one["2"] if key.startswith("validation/")}
        assert "validation/loss" in keys
        for step in ("2", "3"):
            expected = {key: one[step][key] for key in keys}
            assert {key: two[step][key] for key in keys} == pytest.approx(expected, rel=1e-4)


def _train_all(inputs: Path, folder: Path, layout: list[str]) -> None:
    for name, overrides in RUNS.items():
        more = [*overrides, *layout, *_overrides(inputs, every=2)]
        shown = _train(inputs, folder / name, more)
        if torch.distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(shown))
