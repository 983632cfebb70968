"""Keeps the notes and warnings of NeMo, Lightning and Megatron off the terminal."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import nemo.lightning as nl
from lightning_utilities.core import rank_zero
from nemo.utils import logging as nemo_logging


class QuietLogger(nl.NeMoLogger):
    """NeMo's logger, whose look at the checkpoint callbacks asks for nvidia-resiliency-ext."""

    def _setup_trainer_model_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


def quieten() -> None:
    """Let only errors of theirs through; call it before they are used."""
    nemo_logging.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="To copy construct from a tensor")
    others = r"megatron\.core|nemo|lightning|torch\.distributed|transformer_engine"
    warnings.filterwarnings("ignore", module=others)
    rank_zero.log.setLevel(logging.ERROR)
    # NeMo's telemetry: it complains of every run that ends before its last step.
    logging.getLogger("nv_one_logger").setLevel(logging.CRITICAL)
