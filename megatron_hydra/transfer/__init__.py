"""The three stages as losses and steps, for any training loop.

The loop, its data and its checkpoints are `megatron_hydra.training`'s and `megatron_hydra.nemo`'s.
"""
