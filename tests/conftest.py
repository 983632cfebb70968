"""Every test process maps Megatron's CUDA calls to the CPU before it imports Megatron.

Without a GPU, Triton's kernels run in its interpreter, which has to be asked for before Triton is
first imported, and Megatron imports it.
"""

import gc
import os
import sys
import warnings
from pathlib import Path

# Of the tests' models one thread is faster than two, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `python` and `torchrun`, as scripts and launchers call them, are those of this environment,
# however it was started.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import pytest  # noqa: E402
from kit.interpreter import patch_interpreter  # noqa: E402

patch_interpreter()
torch.set_num_threads(1)
# Megatron and NeMo warn of each optional package that is absent, at import.
warnings.filterwarnings("ignore", module="megatron|nemo")


def pytest_collection_finish() -> None:
    """What the test files have imported never becomes garbage, and takes long to walk through."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _warnings_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    """NeMo, once imported, lets no handler of the root logger show warnings, pytest's included."""
    caplog.handler.setLevel(0)


def _one_rank() -> None:
    """Megatron's groups of one process, and its random numbers from the start."""
    from megatron_hydra.parallel import initialize_model_parallel

    initialize_model_parallel()


one_rank = pytest.fixture(_one_rank)
one_rank_of_module = pytest.fixture(_one_rank, scope="module")


@pytest.fixture
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """LA preparation in strips of 4 tokens: its kernels take so many steps, with 3 more each.

    Borders of strips then lie in rows of few tokens. A GPU has its own lengths, of 16 on, which
    `test_kernel_over_several_blocks_strips_and_tiles` takes everywhere.
    """
    from hydra_kernels.la_preparation import triton_la_preparation

    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_la_preparation, "_SHORTEST", 4)
