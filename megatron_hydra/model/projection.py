"""Rows of the fused in-projection of one tensor-parallel rank, section by section, head by head.

Each kind of head brings its sections (`mixers`), one kind after the other. With d = head dimension,
n_fa and n_la = full-attention and Gated DeltaNet heads on the rank, g = query groups whose keys and
values the rank projects (it owns them, see `LayerPlacement.group_owner`), these are

    fa_query [n_fa d] | fa_gate [n_fa d] | fa_key [g d] | fa_value [g d] |
    la_query [n_la d] | la_key [n_la d] | la_value [n_la d] | la_gate [n_la d] |
    la_decay [n_la] | la_beta [n_la] | padding

The rows are filled up to a multiple of `ROW_MULTIPLE`, or the odd widths of decay and beta would
leave every row of the output misaligned: FP8 products refuse that, the others grow slower. Padding
rows are zero, get no gradient and are no part of a checkpoint.

Where the teacher's queries, keys and values have biases, every row has one: those of sections that
no teacher has start at zero and train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_MULTIPLE = 16


Units = tuple[tuple[int, ...], tuple[int, ...]]
"""Heads or query groups: those of this rank, and those of all ranks, both ascending."""


@dataclass(frozen=True)
class Section:
    """Consecutive rows of one purpose: `width` rows for each unit, in the units' order."""

    name: str
    units: tuple[int, ...]
    """Teacher's indices of the units here: heads, or query groups for shared keys and values."""
    all_units: tuple[int, ...]
    """The same over all ranks, ascending."""
    width: int
    teacher: str | None = None
    """Which rows of the teacher's start them: `query`, or `key` or `value` of the query group."""
    is_by_group: bool = False
    """Whether the units are query groups."""
    starts_at_zero: bool = False
    """Rows of a gate that is the identity there; others start at random where no teacher's do."""
    part: str = ""
    """Under which name a split hands them over, joined with neighbours of the same; "": its own."""

    @property
    def unit_noun(self) -> str:
        """What a unit is called."""
        return "query group" if self.is_by_group else "head"


