"""The gated delta rule's public function: checks its input, calls the implementation named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from hydra_kernels.gated_delta_rule import reference
from hydra_kernels.packed import check_cu_seqlens

if TYPE_CHECKING:
    from torch import Tensor

Impl = Literal["reference", "fla"]


class GatedDeltaRuleOutput(NamedTuple):
    """What `gated_delta_rule` returns.

    Attributes:
        output: [b, t, heads, d_v] in v's dtype.
        final_state: [b, heads, d_k, d_v] float32 (float64 for float64 input), or None if not
            asked for.
    """

    output: Tensor
    final_state: Tensor | None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl,
    chunk_size: int = 64,
) -> GatedDeltaRuleOutput:
    """Linear attention with a state that decays and is corrected: Gated DeltaNet's mixer.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    (Eq 10 of Gated Delta Networks, arXiv 2412.06464; the state transposed.) With a decay for each
    channel of the keys it is Kimi Delta Attention's (arXiv 2510.26692, Eq 1):

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T

    Differentiable in every tensor. With keys of unit length and beta in [0, 1] the state never
    amplifies what it holds; normalising them is the caller's.

    Args:
        q, k: [b, t, heads, d_k]. "fla" reads them, and all that follow, without a copy where they
            lie in memory as [b, heads, t, ...], as does its output.
        v: [b, t, heads, d_v].
        g: [b, t, heads] or [b, t, heads, d_k], log of the decay, at most 0; float32 recommended.
        beta: [b, t, heads], write strength; float32 recommended.
        scale: factor on the queries; d_k ** -0.5 when None.
        initial_state: [b, heads, d_k, d_v] or None for zeros.
        output_final_state: return the state after the last token as well.
        cu_seqlens: [documents + 1] integer, where documents begin in a row that packs several
            (b = 1): 0, ascending, t. The state starts anew at each; the initial state is the first
            document's, the final state the last one's. "fla" reads a tensor once and keeps what it
            read: pass a new one in place of changing it. None for whole sequences.
        impl: "reference" is PyTorch on any device; "fla" is flash-linear-attention's kernels, and
            FlashQLA's where fla would take those, on CUDA alone, with d_k and d_v up to 256.
            Neither stands in for the other. One compiled kernel serves every number of heads; the
            first call of a process may wait until it is compiled (`compilation.py`). On Hopper
            GPUs with Triton 3.4 to 3.7.0, whose code for fla's backward is wrong, fla's backward
            raises unless the package tilelang is installed.
        chunk_size: tokens solved together; "fla" takes 16, 32 or 64, of which FlashQLA makes 64,
            and with a decay per channel, for which FlashQLA has no kernels, 32 or 64.

    Raises:
        ValueError: shapes that do not fit, an unknown impl; for "fla" CPU tensors, larger heads,
            and a row with more tokens or chunks than a kernel counts for one head (`documents.py`).
        ImportError: impl="fla" without the package fla-core.
    """
    _check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if impl == "reference":
        output, state = reference.chunk_gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, chunk_size, cu_seqlens
        )
        return GatedDeltaRuleOutput(output, state if output_final_state else None)
    if impl == "fla":
        from hydra_kernels.gated_delta_rule import fla_kernels

        return GatedDeltaRuleOutput(
            *fla_kernels.gated_delta_rule(
                q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, chunk_size
            )
        )
    raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError where a shape does not follow from q's and v's."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q and v must be [b, t, heads, d], got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    b, t, heads, d_k = q.shape
    if t == 0:
        raise ValueError("q has no tokens: t must be 1 or more")
    check_cu_seqlens(cu_seqlens, b)
    expected = {
        "k": (k, (b, t, heads, d_k)),
        "v": (v, (b, t, heads, v.shape[-1])),
        "g": (g, (b, t, heads, d_k) if g.dim() == 4 else (b, t, heads)),
        "beta": (beta, (b, t, heads)),
    }
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (b, heads, d_k, v.shape[-1]))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} to go with q {tuple(q.shape)}, got {tuple(tensor.shape)}"
            )
