"""Trains a teacher: a small Qwen3 that retrieves, as a Hugging Face folder.

Text of the local Python is mixed with needles and questions about them. The learning rate stays
constant until held-out retrieval reaches the target, then decays; the log that is written beside
the weights also shows which heads do the retrieval (``--ablate-only`` measures it anew). ``make
teacher`` runs this: 50 million tokens, under two minutes on one H100. The defaults are those of the
quickstart's teacher; the study's (examples/study) are larger, and learn more than needles.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from retrieval import (
    LENGTH,
    SEED_EVALUATED,
    SEED_SCORED,
    ablation_study,
    accuracy,
    describe,
    make_samples,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, versions, write_beside, write_json
from megatron_hydra.tasks import needles
from megatron_hydra.tasks import training_documents as documents
from megatron_hydra.tasks.probes import find_sub_probe
from megatron_hydra.tasks.text import local_text, read_text, split_held_out

END_OF_TEXT = "<|endoftext|>"
LOG_FILE = "training_log.json"
TEXT_SHARE = 0.2  # of the sequences; the others hold needles in text
CURRICULUM = ((4, 0), (2, 1), (1, 2))  # (part of the length, from which phase on)
TIMES_EVALUATED = (1, 2, 4)

SIZES = {  # of the shipped teacher
    "length": LENGTH,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_layers": 4,
    "num_heads": 8,
    "num_groups": 4,
    "head_dim": 32,
    "max_positions": 2048,
}
SETTINGS = {  # the same
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


def train_tokenizer(text: str, vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit, so that values have a fixed token length."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        # No token types, which `generate` in transformers 4 does not know.
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 of the sizes asked for, in float32."""
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_groups,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_positions,
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
        self.tokenizer, self.text, self.args = tokenizer, text_tokens, args

    def __len__(self) -> int:
        return int(self.args.max_steps)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_num_threads(1)
        phase = index // self.args.phase_steps
        length = self.args.length // min(part for part, start in CURRICULUM if start <= phase)
        rows = [
            self._document(random.Random(f"{self.args.seed}/{index}/{row}"), length)
            for row in range(self.args.batch_tokens // length)
        ]
        weights = torch.ones(len(rows), length)
        for row, document in enumerate(rows):
            weights[row, list(document.answer_positions)] = self.args.answer_weight
        return torch.tensor([document.tokens for document in rows]), weights

    def _document(self, rng: random.Random, length: int) -> documents.TrainingDocument:
        if rng.random() < TEXT_SHARE:
            return documents.make_text_document(rng, self.text, length)
        # At the whole length alone: a chain of variables does not fit into the first ones.
        if length == self.args.length and rng.random() < self.args.other_share:
            return self._other_document(rng, length)
        return documents.make_training_document(rng, self.tokenizer, self.text, length, max_keys=10)

    def _other_document(self, rng: random.Random, length: int) -> documents.TrainingDocument:
        """A prompt of another probe's with its answer."""
        probe = find_sub_probe(rng.choice(self.args.others.split(",")))
        sample = probe.make_pair(rng, self.tokenizer, self.text, length, rng.random()).clean
        tokens = [*sample.tokens, *sample.answer]
        return documents.TrainingDocument(tokens, tuple(range(len(sample.tokens), len(tokens))))


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
        name: make_samples(tokenizer, held_out, task, args.length, seed=SEED_SCORED)
        for name, task in needles.TASKS.items()
    }
    # Compiled anew for each length of the curriculum.
    loss_of = torch.compile(_loss, dynamic=False) if args.compile else _loss
    start, history, decay_from = time.monotonic(), [], args.max_steps - args.decay_steps
    bar = tqdm(enumerate(loader), total=args.max_steps, unit="step", mininterval=5.0)
    for step, (tokens, weights) in bar:
        remaining = 1.0 - max(0, step - decay_from) / args.decay_steps
        lr = args.lr * min(1.0, (step + 1) / args.warmup_steps, max(remaining, 0.02))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, tokens.to(device), weights.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
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


