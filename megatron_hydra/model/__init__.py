"""The layer and the model around it: heads of several kinds, fused, dealt to tensor-parallel ranks.

Start at `hydra_attention`. Weights of a teacher are `megatron_hydra.teachers`' matter, losses are
`megatron_hydra.transfer`'s.
"""
