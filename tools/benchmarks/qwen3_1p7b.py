"""Qwen3-1.7B's sizes, which the benchmarks here measure at."""

from __future__ import annotations

from megatron_hydra.selection.shape import ModelShape

LAYERS, HEADS, GROUPS, DIM, HIDDEN, FFN, VOCAB = 28, 16, 8, 128, 2048, 6144, 151936
SHAPE = ModelShape(LAYERS, HEADS, GROUPS, DIM, HIDDEN, FFN, VOCAB, tied_embeddings=True)
