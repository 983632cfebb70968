"""flash-linear-attention's and FlashQLA's kernels, one compiled for every number of heads.

Which of the two runs is fla's own rule: FlashQLA (https://github.com/QwenLM/FlashQLA) where it is
installed and takes the GPU, dtype and dimension, fla's kernels elsewhere. Both get heads as
documents of one row (`documents.py`, whose legend holds here).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from hydra_kernels.device import check_device
from hydra_kernels.gated_delta_rule.documents import (
    CHUNK_SIZE,
    Documents,
    most_rows,
    one_row,
    packed_rows,
    whole_rows,
)
from hydra_kernels.packed import state_of_each_document

MAX_HEAD_DIM = 256
CHUNK_SIZES = (16, 32, 64)  # fla's
# fla's backward kernel in TileLang has its chunks on a grid's second axis.
_MOST_CHUNKS = 2**16 - 1
# What CUDA graphs were captured with: they read its memory whenever they are replayed.
_captured: set[Documents] = set()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """As `api.gated_delta_rule`, whose checks have passed."""
    from hydra_kernels.gated_delta_rule.compilation import Mode, compile_once

    check_device(q, "fla")
    b, t, n, _ = q.shape
    check_head_dim(q.shape[-1])
    check_head_dim(v.shape[-1])
    of_channels = g.dim() == 4
    sizes = CHUNK_SIZES[1:] if of_channels else CHUNK_SIZES
    if chunk_size not in sizes:
        raise ValueError(f"impl='fla' takes a chunk_size of {sizes}, got {chunk_size}")
    num_rows, with_state = b * n, initial_state is not None or output_final_state
    compile_once(Mode(q.shape[-1], v.shape[-1], q.dtype, with_state, of_channels), q.device)
    row = [one_row(x) for x in (q, k, v, g, beta)]
    uses_flash_qla = why_not_flash_qla(*row) is None
    most_chunks = None if uses_flash_qla else _MOST_CHUNKS

    def documents(count: int) -> Documents:
        if cu_seqlens is None:
            return whole_rows(count, t, q.device)
        return packed_rows(cu_seqlens, count)

    head_dim, num_chunks = max(q.shape[-1], v.shape[-1]), documents(1).num_chunks(chunk_size)
    size = min(num_rows, most_rows(t, num_chunks, head_dim, most_chunks))
    states = None if initial_state is None else initial_state.flatten(0, 1)
    outputs, ends = [], []
    for start in range(0, num_rows, size):
        of_group = documents(min(size, num_rows - start))
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.add(of_group)
        span = slice(start * t, (start + of_group.num_rows) * t)
        output, end = run(
            [x[:, span] for x in row],
            scale,
            None if states is None else states[start : start + of_group.num_rows],
            output_final_state,
            of_group,
            uses_flash_qla,
            chunk_size,
        )
        outputs.append(output)
        ends.append(end)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    output = output.view(b, n, t, -1).transpose(1, 2)
    if not output_final_state:
        return output, None
    return output, torch.cat(ends).unflatten(0, (b, n))


def run(
    row: list[Tensor],
    scale: float,
    states: Tensor | None,
    output_final_state: bool,
    documents: Documents,
    uses_flash_qla: bool,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor | None]:
    """One call of the kernels.

    Args:
        row: q, k, v, g, beta as `[1, num_rows t, 1, ...]`; g per head or per channel.
        scale: Factor on the queries.
        states: `[num_rows, d_k, d_v]` before each row's first document, or None.
        output_final_state: Return the state after each row's last document.
        documents: Where they lie.
        uses_flash_qla: As :func:`why_not_flash_qla` says.
        chunk_size: Tokens solved together, by fla's own kernels.

    Returns:
        `[1, num_rows t, 1, d_v]`, and `[num_rows, d_k, d_v]` or None.
    """
    states = state_of_each_document(states, documents.num_documents)
    options: dict[str, Any] = dict(
        scale=scale,
        initial_state=None if states is None else states.unsqueeze(1),
        output_final_state=output_final_state,
        cu_seqlens=documents.cu_seqlens,
    )
    if row[3].dim() == 4:
        from fla.ops.kda import chunk_kda

        output, ends = chunk_kda(
            *row, chunk_size=chunk_size, cu_seqlens_cpu=documents.cu_seqlens_cpu, **options
        )
    elif uses_flash_qla:
        import flash_qla

        options["cp_context"] = context_of(documents)
        output, ends = flash_qla.chunk_gated_delta_rule(*row, **options)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        options["chunk_indices"] = _chunk_indices(documents, chunk_size)
        output, ends = chunk_gated_delta_rule(*row, chunk_size=chunk_size, **options)
    if ends is None:
        return output, None
    return output, ends.squeeze(1)[documents.num_documents - 1 :: documents.num_documents]


def why_not_flash_qla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> str | None:
    """Why fla would not hand these to FlashQLA; None if it would."""
    if g.dim() == 4:
        return "it has no decay per channel"
    from fla.ops.gated_delta_rule.backends.flash_qla import FlashQLABackend

    backend = FlashQLABackend()
    if not backend.is_available():
        return "FlashQLA is not installed"
    if not backend.is_enabled() or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return "FlashQLA is switched off"
    accepted, reason = backend.verify("chunk_gated_delta_rule", q, k, v, g, beta)
    return None if accepted else str(reason)


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a head dimension that no kernel takes."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"impl='fla' takes head dimensions up to {MAX_HEAD_DIM}, got {head_dim}")


def _chunk_indices(documents: Documents, chunk_size: int) -> Tensor:
    """Document and place in it of each chunk, as fla's kernels want them; looked up once.

    Kept with the offsets that its kernels look up themselves, which it keeps for a few tensors.
    """
    key = f"fla, {chunk_size}"
    if key not in documents.kept:
        from fla.ops.utils import prepare_chunk_indices, prepare_chunk_offsets

        cu_seqlens, on_cpu = documents.cu_seqlens, documents.cu_seqlens_cpu
        with torch.inference_mode(False):
            documents.kept[key] = (
                prepare_chunk_indices(cu_seqlens, chunk_size, cu_seqlens_cpu=on_cpu),
                prepare_chunk_offsets(cu_seqlens, chunk_size),
            )
    return documents.kept[key][0]


@torch.inference_mode(False)
def context_of(documents: Documents, force_cut: bool = False) -> Any:
    """FlashQLA's own look at the documents, which its kernels would else take again and again.

    It cuts long documents into pieces that run side by side. What it looks up is kept for the last
    four tensors alone, and read from the GPU, which waits for it: with another number of heads in
    each layer, in each layer. So it is told once, on the CPU and for one row, whose cuts all rows
    share. Forward passes without a backward pass cut alike: what is computed twice is bit-equal.
    """
    if "FlashQLA" in documents.kept:
        return documents.kept["FlashQLA"]
    from flash_qla.ops.gated_delta_rule.chunk import CHUNK_SIZE as flash_qla_chunk
    from flash_qla.ops.gated_delta_rule.chunk import build_cp_context

    of_row = build_cp_context(
        documents.boundaries,
        enable_intra=True,
        num_v_heads=documents.num_rows,
        chunk_size=flash_qla_chunk,
        is_train=True,
        force_intra_cp=force_cut,
    )
    _tell_chunks(documents.cu_seqlens, documents.boundaries, documents)
    context = dataclasses.replace(of_row, cu_seqlens=documents.cu_seqlens)
    if of_row.is_intra:
        cuts = cuts_of_all_rows(of_row, documents)
        on_device = {name: tensor.to(documents.device) for name, tensor in cuts.items()}
        _tell_chunks(on_device["intra_cp_cu_seqlens"], of_row.intra_cp_cu_seqlens, documents)
        context = dataclasses.replace(context, **on_device)
    documents.kept["FlashQLA"] = context
    return context


def _tell_chunks(cu_seqlens: Tensor, of_row: Tensor, documents: Documents) -> None:
    """Attach to boundaries of all rows what FlashQLA's `prepare_varlen_metadata` would.

    It counts for each document anew: here for those of one row, which are the same in all.

    Args:
        cu_seqlens: `[rows * pieces + 1]` on the device.
        of_row: `[pieces + 1]` on the CPU.
        documents: The rows.
    """
    from flash_qla.utils.index import prepare_varlen_metadata

    chunks = chunks_of_all_rows(prepare_varlen_metadata(of_row.clone(), of_row), documents)
    chunk_size, offsets, num_chunks, indices = chunks
    device = cu_seqlens.device
    cu_seqlens._flash_qla_prepared_varlen = (  # type: ignore[attr-defined]
        chunk_size, offsets.to(device), num_chunks, indices.to(device)
    )  # fmt: skip


def chunks_of_all_rows(of_row: Tensor, documents: Documents) -> tuple[int, Tensor, int, Tensor]:
    """FlashQLA's chunk size, offsets, number and indices of chunks: of one row, for all rows.

    Args:
        of_row: Boundaries `[pieces + 1]` with these of one row attached.
        documents: The rows.

    Returns:
        Chunk size, where each piece's chunks begin `[rows * pieces + 1]`, their number, and the
        piece and place in it of each `[chunks, 2]`.
    """
    chunk_size, offsets, num_chunks, indices = of_row._flash_qla_prepared_varlen  # type: ignore[attr-defined]
    piece, place = indices.unbind(1)
    pieces = documents.tile(piece, len(of_row) - 1)
    all_indices = torch.stack((pieces, place.repeat(documents.num_rows)), dim=1)
    return (
        chunk_size,
        documents.tile_boundaries(offsets),
        num_chunks * documents.num_rows,
        all_indices,
    )


def cuts_of_all_rows(of_row: Any, documents: Documents) -> dict[str, Tensor]:
    """FlashQLA's cuts of one row's documents, for all rows.

    Args:
        of_row: Its context: where pieces begin `[pieces + 1]`, the piece that each document begins
            with `[documents + 1]`, the document of each piece `[pieces]`, and whether a piece is
            its document's last, and first, `[pieces]`.
        documents: The rows.
    """
    return {
        "intra_cp_cu_seqlens": documents.tile_boundaries(of_row.intra_cp_cu_seqlens),
        "seq_map_r2c": documents.tile_boundaries(of_row.seq_map_r2c),
        "seq_map_c2r": documents.tile(of_row.seq_map_c2r, documents.num_documents),
        "ht_mask": of_row.ht_mask.repeat(documents.num_rows),
        "ht_mask_bwd": of_row.ht_mask_bwd.repeat(documents.num_rows),
    }
