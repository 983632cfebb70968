"""The three training stages as NeMo-Run's tasks; `local.py` and `slurm.py` launch them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import nemo_run as run

from megatron_hydra.errors import UserError
from megatron_hydra.training.config import load_config, overrides_of_stage

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("stage1_align", "stage2_distill", "stage3_long_context")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What both launchers take."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--configs", type=Path, default=ROOT / "examples/qwen3_1p7b", help="folder of STAGE.yaml"
    )
    found.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    found.add_argument("--dry-run", action="store_true", help="show what would be launched")
    found.add_argument("overrides", nargs="*", metavar="[STAGE.]section.key=value")
    return found


def launch(args: argparse.Namespace, executor: run.Executor) -> None:
    """Run the stages one after the other, each in a task of its own.

    Finished ones are passed over. NeMo-Run starts tasks in folders of its own: `--chdir` makes the
    YAML files' relative paths those of this folder.
    """
    executor.launcher = "torchrun"
    executor.env_vars |= {
        # Else ranks that start anew read addresses of the dead (PyTorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Seconds that torchrun gives a save, once it has had a signal.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
        # Of this very environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    is_local = isinstance(executor, run.LocalExecutor)
    tasks = {
        stage: (args.configs / f"{stage}.yaml", overrides_of_stage(stage, STAGES, args.overrides))
        for stage in args.stages
    }
    for config, overrides in tasks.values():
        try:  # what is wrong there would be tried again and again
            load_config(config, overrides)
        except UserError as error:
            raise SystemExit(f"{config}: {error}") from error
    with run.Experiment("hydra-transfer") as experiment:
        before: list[str] = []
        for stage, (config, overrides) in tasks.items():
            arguments = ["--chdir", os.getcwd(), "--config", str(config.resolve())]
            script = run.Script(
                path="hydra_tools.train",
                m=True,
                entrypoint="python",
                args=[*arguments, *overrides],
            )
            task = experiment.add(script, executor.clone(), stage, dependencies=before or None)
            before = [] if is_local else [task]  # Slurm's own way to wait
        if args.dry_run:
            experiment.dryrun()
        else:
            experiment.run(sequential=is_local, tail_logs=True)
