"""Trains the quickstart's teacher: a small Qwen3 that retrieves, as a Hugging Face folder.

Text of the local Python is mixed with needles and questions about them. The learning rate stays
constant until held-out retrieval reaches the target, then decays; the log that is written beside
the weights also shows that a few heads do the retrieval. ``make teacher`` runs this: 50 million
tokens, under two minutes on one H100, an hour or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, versions, write_beside, write_json
from megatron_hydra.selection import probes

LENGTH = 256
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
TEXT_SHARE = 0.2  # of the sequences; the others hold needles in text
CURRICULUM = ((64, 0), (128, 1), (LENGTH, 2))  # (tokens of a sequence, from which phase on)
NUM_EVALUATED = 256
LENGTHS_EVALUATED = (LENGTH, 2 * LENGTH, 4 * LENGTH)
SEED_SCORED, SEED_EVALUATED = 1_000_001, 2_000_003  # neither is a training seed

SETTINGS = {  # of the shipped teacher
    "seed": 4,
    "lr": 4e-3,
    "weight_decay": 0.3,
    "batch_tokens": 32768,
    "answer_weight": 4.0,
    "init_std": 0.05,
    "qk_norm_init": 1.5,
    "warmup_steps": 100,
    "phase_steps": 300,
    "decay_steps": 800,
    "max_steps": 6000,
    "eval_every": 250,
    "target": 0.97,
    "workers": 4,
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token a digit, so that values have a fixed token length."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 of about a million parameters, in float32."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        # q and k are normalised: at weight 1 no head could be sharp, and retrieval comes late.
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, args.qk_norm_init)
        torch.nn.init.constant_(layer.self_attn.k_norm.weight, args.qk_norm_init)
    return model


class TrainingBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batch ``i`` as (tokens, loss weights), both [b, s]; drawn from the seed and ``i`` alone."""

    def __init__(self, tokenizer: Any, text_tokens: list[int], args: argparse.Namespace) -> None:
        self.tokenizer, self.text_tokens, self.args = tokenizer, text_tokens, args

    def __len__(self) -> int:
        return int(self.args.max_steps)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        phase = index // self.args.phase_steps
        length = max(tokens for tokens, start in CURRICULUM if start <= phase)
        documents = [
            self._document(random.Random(f"{self.args.seed}/{index}/{row}"), length)
            for row in range(self.args.batch_tokens // length)
        ]
        weights = torch.ones(len(documents), length)
        for row, document in enumerate(documents):
            weights[row, list(document.answer_positions)] = self.args.answer_weight
        return torch.tensor([document.tokens for document in documents]), weights

    def _document(self, rng: random.Random, length: int) -> probes.TrainingDocument:
        text = self.text_tokens
        if rng.random() < TEXT_SHARE:
            return probes.make_text_document(rng, text, length)
        return probes.make_training_document(rng, self.tokenizer, text, length, max_keys=10)


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text_tokens: list[int],
    held_out: list[int],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train until the target is reached and the learning rate has decayed; return the history."""
    batches = TrainingBatches(tokenizer, text_tokens, args)
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    tests = {
        name: make_samples(tokenizer, held_out, task, LENGTH, seed=SEED_SCORED)
        for name, task in probes.TASKS.items()
    }
    start, history, decay_from = time.monotonic(), [], args.max_steps - args.decay_steps
    bar = tqdm(enumerate(loader), total=args.max_steps, unit="step", mininterval=5.0)
    for step, (tokens, weights) in bar:
        remaining = 1.0 - max(0, step - decay_from) / args.decay_steps
        lr = args.lr * min(1.0, (step + 1) / args.warmup_steps, max(remaining, 0.02))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = _train_step(model, optimizer, tokens.to(device), weights.to(device))
        seconds = time.monotonic() - start
        if step % args.eval_every == args.eval_every - 1:
            record = {name: accuracy(model, samples) for name, samples in tests.items()}
            history.append({"step": step + 1, "loss": round(loss.item(), 4)} | record)
            bar.set_postfix(history[-1])
            late = seconds > 0.7 * args.max_seconds
            if (late or min(record.values()) >= args.target) and step < decay_from:
                decay_from = step
        if step >= decay_from + args.decay_steps or seconds > args.max_seconds:
            break
    return {"steps": step + 1, "seconds": round(seconds, 1), "history": history}


def _train_step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """One update on the weighted next-token loss; return the loss."""
    bf16 = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
    with bf16:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def make_samples(
    tokenizer: Any, text_tokens: list[int], task: probes.NeedleTask, length: int, seed: int
) -> torch.Tensor:
    """Held-out samples [b, s]; the answer is the last ``NUM_VALUE_DIGITS`` tokens."""
    rng = random.Random(seed)
    samples = [
        probes.make_needle_sample(rng, tokenizer, text_tokens, length, rng.random(), task.num_keys)
        for _ in range(NUM_EVALUATED)
    ]
    return torch.tensor([sample.tokens + sample.answer for sample in samples])


@torch.no_grad()
def answer_log_probs(model: Qwen3ForCausalLM, samples: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [b, digits, vocab] at the positions that predict the answer."""
    chunks = []
    for chunk in torch.split(samples, 64):
        logits = model(input_ids=chunk.to(model.device), use_cache=False).logits
        chunks.append(logits[:, -probes.NUM_VALUE_DIGITS - 1 : -1].log_softmax(-1).cpu())
    return torch.cat(chunks)


def accuracy(model: Qwen3ForCausalLM, samples: torch.Tensor) -> float:
    """Share of samples whose every digit is the likeliest token (greedy decoding's exact match)."""
    answers = samples[:, -probes.NUM_VALUE_DIGITS :]
    return (answer_log_probs(model, samples).argmax(-1) == answers).all(-1).float().mean().item()


Head = tuple[int, int]  # layer, head


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


def head_means(model: Qwen3ForCausalLM, samples: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's mean head outputs [heads * head dim]."""
    means: list[torch.Tensor] = []

    def note(_: int, outputs: torch.Tensor) -> torch.Tensor:
        means.append(outputs.mean((0, 1)))
        return outputs

    with edited_heads(model, note), torch.no_grad():
        model(input_ids=samples.to(model.device), use_cache=False)
    return means


def ablated(
    model: Qwen3ForCausalLM, heads: list[Head], means: list[torch.Tensor]
) -> AbstractContextManager[None]:
    """Put the mean in place of these heads' outputs."""

    def replace(layer: int, outputs: torch.Tensor) -> torch.Tensor:
        outputs = outputs.clone()
        for head in (head for at, head in heads if at == layer):
            part = slice(head * model.config.head_dim, (head + 1) * model.config.head_dim)
            outputs[..., part] = means[layer][part]
        return outputs

    return edited_heads(model, replace)


def ablation_proof(
    model: Qwen3ForCausalLM, tokenizer: Any, text_tokens: list[int], num_heads: int = 3
) -> dict[str, Any]:
    """Accuracy without the heads that matter most, and without as many random heads.

    The heads are ranked by what one head's mean-ablation costs the answer's log-probability on
    single-needle samples of another seed.
    """
    task = probes.TASKS["single"]
    scored = make_samples(tokenizer, text_tokens, task, LENGTH, SEED_SCORED)[:64]
    samples = make_samples(tokenizer, text_tokens, task, LENGTH, SEED_EVALUATED)
    means = head_means(model, scored)

    def answer_score(heads: list[Head]) -> float:
        with ablated(model, heads, means):
            log_probs = answer_log_probs(model, scored)
        answers = scored[:, -probes.NUM_VALUE_DIGITS :, None]
        return log_probs.gather(-1, answers).mean().item()

    def ablated_accuracy(heads: list[Head]) -> float:
        with ablated(model, heads, means):
            return accuracy(model, samples)

    layers, heads = range(model.config.num_hidden_layers), range(model.config.num_attention_heads)
    every = list(itertools.product(layers, heads))
    whole = answer_score([])
    costs = {head: whole - answer_score([head]) for head in tqdm(every, desc="ablate", unit="head")}
    ranked = sorted(every, key=lambda head: -costs[head])
    rng = random.Random(SEED_EVALUATED)
    draws = [sorted(rng.sample(every, num_heads)) for _ in range(21)]
    randoms = [ablated_accuracy(draw) for draw in draws]
    return {
        "task": task.name,
        "length_tokens": LENGTH,
        "ablation": "mean of the head's output before the output projection",
        "accuracy": ablated_accuracy([]),
        "top_heads": ranked[:num_heads],
        "accuracy_without_top_heads": ablated_accuracy(ranked[:num_heads]),
        "random_draws": draws,
        "accuracy_without_random_heads": randoms,
        "median_accuracy_without_random_heads": median(randoms),
        "log_prob_cost": [[round(costs[layer, head], 4) for head in heads] for layer in layers],
    }


@torch.no_grad()
def perplexity(model: Qwen3ForCausalLM, text_tokens: list[int], max_rows: int = 100) -> float:
    """Perplexity of held-out text in pieces of the training length."""
    tokens = torch.tensor(text_tokens[: max_rows * LENGTH], device=model.device).view(-1, LENGTH)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: Any, held_out: list[int]
) -> dict[str, dict[str, float]]:
    """Accuracy by task and length, on samples of a seed that training never looked at."""
    found: dict[str, dict[str, float]] = {name: {} for name in probes.TASKS}
    for (name, task), length in itertools.product(probes.TASKS.items(), LENGTHS_EVALUATED):
        samples = make_samples(tokenizer, held_out, task, length, SEED_EVALUATED)
        found[name][str(length)] = accuracy(model, samples)
    return found


def parse_arguments() -> argparse.Namespace:
    """Command line; the defaults are those of the shipped teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="examples/quickstart/teacher", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--text", help="UTF-8 text file; default: text of this Python")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="stop training then")
    for name, default in SETTINGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser.parse_args()


def main() -> int:
    """Train, prove, save."""
    args = parse_arguments()
    check_output(args.out, args.overwrite)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    text = probes.read_text(args.text) if args.text else probes.local_text()
    tokenizer = train_tokenizer(text)
    text_tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    training, held_out = probes.split_held_out(text_tokens)
    model = make_model(tokenizer, args).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters on {device} ({name}); {len(training):,} tokens of text")
    log = {
        "settings": {key: value for key, value in vars(args).items() if key in SETTINGS},
        "device": f"{device.type} ({name})",
        "versions": versions(),
        "text": {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "num_parameters": size,
        "training_length_tokens": LENGTH,
    }
    log |= train(model, tokenizer, training, held_out, device, args)
    model.eval()
    log["accuracy"] = evaluate(model, tokenizer, held_out)
    log["perplexity_held_out"] = perplexity(model, held_out)
    log["ablation"] = proof = ablation_proof(model, tokenizer, held_out)
    with write_beside(args.out, args.overwrite) as folder:
        model.float().cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(Path(folder) / "training_log.json", log)
    print(f"{log['steps']} steps in {log['seconds']} s; accuracy {log['accuracy']}")
    print(
        f"single needle: {proof['accuracy']:.3f}; without heads {proof['top_heads']} "
        f"{proof['accuracy_without_top_heads']:.3f}; without as many random heads (median) "
        f"{proof['median_accuracy_without_random_heads']:.3f}"
    )
    if log["accuracy"]["single"][str(LENGTH)] < 0.9:
        raise UserError("the teacher retrieves less than 90%: train longer (--max-steps)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"make_teacher: error: {error}")
