"""What a hybrid keeps of the tokens that it has seen: keys, values and states, and nothing else.

Copied into every exported folder: imports PyTorch and transformers alone.

Legend: b rows, t tokens, g query groups that some FA head uses, n heads of a kind, d channels,
k taps of the short convolution, w tokens of a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_hydra import HydraHeadConfig


class HydraLayerCache(CacheLayerMixin):
    """Of one layer.

    Attributes:
        keys: `[b, g, t, d]`, None in a layer without an FA head.
        values: As `keys`.
        states: By name, of kinds with a state, of a size that no number of tokens changes:
            recurrent states `[b, n, d, d]` in float32, the convolution's last inputs
            `[b, k - 1, 3 n d]`, a window's keys and values `[b, w, n, d]`.
        num_tokens: Seen so far, padding counted in.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.num_tokens = 0

    def lazy_initialization(self, key_states: Tensor, *args: Any) -> None:
        """Nothing is allocated before the first token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[b, g, t, d]`; return all so far."""
        if self.keys is not None:
            key_states = torch.cat((self.keys, key_states), dim=2)
            value_states = torch.cat((self.values, value_states), dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a forward pass, once all heads have seen them."""
        self.num_tokens += num_tokens
        self.is_initialized = True

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        shared = [] if self.keys is None else [self.keys, self.values]
        return [*shared, *self.states.values()]

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen so far, padding counted in."""
        return self.num_tokens

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        """Number of keys that the coming tokens meet, and the first one's place."""
        is_count = isinstance(cache_position, int)
        coming = cache_position if is_count else cache_position.shape[0]  # type: ignore[union-attr]
        return self.num_tokens + coming, 0

    def get_max_cache_shape(self) -> int:
        """No limit."""
        return -1

    get_max_length = get_max_cache_shape  # as later releases call it

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.states, self.num_tokens, self.is_initialized = {}, 0, False

    def crop(self, max_length: int) -> None:
        """Keep the first tokens alone, or with a number below 0 drop the last ones.

        Raises:
            ValueError: Where heads have a state, which cannot be taken back.
        """
        if max_length < 0:
            max_length = self.num_tokens + max_length
        if max_length >= self.num_tokens:
            return
        if self.states:
            raise ValueError(
                f"the cache cannot be cropped from {self.num_tokens} to {max_length} tokens: "
                "recurrent heads and sliding windows do not keep the states of earlier tokens"
            )
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
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)
        self.states = {name: change(state) for name, state in self.states.items()}


class HydraCache(Cache):
    """Of all layers: what :class:`~transformers.GenerationMixin` hands from step to step.

    Args:
        config: Of the model that it is for.
    """

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(layers=[HydraLayerCache() for _ in range(config.num_hidden_layers)])
        self._made_for = _marks(config)
        self._has_padding = False

    def check_padding(self, has_mask: bool, has_padding: bool) -> None:
        """See that padding among earlier tokens is not forgotten.

        Args:
            has_mask: Whether a mask says which tokens are real, earlier ones too.
            has_padding: Whether it marks some as padding.

        Raises:
            ValueError: If there was padding and there is no mask.
        """
        if self._has_padding and not has_mask and self.get_seq_length():
            raise ValueError(
                "the cache has seen padding: attention_mask must say which of its tokens are real"
            )
        self._has_padding = has_padding

    def check(self, config: HydraHeadConfig) -> None:
        """See that it is of this model.

        Raises:
            ValueError: If it was made for heads of other kinds or sizes.
        """
        if self._made_for != _marks(config):
            raise ValueError(
                "the cache was made for another model: its heads have other kinds or sizes"
            )

    @property
    def num_bytes(self) -> int:
        """Memory that it holds, in bytes, of all rows together."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _marks(config: HydraHeadConfig) -> tuple[Any, ...]:
    """What decides the cache's shapes."""
    kernel_size = config.la_conv_kernel_size if config.la_short_conv else 0
    kinds = tuple(map(tuple, config.head_kinds))
    sizes = (config.num_key_value_heads, config.head_dim, config.sliding_window_tokens)
    return (kinds, *sizes, kernel_size)
