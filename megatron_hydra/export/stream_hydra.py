"""Where the tokens of a forward pass belong: positions, padding, what full attention may see.

Copied into every exported folder: imports PyTorch and transformers alone.

Legend: b rows, t tokens, d channels of a head, l tokens that a static cache has room for.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_hydra import HydraCache
from .configuration_hydra import HydraHeadConfig

# What transformers calls the cache: `cache` in its latest releases.
_IS_RENAMED = "cache" in inspect.signature(CausalLMOutputWithPast).parameters
CACHE = "cache" if _IS_RENAMED else "past_key_values"


@dataclass
class Stream:
    """What a layer's heads need to know of the tokens.

    Heads with a state see each row's real tokens first and padding last, so that a state never
    meets padding, wherever it stands; `order` sorts tokens so.

    Attributes:
        cos: `[b, t, 1, d / 2]`, of RoPE's angles, in the model's dtype.
        sin: As `cos`.
        query_scale: `[b, t, 1, 1]`, factor on queries of full attention; None for 1.
        num_before: `[b]`, real tokens of each row that came before.
        num_real: `[b]`, real tokens of each row here.
        is_padded: Whether some token here is padding, or may be.
        order: `[b, t]`, None where no token here is padding, or where there is but one.
        mask: For full attention, as its implementation takes it; in a static cache's step
            `[b, l]`, which of its places are seen.
        is_step: Whether this is one token into a static cache that has seen tokens.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None
    num_before: Tensor
    num_real: Tensor
    is_padded: bool = False
    order: Tensor | None = None
    mask: Any = None
    is_step: bool = False

    def to(self, device: torch.device, **kwargs: Any) -> Stream:
        """The same on another device, where a layer may lie."""
        if self.cos.device == device:
            return self
        tensors = {
            item.name: value.to(device, **kwargs)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **tensors)

    def packed(self) -> Stream:
        """The same with a row's real tokens first."""
        if self.order is None:
            return self
        return replace(self, cos=self.pack(self.cos), sin=self.pack(self.sin))

    def rotated(self, x: Tensor) -> Tensor:
        """RoPE on `[b, t, n, d]`."""
        return rotated(x, self.cos, self.sin)

    def pack(self, x: Tensor) -> Tensor:
        """Move each row's real tokens of `[b, t, ...]` to its start."""
        return x if self.order is None else take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The way back."""
        return x if self.order is None else take(x, self.order.argsort(dim=1))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of `[b, t, ...]` by `index` `[b, tokens]`."""
    shape = (*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[b, t, n, d]`: halves are pairs; angles as a stream has them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def stream_of(
    config: HydraHeadConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: HydraCache | None,
    is_training: bool,
) -> Stream:
    """Of a forward pass; arguments as of the model's.

    Args:
        config: The model's.
        x: `[b, t, h]`, embeddings.
        attention_mask: `[b, tokens]`, of the cache's tokens and the new ones.
        position_ids: `[b, t]`.
        cache: What earlier tokens left.
        is_training: Whether the model is in training mode.

    Raises:
        ValueError: For a mask of another shape, none where the cache has seen padding, or more
            tokens than a static cache has room for.
    """
    if cache is not None and cache.takes_step(x.shape[1]):
        positions, found = _of_a_step(x, attention_mask, cache)
    else:
        positions, found = _of_tokens(config, x, attention_mask, cache)
    if position_ids is not None:
        positions = position_ids.to(x.device).expand(x.shape[:2])
    angles = positions[..., None, None].float() * _frequencies(config, x.device)
    if torch.compiler.is_compiling():
        # As complex numbers they are written out; else each layer would compute them again.
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
    else:
        cos, sin = angles.cos(), angles.sin()
    return Stream(
        cos.to(x.dtype),
        sin.to(x.dtype),
        _query_scale(config, positions, x.dtype, is_training),
        **found,
    )


def padded_mask(attention_mask: Tensor, length: int) -> Tensor:
    """`[b, tokens]` as bool `[b, length]`, False at the end: as large at every step."""
    return F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))


def _of_tokens(
    config: HydraHeadConfig, x: Tensor, attention_mask: Tensor | None, cache: HydraCache | None
) -> tuple[Tensor, dict[str, Any]]:
    """Positions `[b, t]`, and the stream's other fields."""
    b, t, past = *x.shape[:2], 0 if cache is None else cache.get_seq_length()
    if cache is not None:
        cache.check_room(t)
    device, has_mask, order, is_padded = x.device, attention_mask is not None, None, False
    num_before = torch.full((b,), past, device=device)
    num_real = torch.full((b,), t, device=device)
    positions = torch.arange(past, past + t, device=device).expand(b, t)
    if attention_mask is not None:
        if attention_mask.shape != (b, past + t):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; a hybrid needs "
                f"{(b, past + t)}: for each row, which of the tokens seen and coming are real"
            )
        is_real = attention_mask.to(device=device, dtype=torch.bool)
        if is_real.all():
            attention_mask = None
        else:
            num_before, num_real = is_real[:, :past].sum(1), is_real[:, past:].sum(1)
            positions = (is_real.cumsum(1)[:, past:] - 1).clamp_min(0)
            is_padded = not bool(is_real[:, past:].all())
            if is_padded and t > 1:
                order = (~is_real[:, past:]).int().argsort(dim=1, stable=True)
    if cache is not None:
        cache.check_padding(has_mask, attention_mask is not None)
    found = {"num_before": num_before, "num_real": num_real, "is_padded": is_padded}
    mask = _causal_mask(config, x, attention_mask, past, cache)
    return positions, {**found, "order": order, "mask": mask}


def _of_a_step(
    x: Tensor, attention_mask: Tensor | None, cache: HydraCache
) -> tuple[Tensor, dict[str, Any]]:
    """As above, of one token into a static cache.

    All shapes are the same at every step and nothing waits for the device: a compiled step, or one
    recorded as a CUDA graph, is right for all of them.
    """
    b, length = len(x), cache.max_length
    past = cache.layers[0].num_tokens.to(x.device, copy=True)  # the layer counts on in place
    # Looking waits for the device, which a step that is compiled or being recorded must not.
    if not (torch.compiler.is_compiling() or _is_recording(x)):
        cache.check_room(1, None if attention_mask is None else attention_mask.shape)
    cache.check_padding(attention_mask is not None, None)
    places = torch.arange(length, device=x.device)
    is_seen = (places <= past).expand(b, length)
    num_before, num_real = past.expand(b), torch.ones_like(past).expand(b)
    if attention_mask is not None:
        is_real = padded_mask(attention_mask.to(device=x.device, dtype=torch.bool), length)
        is_seen = is_seen & is_real
        num_before = (is_real & (places < past)).sum(1)
        num_real = is_real.index_select(1, past.view(1))[:, 0].to(past.dtype)
    found = {"num_before": num_before, "num_real": num_real, "mask": is_seen, "is_step": True}
    return num_before[:, None], {**found, "is_padded": attention_mask is not None}


def _is_recording(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _query_scale(
    config: HydraHeadConfig, positions: Tensor, dtype: torch.dtype, is_training: bool
) -> Tensor | None:
    """Of `[b, t]` positions, what `fa_query_scale` says."""
    when = config.fa_query_scale
    if when == "none" or (when == "inference" and is_training):
        return None
    base = config.fa_query_scale_base
    past = (positions[..., None, None].float() - config.fa_query_scale_start).clamp_min(0)
    return ((past + base).log() / math.log(base)).to(dtype)


def _causal_mask(
    config: HydraHeadConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    past: int,
    cache: HydraCache | None,
) -> Any:
    """For full attention, as transformers makes it for the implementation that is chosen."""
    names = inspect.signature(create_causal_mask).parameters
    options: dict[str, Any] = {
        "config": config,
        "attention_mask": attention_mask,
        # Of no use before the first token, and for a static one it would write the mask out.
        CACHE: cache if past else None,
        "input_embeds" if "input_embeds" in names else "inputs_embeds": x,
    }
    if "cache_position" in names:
        options["cache_position"] = torch.arange(past, past + x.shape[1], device=x.device)
    return create_causal_mask(**options)


def _frequencies(config: HydraHeadConfig, device: torch.device) -> Tensor:
    """Of RoPE `[d / 2]`, radians per token; with Llama 3.1's scaling where there is one."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling_factor == 1.0:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = frequencies * (config.rope_original_length / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(frequencies / config.rope_scaling_factor, frequencies, kept)
