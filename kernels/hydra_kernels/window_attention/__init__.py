"""Attention over a sliding window of tokens, with a learnable sink."""

from hydra_kernels.window_attention.api import window_attention

__all__ = ["window_attention"]
