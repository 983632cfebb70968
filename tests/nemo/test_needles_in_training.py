"""Needles that are asked for while a model trains, and the training that they must not touch.

Catches: answers of other weights, of one replica or rank alone, or counted wrongly, of the student
told as its teacher's; weights, samples, random numbers or modes of modules that change with the
questions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from kit.tiny_models import PLAN, PLAN_OF_KINDS
from test_training import NUM_STEPS, write_inputs
from test_validation import _check_same_run, _drawing, _train

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TASK, TOKENS, NUM_SAMPLES = "needles/multi_key_2", 200, 6
TEACHER_TASK = f"teacher_{TASK}"
NEEDLES = [
    "trainer.needles_every_n_steps=2",
    f"trainer.needle_samples={NUM_SAMPLES}",
    "trainer.needle_task=multi_key:2",
    f"trainer.needle_tokens={TOKENS}",
]
RUNS = {
    "align": ["transfer.stage=align", "data.reset_at_document_end=true"],
    "distill": ["model.recompute=full", "data.micro_batch_size=4"],
    "bf16": ["trainer.precision=bf16", "strategy.use_distributed_optimizer=true"],
    "long_context": ["transfer.stage=long_context", "transfer.teacher=null"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), PLAN)


def test_questions_touch_nothing_and_are_recorded(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_runs, 1, inputs, tmp_path)


def _check_runs(inputs: Path, folder: Path) -> None:
    for name, overrides in RUNS.items():
        with _drawing() as (trained, others):
            quiet = _train(inputs, folder / f"{name}_without", overrides)
            expected_draws = list(trained)
            trained.clear()
            shown = _train(inputs, folder / name, [*overrides, *NEEDLES])
            assert others == []
        assert trained == expected_draws
        found = {step: scalars[TASK] for step, scalars in shown.items() if TASK in scalars}
        assert set(found) == {2, NUM_STEPS} and all(0 <= share <= 1 for share in found.values())
        with_teacher = {step for step, scalars in shown.items() if TEACHER_TASK in scalars}
        assert with_teacher == (set() if name == "long_context" else set(found))
        _check_same_run(shown, quiet, folder / name, folder / f"{name}_without")
        lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"]: line[TASK] for line in lines if TASK in line} == found
        assert _points(folder / name / "tensorboard") == pytest.approx(found)


def test_the_teacher_answers_the_same_once_and_after_a_stop_again(
    inputs: Path, tmp_path: Path
) -> None:
    run_distributed(_write_right_answers, 1, inputs)
    run_distributed(_check_teacher_of_a_run, 1, inputs, tmp_path)


def _check_teacher_of_a_run(inputs: Path, folder: Path) -> None:
    """An alignment, whose teacher is compared with its student in every other forward pass."""
    from megatron_hydra.nemo import needles

    def as_the_teacher_answers(questions: Any, depth: float) -> Any:
        place = int(depth * NUM_SAMPLES)
        return replace(draw(questions, depth), answer=[*answers[place][:-1], last[place]])

    draw = needles._Questions.draw
    answers = json.loads((inputs / "teacher_answers.json").read_text())
    last = [answer[-1] + (place == 2) for place, answer in enumerate(answers)]  # one is wrong
    overrides = [*RUNS["align"], *NEEDLES, "trainer.needles_every_n_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needles._Questions, "draw", as_the_teacher_answers)
        shown = _train(inputs, folder / "run", overrides, stop_after=2)
        assert TASK in shown[1] and TASK not in shown[2]
        shown |= _train(inputs, folder / "run", overrides)
    quiet = _train(inputs, folder / "quiet", RUNS["align"])
    _check_same_run(shown, quiet, folder / "run", folder / "quiet")
    found = {step: each[TEACHER_TASK] for step, each in shown.items() if TEACHER_TASK in each}
    share = (NUM_SAMPLES - 1) / NUM_SAMPLES
    assert found == {1: share, NUM_STEPS: share}
    assert all(shown[step][TASK] < share for step in found)
    assert _points(folder / "run/tensorboard", TEACHER_TASK) == pytest.approx(found)


def test_ranks_with_sequence_parallelism_train_on_as_they_were(
    inputs: Path, tmp_path: Path
) -> None:
    run_distributed(_check_sequence_parallel, 2, inputs, tmp_path)


def _check_sequence_parallel(inputs: Path, folder: Path) -> None:
    layout = ["strategy.tensor_model_parallel_size=2", "strategy.sequence_parallel=true"]
    quiet = _train(inputs, folder / "without", layout)
    shown = _train(inputs, folder / "with", [*layout, *NEEDLES])
    if torch.distributed.get_rank() == 0:
        assert {step for step, scalars in shown.items() if TASK in scalars} == {2, NUM_STEPS}
        _check_same_run(shown, quiet, folder / "with", folder / "without")


def _points(folder: Path, tag: str = TASK) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


@pytest.mark.parametrize(
    ("world_size", "tensor"),
    [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((1, 1), (2, 1)))],
    ids=str,
)
def test_right_answers_are_counted(tmp_path: Path, world_size: int, tensor: int) -> None:
    """Right are those that the model gives by whole forward passes, one row after the other."""
    inputs = write_inputs(tmp_path, PLAN_OF_KINDS)
    run_distributed(_write_right_answers, 1, inputs)
    run_distributed(_check_count, world_size, inputs, tensor)


def _needles(inputs: Path) -> Any:
    from megatron_hydra.nemo.needles import Needles
    from megatron_hydra.training.config import load_config

    overrides = [*NEEDLES, f"log.folder={inputs}", "data.micro_batch_size=2"]
    return Needles(load_config(inputs / "run.yaml", overrides), inputs / "hybrid/tokenizer")


def _write_right_answers(inputs: Path) -> None:
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers.checkpoint import load_checkpoint

    initialize_model_parallel()
    for name in ("hybrid", "teacher"):
        model = load_checkpoint(inputs / name).model.eval()
        answers = []
        for sample in _needles(inputs)._samples:
            assert len(sample.tokens) + len(sample.answer) == TOKENS
            tokens = torch.tensor([sample.tokens])
            for _ in sample.answer:
                with torch.no_grad():
                    logits = model(tokens, torch.arange(tokens.shape[1])[None], None)
                tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
            answers.append(tokens[0, len(sample.tokens) :].tolist())
        (inputs / f"{name}_answers.json").write_text(json.dumps(answers))


def _check_count(inputs: Path, tensor: int) -> None:
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers.checkpoint import load_checkpoint

    initialize_model_parallel(tensor)
    model = load_checkpoint(inputs / "hybrid").model.train()
    teacher = load_checkpoint(inputs / "teacher").model.eval()
    still = model.decoder.layers[0].mlp.eval()
    _check_predicted_caches(inputs, model, teacher, tensor)
    needles = _needles(inputs)
    for wrong in ([], [0], [1, 2, 5], list(range(NUM_SAMPLES))):
        _set_answers(needles, inputs / "hybrid_answers.json", wrong)
        found = needles.measure(SimpleNamespace(module=model, teacher=None))
        assert found == {TASK: (NUM_SAMPLES - len(wrong)) / NUM_SAMPLES}
    for wrong in ([2, 3], []):
        _set_answers(needles, inputs / "teacher_answers.json", wrong)
        found = needles.measure(SimpleNamespace(module=model, teacher=teacher))
        assert found[TEACHER_TASK] == (NUM_SAMPLES - 2) / NUM_SAMPLES, "of the first time"
        assert found[TASK] < found[TEACHER_TASK]
    assert model.training and not still.training and not still.linear_fc1.training
    assert model.decoder.layers[1].mlp.training


def _set_answers(needles: Any, file: Path, wrong: list[int]) -> None:
    for place, answer in enumerate(json.loads(file.read_text())):
        last = [answer[-1] + 1 if place in wrong else answer[-1]]
        sample = replace(needles._samples[place], answer=[*answer[:-1], *last])
        needles._samples[place] = sample


def _check_predicted_caches(inputs: Path, model: Any, teacher: Any, tensor: int) -> None:
    """What the dry run says of a batch's caches, against what the contexts hold."""
    from kit.contexts import contexts_of  # Megatron, which not every test here loads

    from megatron_hydra.head_plan import HeadPlan
    from megatron_hydra.selection.shape import ModelShape
    from megatron_hydra.training.config import load_config
    from megatron_hydra.training.memory import decoding_cache_bytes
    from megatron_hydra.training.needle_rounds import NeedleRounds

    both = SimpleNamespace(module=model, teacher=teacher)
    contexts = contexts_of(lambda: _needles(inputs).measure(both))
    held = [sum(map(_num_bytes, context.key_value_memory_dict.values())) for context in contexts]
    half = len(held) // 2  # the hybrid's; the teacher's come after them
    most = torch.tensor([max(held[:half]), max(held[half:]), half])
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    layout = [f"strategy.tensor_model_parallel_size={tensor}", f"log.folder={inputs}"]
    overrides = [*NEEDLES, *layout, "data.micro_batch_size=2"]
    config = load_config(inputs / "run.yaml", overrides)
    rounds = NeedleRounds.of(config, torch.distributed.get_world_size())
    assert rounds is not None
    plan, shape = HeadPlan.load(inputs / "hybrid/plan.json"), ModelShape.from_config(model.config)
    length = config.data.seq_length
    predicted = [
        decoding_cache_bytes(shape, asked, rounds, tensor, length, "fp32")
        for asked in rounds.plans(plan)
    ]
    assert most.tolist() == [*predicted, rounds.num_batches]


