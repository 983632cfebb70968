"""One file for each way to measure heads on a model; `base` says what a scorer is.

How effects become scores, and scores a plan, is the rest of `megatron_hydra.selection`.
"""
