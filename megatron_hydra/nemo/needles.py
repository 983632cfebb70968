"""Needles that a model in training finds by generated text, the same questions each time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state

from megatron_hydra.model.generation import generate
from megatron_hydra.tasks.needles import NeedleSample, find_task, make_needle_sample
from megatron_hydra.teachers.tokenizer import load_tokenizer
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.dataset_checks import read_tokens
from megatron_hydra.transfer.hidden_states import unwrapped_model

_HAYSTACK_TOKENS = 2**20
"""Of a dataset's start, from which haystacks are drawn."""


class Needles:
    """Asks for values that stand in text, and leaves the training as if it had not.

    Haystacks come from the first held-out dataset, else from the first that is trained on. The
    model answers greedily, in evaluation mode, as it will be used; nothing is drawn.

    Args:
        config: The run's configuration.
        tokenizer: Its folder.

    Raises:
        UserError: If the needles do not fit into the tokens, there is too little text, or the
            tokenizer splits a value's digits.
    """

    def __init__(self, config: RunConfig, tokenizer: Path) -> None:
        section = config.trainer
        self.every_n_steps = section.needles_every_n_steps
        self.micro_batch_size = config.data.micro_batch_size
        self.task = find_task(section.needle_task)
        self._samples: list[NeedleSample] = []
        if self.every_n_steps:
            path = (config.data.validation_paths or config.data.paths)[0]
            text = read_tokens(path)[:_HAYSTACK_TOKENS].tolist()
            rng, number = random.Random(section.seed), section.needle_samples
            loaded = load_tokenizer(tokenizer)
            self._samples = [
                make_needle_sample(
                    rng,
                    loaded,
                    text,
                    section.needle_tokens or config.data.seq_length,
                    depth=(place + 0.5) / number,
                    num_keys=self.task.num_keys,
                )
                for place in range(number)
            ]

    def prepare(self) -> None:
        """Nothing: the samples are there."""

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether to ask after so many finished steps of a run."""
        return bool(self.every_n_steps) and (step % self.every_n_steps == 0 or step == max_steps)

    def measure(self, model: pl.LightningModule) -> dict[str, float]:
        """The share of answers that are right in every token, the same on every rank; collective.

        Replicas share the questions.

        Args:
            model: The run's HydraModel.

        Returns:
            `needles/<task>`, 0 to 1.
        """
        size = parallel_state.get_data_parallel_world_size()
        own = self._samples[parallel_state.get_data_parallel_rank() :: size]
        gpt_model = unwrapped_model(model.module)
        device = next(gpt_model.parameters()).device
        num_right = torch.zeros((), dtype=torch.int64, device=device)
        with _evaluation_mode(gpt_model):
            for start in range(0, len(own), self.micro_batch_size):
                batch = own[start : start + self.micro_batch_size]
                prompts = torch.tensor([sample.tokens for sample in batch], device=device)
                answers = torch.tensor([sample.answer for sample in batch], device=device)
                found = generate(gpt_model, prompts, answers.shape[1])
                num_right += (found == answers).all(dim=1).sum()
        torch.distributed.all_reduce(num_right, group=parallel_state.get_data_parallel_group())
        return {f"needles/{self.task.name}": int(num_right) / len(self._samples)}


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Each module's mode is afterwards what it was: a part may have been in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