def _loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted next-token loss."""
    bf16 = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
    with bf16:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def perplexity(
    model: Qwen3ForCausalLM, text_tokens: list[int], length: int, max_rows: int = 100
) -> float:
    """Perplexity of held-out text in pieces of the training length."""
    rows = min(max_rows, len(text_tokens) // length)
    tokens = torch.tensor(text_tokens[: rows * length], device=model.device).view(-1, length)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: Any, held_out: list[int], length: int
) -> dict[str, dict[str, float]]:
    """Accuracy by task and length, on samples of a seed that training never looked at."""
    found: dict[str, dict[str, float]] = {name: {} for name in needles.TASKS}
    for (name, task), times in itertools.product(needles.TASKS.items(), TIMES_EVALUATED):
        samples = make_samples(tokenizer, held_out, task, times * length, SEED_EVALUATED)
        found[name][str(times * length)] = accuracy(model, samples)
    return found


def parse_arguments() -> argparse.Namespace:
    """Command line; the defaults are those of the shipped teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="examples/quickstart/teacher", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--ablate-only", action="store_true", help="measure the heads of the teacher in --out anew"
    )
    parser.add_argument("--text", help="UTF-8 text file; default: text of this Python")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="stop training then")
    parser.add_argument(
        "--other-share", type=float, default=0.0, help="of the other documents, not of needles"
    )
    parser.add_argument(
        "--others", default="variable_tracking,kv_retrieval,induction", help="their probes"
    )
    parser.add_argument("--least-accuracy", type=float, default=0.9, help="else it has failed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="fewer, larger kernels")
    parser.add_argument("--no-ablation", action="store_true", help="do not measure the heads")
    for name, default in {**SETTINGS, **SIZES}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser.parse_args()


def ablate_again(args: argparse.Namespace) -> int:
    """Measure the heads of the teacher in ``--out``; write that part of its log anew."""
    path = Path(args.out) / LOG_FILE
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    text = read_text(args.text) if args.text else local_text()
    _, held_out = split_held_out(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    log = json.loads(path.read_text(encoding="utf-8"))
    log["ablation"] = ablation_study(model, tokenizer, held_out)
    write_json(path, log, overwrite=True)
    print(describe(log["ablation"]))
    return 0


def main() -> int:
    """Train, measure, save."""
    args = parse_arguments()
    if args.ablate_only:
        return ablate_again(args)
    check_output(args.out, args.overwrite, "folder", marker=LOG_FILE)
    if args.length != LENGTH and not args.no_ablation:
        raise UserError(f"heads are measured at {LENGTH} tokens: pass --no-ablation")
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    text = read_text(args.text) if args.text else local_text()
    tokenizer = train_tokenizer(text, args.vocab_size, args.max_positions)
    text_tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    training, held_out = split_held_out(text_tokens)
    model = make_model(tokenizer, args).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters on {device} ({name}); {len(training):,} tokens of text")
    log = {
        "settings": {key: value for key, value in vars(args).items() if key in (*SETTINGS, *SIZES)},
        "device": f"{device.type} ({name})",
        "versions": versions(),
        "text": {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "num_parameters": size,
        "training_length_tokens": args.length,
    }
    log |= train(model, tokenizer, training, held_out, device, args)
    model.eval()
    log["accuracy"] = evaluate(model, tokenizer, held_out, args.length)
    log["perplexity_held_out"] = perplexity(model, held_out, args.length)
    if not args.no_ablation:
        log["ablation"] = ablation_study(model, tokenizer, held_out)
    with write_beside(args.out, args.overwrite) as folder:
        model.to(getattr(torch, args.dtype)).cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(Path(folder) / LOG_FILE, log)
    print(f"{log['steps']} steps in {log['seconds']} s; accuracy {log['accuracy']}")
    if not args.no_ablation:
        print(describe(log["ablation"]))
    found = {task: shares[str(args.length)] for task, shares in log["accuracy"].items()}
    if min(found.values()) < args.least_accuracy:
        raise UserError(
            f"the teacher retrieves less than {args.least_accuracy:.0%} at {args.length} tokens "
            f"({found}): train longer (--max-steps, --max-seconds)"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"make_teacher: error: {error}")
