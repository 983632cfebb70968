"""NaN, Inf and jumps put into NeMo's loop at one place on one rank: what is named, and what stays.

Catches a wrong rank, layer, head, parameter or document in the sentence, ranks that disagree on
skipping (a hang, or weights that drift apart), a skipped step that moves weights, moments or
Adam's step counts, a batch that is fed again, a schedule that stands still, a clean run that is
changed or told off, and a run that skips for ever.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import forks
from kit.distributed import run_distributed
from kit.faults import gradient_fault, head_fault, hidden_states_fault
from kit.lives import paths
from kit.recorded_runs import RecordedRun, is_bit_equal, recorded_run, without_watch
from kit.tiny_models import write_models
from torch import nn

from megatron_hydra.head_plan import HeadPlan

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NUM_STEPS, BATCH, LENGTH, NUM_DOCUMENTS = 3, 4, 16, 100
LOSS_PARTS = ("loss", "ce", "kl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, `hybrid`, `run.yaml` and the datasets `low` and `high`.

    All tokens of document d are d in `low`, and 128 + d in `high`: a batch tells its documents.
    """
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    folder = tmp_path_factory.mktemp("inputs")
    write_models(folder)
    for name, first in (("low", 0), ("high", 128)):
        lengths = [5 + 7 * d % 20 for d in range(NUM_DOCUMENTS)]
        documents = [[first + d] * length for d, length in enumerate(lengths)]
        write_indexed_dataset(folder / name, documents, 264, {})
    config = {
        "data": {"paths": [f"{folder}/low", f"{folder}/high"], "weights": [1, 2],
                 "seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": BATCH},
        "trainer": {"max_steps": NUM_STEPS, "num_threads": 1},
        "strategy": {"tensor_model_parallel_size": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 1, "min_lr": 1e-4, "weight_decay": 0.1},
        "transfer": {"stage": "distill", "init_from": f"{folder}/hybrid",
                     "teacher": f"{folder}/teacher"},
        "log": {"folder": "given by the test"},
        "bad_numbers": {"action": "skip"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_tensor_parallel_faults_are_named_and_skipped(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_heads_on_tensor_parallel_ranks, 2, inputs, tmp_path)


@pytest.mark.exhaustive  # five runs more
def test_tensor_parallel_faults_of_gradients(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_gradients_on_tensor_parallel_ranks, 2, inputs, tmp_path)


def _run(inputs: Path, folder: Path, overrides: list[str], faults: Any = None) -> RecordedRun:
    return recorded_run(inputs / "run.yaml", [*overrides, f"log.folder={folder}"], faults)


def _check_heads_on_tensor_parallel_ranks(inputs: Path, folder: Path) -> None:
    clean = _run(inputs, folder / "clean", [])
    assert clean.lines == [] and clean.error is None
    # The heads of the layers behind, the loss and every gradient are bad too, and none is named.
    for layer, head, kind in ((1, 2, "LA"), (0, 1, "FA")):
        fault = head_fault(layer, head, torch.nan)
        skipped = _run(inputs, folder / kind, [], {(1, 2): fault})
        _check_skipped(skipped, clean, [2])
        words = f"NaN in the output of head {head} ({kind}) of layer {layer}"
        rank = _rank_of(clean.model, layer, head)
        _check_line(skipped, words, rank)
        name = {"LA": "gated_delta_net", "FA": "fa"}[kind]
        _check_fields(skipped, rank, [
            {"what": "head_output", "value": "NaN", "layer": layer, "head": head, "kind": name}
        ])  # fmt: skip


def _check_gradients_on_tensor_parallel_ranks(inputs: Path, folder: Path) -> None:
    clean = _run(inputs, folder / "clean", [])
    with without_watch():
        _check_equal(_run(inputs, folder / "unwatched", []), clean)

    in_proj, norm = "self_attention.in_proj.weight", "pre_mlp_layernorm.weight"
    rank = _rank_of(clean.model, 1, 2)
    for layer, name, source, rows, value, of_heads in (
        (1, in_proj, rank, _la_key_of_head_2, torch.inf, "la_key of head 2"),
        # Replicated: Megatron's gradient norm leaves the second rank's out.
        (0, norm, 1, slice(None), torch.nan, ""),
        (0, in_proj, 1, slice(None), 1e30, None),
    ):
        fault = gradient_fault(source, layer, name, rows, value)
        skipped = _run(inputs, folder / f"{name}_{value}", [], {(1, 0): fault})
        _check_skipped(skipped, clean, [0, 1, 2, 3])
        if of_heads is not None:
            kind = "NaN" if value != value else "Inf"
            heads = f" ({of_heads})" if of_heads else ""
            words = f"{kind} in the gradient of {name}{heads} of layer {layer}"
            _check_line(skipped, words, source)
            of_rows = [{"section": "la_key", "owner": "head", "number": 2}] if of_heads else []
            _check_fields(skipped, source, [
                {"what": "gradient", "value": kind, "parameter": name, "layer": layer,
                 "rows": of_rows}
            ])  # fmt: skip
        elif skipped.lines:
            words = "is bad: the gradient's norm is Inf, though every gradient is finite; read from"
            assert words in skipped.lines[0]
            (line,) = skipped.findings
            assert (line["grad_norm"], line["findings"]) == ("Inf", [])


def _la_key_of_head_2(attention: nn.Module) -> slice:
    return attention.layout.rows("la_key", 2)


def test_data_parallel_faults_name_their_replica(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_data_parallel, 2, inputs, tmp_path)


def _check_data_parallel(inputs: Path, folder: Path) -> None:
    layout = ["strategy.tensor_model_parallel_size=1"]
    clean = _run(inputs, folder / "clean", layout)
    # Replica 1 reads the samples 1 and 3 of each batch of 4. Summed, a gradient is bad on both.
    parts = ", ".join(f"NaN in the loss part {part} of micro-batch 0" for part in LOSS_PARTS)
    output = "NaN in the output of head 3 (LA) of layer 0"
    scale = "self_attention.fusion.head_scale"
    of_scale = gradient_fault(
        1, 1, scale, lambda of: of.fusion.head_section.units.index(3), torch.nan
    )
    rank = int(os.environ["RANK"])
    for name, micro_batch, fault, samples, words in (
        ("head", 1, head_fault(0, 3, torch.nan), [3], output),
        ("loss", 0, hidden_states_fault(torch.nan), [1], parts),
        ("scale", 0, of_scale, [0, 1, 2, 3], f"NaN in the gradient of {scale} (head 3) of layer 1"),
    ):
        seen = _run(inputs, folder / name, layout, {(1, micro_batch): fault} if rank == 1 else None)
        _check_skipped(seen, clean, samples)
        _check_line(seen, words, 1, "tensor 0", "data 1")
        if name == "loss":
            _check_fields(seen, 1, [
                {"what": "loss", "value": "NaN", "part": part, "micro_batch": 0}
                for part in LOSS_PARTS
            ])  # fmt: skip
    # Where gradients are summed as they come, the parameter is known, but not the replica.
    layout = [*layout, "strategy.overlap_grad_reduce=true"]
    seen = _run(inputs, folder / "summed", layout, {(1, 0): of_scale} if rank == 1 else None)
    _check_skipped(seen, clean, [0, 1, 2, 3])
    assert all(words in line for line in seen.lines) and len(seen.lines) == (rank == 0)


def test_pipeline_stage_is_named(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_pipeline, 2, inputs, tmp_path)


def _check_pipeline(inputs: Path, folder: Path) -> None:
    layout = ["strategy.tensor_model_parallel_size=1", "strategy.pipeline_model_parallel_size=2",
              "transfer.stage=long_context", "transfer.teacher=null"]  # fmt: skip
    clean = _run(inputs, folder / "clean", layout)
    # The second stage's only layer, which is the model's second.
    faults = {(1, 1): head_fault(0, 2, torch.nan)} if os.environ["RANK"] == "1" else None
    skipped = _run(inputs, folder / "head", layout, faults)
    _check_skipped(skipped, clean, [1])
    words = "NaN in the output of head 2 (LA) of layer 1"
    _check_line(skipped, words, 1, "tensor 0", "pipeline 1", stage="long_context")


def test_run_stops_goes_on_and_counts(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_alone, 1, inputs, tmp_path)


def _check_alone(inputs: Path, folder: Path) -> None:
    alone = ["strategy.tensor_model_parallel_size=1", "transfer.stage=align"]
    saving = [*alone, "resume.save_every_n_steps=1", "trainer.max_steps=6"]
    clean = _run(inputs, folder / "clean", saving)
    fault = head_fault(1, 0, torch.inf)

    stopped = _run(inputs, folder / "run", [*saving, "bad_numbers.action=stop"], {(2, 0): fault})
    assert stopped.lines == []
    (found,) = stopped.findings
    assert (found["step"], found["stage"], found["is_skipped"]) == (3, "align", False)
    assert found["samples"] == [8] and found["grad_norm"] in ("NaN", "Inf")
    assert re.match(
        r"step 3 of stage align is bad: NaN in the output of head 0 \(FA\) of layer 1 on rank 0 "
        r"\(tensor 0, pipeline 0, data 0, context 0\); read from sample 8 \(documents? .*\); the "
        r"weights were left as they were before it: the same command goes on from the newest "
        r"checkpoint, and leaves such steps out with bad_numbers\.action=skip$",
        str(stopped.error),
    ), stopped.error
    # The same run goes on with another setting, up to a second bad step in a row...
    one = [*saving, "bad_numbers.max_skipped_in_a_row=1"]
    faults = {(0, 0): fault, (1, 0): fault}
    again = _run(inputs, folder / "run", one, faults)
    assert len(again.lines) == 1 and again.lines[0].startswith("step 3 of")
    assert "step 4 of stage align" in str(again.error)
    assert "bad_numbers.max_skipped_in_a_row = 1 steps before it were skipped" in str(again.error)
    # ... which counts on from the skipped step's checkpoint.
    limited = _run(inputs, folder / "run", one, {(0, 0): fault})
    assert "step 4 of stage align" in str(limited.error) and limited.lines == []
    last = _run(inputs, folder / "run", saving, {(0, 0): fault})
    assert last.error is None and len(last.lines) == 1
    assert _tensorboard(folder / "run")["train/skipped_steps"] == {3: 1.0, 4: 2.0}
    assert last.shown["lr"][6] == clean.shown["lr"][6]
    assert "train/skipped_steps" not in _tensorboard(folder / "clean")


def test_spikes_are_logged_with_their_documents(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_spikes, 1, inputs, tmp_path)


def _check_spikes(inputs: Path, folder: Path) -> None:
    long = ["strategy.tensor_model_parallel_size=1", "transfer.stage=long_context",
            "transfer.teacher=null", "trainer.max_steps=14"]  # fmt: skip
    bad_guess = hidden_states_fault(-20.0)
    # Too early to be judged, and then one of the four micro-batches of step 13.
    seen = _run(inputs, folder, long, {(5, 0): bad_guess, (12, 1): bad_guess})
    (line,) = seen.lines
    (found,) = seen.findings
    losses = [seen.shown["loss"][step] for step in range(1, 13)]
    ratio = seen.shown["loss"][13] / sorted(losses)[5:7][0]
    assert line.startswith("step 13 of stage long_context: the loss ")
    said = float(re.search(r"is ([\d.]+) times the median of the 12 steps before", line)[1])
    assert 2 < said == pytest.approx(ratio, rel=0.05)
    assert (found["what"], found["step"], found["samples"]) == ("loss_spike", 13, [48, 49, 50, 51])
    assert found["loss"] == seen.shown["loss"][13]
    assert found["times_the_median"] == pytest.approx(said, rel=0.01)
    _check_documents(line, seen, [48, 49, 50, 51])
    assert list(_tensorboard(folder)["train/loss_spike"]) == [13]
    assert not is_bit_equal(seen.states[13].optimizer, seen.states[12].optimizer), (
        "the step was taken"
    )


@pytest.mark.parametrize("action", ["skip", pytest.param("stop", marks=pytest.mark.exhaustive)])
def test_command_ends_with_one_sentence(inputs: Path, tmp_path: Path, action: str) -> None:
    """Weights that are bad from the start, through torchrun: no skipping helps.

    `test_run_stops_goes_on_and_counts` has the error of `stop`, which goes the same way from there.
    """
    run_distributed(_write_bad_hybrid, 1, inputs, tmp_path / "bad")
    step, num_skipped = (3, 2) if action == "skip" else (1, 0)
    program = [
        "-m", "hydra_tools.train", "--config", f"{inputs}/run.yaml",
        f"transfer.init_from={tmp_path}/bad", f"log.folder={tmp_path}/run",
        f"bad_numbers.action={action}", "bad_numbers.max_skipped_in_a_row=2",
    ]  # fmt: skip
    printed = tmp_path / "printed.log"
    environment = {**os.environ, "PYTHONPATH": paths(), "OMP_NUM_THREADS": "1"}
    assert forks.start(program, environment, printed, ranks=2).wait(300) == 1
    log = printed.read_text()
    *_, summary = log.partition("Root Cause")
    bad = f"step {step} of stage distill is bad: NaN in the output of head 1 (LA) of layer 1 on"
    assert f"\nmegatron-hydra: error: {bad} rank " in log, log[-4000:]
    assert re.search(r"exitcode +: 2 ", summary), log[-4000:]
    assert not re.search(r'File ".*(megatron_hydra|hydra_tools)', log), log[-4000:]
    assert log.count("; skipped: ") == num_skipped, log[-4000:]


def _write_bad_hybrid(inputs: Path, folder: Path) -> None:
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers.checkpoint import load_checkpoint, save_checkpoint

    initialize_model_parallel()
    loaded = load_checkpoint(inputs / "hybrid")
    attention = loaded.model.decoder.layers[1].self_attention
    with torch.no_grad():
        attention.in_proj.weight[attention.layout.rows("la_value", 1)] = torch.nan
    plan = HeadPlan.load(inputs / "plan.json")
    save_checkpoint(folder, loaded.model, loaded.config, plan, inputs / "hybrid/tokenizer", {})


def _rank_of(model: nn.Module, layer: int, head: int) -> int:
    """The tensor-parallel rank that has a head; all ranks know."""
    placement = model.decoder.layers[layer].self_attention.placement
    (rank,) = (r for r, heads in enumerate(placement.heads_per_rank) if head in heads)
    return rank


def _check_skipped(skipped: RecordedRun, clean: RecordedRun, samples: list[int]) -> None:
    """Step 2 changed nothing but the schedule and the place in the data; the others trained."""
    states = skipped.states
    assert len(states) == NUM_STEPS and skipped.error is None
    for number, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        is_same = (
            is_bit_equal(before.weights, after.weights),
            is_bit_equal(before.optimizer, after.optimizer),
        )
        assert is_same == ((True, True) if number == 1 else (False, False)), number
    assert is_bit_equal(skipped.batches, clean.batches)
    if int(os.environ["RANK"]) != 0:
        assert skipped.lines == [] and skipped.shown == {}
        return
    assert skipped.shown["lr"] == clean.shown["lr"]
    assert skipped.shown["loss"][1] == clean.shown["loss"][1]
    (line,) = skipped.lines
    _check_documents(line, clean, [BATCH + sample for sample in samples])


def _check_documents(line: str, seen: RecordedRun, positions: list[int]) -> None:
    """The line names the samples and, by dataset, what their tokens tell of their documents."""
    match = re.search(r"read from samples? ([^(]*) \(([^)]*)\)", line)
    assert match, line
    assert _numbers(match[1]) == set(positions)
    named = {}
    for words in match[2].split("; "):
        numbers, path = re.fullmatch(r"documents? (.*) of (.*)", words).groups()
        named[Path(path).name] = _numbers(numbers)
    tokens = {int(token) for position in positions for token in seen.samples[position].flatten()}
    expected = {
        "low": {token for token in tokens if token < 128},
        "high": {token - 128 for token in tokens if token >= 128},
    }
    assert named == {name: numbers for name, numbers in expected.items() if numbers}


def _numbers(words: str) -> set[int]:
    """`3, 5 to 7` as a set."""
    ends = ([int(end) for end in part.split(" to ")] for part in words.split(", "))
    return {number for end in ends for number in range(end[0], end[-1] + 1)}


def _check_line(
    seen: RecordedRun, words: str, rank: int, *coordinates: str, stage: str = "distill"
) -> None:
    """The sentence begins with these words, and no other rank is named."""
    if int(os.environ["RANK"]) != 0:
        return
    (line,) = seen.lines
    start = f"step 2 of stage {stage} is bad: {words} on rank {rank} ("
    assert line.startswith(start), line
    named = line.removeprefix(start).partition(")")[0].split(", ")
    assert set(coordinates or (f"tensor {rank}", "data 0")) <= set(named), line
    assert line.count(" on rank ") == 1, line
    assert line.endswith("; skipped: the weights were left as they were before it")


def _check_fields(seen: RecordedRun, rank: int, findings: list[dict[str, Any]]) -> None:
    """Programs read of step 2 what the sentence says."""
    (line,) = seen.findings
    assert (line["what"], line["step"], line["is_skipped"]) == ("bad_numbers", 2, True)
    places = ("rank", "tensor", "pipeline", "data", "context")
    assert [{k: v for k, v in x.items() if k not in places} for x in line["findings"]] == findings
    assert {x["rank"] for x in line["findings"]} == {rank}
    if seen.lines:
        where = ", ".join(f"{name} {line['findings'][0][name]}" for name in places[1:])
        assert f" on rank {rank} ({where})" in seen.lines[0]
        said = re.search(r"read from samples? ([^(]*) \(", seen.lines[0])[1]
        assert _numbers(said) == set(line["samples"])


def _check_equal(seen: RecordedRun, expected: RecordedRun) -> None:
    """Bit by bit, but for the speed."""
    for shown in (seen.shown, expected.shown):
        for name in ("tokens_per_s", "step_s"):
            shown.pop(name, None)
    assert seen.shown == expected.shown
    assert is_bit_equal(
        [vars(state) for state in seen.states], [vars(state) for state in expected.states]
    )


def _tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: {point.step: point.value for point in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
