"""Which heads of a small Qwen3 retrieve: its accuracy on needles with heads ablated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from megatron_hydra.tasks import needles

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

LENGTH = 256
NUM_EVALUATED = 256
NUM_SCORED = 64
NUM_CONTROLS = 50
SEED_SCORED, SEED_EVALUATED = 1_000_001, 2_000_003  # neither is a training seed

Head = tuple[int, int]  # layer, head


def make_samples(
    tokenizer: Any,
    text_tokens: list[int],
    task: needles.NeedleTask,
    length: int,
    seed: int,
    num_samples: int = NUM_EVALUATED,
) -> torch.Tensor:
    """Held-out samples [b, s]; the answer is the last ``NUM_VALUE_DIGITS`` tokens."""
    rng = random.Random(seed)
    samples = [
        needles.make_needle_sample(rng, tokenizer, text_tokens, length, rng.random(), task.num_keys)
        for _ in range(num_samples)
    ]
    return torch.tensor([sample.tokens + sample.answer for sample in samples])


@torch.no_grad()
def answer_log_probs(model: Qwen3ForCausalLM, samples: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [b, digits, vocab] at the positions that predict the answer."""
    chunks = []
    for chunk in torch.split(samples, 64):
        logits = model(input_ids=chunk.to(model.device), use_cache=False).logits
        chunks.append(logits[:, -needles.NUM_VALUE_DIGITS - 1 : -1].log_softmax(-1).cpu())
    return torch.cat(chunks)


def accuracy(model: Qwen3ForCausalLM, samples: torch.Tensor) -> float:
    """Share of samples whose every digit is the likeliest token (greedy decoding's exact match)."""
    answers = samples[:, -needles.NUM_VALUE_DIGITS :]
    return (answer_log_probs(model, samples).argmax(-1) == answers).all(-1).float().mean().item()


@contextmanager
def edited_heads(
    model: Qwen3ForCausalLM, edit: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass the input [b, s, heads * head dim] of each ``o_proj`` through ``edit(layer, input)``."""
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, index=index: (edit(index, inputs[0]),)
        )
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class HeadAblation:
    """Accuracy and log-probability of a model with the mean in place of some heads' outputs.

    Means and scores come from samples of one seed, accuracies from samples of another.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        text_tokens: Held-out text for haystacks.
        num_samples: Samples of the single-needle task that an accuracy is measured on.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: Any,
        text_tokens: list[int],
        num_samples: int = NUM_EVALUATED,
    ) -> None:
        self.model, self.task = model, needles.TASKS["single"]
        arguments = (tokenizer, text_tokens, self.task, LENGTH)
        self.samples = make_samples(*arguments, SEED_EVALUATED, num_samples)
        self.scored = make_samples(*arguments, SEED_SCORED, NUM_SCORED)
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        self.every_head: list[Head] = list(itertools.product(range(layers), range(heads)))
        self._means: list[torch.Tensor] = []  # of each layer, [heads * head dim]
        with edited_heads(model, self._note_mean), torch.no_grad():
            model(input_ids=self.scored.to(model.device), use_cache=False)

    def accuracy(self, heads: Sequence[Head] = ()) -> float:
        """Accuracy without these heads."""
        with self._ablated(heads):
            return accuracy(self.model, self.samples)

    def log_prob(self, heads: Sequence[Head] = ()) -> float:
        """Mean log-probability of the answers' tokens without these heads."""
        with self._ablated(heads):
            log_probs = answer_log_probs(self.model, self.scored)
        answers = self.scored[:, -needles.NUM_VALUE_DIGITS :, None]
        return log_probs.gather(-1, answers).mean().item()

    def random_others(self, heads: Sequence[Head], num_draws: int) -> list[list[Head]]:
        """Draws of as many heads as ``heads``, of which none is in one."""
        rng = random.Random(SEED_EVALUATED)
        others = [head for head in self.every_head if head not in heads]
        return [sorted(rng.sample(others, len(heads))) for _ in range(num_draws)]

    def _note_mean(self, _: int, outputs: torch.Tensor) -> torch.Tensor:
        self._means.append(outputs.mean((0, 1)))
        return outputs

    def _ablated(self, heads: Sequence[Head]) -> AbstractContextManager[None]:
        dim = self.model.config.head_dim

        def replace(layer: int, outputs: torch.Tensor) -> torch.Tensor:
            outputs = outputs.clone()
            for head in (head for at, head in heads if at == layer):
                part = slice(head * dim, (head + 1) * dim)
                outputs[..., part] = self._means[layer][part]
            return outputs

        return edited_heads(self.model, replace)


def ablation_study(
    model: Qwen3ForCausalLM, tokenizer: Any, text_tokens: list[int], num_heads: int = 3
) -> dict[str, Any]:
    """Accuracy without each head, without the heads that matter most, and without others.

    The heads are ranked by what one head's ablation costs the answer's log-probability. The
    controls are random draws of as many of the other heads; their whole distribution is kept.
    """
    study = HeadAblation(model, tokenizer, text_tokens)
    heads = study.every_head
    whole = study.log_prob()
    costs = {head: whole - study.log_prob([head]) for head in tqdm(heads, desc="cost", unit="head")}
    alone = {head: study.accuracy([head]) for head in tqdm(heads, desc="ablate", unit="head")}
    top = sorted(heads, key=lambda head: -costs[head])[:num_heads]
    draws = study.random_others(top, NUM_CONTROLS)
    controls = [study.accuracy(draw) for draw in tqdm(draws, desc="controls", unit="draw")]

    def table(values: dict[Head, float]) -> list[list[float]]:
        rows = range(model.config.num_hidden_layers)
        return [[round(values[h], 4) for h in heads if h[0] == row] for row in rows]

    return {
        "task": study.task.name,
        "length_tokens": LENGTH,
        "num_samples": NUM_EVALUATED,
        "ablation": "mean of the head's output before the output projection",
        "device": model.device.type,
        "log_prob_cost": table(costs),
        "accuracy": study.accuracy(),
        "accuracy_without_head": table(alone),
        "top_heads": top,
        "accuracy_without_top_heads": study.accuracy(top),
        "control_draws": draws,
        "accuracy_without_control_draws": controls,
    }


def describe(study: dict[str, Any]) -> str:
    """The study in a few words."""
    alone = [value for row in study["accuracy_without_head"] for value in row]
    controls = study["accuracy_without_control_draws"]
    return (
        f"single needle: {study['accuracy']:.1%}; without one head: below 10% for "
        f"{sum(value < 0.1 for value in alone)} of {len(alone)} heads, 80% or more for "
        f"{sum(value >= 0.8 for value in alone)}; without the top heads "
        f"{[list(head) for head in study['top_heads']]}: "
        f"{study['accuracy_without_top_heads']:.1%}; without as many random others: 90% or more in "
        f"{sum(value >= 0.9 for value in controls)} of {len(controls)} draws, median "
        f"{median(controls):.1%}, worst {min(controls):.1%}"
    )
