"""`megatron-hydra score`, or `torchrun -m hydra_tools.score`: how much each head matters.

Imports stay inside functions where they are heavy: a config with a typo is answered at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hydra_tools import launch
from hydra_tools.progress import progress
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs, versions
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.cost import ModelShape
from megatron_hydra.selection.scorers.controls import CONTROL_PROBE, CONTROLS, control_effects
from megatron_hydra.selection.scores import HeadScores, ProbeRecord
from megatron_hydra.selection.scoring_config import ScoringConfig, load_scoring_config
from megatron_hydra.tasks.probes import Probe, find_sub_probe, make_probe
from megatron_hydra.tasks.text import STAND_IN, read_text, split_held_out, stand_in_text
from megatron_hydra.tasks.text_files import find_texts
from megatron_hydra.teachers.model_folder import check_model_folder, stored_sizes, weights_hash

_NUM_TOP_HEADS = 8
_PAPER_LENGTH = 4096  # tokens of the paper's probes (arXiv 2606.20097)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--config", help="YAML file; without it every key has its default")
    parser.add_argument("--teacher", help="the same as model.teacher=DIR")
    parser.add_argument("--out", help="the same as run.out=FILE: the scores to write (JSON)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Score every head; write the file; print a summary."""
    given = {"model.teacher": args.teacher, "run.out": args.out}
    values = {key: value for key, value in given.items() if value is not None}
    config = load_scoring_config(args.config, args.overrides, values)
    texts = find_texts(filter(None, [config.probes.text]), config.probes.text_options)
    check_outputs([config.out], (config.model.teacher, config.probes.text, *texts, args.config))
    check_output(config.out, args.overwrite, "file")
    is_checkpoint = check_model_folder(config.model.teacher)
    _check_parallel_size(config)
    _check_world_size(config)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.selection.scoring_run import PartialFolder, ScoringRun

    initialize_model_parallel(config.model.tensor_model_parallel_size)
    seconds, start = {}, time.perf_counter()
    loaded = _load_teacher(config)
    shape = ModelShape.from_config(loaded.config)
    if launch.rank() == 0:
        print(ParallelSizes.of(vars(loaded.config)).describe(), flush=True)
    _choose_length(config, loaded.config.seq_length)
    controls = _controls(config, shape)
    seconds["model"], start = time.perf_counter() - start, time.perf_counter()
    probes = _make_probes(config, loaded.tokenizer_folder, loaded.config.vocab_size)
    _check_memory(config, loaded.model, probes)
    same = _what_makes_the_run(config, loaded, is_checkpoint, probes)
    seconds["probes"] = time.perf_counter() - start
    partial = PartialFolder(config.out, same, start_anew=args.overwrite)
    start = time.perf_counter()
    scoring = ScoringRun(
        loaded.model.eval(),
        probes,
        _make_scorers(config),
        partial,
        {
            "logit_difference": config.probes.min_gap_logits,
            "log_probability": config.probes.min_gap_nats,
        },
        config.run.batch_tokens,
        progress,
    )
    records, effects = scoring.run()
    measured_s, start = time.perf_counter() - start, time.perf_counter()
    if launch.rank() == 0:
        if controls:
            records = (
                *records,
                ProbeRecord(CONTROL_PROBE, CONTROL_PROBE, "none", 1, (0,), (), 0, 0),
            )
        scores = HeadScores(
            shape, loaded.meta["teacher_config_hash"], records, {**effects, **controls},
            config.combination(), _provenance(config, args), loaded.meta["teacher_weights_hash"],
        )  # fmt: skip
        scores.save(config.out, args.overwrite)
        partial.remove()
        print("\n".join(describe(scores)))
        seconds |= {**scoring.seconds, "scores": time.perf_counter() - start}
        print(f"{_times(seconds)}\nmeasured in {measured_s:.1f} s\n\nscores: {config.out}")
    return 0


def _what_makes_the_run(
    config: ScoringConfig, loaded: Any, is_checkpoint: bool, probes: list[Probe]
) -> dict[str, Any]:
    """What an unfinished run must have in common with this one to be gone on with.

    Where the scores go and where the teacher lies do not change them; everything else makes
    another run, weights and probes by their contents.
    """
    from megatron_hydra.selection.scoring_run import probes_digest

    # A checkpoint folder's record names the weights that it came from, not its own.
    stored = loaded.meta["teacher_weights_hash"]
    same = {
        **config.to_dict(),
        "teacher_config_hash": loaded.meta["teacher_config_hash"],
        "weights": weights_hash(config.model.teacher) if is_checkpoint else stored,
        "probes": probes_digest(probes),
        "run": {"batch_tokens": config.run.batch_tokens},
    }
    del same["model"]["teacher"]
    return same


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


