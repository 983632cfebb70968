"""The preparation's public function: checks its input, calls the implementation named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from hydra_kernels.la_preparation import reference
from hydra_kernels.packed import check_cu_seqlens

if TYPE_CHECKING:
    from torch import Tensor

Impl = Literal["reference", "triton"]
_MAX_HEAD_DIM = 256


class LAPreparationOutput(NamedTuple):
    """What `la_preparation` returns, as `gated_delta_rule` takes it.

    Attributes:
        q, k, v: [b, t, n, d] in x's dtype; "triton" writes them, g and beta as [b, n, t, ...] in
            memory, and reads their gradients without a copy where they lie so too.
        g: [b, t, n] float32 (float64 for float64 input), or None without `a`.
        beta: as g, or None without `b`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None


def la_preparation(
    x: Tensor,
    *,
    num_heads: int,
    a: Tensor | None = None,
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    b: Tensor | None = None,
    conv_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    empty_gradients: Callable[[], list[Tensor]] | None = None,
    impl: Impl,
) -> LAPreparationOutput:
    """From one in-projection's rows to the inputs of the gated delta rule, head by head.

        q | k | v = silu(conv(x)),    q, k = l2norm(rope(rmsnorm(.))),
        g = -exp(a_log) softplus(a + dt_bias),    beta = sigmoid(b)

    (Gated DeltaNet's input side, arXiv 2412.06464, section 3.4, with the teacher's norm and RoPE
    between SiLU and L2 norm.) Each part but the L2 norm is left out with its tensors; SiLU goes
    with the convolution. Computed in float32 and rounded once. Differentiable in x, a, b, a_log,
    dt_bias, conv_weight, initial_state and both norm weights.

    Args:
        x: [b, t, 3 n d], queries | keys | values, head by head. Any strides: "triton" reads it
            in place if its last dimension is contiguous, and copies it first otherwise. Its
            gradient lies in memory as x does, sequence first or batch first.
        num_heads: n.
        a: [b, t, n], with a_log and dt_bias [n]; any strides.
        b: [b, t, n]; any strides.
        conv_weight: [3 n d, k], depthwise taps; [:, -1] is the one on the token itself. "triton"
            takes k up to 4.
        initial_state: [b, k - 1, 3 n d], the tokens before x, oldest first; None for zeros.
        q_norm_weight, k_norm_weight: [d], both or neither.
        norm_eps: added to the mean square.
        cos, sin: [r, t, d / 2] float32, of rotate-half angles: dimensions i and i + d / 2 turn
            together. b is divisible by r; each serves b / r rows in turn.
        cu_seqlens: [documents + 1] integer, where documents begin in a row that packs several
            (b = 1): 0, ascending, t. The convolution starts anew at each; the initial state is
            the first document's. None for whole sequences.
        empty_gradients: Called once in each backward pass, it makes the tensors that the gradients
            of x, a and b (of those given) are written to, so that a caller who joins them with
            others need not copy them. Shaped and typed as these, last dimension contiguous.
            "reference" does not call it.
        impl: "reference" is PyTorch on any device; "triton" is one kernel each way, for bfloat16,
            float16 and float32 with even d up to 256. Neither stands in for the other.

    Raises:
        ValueError: shapes that do not fit, an unknown impl, what "triton" does not take.
    """
    _check(x, num_heads, conv_weight, initial_state, cu_seqlens)
    _check_gates(x, num_heads, a, a_log, dt_bias, b)
    _check_vectors(x, num_heads, q_norm_weight, k_norm_weight, cos, sin)
    tensors = (
        x, a, b, conv_weight, q_norm_weight, k_norm_weight, a_log, dt_bias, initial_state,
        cos, sin, cu_seqlens,
    )  # fmt: skip
    if impl == "reference":
        return LAPreparationOutput(*reference.la_preparation(*tensors, num_heads, norm_eps))
    if impl == "triton":
        from hydra_kernels.la_preparation import triton_la_preparation

        triton_la_preparation.check(x, num_heads, conv_weight)
        outputs = triton_la_preparation.LAPreparation.apply(
            *tensors, num_heads, norm_eps, empty_gradients
        )
        return LAPreparationOutput(*outputs)
    raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a head dimension that "triton" does not take."""
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise ValueError(
            f"impl='triton' takes even head dimensions up to {_MAX_HEAD_DIM}, got {head_dim}"
        )


def _check(
    x: Tensor,
    num_heads: int,
    conv_weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError where x, the heads or the convolution do not fit one another."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [b, t, 3 n d] with a token at least, got {tuple(x.shape)}")
    b, _, channels = x.shape
    if num_heads < 1 or channels == 0 or channels % (3 * num_heads):
        raise ValueError(f"x {tuple(x.shape)} is not q, k and v of {num_heads} heads side by side")
    check_cu_seqlens(cu_seqlens, b)
    if conv_weight is None:
        if initial_state is not None:
            raise ValueError("initial_state is given without conv_weight, whose past it is")
        return
    if conv_weight.dim() != 2 or conv_weight.shape[0] != channels or conv_weight.shape[1] == 0:
        raise ValueError(
            f"conv_weight must be [{channels}, k] to go with x {tuple(x.shape)}, "
            f"got {tuple(conv_weight.shape)}"
        )
    _expect("initial_state", initial_state, (b, conv_weight.shape[1] - 1, channels), x)


def _check_gates(
    x: Tensor,
    num_heads: int,
    a: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    b: Tensor | None,
) -> None:
    """Raise ValueError unless a, a_log and dt_bias come together, and all gates fit x."""
    if len({t is None for t in (a, a_log, dt_bias)}) > 1:
        raise ValueError("a, a_log and dt_bias make the decay together: give all three or none")
    for name, tensor in (("a", a), ("b", b)):
        _expect(name, tensor, (*x.shape[:2], num_heads), x)
    for name, tensor in (("a_log", a_log), ("dt_bias", dt_bias)):
        _expect(name, tensor, (num_heads,), x)


def _check_vectors(
    x: Tensor,
    num_heads: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Raise ValueError unless norms and angles come in pairs that fit x."""
    rows, num_tokens, channels = x.shape
    d = channels // (3 * num_heads)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight go together: give both or neither")
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        _expect(name, weight, (d,), x)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together: give both or neither")
    if cos is None or sin is None:
        return
    if d % 2 or cos.dim() != 3 or cos.shape[0] == 0 or rows % cos.shape[0]:
        raise ValueError(
            f"cos must be [r, {num_tokens}, {d} / 2] with even d and r dividing {rows}, "
            f"got {tuple(cos.shape)}"
        )
    for name, tensor in (("cos", cos), ("sin", sin)):
        _expect(name, tensor, (cos.shape[0], num_tokens, d // 2), x)


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} to go with x {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )
