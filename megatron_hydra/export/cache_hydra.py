"""What a hybrid keeps of the tokens that it has seen: keys, values and states, and nothing else.

Copied into every exported folder: imports PyTorch and transformers alone.

Legend: b rows, t tokens seen, l tokens that a static cache has room for, g query groups that some
FA head uses, n heads of a kind, d channels, k taps of the short convolution, w tokens of a sliding
window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_hydra import HydraHeadConfig
from .recurrence_hydra import ROOM

_COUNTS_WHAT_GOES = "tokens_to_remove" in inspect.signature(Cache.crop).parameters
NUM_STATES = 2
"""Kinds with a recurrent state: each has its `Mixer.state_index`."""


class _LayerOfEarlierReleases(CacheLayerMixin):
    """What `LinearAttentionAndFullAttentionLayer` of later transformers has for states."""

    def __init__(self, number_of_states: int) -> None:
        super().__init__()
        self.conv_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.recurrent_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        return self._update(self.conv_states, conv_states, state_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        return self._update(self.recurrent_states, recurrent_states, state_idx)

    @staticmethod
    def _update(states: dict[int, Tensor | None], new: Tensor, index: int) -> Tensor:
        old = states[index]
        kept = states[index] = _fixed(torch.zeros_like(new)) if old is None else old
        return kept.copy_(new)


_Layer: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
if _Layer is None or "number_of_states" not in inspect.signature(_Layer.__init__).parameters:
    _Layer = _LayerOfEarlierReleases


class HydraLayerCache(_Layer):
    """Of one layer: transformers' own for linear beside full attention, in releases that have it.

    Theirs has no place for a window beside both, takes padding to stand on the left, and is static
    in another class; that is added here.

    Args:
        max_length: l, where the cache is static: room for as many tokens from the start, written in
            place, so that every step has the same shapes and addresses. None to grow.

    Attributes:
        keys: `[b, g, t, d]`, in a static cache `[b, g, l, d]`; None in a layer without an FA head.
        values: As `keys`.
        recurrent_states: `[b, n, d, d]` in float32, by a kind's `state_index`; None before
            the first token, and of a kind without a head.
        conv_states: The convolution's last inputs `[b, 3 n d, k - 1]`, alike.
        window: Keys and values `[b, w, n, d]` of a window.
        num_tokens: Seen so far, padding counted in; of a static cache that has seen some a tensor.
    """

    is_sliding = False

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(number_of_states=NUM_STATES)
        self.max_length, self.is_compileable = max_length, max_length is not None
        self.window: tuple[Tensor, ...] = ()
        self.num_tokens: int | Tensor = 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make a state's place, at its first token; keys and values need none."""
        if kwargs:
            super().lazy_initialization(**kwargs)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[b, g, t, d]`; return all so far, a static cache's step all room."""
        if self.max_length is not None:
            return self._write(key_states, value_states)
        if self.keys is not None:
            key_states = torch.cat((self.keys, key_states), dim=2)
            value_states = torch.cat((self.values, value_states), dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        b, g, num_tokens, d = key_states.shape
        if self.keys is None:
            shape = (b, g, self.max_length, d)
            self.keys = _fixed(key_states.new_zeros(shape))
            self.values = _fixed(value_states.new_zeros(shape))
        places = torch.arange(num_tokens, device=key_states.device) + self.num_tokens
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        if self.takes_step(num_tokens):
            return self.keys, self.values
        end = self.get_seq_length() + num_tokens
        return self.keys[:, :, :end], self.values[:, :, :end]

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take a recurrent state in place of the one before."""
        kept = recurrent_states
        if self.max_length is not None:
            kept = super().update_recurrent_state(recurrent_states, state_idx)
        # Else not written into the one before: gradients pass, and inference mode may have made it.
        self.recurrent_states[state_idx] = kept
        return kept

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take a convolution's last inputs, all of them, in place of those before; return them."""
        if self.max_length is not None:
            super().update_conv_state(conv_states, state_idx)
        else:
            kept = conv_states.clone(memory_format=torch.contiguous_format)
            self.conv_states[state_idx] = kept
        return conv_states

    def keep_window(self, tensors: Sequence[Tensor]) -> None:
        """Take a window's keys and values in place of those before."""
        if self.max_length is None:
            self.window = tuple(tensors)
        elif self.window:
            for old, new in zip(self.window, tensors, strict=True):
                old.copy_(new)
        else:
            self.window = tuple(_fixed(tensor.clone()) for tensor in tensors)

    def advance(self, num_tokens: int, device: torch.device) -> None:
        """Count the tokens of a forward pass, once all heads have seen them."""
        if self.max_length is not None and not self.is_initialized:
            self.num_tokens = _fixed(torch.zeros((), dtype=torch.int64, device=device))
        self.num_tokens += num_tokens
        self.is_initialized = True

    def takes_step(self, num_tokens: int) -> bool:
        """Whether as many tokens are a step: one, into a static cache that has seen some."""
        return self.max_length is not None and self.is_initialized and num_tokens == 1

    @property
    def states(self) -> dict[str, Tensor]:
        """By name, what has a size that no number of tokens changes."""
        found = {f"window[{index}]": tensor for index, tensor in enumerate(self.window)}
        for name in ("recurrent_states", "conv_states"):
            of_kinds = getattr(self, name).items()
            found |= {f"{name}[{index}]": x for index, x in of_kinds if x is not None}
        return found

    def tensors(self) -> list[Tensor]:
        """All that is kept of tokens."""
        shared = [] if self.keys is None else [self.keys, self.values]
        return [*shared, *self.states.values()]

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen so far, padding counted in."""
        return int(self.num_tokens)

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        """Number of keys that the coming tokens meet, and the first one's place."""
        is_count = isinstance(cache_position, int)
        coming = cache_position if is_count else cache_position.shape[0]  # type: ignore[union-attr]
        return self.get_seq_length() + coming, 0

    def get_max_cache_shape(self) -> int:
        """l, or -1 for no limit."""
        return -1 if self.max_length is None else self.max_length

    get_max_length = get_max_cache_shape  # as later releases call it

    def reset(self) -> None:
        """Forget all tokens."""
        HydraLayerCache.__init__(self, self.max_length)

    @property
    def is_croppable(self) -> bool:
        """Whether earlier tokens can be gone back to, as assisted decoding asks."""
        return not self.states

    def crop(self, max_length: int) -> None:
        """Keep the first tokens alone, or with a number below 0 drop the last ones.

        Of 0 the latest transformers drop none, earlier ones all.

        Raises:
            ValueError: Where heads have a state, which cannot be taken back.
        """
        seen = self.get_seq_length()
        if max_length < 0 or (max_length == 0 and _COUNTS_WHAT_GOES):
            max_length = seen + max_length
        if max_length >= seen:
            return
        if self.states:
            raise ValueError(
                f"the cache cannot be cropped from {seen} to {max_length} tokens: "
                "recurrent heads and sliding windows do not keep the states of earlier tokens"
            )
        if isinstance(self.num_tokens, Tensor):
            self.num_tokens.fill_(max_length)
        else:
            self.num_tokens = max_length
            self._map(lambda x: x[:, :, :max_length].clone())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows, as beam search does; `[rows]`, indices of the present ones."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As :meth:`reorder_cache`."""
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        def changed(old: Tensor) -> Tensor:
            new = change(old)
            if self.max_length is None:
                return new
            return old.copy_(new) if new.shape == old.shape else _fixed(new)

        if self.keys is not None:
            self.keys, self.values = changed(self.keys), changed(self.values)
        self.window = tuple(map(changed, self.window))
        for states in (self.recurrent_states, self.conv_states):
            for index, state in states.items():
                states[index] = None if state is None else changed(state)


class HydraCache(Cache):
    """Of all layers: what :class:`~transformers.GenerationMixin` hands from step to step.

    Args:
        config: Of the model that it is for.
        max_length: Tokens that a static cache has room for, rounded up to a multiple of 512;
            None for a cache that grows.

    Attributes:
        max_length: As given, rounded.
    """

    def __init__(self, config: HydraHeadConfig, max_length: int | None = None) -> None:
        if max_length is not None:
            max_length = -(-max_length // ROOM) * ROOM
        super().__init__(
            layers=[HydraLayerCache(max_length) for _ in range(config.num_hidden_layers)]
        )
        self.max_length = max_length
        self._made_for = config.cache_sizes
        self._has_padding = False

    def takes_step(self, num_tokens: int) -> bool:
        """Whether as many tokens are a step, as :meth:`HydraLayerCache.takes_step` has it."""
        return bool(self.layers[0].takes_step(num_tokens))

    def check_room(self, num_tokens: int, mask_shape: Sequence[int] | None = None) -> None:
        """See that a static cache has room for tokens, and that a step's mask knows of them.

        Raises:
            ValueError: If not.
        """
        if self.max_length is None:
            return
        end = self.get_seq_length() + num_tokens
        if end > self.max_length:
            raise ValueError(
                f"the static cache has room for {self.max_length} tokens, not for {end}"
            )
        if mask_shape is not None and not (len(mask_shape) == 2 and mask_shape[1] >= end):
            raise ValueError(
                f"attention_mask is {tuple(mask_shape)}; a step of a static cache needs a row per "
                f"sequence and {end} to {self.max_length} columns"
            )

    def check_padding(self, has_mask: bool, has_padding: bool | None) -> None:
        """See that padding among earlier tokens is not forgotten.

        Args:
            has_mask: Whether a mask says which tokens are real, earlier ones too.
            has_padding: Whether it marks some as padding; None where that is not looked up.

        Raises:
            ValueError: If there was padding and there is no mask.
        """
        if self._has_padding and not has_mask and self.get_seq_length():
            raise ValueError(
                "the cache has seen padding: attention_mask must say which of its tokens are real"
            )
        if has_padding is not None:
            self._has_padding = has_padding

    @property
    def num_bytes(self) -> int:
        """Memory that it holds, in bytes, of all rows together."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def check_cache(cache: Any, config: HydraHeadConfig) -> None:
    """See that a cache is a hybrid's, and this one's.

    Raises:
        ValueError: If it is of transformers, or was made for heads of other kinds or sizes.
    """
    if not isinstance(cache, HydraCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; a hybrid needs its own HydraCache, "
            "which generate makes where none is given"
        )
    if cache._made_for != config.cache_sizes:
        raise ValueError(
            "the cache was made for another model: its heads have other kinds or sizes"
        )


def _fixed(x: Tensor) -> Tensor:
    """Tell PyTorch's compiler that x stays where it is, as CUDA graphs ask of what they change."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x
