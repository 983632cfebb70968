"""Text that a Hugging Face folder's model generates, by transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_hydra.errors import UserError
from megatron_hydra.export.mixers_hydra import without_plans
from megatron_hydra.export.stream_hydra import CACHE
from megatron_hydra.progress import Progress, no_progress

_POSITIONS = 256


class Generator:
    """A model and its tokenizer.

    Args:
        folder: Of Hugging Face.
        has_code: Whether transformers is to run the folder's own model code.
        forward_tokens: Most tokens of a forward pass over prompts, one a prompt or more; longer
            ones fill the cache in pieces. None: prompts are read in one pass.
    """

    def __init__(self, folder: Path, has_code: bool, forward_tokens: int | None = None) -> None:
        self.folder, self.forward_tokens = folder, forward_tokens
        self._options = {"trust_remote_code": has_code, "local_files_only": True}
        self._model: Any = None
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, padding_side="left", **self._options
            )
        except Exception as error:  # transformers raises whatever it meets
            raise UserError(f"cannot load a tokenizer from {folder}: {_first(error)}") from error
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise UserError(f"the tokenizer of {folder} has no token to fill batches up with")
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def num_tokens(self, text: str) -> int:
        """Of a prompt, with what the tokenizer puts before it."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        progress: Progress = no_progress,
        description: str = "",
    ) -> Iterator[str]:
        """Go on with each prompt greedily; yields texts without the prompt.

        Args:
            prompts: Texts.
            max_new_tokens: Most tokens of each.
            batch_size: Prompts that are answered together.
            progress: Shows the batches.
            description: What it shows.
        """
        model = self._load()
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        for batch in progress(batches, description, "batch"):
            inputs = self._inputs(batch)
            new = self._answer(model, inputs, max_new_tokens=max_new_tokens)
            yield from self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def step_seconds(self, prompts: Sequence[str], num_tokens: int) -> list[float]:
        """How long :meth:`generate` takes to each new token of one batch, in seconds.

        The first is from the prompts on the device, the others from the token before. Nothing ends
        early.

        Args:
            prompts: Texts, which are answered together.
            num_tokens: New ones of each.
        """
        model, inputs, clock = self._load(), self._inputs(prompts), _Clock()
        start = time.perf_counter()
        options = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        self._answer(model, inputs, streamer=clock, **options)
        _, *times = clock.times  # transformers hands on the prompts too
        return [end - begin for begin, end in pairwise([start, *times])]

    def _inputs(self, batch: Sequence[str]) -> Any:
        """Tokens and mask on the model's device."""
        inputs = self.tokenizer(
            list(batch), return_tensors="pt", padding=True, return_token_type_ids=False
        )
        return inputs.to(self._load().device)

    def _answer(self, model: Any, inputs: Any, **options: Any) -> Tensor:
        """New tokens by transformers' `generate` and its options."""
        # Exported hybrids see to it themselves; other models' steps are 2.5 times as long with.
        with torch.inference_mode(), without_plans(inputs["input_ids"]):
            found: Tensor = model.generate(**inputs, **self._read(model, **inputs), **options)
        return found[:, inputs["input_ids"].shape[1] :]

    def _read(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """The cache of all but the last token of prompts that are too much for one pass.

        transformers' own `prefill_chunk_size` counts the padding's positions (4.57), so that a
        prompt with some would be read elsewhere than its answer is written.

        Args:
            model: Of transformers.
            input_ids: `[b, s]`, padded on the left.
            attention_mask: `[b, s]`, 0 for padding.

        Returns:
            An argument of `generate`; none where one pass can read all.
        """
        batch, length = input_ids.shape
        if self.forward_tokens is None or batch * length <= self.forward_tokens:
            return {}
        positions, cache = (attention_mask.cumsum(-1) - 1).clamp(min=0), None
        for part in torch.arange(length - 1).split(max(1, self.forward_tokens // batch)):
            piece = slice(int(part[0]), int(part[-1]) + 1)
            output = model(
                input_ids[:, piece], attention_mask=attention_mask[:, : piece.stop],
                position_ids=positions[:, piece], use_cache=True, logits_to_keep=1,
                **{CACHE: cache},
            )  # fmt: skip
            cache = output[CACHE]
        return {CACHE: cache}

    @torch.inference_mode()
    def position_losses(
        self,
        windows: Sequence[Sequence[int]],
        batch_size: int,
        progress: Progress = no_progress,
        description: str = "",
    ) -> list[float]:
        """Next-token losses in nats by position, the mean over windows, by whole forward passes.

        A batch's logits are held at once, in the model's number format.

        Args:
            windows: Tokens, in each as many; the first of each is not predicted.
            batch_size: Windows of a forward pass.
            progress: Shows the batches.
            description: What it shows.
        """
        model = self._load()
        total = torch.zeros(len(windows[0]) - 1, dtype=torch.float64)
        batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        for batch in progress(batches, description, "batch"):
            tokens = torch.tensor(batch, device=model.device)
            logits = model(tokens[:, :-1], use_cache=False).logits  # [b, s, v]
            # In float32 a few positions' at a time.
            for start in range(0, len(total), _POSITIONS):
                part = slice(start, start + _POSITIONS)
                losses = F.cross_entropy(
                    logits[:, part].float().transpose(1, 2),
                    tokens[:, 1:][:, part],
                    reduction="none",
                )
                total[part] += losses.double().sum(0).cpu()
        return (total / len(windows)).tolist()

    @torch.inference_mode()
    def right_answers(
        self, samples: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
    ) -> list[bool]:
        """Whether greedy decoding gives each answer, by one forward pass with the answer's tokens.

        Args:
            samples: Tokens of prompt and answer; each pair of one length, prompts and answers.
            batch_size: Samples of a forward pass.
        """
        model, found = self._load(), []
        for start in range(0, len(samples), batch_size):
            rows = [[*prompt, *answer] for prompt, answer in samples[start : start + batch_size]]
            tokens, size = torch.tensor(rows, device=model.device), len(samples[0][1])
            logits = model(tokens[:, :-1], use_cache=False).logits[:, -size:]
            found += (logits.argmax(-1) == tokens[:, -size:]).all(-1).tolist()
        return found

    @torch.inference_mode()
    def divergence_from(
        self, teacher: Generator, windows: Sequence[Sequence[int]], batch_size: int
    ) -> float:
        """KL(teacher || this model) of the next token in nats, the mean over positions.

        Args:
            teacher: With the same vocabulary.
            windows: Tokens, in each as many.
            batch_size: Windows of a forward pass.
        """
        ours, theirs = self._load(), teacher._load()
        total = 0.0
        for start in range(0, len(windows), batch_size):
            tokens = torch.tensor(windows[start : start + batch_size], device=ours.device)
            own, other = (
                model(tokens, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
                for model in (ours, theirs)
            )
            total += F.kl_div(own, other, reduction="sum", log_target=True).double().item()
        return total / sum(map(len, windows))

    def release(self) -> None:
        """Give the model's memory back."""
        self._model = None

    def _load(self) -> Any:
        """The model, when it is first needed."""
        if self._model is not None:
            return self._model
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype="auto", use_safetensors=True, **self._options
            )
        except Exception as error:  # as above
            raise UserError(f"cannot load the model of {self.folder}: {_first(error)}") from error
        # Greedy, whatever the folder's settings sample or penalise.
        ends = model.generation_config.eos_token_id
        pad = self.tokenizer.pad_token_id
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=ends, pad_token_id=pad
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and model.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(
            including_emulation=False
        ):  # fmt: skip
            raise UserError(
                f"the weights of {self.folder} are bfloat16, which {torch.cuda.get_device_name()} "
                "does not compute: export them with --dtype float32"
            )
        self._model = model.to(device).eval()
        return self._model


class _Clock:
    """Notes when it is handed tokens, as a streamer of transformers, which has waited for them."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All are there."""


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
