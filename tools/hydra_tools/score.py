"""``megatron-hydra score``: how much each head of a teacher matters, by activation patching."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_hydra import cpu
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, versions
from megatron_hydra.selection.activation_patching import MIN_GAP_LOGITS, ActivationPatching
from megatron_hydra.selection.probes import (
    TASKS,
    NeedleTask,
    local_text,
    read_text,
    split_held_out,
)
from megatron_hydra.selection.scorer import (
    Probe,
    ScorerResult,
    assemble_scores,
    retrieval_probe,
)
from megatron_hydra.selection.scores import HeadScores

_NUM_TOP_HEADS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--teacher", required=True, type=Path, help="Hugging Face Qwen3 folder")
    parser.add_argument("--out", required=True, type=Path, help="the scores to write (JSON)")
    parser.add_argument(
        "--probes",
        default="single,multi_key:4,multi_key:8",
        metavar="LIST",
        help=f"sub-probes, of {', '.join(TASKS)}; multi_key:N has N needles (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs", type=int, default=8, metavar="N", help="counterfactual pairs a sub-probe"
    )
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument(
        "--text",
        type=Path,
        help="text to hide needles in; a tenth of it, held out, is used (default: Python's "
        "documentation)",
    )
    parser.add_argument(
        "--min-gap",
        type=float,
        default=MIN_GAP_LOGITS,
        metavar="LOGITS",
        help="pairs that the teacher tells apart by less are dropped (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Score every head; write the file; print a summary."""
    check_output(args.out, args.overwrite)
    tasks = parse_tasks(args.probes)
    cpu.install_if_needed()
    from megatron_hydra.conversion.checkpoint import load_any_model
    from megatron_hydra.parallel import initialize_model_parallel

    scorer = ActivationPatching(args.min_gap)
    initialize_model_parallel()
    loaded = load_any_model(args.teacher)
    if loaded.plan is not None:
        raise UserError(f"{args.teacher} is a hybrid: scores are measured on its teacher")
    if args.length > loaded.config.seq_length:
        raise UserError(
            f"--length is {args.length}; the teacher is built for {loaded.config.seq_length} "
            "tokens at most"
        )
    probes = _make_probes(args, tasks, loaded.tokenizer_folder)

    start = time.perf_counter()
    result = scorer.score(loaded.model.eval(), probes, _progress)
    seconds = time.perf_counter() - start
    scores, consistency = assemble_scores(result)
    head_scores = HeadScores(
        num_layers=loaded.config.num_layers,
        num_heads=loaded.config.num_attention_heads,
        num_query_groups=loaded.config.num_query_groups,
        teacher_config_hash=loaded.meta["teacher_config_hash"],
        scorer=result.scorer,
        scores=scores.tolist(),
        effects={probe.probe.name: probe.effects.tolist() for probe in result.probes},
        consistency=consistency.tolist(),
        provenance=_provenance(args, result),
    )
    head_scores.save(args.out, args.overwrite)
    print("\n".join(describe(head_scores, args.min_gap)))
    print(f"{num_patches(result):,} patched runs in {seconds:.1f} s\n\nscores: {args.out}")
    return 0


def parse_tasks(text: str) -> list[NeedleTask]:
    """Read a list of needle tasks, ``single,multi_key:4``; each name stands once.

    Raises:
        UserError: For an unknown task, a number of needles that is not one, a repetition.
    """
    tasks: dict[str, NeedleTask] = {}
    for word in text.split(","):
        name, colon, keys = word.strip().partition(":")
        if name not in TASKS:
            raise UserError(f"unknown probe {name!r} in {text!r}; known: {', '.join(TASKS)}")
        task = TASKS[name]
        if colon:
            if task.num_keys == 1 or not keys.isdigit() or int(keys) < 2:
                raise UserError(f"probe {word!r} is not understood; write multi_key:N with N >= 2")
            task = NeedleTask(f"{name}_{int(keys)}", int(keys))
        if task.name in tasks:
            raise UserError(f"probe {word!r} stands twice in {text!r}")
        tasks[task.name] = task
    return list(tasks.values())


def describe(scores: HeadScores, min_gap: float) -> list[str]:
    """Sentences on scores: pairs kept and dropped, the heads that matter most, how many do."""
    lines = []
    for probe in scores.provenance["probes"]:
        lines.append(
            f"{probe['name']}: {probe['kept']} of {probe['pairs']} pairs kept, "
            f"{probe['dropped']} dropped for a clean-corrupt gap below {min_gap:g} logits"
        )
    ranked = sorted(
        (
            (score, layer, head)
            for layer, row in enumerate(scores.scores)
            for head, score in enumerate(row)
        ),
        key=lambda entry: (-entry[0], -scores.effect_size(*entry[1:])),
    )
    num_positive = sum(score > 0 for score, _, _ in ranked)
    lines.append(f"{num_positive} of {len(ranked)} heads have a score above 0; the highest:")
    names = list(scores.effects)
    lines.append("  layer head  score  consistency  effect on " + ", ".join(names))
    for score, layer, head in ranked[:_NUM_TOP_HEADS]:
        effects = "  ".join(f"{scores.effects[name][layer][head]:+.3f}" for name in names)
        kappa = scores.consistency[layer][head]
        lines.append(f"  {layer:>5} {head:>4}  {score:5.3f}  {kappa:11.2f}  {effects}")
    return lines


def num_patches(result: ScorerResult) -> int:
    """How many times one head was patched in one pair."""
    return sum(probe.pair_effects.numel() for probe in result.probes)


def _make_probes(
    args: argparse.Namespace, tasks: Sequence[NeedleTask], tokenizer_folder: Path
) -> list[Probe]:
    from megatron_hydra.conversion.qwen3 import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    text = read_text(args.text) if args.text else local_text()
    # Held out, as far as the teacher was trained on the same text.
    _, text_tokens = split_held_out(tokenizer.encode(text, add_special_tokens=False))
    return [
        retrieval_probe(tokenizer, text_tokens, task, args.length, args.pairs, args.seed)
        for task in tasks
    ]


def _progress(items: Any, description: str, unit: str) -> Any:
    return tqdm(items, desc=description, unit=unit)


def _provenance(args: argparse.Namespace, result: ScorerResult) -> dict[str, Any]:
    return {
        "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
        "teacher": str(args.teacher),
        "text": str(args.text) if args.text else "Python's documentation",
        "probes": [probe.counts() for probe in result.probes],
        "min_gap_logits": args.min_gap,
        "seed": args.seed,
        "versions": versions(),
    }
