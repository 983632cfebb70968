"""What a run's questions about needles come to: rounds, batches, tokens; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.tasks.needles import NUM_VALUE_DIGITS

if TYPE_CHECKING:
    from megatron_hydra.training.config import RunConfig


@dataclass(frozen=True)
class NeedleRounds:
    """All that `trainer.needles_every_n_steps` asks for.

    Attributes:
        num_rounds: Of the whole run.
        num_questions: Of a round.
        num_tokens: Of a question's text, question and answer.
        num_batches: Of a round, on the replica that has most.
        num_rows: Questions of a batch.
        asks_teacher: Whether a teacher is there, which answers in one round more.
    """

    num_rounds: int
    num_questions: int
    num_tokens: int
    num_batches: int
    num_rows: int
    asks_teacher: bool

    num_passes = NUM_VALUE_DIGITS
    """Forward passes of a batch: the prompt's, and one for each of the answer's tokens but the
    last, of which each digit is one."""

    @classmethod
    def of(cls, config: RunConfig, num_ranks: int) -> NeedleRounds | None:
        """None where a run asks nothing.

        Args:
            config: Of the run, whose layout fits the ranks.
            num_ranks: GPUs, or processes, in all.
        """
        section, rows = config.trainer, config.data.micro_batch_size
        every = section.needles_every_n_steps
        if not every:
            return None
        num_replicas = num_ranks // config.strategy.model_parallel_size
        of_replica = -(-section.needle_samples // num_replicas)
        return cls(
            num_rounds=-(-section.max_steps // every),  # after the last step too
            num_questions=section.needle_samples,
            num_tokens=section.needle_tokens or config.data.seq_length,
            num_batches=-(-of_replica // rows),
            num_rows=min(rows, of_replica),
            asks_teacher=config.transfer.teacher is not None,
        )

    def plans(self, plan: HeadPlan) -> list[HeadPlan]:
        """Of the models that answer: the hybrid's plan, and the teacher's, of FA heads alone."""
        heads = dict.fromkeys(range(plan.num_layers), range(plan.num_heads))
        sizes = plan.num_layers, plan.num_heads, plan.num_query_groups
        of_teacher = HeadPlan.from_fa_heads(heads, *sizes)
        return [plan, of_teacher] if self.asks_teacher else [plan]
