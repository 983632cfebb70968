"""Heartbeats, by which nvidia-resiliency-ext's `ft_launcher` notices a training that hangs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


def make_heartbeat(seconds: float | None, folder: Path) -> list[pl.Callback]:
    """NVIDIA's callback, which tells `ft_launcher` of each step and save; none without a limit.

    Args:
        seconds: Between two heartbeats, from the one before the first step on; until that one the
            launcher's own limit holds, by its option `--ft-initial-rank-heartbeat-timeout`.
        folder: One that is there; nothing is written.

    Raises:
        ImportError: Without the package, for which `check_heartbeat` looks first.
    """
    if seconds is None:
        return []
    from nvidia_resiliency_ext.fault_tolerance.data import HeartbeatTimeouts
    from nvidia_resiliency_ext.ptl_resiliency import FaultToleranceCallback

    class Heartbeat(FaultToleranceCallback):  # type: ignore[misc]
        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            client = self.fault_tol_client
            if client is not None:  # it fits
                limits = HeartbeatTimeouts(client.hb_timeouts.initial, seconds, False)
                state = {client.CURRENT_TIMEOUTS_STATE_KEY: {"heartbeat": asdict(limits)}}
                client.load_state_dict(state)

    # Its own ways to go on and to find limits would write into the run folder.
    return [Heartbeat(autoresume=False, calculate_timeouts=False, exp_dir=folder)]