def _num_bytes(layer: Any) -> int:
    """Of a hybrid's layer; of a teacher's, which is Megatron's own, keys and values."""
    return sum(part.nbytes for part in layer) if isinstance(layer, tuple) else layer.num_bytes


def test_what_does_not_fit_ends_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_refusals, 1, inputs, tmp_path)


def _check_refusals(inputs: Path, folder: Path) -> None:
    from megatron_hydra.errors import UserError

    for override, message in (
        ("trainer.needle_tokens=60", "a sample of 60 tokens has no room for text and 2 needles"),
        ("trainer.needle_tokens=2000", "the text has 321 tokens, but"),
        ("trainer.needle_task=find", "unknown needle task 'find'"),
    ):
        with pytest.raises(UserError, match=message):
            _train(inputs, folder / "run", [*NEEDLES, override])
    assert not (folder / "run").exists()


def test_a_key_has_one_value_in_text_that_teaches_retrieval(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_text_with_needles, 1, inputs, tmp_path)


def _check_text_with_needles(inputs: Path, folder: Path) -> None:
    from megatron_hydra.errors import UserError
    from megatron_hydra.nemo.needles import Needles
    from megatron_hydra.tasks.needles import KEYS, pieces_of
    from megatron_hydra.teachers.tokenizer import load_tokenizer
    from megatron_hydra.training.config import load_config
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    tokenizer = load_tokenizer(inputs / "hybrid/tokenizer")
    pieces = pieces_of(tokenizer)
    for name, keys in (("half", KEYS[::2]), ("all", KEYS)):
        stated = [pieces.needle(key, "1234").tokens for key in keys]
        write_indexed_dataset(folder / name, [3 * sum(stated, [])], 257, {})
    length = sum(len(pieces.needle(key, "1234").tokens) for key in KEYS)

    def needles(name: str, num_tokens: int) -> Any:
        more = [f"data.paths=[{folder / name}]", f"trainer.needle_tokens={num_tokens}"]
        overrides = [*NEEDLES, "trainer.needle_samples=20", *more, f"log.folder={folder}"]
        return Needles(load_config(inputs / "run.yaml", overrides), inputs / "hybrid/tokenizer")

    asked = set()
    for sample in needles("half", length // 2)._samples:
        text = tokenizer.decode(sample.tokens)
        assert text.count(f"\nThe number for {sample.key} is ") == 1
        asked.add(sample.key)
    assert len(asked) > 5
    with pytest.raises(UserError, match="gives keys values of its own in 200 pieces of 200: name"):
        needles("all", 2 * length)  # wherever a piece of it begins, it has every key
