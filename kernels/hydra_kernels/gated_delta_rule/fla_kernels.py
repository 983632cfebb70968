"""flash-linear-attention's and FlashQLA's kernels, one compiled for every number of heads.

Which of the two runs is fla's own rule: FlashQLA (https://github.com/QwenLM/FlashQLA) where it is
installed and takes the GPU, dtype and dimension, fla's Triton kernels elsewhere. Both get heads as
documents of one row (`documents.py`).
"""

from __future__ import annotations

import dataclasses
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
    num_rows, with_state = b * n, initial_state is not None or output_final_state
    compile_once(Mode(q.shape[-1], v.shape[-1], q.dtype, with_state), q.device)

    def documents(count: int) -> Documents:
        if cu_seqlens is None:
            return whole_rows(count, t, q.device)
        return packed_rows(cu_seqlens, count)

    size = min(num_rows, most_rows(t, documents(1).num_chunks, max(q.shape[-1], v.shape[-1])))
    row = [one_row(x) for x in (q, k, v, g, beta)]
    states = None if initial_state is None else initial_state.flatten(0, 1)
    outputs, ends = [], []
    for start in range(0, num_rows, size):
        of_group = documents(min(size, num_rows - start))
        span = slice(start * t, (start + of_group.num_rows) * t)
        output, end = run(
            [x[:, span] for x in row],
            scale,
            None if states is None else states[start : start + of_group.num_rows],
            output_final_state,
            of_group,
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
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor | None]:
    """One call of the kernels.

    Args:
        row: q, k, v, g, beta as `[1, num_rows t, 1, ...]`.
        scale: Factor on the queries.
        states: `[num_rows, d_k, d_v]` before each row's first document, or None.
        output_final_state: Return the state after each row's last document.
        documents: Where they lie.
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
    if runs_flash_qla(*row):
        import flash_qla

        options["cp_context"] = context_of(documents)
        output, ends = flash_qla.chunk_gated_delta_rule(*row, **options)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        options["cu_seqlens_cpu"] = documents.cu_seqlens_cpu
        output, ends = chunk_gated_delta_rule(*row, chunk_size=chunk_size, **options)
    if ends is None:
        return output, None
    return output, ends.squeeze(1)[documents.num_documents - 1 :: documents.num_documents]


def runs_flash_qla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> bool:
    """Whether fla would hand these to FlashQLA."""
    from fla.ops.gated_delta_rule.backends.flash_qla import FlashQLABackend

    backend = FlashQLABackend()
    if not (backend.is_available() and backend.is_enabled()):
        return False
    return backend.verify("chunk_gated_delta_rule", q, k, v, g, beta)[0]


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for a head dimension that no kernel takes."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"impl='fla' takes head dimensions up to {MAX_HEAD_DIM}, got {head_dim}")


def context_of(documents: Documents, force_cut: bool = False) -> Any:
    """FlashQLA's own look at the documents, which its kernels would else take again and again.

    It cuts long documents into pieces that run side by side. What it looks up is kept for the last
    four tensors alone, and read from the GPU, which waits for it: with another number of heads in
    each layer, in each layer. So it is told once, on the CPU and for one row, whose cuts all rows
    share. Forward passes without a backward pass cut alike: what is computed twice is bit-equal.
    """
    if "flash_qla" in documents.kept:
        return documents.kept["flash_qla"]
    from flash_qla.ops.gated_delta_rule.chunk import build_cp_context
    from flash_qla.utils.index import prepare_varlen_metadata

    of_row = build_cp_context(
        documents.boundaries,
        enable_intra=True,
        num_v_heads=documents.num_rows,
        chunk_size=CHUNK_SIZE,
        is_train=True,
        force_intra_cp=force_cut,
    )
    prepare_varlen_metadata(documents.cu_seqlens, documents.cu_seqlens_cpu)
    context = dataclasses.replace(of_row, cu_seqlens=documents.cu_seqlens)
    if of_row.is_intra:
        cuts = cuts_of_all_rows(of_row, documents)
        on_device = {name: tensor.to(documents.device) for name, tensor in cuts.items()}
        prepare_varlen_metadata(on_device["intra_cp_cu_seqlens"], cuts["intra_cp_cu_seqlens"])
        context = dataclasses.replace(context, **on_device)
    documents.kept["flash_qla"] = context
    return context


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
