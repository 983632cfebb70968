"""A run against a plain PyTorch loop: batches, every recorded number, and the trained weights.

Catches: a loss weight, the teacher or the mask ignored, a loss that depends on the micro-batch
size, a document that feels another of its row, a wrong learning rate, clipping, weight decay or
Adam constant, scalars that are not written or stand at another step, and a trained hybrid that is
not the trained one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from kit.distributed import run_distributed
from kit.going_on import check_damaged_checkpoint, check_full_disk
from kit.tiny_models import PLAN, write_models
from torch import Tensor

from megatron_hydra.head_plan import HeadPlan

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NUM_STEPS, BATCH, LENGTH, END = 3, 4, 16, 256
OPTIM = {"lr": 2e-3, "min_lr": 1e-3, "warmup_steps": 1, "weight_decay": 0.3, "beta1": 0.8,
         "beta2": 0.9, "eps": 1e-6, "clip_grad": 0.05}  # fmt: skip
# One step of warm-up at half the rate, the whole rate, and half way down to the least.
RATES = [1e-3, 2e-3, 1.5e-3]
DECAYED = ("in_proj.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight",
           "word_embeddings.weight")  # fmt: skip
# Overrides of a run. Of two alike but for the micro-batches, both equal the one plain loop.
RUNS = {
    "align": ["transfer.stage=align", "resume.save_every_n_steps=2"],
    "align_micro_2": [
        "transfer.stage=align", "data.micro_batch_size=2", "model.recompute=full",
    ],
    "distill": ["transfer.kl_weight=0.7", "transfer.ce_weight=0.3"],
    "distill_micro_2": [
        "transfer.kl_weight=0.7", "transfer.ce_weight=0.3", "data.micro_batch_size=2",
        "model.recompute=full", "model.recompute_layers=1",
    ],
    "long_context": ["transfer.stage=long_context", "log.every_n_steps=2"],
    "align_packed": [
        "transfer.stage=align", "data.reset_at_document_end=true", "data.micro_batch_size=2",
    ],
    "distill_packed": [
        "transfer.kl_weight=0.7", "transfer.ce_weight=0.3", "data.reset_at_document_end=true",
        "data.mask_end_of_document=false",
    ],
}  # fmt: skip

Batch = dict[str, Tensor]
Scalars = dict[str, dict[int, float]]  # by name, then by step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_inputs`, of two layers."""
    folder = tmp_path_factory.mktemp("inputs")
    return write_inputs(folder, PLAN)


