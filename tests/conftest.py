"""Every test process maps Megatron's CUDA calls to the CPU before it imports Megatron."""

import warnings

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import torch  # noqa: E402

torch.set_num_threads(1)
# Megatron and NeMo warn of each optional package that is absent, at import.
warnings.filterwarnings("ignore", module="megatron|nemo")
