"""Head fusion: norm, gate and scale of every head, FA and LA, into one tensor in one order."""

from hydra_kernels.head_fusion.api import head_fusion

__all__ = ["head_fusion"]
