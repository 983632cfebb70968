"""How fast the arms of a study are: each alone on the device, one after another in this process.

An arm is planned and converted as it is for its results, takes some steps of stage 3 in the same
training loop, is exported, and answers prompts of the evaluation's longest length by the same
function. Stages 1 and 2 are left out: the work does not depend on the weights.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output
from megatron_hydra.progress import no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.study.arm import plan_and_convert, stage_of
from megatron_hydra.study.config import StudyConfig
from megatron_hydra.study.speeds import RATES, Speed, Speeds, Timed, speeds_section, timed_arms
from megatron_hydra.study.teacher import prepare_teacher, teacher_inputs
from megatron_hydra.study.watch import StoppedError, Watch
from megatron_hydra.training.config import RunConfig

_LEAST_FREE = 0.9
_NEVER = 2**31 - 1
_SAME = ("device", "versions")


def measure_speeds(
    study: StudyConfig, watch: Watch, seconds: float, tell: Callable[[str], None]
) -> int:
    """Measure what is not measured yet, and write each to `speeds.out` at once.

    Args:
        study: The study.
        watch: Of the steps.
        seconds: Left for a script that has to train the teacher first.
        tell: Gets a line on each arm.

    Returns:
        How many failed: the reasons were told, and the next call tries again.

    Raises:
        StoppedError: If it was asked to stop; what is finished is written.
        UserError: If the GPU is in use, or `speeds.out` cannot be written, or is of another device
            or other versions.
    """
    teacher = study.run.replicates[0].teacher
    out = check_output(speeds_section(study).out, overwrite=True, kind="file")
    speeds = _so_far(out)
    _check_alone()
    prepare_teacher(study, teacher, watch, seconds)
    scores = {"teacher's scores": teacher_inputs(study, teacher)["scores"]}
    prompts, num_failed = _prompts(study, teacher), 0
    for timed in timed_arms(study):
        name, inputs = timed.run.name, study.speed_inputs(timed.run) | scores
        if any(
            (s.arm, s.budget, s.inputs) == (timed.run.arm, timed.run.budget, inputs)
            for s in speeds.speeds
        ):
            tell(f"{name}: measured already")
            continue
        folder = study.folder / "speeds" / name
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        try:
            speed = _measure(study, timed, inputs, prompts, folder, watch)
        except (UserError, RuntimeError) as error:
            tell(f"{name}: failed: {error}")
            num_failed += 1
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _free_memory()
        speeds = speeds.with_speed(speed)
        speeds.save(out)
        told = (f"{what} {rate:,.0f}" for what, rate in zip(RATES, speed.rates, strict=True))
        tell(f"{name}: {', '.join(told)} tokens/s")
    return num_failed


def _so_far(out: Path) -> Speeds:
    """What the file holds; nothing if there is none.

    Raises:
        UserError: If it is of another device or other versions: speeds of two do not compare.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    here = origin(device=device)
    if not out.exists():
        return Speeds(here)
    found = Speeds.load(out)
    if other := [key for key in _SAME if found.provenance.get(key) != here[key]]:
        raise UserError(
            f"{out} was measured with another {' and other '.join(other)}: name another speeds.out"
        )
    return replace(found, provenance=here)


def _check_alone() -> None:
    """UserError if others hold a GPU's memory."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        if free < _LEAST_FREE * total:
            raise UserError(
                f"{(total - free) / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB are in use: "
                "speeds are measured alone on it"
            )


def _prompts(study: StudyConfig, teacher: str) -> list[str]:
    """As many as the evaluation answers together at its longest length."""
    from megatron_hydra.api.generate import Prompts, draw_samples, held_out_tokens
    from megatron_hydra.export.generating import Generator
    from megatron_hydra.tasks.text import stand_in_text

    asked, longest = study.evaluation, max(study.lengths)
    number = max(1, asked.batch_tokens // longest)
    prompts = Prompts((asked.tasks[0],), num_samples=number, seed=asked.seed, wording="short")
    generator = Generator(study.teacher_folder(teacher), False)
    held_out = held_out_tokens(generator, stand_in_text("text"))
    (samples,) = draw_samples(prompts, [longest], generator, held_out, no_progress)
    return [sample.prompt for sample in samples]


def _measure(
    study: StudyConfig,
    timed: Timed,
    inputs: dict[str, str],
    prompts: Sequence[str],
    folder: Path,
    watch: Watch,
) -> Speed:
    from megatron_hydra.api.export import export
    from megatron_hydra.export.generating import Generator
    from megatron_hydra.head_plan import HeadPlan

    run, section = timed.run, speeds_section(study)
    plan, converted, exported = folder / "plan.json", folder / "converted", folder / "hf"
    with watch.part("plan and convert"):
        plan_and_convert(study, run, plan, converted)
    config = stage_of(study, run, "long_context", converted, folder / "long_context")
    with watch.part("training"):
        trained, training_ms = _train(config, section.warmup_steps, section.steps, watch)
    with watch.part("export"):
        export(trained, exported, progress=watch.progress)
    with watch.part("generation"):
        generator = Generator(exported, True, study.evaluation.forward_tokens)
        generator.step_seconds(prompts, 2)  # what is loaded and compiled at first
        first, *others = generator.step_seconds(prompts, section.new_tokens)
        prompt_tokens = sum(map(generator.num_tokens, prompts))
    return Speed(
        run.arm, run.budget, timed.stands_for, inputs, HeadPlan.load(plan).num_fa_heads,
        config.data.global_batch_size * config.data.seq_length, tuple(map(_ms, training_ms)),
        len(prompts), prompt_tokens, _ms(first), tuple(map(_ms, others)),
    )  # fmt: skip


def _train(
    config: RunConfig, num_before: int, num_timed: int, watch: Watch
) -> tuple[Path, list[float]]:
    """The trained hybrid, and seconds of the last steps, each with all that lies between two."""
    from megatron_hydra.api.train import train

    trainer = replace(config.trainer, max_steps=num_before + num_timed)
    resume = replace(config.resume, save_every_n_steps=_NEVER)
    ends: list[float] = []

    def on_step(step: int, scalars: Any) -> None:
        ends.append(time.perf_counter())

    config = replace(config, trainer=trainer, resume=resume)
    done = train(config, on_step=on_step, asks_to_stop=watch.asks_to_stop)
    if not done.is_complete:
        raise StoppedError
    return done.folder.hybrid, [end - begin for begin, end in pairwise(ends)][-num_timed:]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _free_memory() -> None:
    """What one arm leaves is in the way of the next."""
    import torch

    gc.collect()  # DDP's hooks hold a model in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
