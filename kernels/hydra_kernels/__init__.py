"""Operators of the linear-attention heads; they know nothing of Megatron."""
