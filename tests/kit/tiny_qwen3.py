"""A random teacher's folder of a few kilobytes, with a byte-level tokenizer, for tests."""

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


def write_tiny_qwen3(folder: Path, **options: Any) -> Path:
    """As :func:`write_tiny_teacher`, of the first family."""
    return write_tiny_teacher(folder, "qwen3", **options)


def write_tiny_teacher(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **fields: Any,
) -> Path:
    """Save transformers' own causal model with random weights, and a tokenizer, to ``folder``.

    Every weight is drawn at a scale that matters to the logits, norms and biases included: at
    transformers' own initialisation a swapped norm, a misplaced head or a bias, which starts at
    zero, would go unseen.

    Args:
        folder: Made if it does not exist.
        model_type: Of the family, in transformers' words.
        seed: Of the weights.
        dtype: Of the saved weights.
        max_shard_size: Smaller than the weights, in transformers' words, for several shards.
        **fields: Of transformers' configuration, on top of :data:`TINY_SHAPE`; None is left out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**TINY_SHAPE, "eos_token_id": 256, **fields}
    given = {name: value for name, value in fields.items() if value is not None}
    config = AutoConfig.for_model(model_type, bos_token_id=None, **given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
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
    from transformers import AutoModelForCausalLM

    from megatron_hydra.teachers.loading import load_teacher

    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(oracle or folder, dtype=torch.float32)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5, "logits too small for the comparison to mean something"
    logits = load_teacher(folder).eval()(tokens, torch.arange(40).expand(2, -1), None)
    return float((logits - expected).abs().max())


def write_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of one token per byte (0 to 255) and an end-of-text token (256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
