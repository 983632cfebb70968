"""`megatron-hydra score`, or `torchrun -m hydra_tools.score`: how much each head matters."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import numpy as np

from hydra_tools import launch
from hydra_tools.progress import progress
from megatron_hydra.api.score import score
from megatron_hydra.errors import UserError
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.scoring_config import load_scoring_config

_NUM_TOP_HEADS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--config", help="YAML file; without it every key has its default")
    parser.add_argument("--teacher", help="the same as model.teacher=DIR")
    parser.add_argument("--out", help="the same as run.out=FILE: the scores to write (JSON)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Score every head; write the file; print a summary."""
    launch.check_launcher("score")
    given = {"model.teacher": args.teacher, "run.out": args.out}
    values = {key: value for key, value in given.items() if value is not None}
    config = load_scoring_config(args.config, args.overrides, values)
    done = score(
        config,
        config_file=args.config,
        overwrite=args.overwrite,
        progress=progress,
        tell=partial(print, flush=True),
    )
    if done.scores is not None:
        print("\n".join(describe(done.scores)))
        print(f"{_times(done.seconds)}\nmeasured in {done.measured_s:.1f} s\n")
        print(f"scores: {config.out}")
    return 0


def describe(scores: HeadScores) -> list[str]:
    """Sentences on scores: pairs kept and dropped, the heads that matter most, how sure that is."""
    from megatron_hydra.selection.uncertainty import bootstrap_scores, score_intervals

    lines = []
    for probe in scores.probes:
        if probe.gaps:
            lines.append(
                f"{probe.name} ({probe.capability}): {len(probe.kept)} of {probe.num_pairs} pairs "
                f"kept, {probe.num_dropped} dropped; median gap {np.median(probe.gaps):.3g}"
            )
    intervals = score_intervals(bootstrap_scores(scores))
    order = scores.ranked_heads
    num_positive = int((scores.scores > 0).sum())
    lines.append(f"{num_positive} of {order.size} heads have a score above 0; the highest:")
    columns = [
        (scorer, probe) for scorer in scores.combination.scorers for probe in scores.effects[scorer]
    ]
    lines.append(
        "  layer head  score  95% interval    largest mean effect, and where (scorer, sub-probe)"
    )
    for index in order[:_NUM_TOP_HEADS]:
        layer, head = divmod(int(index), scores.num_heads)
        effects = [scores.mean_effects(*column)[layer, head] for column in columns]
        best = int(np.argmax(np.abs(effects)))
        interval = f"{intervals.lower[layer, head]:.3f} to {intervals.upper[layer, head]:.3f}"
        lines.append(
            f"  {layer:>5} {head:>4}  {scores.scores[layer, head]:.3f}  {interval}  "
            f"{effects[best]:+.3f}  {', '.join(columns[best])}"
        )
    lines.append(_reproducibility(scores))
    return lines


def _times(seconds: dict[str, float]) -> str:
    """Where the time went, and how much of the GPU's memory was needed."""
    import torch

    parts = [f"{name} {value:.1f} s" for name, value in seconds.items()]
    if torch.cuda.is_available():
        parts.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory")
    return ", ".join(parts)


def _reproducibility(scores: HeadScores) -> str:
    from megatron_hydra.selection.uncertainty import split_half_correlation

    try:
        half = split_half_correlation(scores)
    except UserError as error:
        return f"rank correlation between halves of the pairs: none, since {error}"
    return (
        f"rank correlation (Spearman) between halves of the pairs: {half.median:.2f} "
        f"({half.lower:.2f} to {half.upper:.2f} over splits), with {half.num_pairs_per_half} pairs "
        "or more of each sub-probe in a half"
    )


if __name__ == "__main__":
    sys.exit(launch.main("score"))
