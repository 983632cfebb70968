"""The training loop on NeMo, and what cannot do without it.

What another loop would need too is in `megatron_hydra.training`.
"""
