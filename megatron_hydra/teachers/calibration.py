"""A teacher run on a text, a layer in memory at a time, and what is measured of its heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hydra.model.build import build_layer
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.teachers.attention_statistics import AttentionMeter, AttentionStatistics
from megatron_hydra.teachers.loading import load_weights_into
from megatron_hydra.teachers.weight_names import EMBEDDING
from megatron_hydra.teachers.weights import TeacherWeights

if TYPE_CHECKING:
    from collections.abc import Callable


class Measured(NamedTuple):
    """What was measured of a teacher's heads, where it was asked for.

    Attributes:
        head_rms: `[layers, heads]` float32, root mean square of each head's output before the
            output projection, over all tokens and channels.
        attention: What each head looks at.
    """

    head_rms: Tensor | None = None
    attention: AttentionStatistics | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file."""
        found = {} if self.head_rms is None else {"head_rms": self.head_rms}
        return found if self.attention is None else {**found, **self.attention._asdict()}

    def of_layer(self, index: int) -> tuple[Tensor | None, AttentionStatistics | None]:
        """The same of one layer, as of a model of one."""
        here = slice(index, index + 1)
        rms, found = self.head_rms, self.attention
        return (
            None if rms is None else rms[here],
            None if found is None else AttentionStatistics(*(tensor[here] for tensor in found)),
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Measured:
        """What :meth:`tensors` gave."""
        names = AttentionStatistics._fields
        has_attention = names[0] in tensors
        attention = AttentionStatistics(*map(tensors.get, names)) if has_attention else None
        return cls(tensors.get("head_rms"), attention)


class HeadRms:
    """The mean square of each head's output in one layer, which a hook adds up.

    Args:
        attention: Its attention, with Megatron's output projection.
    """

    def __init__(self, attention: Any) -> None:
        self._heads = attention.config.num_attention_heads
        self._squares, self._count = torch.zeros(self._heads, dtype=torch.float64), 0
        attention.linear_proj.register_forward_pre_hook(self._add)

    def _add(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        per_head = inputs[0].unflatten(-1, (self._heads, -1))  # [s, b, h] -> [s, b, heads, d]
        self._squares += per_head.double().square().sum(dim=(0, 1, 3)).cpu()
        self._count += per_head[..., 0, :].numel()

    def found(self) -> Tensor:
        """`[heads]` float32."""
        return (self._squares / self._count).sqrt().float()


@torch.no_grad()
def measure_heads(
    config: HydraConfig,
    weights: TeacherWeights,
    token_batches: Sequence[Tensor],
    layers: Iterable[int],
    *,
    rms: bool,
    attention: bool,
) -> Measured:
    """Run a teacher, whole on one rank, and measure every head.

    Args:
        config: Of the teacher or its hybrid, of the `local` backend.
        weights: The teacher's.
        token_batches: Token ids `[b, s]`, int64; s at least 4.
        layers: All layers in turn, such as what shows the progress gives.
        rms: Whether to measure the size of the heads' outputs.
        attention: Whether to measure what they look at.
    """
    (name,) = EMBEDDING.hugging_face
    embedding = weights.read([name])[name]
    # [b, s] -> [s, b, h]
    hidden = [F.embedding(x, embedding).transpose(0, 1).contiguous() for x in token_batches]
    hidden = [x.to(config.params_dtype) for x in hidden]
    del embedding
    kinds: list[Callable[[Any], Any]] = [*[HeadRms] * rms, *[AttentionMeter] * attention]
    found: list[list[Any]] = []
    for index in layers:
        model = build_layer(config, None, index)
        load_weights_into(model, weights.read_layer(index), ends=False)
        meters = [kind(model.decoder.layers[0].self_attention) for kind in kinds]
        device = next(model.parameters()).device
        for number, tokens in enumerate(token_batches):
            model.set_input_tensor(hidden[number].to(device))
            positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
            hidden[number] = model(tokens.to(device), positions, None).to(hidden[number].device)
        found.append([meter.found() for meter in meters])
        del model, meters  # before the next layer is there
    columns = [list(column) for column in zip(*found, strict=True)]
    return Measured(
        torch.stack(columns[0]) if rms else None,
        AttentionStatistics(*map(torch.stack, zip(*columns[-1], strict=True)))
        if attention
        else None,
    )