def _check_world_size(config: ScoringConfig) -> None:
    size, tensor = int(os.environ.get("WORLD_SIZE", "1")), config.model.tensor_model_parallel_size
    if size % tensor:
        raise UserError(
            f"model.tensor_model_parallel_size {tensor} does not divide the {size} ranks: start "
            f"torchrun with a multiple of {tensor} ranks"
        )


def _check_parallel_size(config: ScoringConfig) -> None:
    sizes = stored_sizes(config.model.teacher)
    if sizes is not None:
        tensor = config.model.tensor_model_parallel_size
        sizes.check(f"model.teacher {config.model.teacher}", tensor, section="model.")


def _load_teacher(config: ScoringConfig) -> Any:
    import torch

    from megatron_hydra.teachers.checkpoint import load_any_model

    section = config.model
    overrides: dict[str, Any] = {}
    if section.dtype is not None:
        overrides["params_dtype"] = getattr(torch, _DTYPES[section.dtype])
    on_gpu = torch.cuda.is_available()
    overrides["backend"] = section.backend or ("transformer_engine" if on_gpu else "local")
    loaded = load_any_model(section.teacher, **overrides)
    if loaded.plan is not None:
        raise UserError(f"{section.teacher} is a hybrid: scores are measured on its teacher")
    if on_gpu:
        loaded.model.cuda()
    return loaded


def _choose_length(config: ScoringConfig, built_for: int) -> None:
    """Fill in the default of `probes.length`, or hold what was asked for against the teacher."""
    if config.probes.length is None:
        config.probes.length = min(_PAPER_LENGTH, built_for)
        if launch.rank() == 0:
            print(f"probes of {config.probes.length:,} tokens (probes.length)", flush=True)
    elif config.probes.length > built_for:
        raise UserError(
            f"probes.length is {config.probes.length}; the teacher is built for {built_for} tokens "
            "at most"
        )


def _make_probes(config: ScoringConfig, tokenizer_folder: Path, vocab_size: int) -> list[Probe]:
    from megatron_hydra.teachers.tokenizer import load_model_tokenizer

    section = config.probes
    assert section.length is not None
    tokenizer = load_model_tokenizer(tokenizer_folder, vocab_size)
    text = section.text
    text = read_text(text, section.text_options) if text else stand_in_text("probes.text=")
    # Held out, as far as the teacher was trained on the same text.
    _, text_tokens = split_held_out(tokenizer.encode(text, add_special_tokens=False))
    return [
        make_probe(
            name,
            tokenizer,
            text_tokens,
            section.length,
            section.pairs_of.get(find_sub_probe(name).name, section.pairs),
            section.seed,
        )
        for name in section.names
    ]


def _check_memory(config: ScoringConfig, model: Any, probes: list[Probe]) -> None:
    """Say what the run needs of the GPU, and refuse it where the GPU has less."""
    import torch

    from megatron_hydra.selection.scoring_memory import check_memory, scoring_peak_bytes

    if not torch.cuda.is_available():
        return
    peak = scoring_peak_bytes(model, probes, config.scorers.names, config.run.batch_tokens)
    if launch.rank() == 0:
        print(f"predicted peak {peak / 2**30:.1f} GiB of GPU memory", flush=True)
    free, _ = torch.cuda.mem_get_info()
    check_memory(peak, free + torch.cuda.memory_reserved())


def _make_scorers(config: ScoringConfig) -> list[Any]:
    from megatron_hydra.selection.scorers.ablation import MeanAblation, ZeroAblation
    from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
    from megatron_hydra.selection.scorers.attention_score import AttentionScore
    from megatron_hydra.selection.scorers.attribution_patching import AttributionPatching
    from megatron_hydra.selection.scorers.path_patching import PathPatching

    section = config.scorers
    known = {
        "activation_patching": ActivationPatching,
        "path_patching": lambda: PathPatching(
            section.path_patching.min_effect, section.path_patching.max_rounds
        ),
        "attribution_patching": lambda: AttributionPatching(section.num_rechecked),
        "zero_ablation": ZeroAblation,
        "mean_ablation": MeanAblation,
        "attention_score": AttentionScore,
    }
    names = sorted(section.names, key=lambda name: name == "path_patching")  # after receivers
    return [known[name]() for name in names if name in known]


def _controls(config: ScoringConfig, shape: ModelShape) -> dict[str, dict[str, Array]]:
    section = config.scorers
    return {
        name: {
            CONTROL_PROBE: control_effects(
                name,
                shape.num_layers,
                shape.num_heads,
                seed=section.control_seed,
                every=section.every,
            )
        }
        for name in section.names
        if name in CONTROLS
    }


def _provenance(config: ScoringConfig, args: argparse.Namespace) -> dict[str, Any]:
    given = (("--config", args.config), ("--teacher", args.teacher), ("--out", args.out))
    flags = [word for pair in given if pair[1] is not None for word in pair]
    return {
        "command": shlex.join(launch.command("score", [*flags, *args.overrides])),
        "config": config.to_dict(),
        "text": config.probes.text or STAND_IN,
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(launch.main("score"))