def write_inputs(folder: Path, plan: HeadPlan, **qwen3_fields: Any) -> Path:
    """Write `teacher`, `hybrid`, the tokens of `data` in `tokens.json`, and `run.yaml`."""
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    write_models(folder, plan, **qwen3_fields)
    # One document, which Megatron does not shuffle; unequal numbers of ends in its samples.
    tokens = torch.randint(END, (20 * LENGTH + 1,), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(20) ** 2 % len(tokens)] = END
    write_indexed_dataset(folder / "data", [tokens.tolist()], END + 1, {})
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    config = {
        "data": {"paths": [f"{folder}/data"], "seq_length": LENGTH, "micro_batch_size": 1,
                 "global_batch_size": BATCH, "mask_end_of_document": True},
        "trainer": {"max_steps": NUM_STEPS, "num_threads": 1},
        "optim": OPTIM,
        "transfer": {"stage": "distill", "init_from": f"{folder}/hybrid",
                     "teacher": f"{folder}/teacher", "chunk_tokens": 7},
        "log": {"folder": "given by the test"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_runs_equal_plain_loops(inputs: Path, tmp_path: Path) -> None:
    # On a process of its own: NeMo sets up process groups and logging for good.
    run_distributed(_check_runs, 1, inputs, tmp_path)


def _check_runs(inputs: Path, folder: Path) -> None:
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    with _log_lines() as lines:
        for name, overrides in RUNS.items():
            _check_run(inputs, folder / name, overrides)
            unset_num_microbatches_calculator()  # NeMo keeps the first run's
        assert lines.count("accelerator cpu; starting at step 0") == len(RUNS)
        overrides = [*RUNS["align"], f"log.folder={folder / 'align'}"]
        check_damaged_checkpoint(inputs, folder / "align", overrides, lines)
        unset_num_microbatches_calculator()
        for way in ("true", "false"):
            way_of_saving = [f"log.folder={folder}/full_{way}", f"resume.async_save={way}"]
            check_full_disk(inputs, [*RUNS["distill"], *way_of_saving])
            unset_num_microbatches_calculator()
        for stage in ("align", "distill", "long_context"):
            _check_bf16(inputs, folder / f"{stage}_bf16", RUNS[stage])
            unset_num_microbatches_calculator()
    chosen = (
        "FA heads run on LocalCoreAttention, LA heads on the kernel 'reference', "
        "what surrounds both on 'reference'"
    )
    assert lines.count(chosen) == 1  # not once per layer


@contextmanager
def _in_a_slurm_allocation() -> Iterator[None]:
    """With the variables that a shell of one has, where srun has started nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "1")
        patch.setenv("SLURM_JOB_NAME", "transfer")
        for name, value in (("NTASKS", 8), ("NTASKS_PER_NODE", 8), ("PROCID", 3), ("LOCALID", 3)):
            patch.setenv(f"SLURM_{name}", str(value))
        yield


def _check_bf16(inputs: Path, folder: Path, overrides: list[str]) -> None:
    """The losses of the float32 loop, but for bf16's rounding."""
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    bf16 = ["trainer.precision=bf16", "strategy.use_distributed_optimizer=true"]
    config = load_config(inputs / "run.yaml", [*overrides, *bf16, f"log.folder={folder}"])
    losses: dict[int, float] = {}
    with _spied_batches() as batches, _in_a_slurm_allocation():
        TrainingRun(config).run(lambda step, scalars: losses.update({step: scalars["loss"]}))
    steps = [batches[i : i + BATCH] for i in range(0, len(batches), BATCH)]
    expected, _ = _plain_loop(inputs, steps, config.transfer)
    torch.testing.assert_close(losses, expected["loss"], rtol=5e-2, atol=0)


def _check_run(inputs: Path, folder: Path, overrides: list[str]) -> None:
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.teachers.checkpoint import load_checkpoint
    from megatron_hydra.training.config import load_config

    config = load_config(inputs / "run.yaml", [*overrides, f"log.folder={folder}"])
    shown: Scalars = {}

    def show(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            shown.setdefault(name, {})[step] = value

    start = time.monotonic()
    kernels = "megatron_hydra.nemo.callbacks.load_kernels"
    with _spied_batches() as batches, patch(kernels) as loading:
        loading.side_effect = lambda *args: batches == [] or pytest.fail("after the first step")
        run = TrainingRun(config)
        run.run(show)
    assert [call.args[1] for call in loading.call_args_list] == [config.data.micro_batch_size]
    # A run that goes on is held to the token, also where its name was left open.
    assert run.config.data.end_of_document == "<|endoftext|>"
    seconds = time.monotonic() - start
    _check_batches(batches, inputs, config.data.micro_batch_size, config.data.reset_at_document_end)
    if config.data.reset_at_document_end:
        batches = [_documents(batch) for batch in batches]
    else:
        batches = [[batch] for batch in batches]
    num_micro = BATCH // config.data.micro_batch_size
    steps = [sum(batches[i : i + num_micro], []) for i in range(0, len(batches), num_micro)]
    expected, trained = _plain_loop(inputs, steps, config.transfer)

    recorded = {f"train/{name}": values for name, values in shown.items()}
    _check_resources(shown, seconds)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-7)
    every = config.log.every_n_steps
    assert _tensorboard(folder / "tensorboard") == {
        name: {
            step: pytest.approx(value)
            for step, value in values.items()
            if step % every == 0 or step == NUM_STEPS
        }
        for name, values in recorded.items()
    }
    hybrid = load_checkpoint(folder / "hybrid")
    found = dict(hybrid.model.named_parameters())
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-6)
    assert hybrid.meta["provenance"]["hardware"] == "1 x CPU"
    assert hybrid.meta["provenance"]["seq_length"] == LENGTH  # where it is to be evaluated
    # Heads are placed for the run's length; the stored model reaches as far as it did before.
    assert (run.model_config.seq_length, hybrid.config.seq_length) == (LENGTH, 128)


def _check_resources(shown: Scalars, seconds: float) -> None:
    """What the steps took, which is taken out; a CPU has neither a known peak nor GPU memory."""
    step_s, tokens_per_s = shown.pop("step_s"), shown.pop("tokens_per_s")
    assert all(value > 0 for value in step_s.values()) and sum(step_s.values()) < seconds
    per_s = {step: BATCH * LENGTH / value for step, value in step_s.items()}
    assert tokens_per_s == pytest.approx(per_s)
    tokens = {step: step * BATCH * LENGTH for step in range(1, NUM_STEPS + 1)}
    assert shown.pop("tokens") == tokens
    assert not {"peak_memory_gib", "mfu"} & set(shown)


def _split(tokens: Tensor) -> list[list[int]]:
    """The documents of one row: each ends with its end token or with the row."""
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        documents[-1].append(token)
        if token == END:
            documents.append([])
    return [document for document in documents if document]


def _documents(batch: Batch) -> list[Batch]:
    """Each document of a packed micro-batch as a batch of its own."""
    rows = batch["tokens"].view(-1, LENGTH)
    lengths = [len(document) for row in rows for document in _split(row)]
    parts = {name: batch[name][0].split(lengths) for name in ("tokens", "labels", "loss_mask")}
    return [
        {
            **{name: values[i][None] for name, values in parts.items()},
            "position_ids": torch.arange(length)[None],
        }
        for i, length in enumerate(lengths)
    ]


def _check_batches(batches: list[Batch], inputs: Path, micro_batch_size: int, packed: bool) -> None:
    """Different samples of the data, one after the other, with the next tokens as labels."""
    tokens = torch.tensor(json.loads((inputs / "tokens.json").read_text()))
    starts = []
    for batch in batches:
        rows = ("tokens", "labels", "loss_mask", "position_ids")
        batch = {name: batch[name].view(-1, LENGTH) for name in rows}
        assert batch["tokens"].shape == (micro_batch_size, LENGTH)
        for row in range(micro_batch_size):
            sample = {name: values[row] for name, values in batch.items()}
            (start,) = [
                start
                for start in range(0, len(tokens) - 1, LENGTH)
                if torch.equal(sample["tokens"], tokens[start : start + LENGTH])
            ]
            starts.append(start)
            assert torch.equal(sample["labels"], tokens[start + 1 : start + LENGTH + 1])
            assert torch.equal(sample["loss_mask"], (sample["tokens"] != END).float())
            lengths = map(len, _split(sample["tokens"])) if packed else [LENGTH]
            positions = [position for length in lengths for position in range(length)]
            assert sample["position_ids"].tolist() == positions
    assert len(set(starts)) == len(starts) == NUM_STEPS * BATCH


def _plain_loop(
    inputs: Path, steps: list[list[Batch]], transfer: Any
) -> tuple[Scalars, dict[str, Tensor]]:
    """The scalars of each step and the parameters after the last, by PyTorch's own optimizer."""
    from megatron_hydra.teachers.checkpoint import load_checkpoint

    student, teacher = (load_checkpoint(inputs / name).model for name in ("hybrid", "teacher"))
    sums_of = _sums_of_stage(student, teacher, transfer)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if name.endswith(DECAYED)]
    others = [p for name, p in trained.items() if not name.endswith(DECAYED)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": OPTIM["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(OPTIM["beta1"], OPTIM["beta2"]),
        eps=OPTIM["eps"],
    )
    scalars: Scalars = {}
    for step, (batches, rate) in enumerate(zip(steps, RATES, strict=True), start=1):
        sums = [sums_of(batch) for batch in batches]
        num_tokens = sum(part.pop("num_tokens") for part in sums)
        means = {name: sum(part[name] for part in sums) / num_tokens for name in sums[0]}
        optimizer.zero_grad()
        means["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM["clip_grad"])
        assert norm > OPTIM["clip_grad"], "clipping must show"
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, value in {**means, "grad_norm": norm, "lr": rate}.items():
            scalars.setdefault(name, {})[step] = float(value)
    return scalars, dict(student.named_parameters())


def _sums_of_stage(
    student: torch.nn.Module, teacher: torch.nn.Module, transfer: Any
) -> Callable[[Batch], dict[str, Any]]:
    """Loss and parts of a batch as sums over its tokens, through full logits."""
    from megatron_hydra.transfer.alignment import Alignment

    if transfer.stage == "align":
        alignment = Alignment(student, teacher)

        def align(batch: Batch) -> dict[str, Any]:
            num_tokens = batch["tokens"].numel()
            layers = alignment.forward(batch["tokens"], batch["position_ids"])
            parts = {f"alignment/{name}": loss for name, loss in layers.items()}
            total = sum(parts.values())
            return {**parts, "alignment": total, "loss": total, "num_tokens": num_tokens}

        return align

    def predict(batch: Batch) -> dict[str, Any]:
        models = [student, teacher] if transfer.stage == "distill" else [student]
        log_probabilities = [
            model(batch["tokens"], batch["position_ids"], None).log_softmax(-1) for model in models
        ]
        mask = batch["loss_mask"]
        chosen = log_probabilities[0].gather(-1, batch["labels"][..., None])[..., 0]
        sums = {"ce": -(chosen * mask).sum(), "num_tokens": mask.sum()}
        sums["loss"] = sums["ce"]
        if transfer.stage == "distill":
            ours, theirs = log_probabilities[0], log_probabilities[1].detach()
            sums["kl"] = ((theirs.exp() * (theirs - ours)).sum(-1) * mask).sum()
            sums["loss"] = 0.7 * sums["kl"] + 0.3 * sums["ce"]
        return sums

    return predict


def _tensorboard(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: {point.step: point.value for point in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


@contextmanager
def _spied_batches() -> Iterator[list[Batch]]:
    """The micro-batches that runs train on."""
    from megatron_hydra.nemo.model import HydraModel

    data_step, batches = HydraModel.data_step, []

    def spy(self: HydraModel, dataloader_iter: Any) -> Batch:
        batches.append(data_step(self, dataloader_iter))
        return batches[-1]

    HydraModel.data_step = spy
    try:
        yield batches
    finally:
        HydraModel.data_step = data_step


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """What the package logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_hydra")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_the_model_is_wrapped_in_order_with_what_comes_before_and_after() -> None:
    """On a stream of NeMo's own, whose work is awaited; what it copies is there when it begins."""
    from nemo.lightning.megatron_parallel import MegatronParallel

    from megatron_hydra import cpu
    from megatron_hydra.nemo.strategy import HydraStrategy

    cpu.install_if_needed()
    calls: list[str] = []

    class Parallel(SimpleNamespace):
        init_model_parallel = MegatronParallel.init_model_parallel

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    fit = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    own: dict[str, Any] = {"init_ddp": lambda: calls.append("wrap"), "trainer": fit}
    strategy = HydraStrategy()
    strategy.megatron_parallel = Parallel(convert_module_fn=None, **own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
        strategy.init_model_parallel()
    assert calls == ["wait", "wrap", "wait"]
