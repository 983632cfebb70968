"""The chunked loss with the vocabulary spread over TP ranks, alone and on Megatron's GPTModel.

Catches: a maximum, sum or label logit that is not reduced over ranks, hidden states' gradients
that are not summed (or summed twice, under sequence parallel), a transposed batch.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit.distributed import run_distributed

pytestmark = pytest.mark.dist

ROWS, VOCAB, HIDDEN = 13, 22, 6  # of 4 ranks the last has 4 rows of 6
WEIGHTS = {"kl_weight": 0.7, "ce_weight": 0.3}


def full_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, KL and CE sums by PyTorch's own functions, on logits [..., vocabulary]."""
    kl = F.kl_div(
        F.log_softmax(student_logits / temperature, -1),
        F.log_softmax(teacher_logits / temperature, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    ce = F.cross_entropy(student_logits.flatten(0, -2), labels.flatten(), reduction="none")
    kl_sum = temperature**2 * (kl * loss_mask).sum()
    ce_sum = (ce * loss_mask.flatten()).sum()
    loss = WEIGHTS["kl_weight"] * kl_sum + WEIGHTS["ce_weight"] * ce_sum
    return loss, kl_sum, ce_sum


def check_sharded_vocabulary(tp_size: int) -> None:
    """Every rank: values of the whole, gradients of its rows, and a part of the hidden states'."""
    from hydra_kernels import linear_kl as operator
    from kit.losses import with_options
    from megatron.core import parallel_state

    from megatron_hydra.model.parallel_sizes import padded_size, real_part
    from megatron_hydra.parallel import initialize_model_parallel

    linear_kl = with_options(partial(operator.linear_kl, impl="reference"))
    initialize_model_parallel(tensor=tp_size)
    group = parallel_state.get_tensor_model_parallel_group()
    rng = torch.Generator().manual_seed(0)
    shapes = (ROWS, HIDDEN), (VOCAB, HIDDEN), (ROWS, HIDDEN), (VOCAB, HIDDEN)
    whole = [torch.randn(shape, generator=rng, dtype=torch.float64) * 2 for shape in shapes]
    labels = torch.randint(VOCAB, (ROWS,), generator=rng)
    first, number = real_part(VOCAB, group.size(), group.rank())
    mine, part = slice(first, first + number), padded_size(VOCAB, group.size()) // group.size()

    def padded(rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (0, 0, 0, part - number))

    for temperature in (1.0, 2.0):
        for mask in (torch.ones(ROWS), (torch.arange(ROWS) % 2).float(), torch.zeros(ROWS)):
            hidden, weight = (x.clone().requires_grad_() for x in whole[:2])
            teacher_logits = whole[2] @ whole[3].T
            expected = full_loss(hidden @ weight.T, teacher_logits, labels, mask, temperature)
            expected[0].backward()
            for chunk_tokens in (1, 5, ROWS, 2 * ROWS):
                student = [
                    whole[0].clone().requires_grad_(),
                    padded(whole[1][mine]).requires_grad_(),
                ]
                parts = linear_kl(
                    *student,
                    whole[2],
                    padded(whole[3][mine]),
                    labels,
                    mask,
                    chunk_tokens=chunk_tokens,
                    temperature=temperature,
                    vocab_size=VOCAB,
                    group=group,
                    **WEIGHTS,
                )
                parts.loss_sum.backward()
                dist.all_reduce(student[0].grad, group=group)
                torch.testing.assert_close(parts[:3], expected, rtol=1e-12, atol=1e-12)
                assert parts.num_tokens == mask.sum()
                torch.testing.assert_close(student[0].grad, hidden.grad, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(
                    student[1].grad, padded(weight.grad[mine]), rtol=1e-12, atol=1e-12
                )


def check_on_gpt_model(
    tp_size: int, tied: bool, sequence_parallel: bool, vocab_size: int = 64
) -> None:
    """Loss and every parameter's gradient equal those through the model's own gathered logits."""
    from kit.losses import with_options
    from kit.tiny import tiny_config, token_batch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_hydra.errors import UserError
    from megatron_hydra.model.build import build_model
    from megatron_hydra.transfer import distillation

    distillation_loss = with_options(distillation.distillation_loss)

    config = tiny_config(
        vocab_size=vocab_size,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        share_embeddings_and_output_weights=tied,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    student, teacher = build_model(config, None), build_model(config, None)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)  # another model, the same on every rank where it is replicated
    tokens, position_ids = token_batch(config, batch=3, length=8)
    labels = tokens.roll(-1, dims=1)
    loss_mask = torch.ones(3, 8)
    loss_mask[:, -1] = 0
    loss_mask[1, 2:5] = 0.5
    batch = (tokens, position_ids, labels, loss_mask)

    group = parallel_state.get_tensor_model_parallel_group()
    logits, teacher_logits = (
        gather_from_tensor_model_parallel_region(model(tokens, position_ids, None), group=group)[
            ..., :vocab_size
        ]
        for model in (student, teacher)
    )
    expected = full_loss(logits, teacher_logits.detach(), labels, loss_mask, temperature=1.0)
    assert expected[1] > 1e-2, "the teacher differs too little for this test to tell"
    expected[0].backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()

    parts = distillation_loss(student, teacher, *batch, chunk_tokens=5, **WEIGHTS)
    torch.testing.assert_close(parts[:3], expected, rtol=1e-5, atol=1e-5)
    assert parts.num_tokens == loss_mask.sum()
    parts.loss_sum.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    whole = student(tokens, position_ids, None, runtime_gather_output=True)
    torch.testing.assert_close(whole, logits, rtol=0, atol=0)

    alone = distillation_loss(student, None, *batch, kl_weight=0.0, ce_weight=1.0, chunk_tokens=5)
    megatron_loss = (student(tokens, position_ids, None, labels=labels) * loss_mask).sum()
    torch.testing.assert_close(alone.loss_sum, megatron_loss, rtol=1e-5, atol=1e-5)

    labels[0, 0] = vocab_size
    with pytest.raises(UserError, match=f"label {vocab_size} counts"):
        distillation_loss(student, teacher, *batch, chunk_tokens=5, **WEIGHTS)


def check_rank(tp_size: int, models: list[tuple[bool, bool]]) -> None:
    """Everything of one TP size: starting ranks takes longer than the checks."""
    check_sharded_vocabulary(tp_size)
    for tied, sequence_parallel in models:
        check_on_gpt_model(tp_size, tied, sequence_parallel)
    check_on_gpt_model(tp_size, *models[-1], vocab_size=61)


@pytest.mark.parametrize(
    ("tp_size", "models"),
    [
        (1, [(True, False), (False, False)]),
        (2, [(True, False), (False, True)]),
        (4, [(False, False), (True, True)]),
    ],
    ids=["tp1", "tp2", "tp4"],
)
def test_equals_full_logits(tp_size: int, models: list[tuple[bool, bool]]):
    """Models: (tied output weights, sequence parallel)."""
    run_distributed(check_rank, tp_size, tp_size, models)
