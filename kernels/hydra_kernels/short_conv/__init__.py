"""Short convolution: the causal depthwise mixing in front of a linear-attention head."""

from hydra_kernels.short_conv.api import short_conv

__all__ = ["short_conv"]
