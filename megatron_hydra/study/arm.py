"""One arm from its plan to its result.

Every step leaves a file or folder; what is there is not made again, so that a run that was stopped
or killed goes on. Imports that take long stay inside functions.
"""

from __future__ import annotations

import dataclasses
import shutil
from fractions import Fraction
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, versions, write_json
from megatron_hydra.schema import as_overrides
from megatron_hydra.study.config import STAGES, Run, StudyConfig, budget_for
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.teacher import INPUTS, all_inputs, teacher_place
from megatron_hydra.study.watch import StoppedError, Watch
from megatron_hydra.training.config import RunConfig

_HEADING = {"kind": "study_inputs", "schema_version": 1}


def run_arm(study: StudyConfig, run: Run, watch: Watch) -> ArmResult:
    """Run an arm, or what is left of it; write its result and remove the rest.

    What an earlier start has left is used if it was made of the same inputs, else removed.

    Args:
        study: The study.
        run: Which arm, with a prepared teacher.
        watch: Of the steps.

    Raises:
        StoppedError: If it was asked to stop; what is finished is kept.
        UserError: If a step refuses what the arm asks for.
    """
    from megatron_hydra.api.export import export

    folder, inputs = study.folder / "arms" / run.name, all_inputs(study, run)
    record = folder / INPUTS
    if record.exists() and read_json(record, "study_inputs", 1) != _HEADING | inputs:
        shutil.rmtree(folder)
    write_json(record, _HEADING | inputs, overwrite=True)
    last, exported = folder / "converted", folder / "hf"
    if not last.exists():
        with watch.part("plan and convert"):
            plan_and_convert(study, run, folder / "plan.json", last)
    for stage in filter(lambda stage: study.steps(run, stage), STAGES):
        with watch.part(stage):
            last = _train(stage_of(study, run, stage, last, folder / stage), watch)
    if not exported.exists():
        with watch.part("export"):
            export(last, exported, progress=watch.progress)
    with watch.part("evaluate"):
        result = _measure(study, run, folder, watch)
    tokens = {stage: study.tokens(run, stage) for stage in STAGES}
    found = dataclasses.replace(result, inputs=inputs, tokens=tokens, seconds=watch.seconds)
    found.save(study.results)
    shutil.rmtree(folder)
    return found


def plan_and_convert(study: StudyConfig, run: Run, out: Path, converted: Path) -> None:
    """Choose the heads and make the untrained hybrid.

    Args:
        study: The study.
        run: Which arm, with a prepared teacher.
        out: The plan's file.
        converted: The checkpoint's folder.

    Raises:
        UserError: For what the arm asks for and cannot be.
    """
    from megatron_hydra.api.convert import Calibration, convert
    from megatron_hydra.api.plan import plan

    arm, scores = study.arms[run.arm], teacher_place(study, run.teacher) / "scores.json"
    plan(
        scores, out, budget_for(study, run), arm.constraints,
        combine=as_overrides({"combine": arm.combine}),
        window_ratio=Fraction(arm.window_ratio),
        random_seed=run.seed if arm.random else None, overwrite=True,
    )  # fmt: skip
    convert(
        study.teacher_folder(run.teacher), converted, out,
        options={"head_init_seed": 1234 + run.seed, **arm.model},
        calibration=Calibration(
            num_tokens=arm.calibration_tokens,
            length_tokens=study.data.length if arm.calibration_tokens else None,
            recurrence=arm.calibrates_recurrence,
        ),
        reuse=arm.reuse,
    )  # fmt: skip


def stage_of(study: StudyConfig, run: Run, stage: str, init_from: Path, folder: Path) -> RunConfig:
    """The training of a run's stage, with what is made of its teacher."""
    place = teacher_place(study, run.teacher)
    return study.stage_config(run, stage, place / "data", init_from, place / "checkpoint", folder)


def _train(config: RunConfig, watch: Watch) -> Path:
    from megatron_hydra.api.train import train

    done = train(config, asks_to_stop=watch.asks_to_stop)
    if not done.is_complete:
        raise StoppedError
    return done.folder.hybrid


def _measure(study: StudyConfig, run: Run, folder: Path, watch: Watch) -> ArmResult:
    """Ask the exported hybrid everything."""
    import torch

    from megatron_hydra.api.generate import Prompts, generate
    from megatron_hydra.evaluation.generation import Generation
    from megatron_hydra.evaluation.positions import position_windows
    from megatron_hydra.export.generating import Generator
    from megatron_hydra.head_plan import HeadPlan
    from megatron_hydra.tasks.probes import make_probe
    from megatron_hydra.tasks.text import split_held_out, stand_in_text

    asked, length, out = study.evaluation, study.data.length, folder / "generation.json"
    prompts = Prompts(
        tuple(asked.tasks), study.lengths, asked.samples,
        max(asked.text_tokens, *study.lengths), asked.seed, "short",
    )  # fmt: skip
    if not out.exists():
        generate(
            {run.name: folder / "hf"}, out, prompts,
            batch_tokens=asked.batch_tokens, forward_tokens=asked.forward_tokens,
            progress=watch.progress,
        )  # fmt: skip
    (evaluation,) = Generation.load(out).models
    student = Generator(folder / "hf", True)
    teacher = Generator(study.teacher_folder(run.teacher), False)
    text = student.tokenizer(stand_in_text("text"), add_special_tokens=False, verbose=False)
    _, held_out = split_held_out(text["input_ids"])
    windows = position_windows(held_out, length, max(length, asked.text_tokens))
    size, probes = max(1, 8192 // length), {}
    for name in asked.probes:
        watch.check()
        drawn = make_probe(name, student.tokenizer, held_out, length, asked.samples, asked.seed)
        samples = [(pair.clean.tokens, pair.clean.answer) for pair in drawn.pairs]
        right = student.right_answers(samples, size)
        probes[name] = "".join(str(int(each)) for each in right)
    divergence = student.divergence_from(teacher, windows, size)
    if not divergence < float("inf"):
        raise UserError(f"the divergence from the teacher on text is {divergence}")
    layers = HeadPlan.load(folder / "plan.json").layers
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return ArmResult(
        run.arm, run.budget, run.teacher, run.seed, {}, "finished",
        fa_heads=tuple(layer.fa_heads for layer in layers),
        evaluation=dataclasses.replace(evaluation, path=""),
        probes=probes, divergence_nats=divergence,
        provenance={"versions": versions(), "device": device},
    )  # fmt: skip