@dataclass(frozen=True)
class ProjectionLayout:
    """Which rows of a rank's in-projection belong to which head.

    Args:
        sections: All kinds' in order, see `mixers.base.Mixer.sections`.
    """

    sections: tuple[Section, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the rank's in-projection, padding counted in."""
        return self._used_rows + self.num_padding_rows

    @property
    def num_padding_rows(self) -> int:
        """Rows at the end that belong to no section."""
        return -self._used_rows % ROW_MULTIPLE

    @property
    def padding_rows(self) -> slice:
        """Where they are."""
        return slice(self._used_rows, self.num_rows)

    @property
    def _used_rows(self) -> int:
        return sum(len(section.units) * section.width for section in self.sections)

    def rows(self, name: str, unit: int) -> slice:
        """Rows of one head (one query group for `fa_key` and `fa_value`) in section `name`.

        Raises:
            KeyError: If this rank has no such rows.
        """
        start = 0
        for section in self.sections:
            if section.name == name and unit in section.units:
                start += section.units.index(unit) * section.width
                return slice(start, start + section.width)
            start += len(section.units) * section.width
        raise KeyError(f"no rows for unit {unit} in section {name!r} on this rank")

    def split(self, projected: Tensor) -> Sections:
        """Cut `[s, b, rows]` into views.

        Returns:
            `{section: [s, b, units, width]}`; width 1 is dropped. Sections of one part come as
            one, `{part: [s, b, rows]}`, such as `la_qkv` `[s, b, 3 n_la d]`.
        """
        gradients = SectionGradients(self, projected)
        *parts, _ = _Split.apply(projected, gradients)
        named = zip(self._shapes, parts, strict=True)
        return Sections({name: self.shaped(name, part) for name, part in named}, gradients)

    def cut(self, projected: Tensor) -> dict[str, Tensor]:
        """Views `[s, b, ·]` of all parts of a split in order, "padding" last."""
        parts = projected.split(self._split_sizes, dim=-1)
        return dict(zip((*self._shapes, "padding"), parts, strict=True))

    def shaped(self, name: str, part: Tensor) -> Tensor:
        """A part of a cut as `split` returns it."""
        return part.reshape(*part.shape[:2], *self._shapes[name])

    # Looked up in every layer of every step, where Python's time shows.
    @cached_property
    def _shapes(self) -> dict[str, list[int]]:
        """By part of a split: what its last dimension becomes."""
        shapes: dict[str, list[int]] = {}
        for section in self.sections:
            units = len(section.units)
            if section.part:
                shapes[section.part] = [shapes.get(section.part, [0])[0] + units * section.width]
            else:
                shapes[section.name] = [units] if section.width == 1 else [units, section.width]
        return shapes

    @cached_property
    def _split_sizes(self) -> list[int]:
        return [*map(math.prod, self._shapes.values()), self.num_padding_rows]


class Sections(dict[str, Tensor]):
    """What :meth:`ProjectionLayout.split` returns: views by name, and where gradients may go."""

    def __init__(self, views: dict[str, Tensor], gradients: SectionGradients) -> None:
        super().__init__(views)
        self.gradients = gradients


class SectionGradients:
    """One buffer for the gradients of a split's sections, side by side as the sections are.

    Kernels whose backward writes into it spare the copy that joins them. Whatever lies elsewhere
    is copied, so nobody needs to know of it.

    Args:
        layout: Cuts it.
        like: `[s, b, rows]`, what was split; only its shape, dtype and device are kept.
    """

    def __init__(self, layout: ProjectionLayout, like: Tensor) -> None:
        self.layout = layout
        self._shape = like.shape
        self._options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self._begin(None)

    def empty(self, *names: str) -> list[Tensor]:
        """Memory for the gradients of sections, `[s, b, units, width]`, nothing in it.

        A backward function asks for all of its own at once, in each pass. Whoever asks a second
        time begins a pass, with a new buffer: what an earlier one left stays as it is.
        """
        if self._joined is None or self._handed.intersection(names):
            self._begin(torch.empty(self._shape, **self._options))
        self._handed.update(names)
        return [self.layout.shaped(name, self._places[name]) for name in names]

    def join(self, gradients: dict[str, Tensor | None]) -> Tensor:
        """The `[s, b, rows]` that :meth:`ProjectionLayout.cut` makes `gradients` of; None is 0."""
        # Of another pass, or somebody has added to what lies there: it stays as it is.
        is_usable = all(_is_same(self._places[name], gradients[name]) for name in self._handed)
        if self._joined is None or not is_usable:
            self._begin(torch.empty(self._shape, **self._options))
        for name, place in self._places.items():
            gradient = gradients[name]
            if gradient is None:
                place.zero_()
            elif name not in self._handed:
                _copy(gradient, place)
        joined = self._joined
        self._begin(None)
        return joined

    def _begin(self, joined: Tensor | None) -> None:
        self._joined = joined
        self._places = {} if joined is None else self.layout.cut(joined)
        self._handed: set[str] = set()


class _Split(torch.autograd.Function):
    """`ProjectionLayout.cut`, whose gradients `SectionGradients` joins."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, gradients: SectionGradients) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        parts = gradients.layout.cut(projected)
        ctx.names = list(parts)
        return tuple(parts.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        return ctx.gradients.join(dict(zip(ctx.names, gradients, strict=True))), None


def _is_same(x: Tensor, y: Tensor | None) -> bool:
    """Whether two tensors of one shape and dtype are the same memory."""
    if x.numel() == 0:
        return True
    if y is None or x.data_ptr() != y.data_ptr():
        return False
    return all(a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True) if n > 1)


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy columns; 16 bytes at once if they allow it, as PyTorch copies them one by one."""
    *steps, last = source.stride()
    offsets = (source.storage_offset(), target.storage_offset())
    divisor = math.gcd(*offsets, *steps, *target.stride()[:-1], target.shape[-1])
    if last == 1 and divisor * target.element_size() % 16 == 0:
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)
