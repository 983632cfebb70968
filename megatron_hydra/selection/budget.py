"""Budgets of a head plan: how many heads, or which cost, under which constraints of each layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from megatron_hydra.errors import UserError
from megatron_hydra.schema import MAY_LACK, Limits, ReadBy, check_fields
from megatron_hydra.selection.cost import (
    GIB,
    PlanCost,
    ServeDtype,
    decode_bounds,
    find_device,
    total_cache_bytes,
)
from megatron_hydra.selection.shape import ModelShape

BudgetKind = Literal["fa_heads", "fa_ratio", "kv_cache_ratio", "cache_gib", "decode_ms"]


@dataclass(frozen=True)
class Constraints:
    """What each layer must keep to.

    Attributes:
        min_fa_per_layer: FA heads at least.
        per_layer: FA heads exactly; None leaves it open.
        whole_groups: A query group's heads are all FA or all LA, so that the cache shrinks.
        multiple_of: The number of FA heads is a multiple of this, such as the tensor-parallel
            size, so that every rank gets as many.
        max_fa_per_layer: FA heads at most; None: all may be.

    Raises:
        UserError: If a number is negative or, for ``multiple_of``, below 1.
    """

    min_fa_per_layer: Annotated[int, Limits(least=0)] = 0
    per_layer: Annotated[int, Limits(least=0)] | None = None
    whole_groups: bool = False
    multiple_of: Annotated[int, Limits(least=1)] = 1
    max_fa_per_layer: Annotated[int, Limits(least=0)] | None = field(
        default=None, metadata=MAY_LACK
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def words(self) -> str:
        """The constraints as a reader would say them; empty if there are none."""
        found = []
        if self.min_fa_per_layer:
            found.append(f"{self.min_fa_per_layer} or more FA heads per layer")
        if self.max_fa_per_layer is not None:
            found.append(f"{self.max_fa_per_layer} or fewer FA heads per layer")
        if self.per_layer is not None:
            found.append(f"FA heads per layer: {self.per_layer}")
        if self.whole_groups:
            found.append("whole query groups")
        if self.multiple_of > 1:
            found.append(f"FA heads per layer in multiples of {self.multiple_of}")
        return ", ".join(found)

    def step(self, shape: ModelShape) -> int:
        """The numbers of FA heads that a layer may have are multiples of this."""
        return math.lcm(shape.heads_per_group if self.whole_groups else 1, self.multiple_of)

    def layer_counts(self, shape: ModelShape) -> range:
        """The numbers of FA heads that a layer may have.

        Raises:
            UserError: If there is none; says which would be possible without the numbers asked.
        """
        step, low, high = self.step(shape), self.min_fa_per_layer, self.max_fa_per_layer
        possible = range(0, shape.num_heads + 1, step)
        words = f"a layer has {shape.num_heads} heads"
        if step > 1:
            words += f", of which a multiple of {step} can be FA (whole groups, --multiple-of)"
        if low > possible[-1]:
            raise UserError(f"at least {low} FA heads per layer asked for, but {words}")
        if (exact := self.per_layer) is not None:
            if exact not in possible:
                raise UserError(f"{exact} FA heads per layer asked for, but {words}")
            if exact < low:
                raise UserError(f"{exact} FA heads per layer contradict at least {low}")
            if high is not None and exact > high:
                raise UserError(f"{exact} FA heads per layer contradict at most {high}")
            return range(exact, exact + 1, step)
        most = possible[-1] if high is None else min(high, possible[-1])
        counts = range(-(-low // step) * step, most + 1, step)
        if not counts:
            raise UserError(
                f"at least {low} and at most {high} FA heads per layer asked for, but {words}"
            )
        return counts


class Limit(NamedTuple):
    """A cost that a plan may not exceed."""

    cost: PlanCost
    most: float


@dataclass(frozen=True)
class Problem:
    """A budget for one model, ready to be solved.

    Attributes:
        shape: The model.
        constraints: Of each layer.
        num_fa_heads: FA heads of the model, exactly; None where limits decide.
        limits: What the plan may cost.
    """

    shape: ModelShape
    constraints: Constraints
    num_fa_heads: int | None = None
    limits: tuple[Limit, ...] = ()

    def allows(self, num_fa_heads: int, num_groups: int) -> bool:
        """Whether so many FA heads and stored groups in the model keep to number and limits."""
        return self.num_fa_heads in (None, num_fa_heads) and all(
            limit.cost.at(num_fa_heads, num_groups) <= limit.most for limit in self.limits
        )


def _read_amount(value: Any, name: str) -> Fraction | float:
    """A number, or the text of a ratio, such as 1/4."""
    if isinstance(value, int | float | Fraction) and not isinstance(value, bool):
        return value
    try:
        return Fraction(value if isinstance(value, str) else "")
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name} is {value!r}; a number, or a ratio such as 1/4") from error


@dataclass(frozen=True)
class Budget:
    """What a plan may keep, by one figure.

    Attributes:
        kind: `fa_heads`: FA heads of the model. `fa_ratio`: the same as a share of all heads,
            rounded to a number that the constraints allow. `kv_cache_ratio`: stored query groups
            as a share of all, at most. `cache_gib`: KV cache and state of a sequence, in GiB, at
            most. `decode_ms`: predicted milliseconds per decoded token, at most.
        amount: The figure.
        context_tokens: Length of the sequence, for `cache_gib` and `decode_ms`.
        device: For `decode_ms`.
        serve_dtype: Number format of weights and caches, for `cache_gib` and `decode_ms`.

    Raises:
        UserError: If the kind is unknown, the amount is out of range, or the length is missing.
    """

    kind: BudgetKind
    amount: Annotated[Fraction | float, ReadBy(_read_amount)]
    context_tokens: int | None = None
    device: str = "h100"
    serve_dtype: ServeDtype = field(default="bf16", metadata=MAY_LACK)

    def __post_init__(self) -> None:
        check_fields(self)
        kind, amount = self.kind, self.amount
        if kind == "fa_heads":
            if amount != int(amount) or amount < 0:
                raise UserError(f"{amount} FA heads asked for; a whole number from 0 is needed")
        elif kind in ("fa_ratio", "kv_cache_ratio"):
            what = "FA heads" if kind == "fa_ratio" else "the KV cache"
            if not 0 < amount <= 1:
                raise UserError(f"ratio of {what} {amount} must be above 0 and at most 1")
        elif not 0 < amount < math.inf:
            raise UserError(f"a budget of {self.words} must be above 0 and finite")
        elif self.context_tokens is None or self.context_tokens < 1:
            raise UserError(f"a budget of {self.words} needs a context length of 1 token or more")

    @property
    def words(self) -> str:
        """The budget as a reader would say it."""
        amount = self.amount if isinstance(self.amount, Fraction) else f"{self.amount:g}"
        at = f" at {self.context_tokens:,} tokens" if self.context_tokens else ""
        return {
            "fa_heads": f"{amount} FA heads",
            "fa_ratio": f"{amount} of the heads FA",
            "kv_cache_ratio": f"{amount} of the teacher's KV cache",
            "cache_gib": f"{amount} GiB of cache and state{at} ({self.serve_dtype})",
            "decode_ms": f"{amount} ms per decoded token{at} on {find_device(self.device).name} "
            f"({self.serve_dtype})",
        }[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a ratio is text, such as 1/4."""
        amount = str(self.amount) if isinstance(self.amount, Fraction) else self.amount
        return {**asdict(self), "amount": amount}

    def problem(self, shape: ModelShape, constraints: Constraints) -> Problem:
        """The budget for one model.

        Raises:
            UserError: If no plan can keep to it by its numbers of heads or groups; says what is
                possible. Costs are found impossible when the problem is solved.
        """
        if self.kind in ("fa_heads", "fa_ratio"):
            return Problem(shape, constraints, self._num_fa_heads(shape, constraints))
        constraints.layer_counts(shape)  # raises where there is none
        return Problem(shape, constraints, limits=self._limits(shape))

    def _limits(self, shape: ModelShape) -> tuple[Limit, ...]:
        if self.kind == "kv_cache_ratio":
            groups = math.floor(self.amount * shape.total_groups)
            if groups == 0:
                raise UserError(
                    f"ratio {self.amount} of {shape.total_groups} query groups is less than one "
                    f"group: 1/{shape.total_groups} is the least"
                )
            return (Limit(PlanCost(0, 0, 1, shape.total_groups), groups),)
        assert self.context_tokens is not None
        if self.kind == "cache_gib":
            cost = total_cache_bytes(shape, self.context_tokens, self.serve_dtype)
            return (Limit(cost, float(self.amount) * GIB),)
        device = find_device(self.device)
        bounds = decode_bounds(shape, self.context_tokens, device, dtype=self.serve_dtype)
        return tuple(Limit(bound, float(self.amount) / 1e3) for bound in bounds)

    def _num_fa_heads(self, shape: ModelShape, constraints: Constraints) -> int:
        counts, step = constraints.layer_counts(shape), constraints.step(shape)
        low, high = (shape.num_layers * count for count in (counts[0], counts[-1]))
        if self.kind == "fa_ratio":
            exact = self.amount * shape.total_heads
            number = math.floor(exact / step + Fraction(1, 2)) * step
            if number == 0:
                unit = "a head" if step == 1 else f"the {step} heads that become FA together"
                raise UserError(
                    f"ratio {self.amount} of {shape.total_heads} heads is less than half {unit}"
                )
        else:
            number = int(self.amount)
            if number > shape.total_heads:
                raise UserError(
                    f"{number} FA heads asked for, but the model has {shape.total_heads} heads"
                )
        if number < low:
            raise UserError(
                f"a budget of {number} FA heads cannot give {counts[0]} to each of "
                f"{shape.num_layers} layers: that takes {low}"
            )
        if number > high:
            raise UserError(
                f"a budget of {number} FA heads is too large for {counts[-1]} in each of "
                f"{shape.num_layers} layers: that makes {high} ({constraints.words})"
            )
        if number % step:
            below = number // step * step
            raise UserError(
                f"{number} FA heads asked for, but they become FA {step} at a time (whole "
                f"groups, --multiple-of): ask for {below} or {below + step}"
            )
        return number
