"""A random Qwen3 folder of a few kilobytes, with a byte-level tokenizer, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}


def write_tiny_qwen3(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **fields: Any,
) -> Path:
    """Save transformers' own Qwen3ForCausalLM with random weights, and a tokenizer, to ``folder``.

    Every weight is drawn at a scale that matters to the logits, norms included: at
    transformers' own initialisation a swapped norm or a misplaced head would go unseen.

    Args:
        folder: Made if it does not exist.
        seed: Of the weights.
        dtype: Of the saved weights.
        max_shard_size: Smaller than the weights, in transformers' words, for several shards.
        **fields: Of transformers' Qwen3Config, on top of :data:`TINY_SHAPE`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**TINY_SHAPE, "bos_token_id": None, "eos_token_id": 256, **fields})
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(noise * scale + (1.0 if parameter.dim() == 1 else 0.0))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_byte_tokenizer(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; the word `REMOVE` as a value takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if value != "REMOVE"}
    path.write_text(json.dumps(kept), encoding="utf-8")


@torch.no_grad()
def logits_difference(folder: Path, oracle: Path | None = None) -> float:
    """The largest difference between transformers' logits and ours, on some tokens.

    Args:
        folder: That we read.
        oracle: That transformers reads; the same if it is None.
    """
    from transformers import Qwen3ForCausalLM

    from megatron_hydra.teachers.loading import load_teacher

    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = Qwen3ForCausalLM.from_pretrained(oracle or folder, dtype=torch.float32)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "logits too small for the comparison to mean something"
    logits = load_teacher(folder).eval()(tokens, torch.arange(40).expand(2, -1), None)
    return float((logits - expected).abs().max())


def write_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token a byte (0 to 255) and an end-of-text token (256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
