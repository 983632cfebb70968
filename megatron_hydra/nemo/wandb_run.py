"""Weights & Biases: the run there that gets a training's scalars, where its YAML asks for it."""

from __future__ import annotations

import secrets
from dataclasses import asdict

from lightning.pytorch.loggers import WandbLogger

from megatron_hydra.errors import UserError
from megatron_hydra.training.run_folder import RunFolder


def open_wandb(folder: RunFolder) -> WandbLogger | None:
    """W&B's run of a run folder, begun or gone on with; None where the YAML names no project.

    To be called on the rank that logs. Lightning's trainer does not know the logger: what W&B gets
    is what the caller logs, and the configuration, in which no key has a place.

    Raises:
        UserError: If W&B cannot be started, without a key for example.
    """
    log = folder.config.log
    if log.wandb_project is None:
        return None
    import wandb

    logger = WandbLogger(
        project=log.wandb_project,
        name=log.wandb_name or folder.path.resolve().name,
        id=_run_id(folder),
        save_dir=folder.path,  # W&B makes the folder `wandb` below
        config=asdict(folder.config),
        settings={"console": "off"},  # the progress line is for a terminal
        **({} if log.wandb_mode is None else {"mode": log.wandb_mode}),
    )
    try:
        _ = logger.experiment  # or the first step would start it
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"log.wandb_project is {log.wandb_project}, but Weights & Biases does not start: "
            f"{reason}; run wandb login or set WANDB_API_KEY, or set log.wandb_mode to offline"
        ) from error
    return logger


def _run_id(folder: RunFolder) -> str:
    """W&B's name of the run, drawn once: a training that goes on goes on there too."""
    file = folder.wandb / "run_id"
    try:
        known = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        known = ""
    if not known:
        known = secrets.token_hex(4)
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{known}\n", encoding="utf-8")
    return known
