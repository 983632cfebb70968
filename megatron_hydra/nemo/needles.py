"""Needles that a model in training finds by generated text, the same questions each time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_hydra.errors import UserError
from megatron_hydra.model.generation import generate
from megatron_hydra.tasks.needles import (
    NeedleSample,
    find_task,
    make_needle_sample,
    pieces_of,
)
from megatron_hydra.teachers.tokenizer import load_tokenizer
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.dataset_checks import read_tokens
from megatron_hydra.training.run_files import NEEDLES, TEACHER_NEEDLES
from megatron_hydra.transfer.hidden_states import unwrapped_model

_HAYSTACK_TOKENS = 2**20
"""Of a dataset's start, from which haystacks are drawn."""
_MOST_DRAWS = 200


class Needles:
    """Asks for values that stand in text, and leaves the training as if it had not.

    Haystacks come from the first held-out dataset, else from the first that is trained on. The
    model answers greedily, in evaluation mode, as it will be used; nothing is drawn. Its teacher,
    where the stage has one, answers once; what it finds stands beside each of the model's results,
    so that a run that goes on, with other questions even, needs to know nothing of its past.

    Args:
        config: The run's configuration.
        tokenizer: Its folder.

    Raises:
        UserError: If the needles do not fit into the tokens, there is too little text, it holds
            such needles itself nearly everywhere, or the tokenizer splits a value's digits.
    """

    def __init__(self, config: RunConfig, tokenizer: Path) -> None:
        section = config.trainer
        self.every_n_steps = section.needles_every_n_steps
        self.micro_batch_size = config.data.micro_batch_size
        self.task = find_task(section.needle_task)
        self._of_teacher: float | None = None
        self._samples: list[NeedleSample] = []
        if self.every_n_steps:
            path = (config.data.validation_paths or config.data.paths)[0]
            number = section.needle_samples
            length = section.needle_tokens or config.data.seq_length
            questions = _Questions(path, tokenizer, length, self.task.num_keys, section.seed)
            self._samples = [questions.draw((place + 0.5) / number) for place in range(number)]

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
            `needles/<task>`, 0 to 1, and of its teacher `teacher_needles/<task>`.
        """
        found = {f"{NEEDLES}{self.task.name}": self._share_right(unwrapped_model(model.module))}
        if model.teacher is not None:
            if self._of_teacher is None:
                self._of_teacher = self._share_right(model.teacher)
            found[f"{TEACHER_NEEDLES}{self.task.name}"] = self._of_teacher
        return found

    def _share_right(self, gpt_model: GPTModel) -> float:
        size = parallel_state.get_data_parallel_world_size()
        own = self._samples[parallel_state.get_data_parallel_rank() :: size]
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
        return int(num_right) / len(self._samples)


class _Questions:
    """Draws questions about a dataset's text.

    Args:
        path: The dataset's prefix.
        tokenizer: Its tokenizer's folder.
        length: Of a sample, in tokens.
        num_keys: Needles in it.
        seed: Of all that is drawn.
    """

    def __init__(self, path: str, tokenizer: Path, length: int, num_keys: int, seed: int) -> None:
        self._path, self._length, self._num_keys = path, length, num_keys
        self._tokenizer, self._rng = load_tokenizer(tokenizer), random.Random(seed)
        self._text = read_tokens(path)[:_HAYSTACK_TOKENS].tolist()

    def draw(self, depth: float) -> NeedleSample:
        """One whose text gives the key that is asked for no second value, as a dataset that
        teaches retrieval may (`preprocess --retrieval-fraction`)."""
        for _ in range(_MOST_DRAWS):
            sample = make_needle_sample(
                self._rng, self._tokenizer, self._text, self._length, depth, self._num_keys
            )
            needle = pieces_of(self._tokenizer).needle(sample.key, sample.value)
            if _count(sample.tokens, needle.tokens[: needle.value_start]) == 1:
                return sample
        raise UserError(
            f"trainer.needles_every_n_steps asks for needles in the text of {self._path}, which "
            f"gives keys values of its own in {_MOST_DRAWS} pieces of {_MOST_DRAWS}: name text "
            "without needles first in data.validation_paths, or fewer trainer.needle_tokens"
        )


def _count(tokens: list[int], part: list[int]) -> int:
    """How often the part stands in the tokens."""
    size = len(part)
    return sum(tokens[i : i + size] == part for i in range(len(tokens) - size + 1))


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
