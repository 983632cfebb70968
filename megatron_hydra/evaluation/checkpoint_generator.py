"""Text that a checkpoint's model generates under Megatron, on one rank or on several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hydra.evaluation.perplexity import token_losses
from megatron_hydra.model.generation import generate
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.teachers.checkpoint import load_checkpoint, read_metadata
from megatron_hydra.teachers.token_ids import ends_of_generation
from megatron_hydra.teachers.tokenizer import load_model_tokenizer


class CheckpointGenerator:
    """A hybrid or a teacher, and its tokenizer; Megatron's parallel state is set up before.

    What it generates is collective: every rank asks the same. Replicas share batches.

    Args:
        folder: Checkpoint folder, saved at any layout.

    Raises:
        UserError: If it is damaged, or its tokenizer cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        vocab_size = int(read_metadata(folder)["config"]["vocab_size"])
        self.tokenizer: Any = load_model_tokenizer(folder, vocab_size)
        self._ends = ends_of_generation(self.tokenizer)
        self._model: Any = None

    def num_tokens(self, text: str) -> int:
        """Of a prompt, with what the tokenizer puts before it."""
        return len(self._encode(text))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        progress: Progress = no_progress,
        description: str = "",
    ) -> list[str]:
        """Go on with each prompt greedily; texts without the prompt, in the prompts' order.

        Prompts of similar length are answered together: what a longer one has beyond the shortest
        of its batch comes token by token.

        Args:
            prompts: Texts.
            max_new_tokens: Most tokens of each.
            batch_size: Prompts that are answered together.
            progress: Shows this replica's batches.
            description: What it shows.
        """
        tokens = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda place: len(tokens[place]))
        found: dict[int, str] = {}
        for batch in progress(_own_batches(order, batch_size), description, "batch"):
            texts = self._answer([tokens[place] for place in batch], max_new_tokens)
            found.update(zip(batch, texts, strict=True))
        parts: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
        dist.all_gather_object(parts, found, group=parallel_state.get_data_parallel_group())
        texts_by_place = {place: text for part in parts for place, text in part.items()}
        return [texts_by_place[place] for place in range(len(prompts))]

    def position_losses(
        self,
        windows: Sequence[Sequence[int]],
        batch_size: int,
        progress: Progress = no_progress,
        description: str = "",
    ) -> list[float]:
        """Next-token losses in nats by position, the mean over windows, by whole forward passes.

        Args:
            windows: Tokens, in each as many; the first of each is not predicted.
            batch_size: Windows of a forward pass.
            progress: Shows this replica's batches.
            description: What it shows.
        """
        model = self._load()
        device = next(model.parameters()).device
        total = torch.zeros(len(windows[0]) - 1, dtype=torch.float64, device=device)
        for batch in progress(_own_batches(windows, batch_size), description, "batch"):
            tokens = torch.tensor(batch, device=device)
            total += token_losses(model, tokens[:, :-1], tokens[:, 1:]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return (total / len(windows)).tolist()

    def release(self) -> None:
        """Give the model's memory back."""
        self._model = None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """The texts that follow prompts, which are padded on the right with any token."""
        model = self._load()
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        rows = rows.to(next(model.parameters()).device)
        ends = self._ends or None
        new = generate(model, rows, max_new_tokens, lengths=lengths, end_token=ends)
        texts: list[str] = self.tokenizer.batch_decode(new.tolist(), skip_special_tokens=True)
        return texts

    def _load(self) -> Any:
        """The model, when it is first needed."""
        if self._model is None:
            model = load_checkpoint(self.folder).model
            self._model = (model.cuda() if torch.cuda.is_available() else model).eval()
        return self._model


def _own_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Those of this replica."""
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    rank = parallel_state.get_data_parallel_rank()
    return batches[rank :: parallel_state.get_data_parallel_world_size()]
