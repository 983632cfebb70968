"""A checkpoint as a Hugging Face folder: the hybrid's own model code, and the weights' way there.

The files named `*_hydra.py` are copied into the folder. They stand alone, on PyTorch and
transformers (and fla on a GPU), and import nothing of this package. Checkpoints themselves are
`megatron_hydra.teachers`' matter.
"""
