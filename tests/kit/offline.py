"""Programs of other environments on an exported folder, without a network and this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PREFIX = Path(sys.prefix)
IS_NEWEST = _PREFIX.name == "transformers-newest"
"""Whether this process has the newest transformers, and not those of training."""
_BESIDE = _PREFIX.parent if IS_NEWEST else _PREFIX
NEWEST = str(_BESIDE / "transformers-newest/bin/python")
LM_EVAL = _BESIDE / "lm-eval/bin/python"


def run_offline(folder: Path, *command: object, **environment: str) -> str:
    """What a command says, run in a folder where transformers also keeps what it copies."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{folder}/home"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**own, **offline, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def ask_by_lm_eval(folder: Path, tasks: str, *options: object, **environment: str) -> None:
    """The harness's own command line, on the folder's `hf`, into its `out`."""
    command = [LM_EVAL, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--output_path", "out"]
    command += ["--model_args", "pretrained=hf,trust_remote_code=True", "--tasks", tasks, *options]
    run_offline(folder, *command, **environment)
