"""Packed documents in both stages of the transfer: the row equals the sum over documents alone.

Catches: a state, position or key that leaks over a document's end, a prediction that counts across
it, a row's end that is none, padding that counts, and a row of the wrong length.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.losses import with_options
from kit.teachers import by_head
from kit.tiny import tiny_config, tiny_plan
from torch import Tensor

from megatron_hydra.model.build import build_model
from megatron_hydra.nemo.data import pack_documents
from megatron_hydra.parallel import initialize_model_parallel
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights
from megatron_hydra.transfer import distillation
from megatron_hydra.transfer.alignment import Alignment

LENGTH, END = 12, 5
# Lengths of the documents in each row of a batch.
ROWS = {
    "one fills a row": [[12], [3, 9]],
    "many tiny ones": [[1, 2, 1, 1, 3, 1, 1, 2], [1] * 12],
    "over the middle": [[7, 5], [1, 10, 1]],
}


def _batch(rows: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = sum(rows[0])
    tokens = torch.randint(END + 1, 64, (len(rows), length + 1), generator=generator)
    for row, lengths in enumerate(rows):
        assert sum(lengths) == length
        # Every second row's last document ends with the row, the others are cut there.
        ends = list(accumulate(lengths))[: None if row % 2 else -1]
        tokens[row, [end - 1 for end in ends]] = END
    loss_mask = torch.ones(len(rows), length)
    loss_mask[0, 1::4] = 0.5
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": loss_mask}


def _alone(batch: dict[str, Tensor], rows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Each document as a batch of its own; what follows a document in its row does not count."""
    documents = []
    for row, lengths in enumerate(rows):
        for end, length in zip(accumulate(lengths), lengths):
            part = slice(end - length, end)
            document = {name: values[row : row + 1, part] for name, values in batch.items()}
            document["loss_mask"] = document["loss_mask"].clone()
            if document["tokens"][0, -1] == END:
                document["loss_mask"][0, -1] = 0
            documents.append({**document, "position_ids": torch.arange(length)[None]})
    return documents


@st.composite
def _rows(draw: st.DrawFn) -> list[list[int]]:
    """The documents' lengths in each row of a batch."""
    length = draw(st.integers(1, 12))
    borders = st.sets(st.integers(1, length)).map(lambda ends: [0, *sorted(ends | {length})])
    rows = draw(st.lists(borders, min_size=1, max_size=3))
    return [[end - begin for begin, end in pairwise(row)] for row in rows]


@settings(deadline=None, derandomize=True)
@given(rows=_rows(), cp_size=st.integers(1, 4), multiple_of=st.integers(1, 5))
def test_row_holds_every_document_padded_as_ranks_need(
    rows: list[list[int]], cp_size: int, multiple_of: int
) -> None:
    batch = _batch(rows)
    row, packed = pack_documents(batch, END, cp_size, multiple_of)
    num_tokens = row["tokens"].shape[1]
    assert num_tokens % (cp_size * multiple_of) == 0
    begins = packed.cu_seqlens_q if cp_size == 1 else packed.cu_seqlens_q_padded
    assert begins[0] == 0 and begins[-1] == num_tokens
    assert begins.dtype == torch.int32
    documents = _alone(batch, rows)
    padding = torch.ones(num_tokens, dtype=torch.bool)
    for document, begin, room in zip(documents, begins.tolist(), begins.diff().tolist()):
        length = document["tokens"].shape[1]
        assert room >= length and (cp_size == 1 or room % (2 * cp_size) == 0)
        for name, values in document.items():
            assert torch.equal(row[name][0, begin : begin + length], values[0]), name
        padding[begin : begin + length] = False
    assert not row["loss_mask"][0, padding].any()
    assert torch.equal(row["token_weights"][0], (~padding).float())


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("stage", ["align", "distill", "text alone"])
def test_packed_row_equals_the_sum_over_documents(rows: list[list[int]], stage: str) -> None:
    initialize_model_parallel()
    # The certificate's epsilon: a smaller one lets norms of nearly nothing make much of rounding.
    config = tiny_config(
        init_method_std=0.2, fa_query_scale="always", fa_rope=True, layernorm_epsilon=1e-2
    )
    teacher = build_model(dataclasses.replace(config), None)
    student = build_model(config, tiny_plan())
    reuse_teacher_weights(student, by_head(teacher))
    losses_of = _losses_of_stage(stage, student, teacher)

    batch = _batch(rows)
    row, packed = pack_documents(batch, END, multiple_of=5)  # 24 tokens and one of padding
    assert row["tokens"].shape == (1, 25)
    found = losses_of(row, packed)
    alone = [losses_of(document, None) for document in _alone(batch, rows)]
    expected = {name: sum(losses[name] for losses in alone) for name in found}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    gradients = []
    for loss in (found["loss"], expected["loss"]):
        student.zero_grad()
        loss.backward()
        parameters = dict(student.named_parameters())
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert sum(gradient.abs().sum() for gradient in gradients[0].values()) > 1
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected_gradient in gradients[1].items():
        # float32, against the largest entry: what differs is the order of sums.
        worst = (gradients[0][name] - expected_gradient).abs().max()
        assert worst <= 2e-5 * expected_gradient.abs().max(), name


def _losses_of_stage(stage: str, student: Any, teacher: Any) -> Any:
    if stage == "align":
        alignment = Alignment(student, teacher)

        def align(batch: dict[str, Tensor], packed: Any) -> dict[str, Tensor]:
            losses = alignment.forward(
                batch["tokens"], batch["position_ids"], packed, batch.get("token_weights")
            )
            return {**losses, "loss": sum(losses.values())}

        return align

    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)  # another model
    weights = {"kl_weight": 0.7, "ce_weight": 0.3}
    if stage == "text alone":
        teacher, weights = None, {"kl_weight": 0.0, "ce_weight": 1.0}

    def distill(batch: dict[str, Tensor], packed: Any) -> dict[str, Tensor]:
        names = ("tokens", "position_ids", "labels", "loss_mask")
        parts = with_options(distillation.distillation_loss)(
            student,
            teacher,
            *(batch[name] for name in names),
            chunk_tokens=7,
            packed_seq_params=packed,
            **weights,
        )
        return {"loss": parts.loss_sum, "kl": parts.kl_sum, "ce": parts.ce_sum,
                "num_tokens": parts.num_tokens}  # fmt: skip

    return distill
