"""`score`: how much each head of a teacher matters, by every scorer on every sub-probe.

Imports stay inside functions where they are heavy: what is wrong with the configuration is said at
once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.processes import is_first_rank
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.scorers.controls import CONTROL_PROBE, CONTROLS, control_effects
from megatron_hydra.selection.scores import HeadScores, ProbeRecord
from megatron_hydra.selection.scoring_config import ScoringConfig
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.tasks.probes import Probe, find_sub_probe, make_probe
from megatron_hydra.tasks.text import STAND_IN, read_text, split_held_out, stand_in_text
from megatron_hydra.tasks.text_files import find_texts
from megatron_hydra.teachers.model_folder import check_model_folder, stored_sizes, weights_hash

if TYPE_CHECKING:
    from megatron_hydra.teachers.checkpoint import LoadedCheckpoint

logger = logging.getLogger(__name__)

_PAPER_LENGTH = 4096  # tokens of the paper's probes (arXiv 2606.20097)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Scoring:
    """What was measured.

    Attributes:
        scores: As written; None on other ranks than the first.
        seconds: By the part of the work.
        measured_s: Seconds of the measurements alone.
    """

    scores: HeadScores | None
    seconds: dict[str, float]
    measured_s: float


def score(
    config: ScoringConfig,
    *,
    config_file: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    tell: Callable[[str], None] = logger.info,
) -> Scoring:
    """Score every head and write the file; an unfinished run of the same is gone on with.

    On several ranks each calls it: `model.tensor_model_parallel_size` of them hold a model, the
    others share the pairs.

    Args:
        config: What is measured on what.
        config_file: It was read from, which the output must not replace.
        overwrite: Replace an existing output, and start an unfinished run anew.
        progress: Shows how far it is.
        tell: Gets a line, on the first rank, on each thing that was chosen.

    Raises:
        UserError: For a teacher, text, probe or scorer that cannot be used, or an output that is
            in the way.
    """
    texts = find_texts(filter(None, [config.probes.text]), config.probes.text_options)
    check_outputs([config.out], (config.model.teacher, config.probes.text, *texts, config_file))
    check_output(config.out, overwrite, "file")
    is_checkpoint = check_model_folder(config.model.teacher)
    _check_parallel_size(config)
    _check_world_size(config)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.selection.scoring_run import PartialFolder, ScoringRun

    if not is_first_rank():
        tell = logger.debug
    initialize_model_parallel(config.model.tensor_model_parallel_size)
    seconds, start = {}, time.perf_counter()
    loaded = _load_teacher(config)
    shape = ModelShape.from_config(loaded.config)
    tell(ParallelSizes.of(vars(loaded.config)).describe())
    _choose_length(config, loaded.config.seq_length, tell)
    controls = _controls(config, shape)
    seconds["model"], start = time.perf_counter() - start, time.perf_counter()
    probes = _make_probes(config, loaded.tokenizer_folder, loaded.config.vocab_size)
    _check_memory(config, loaded.model, probes, tell)
    same = _what_makes_the_run(config, loaded, is_checkpoint, probes)
    seconds["probes"] = time.perf_counter() - start
    partial = PartialFolder(config.out, same, start_anew=overwrite)
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
    scores = None
    if is_first_rank():
        if controls:
            nothing = ProbeRecord(CONTROL_PROBE, CONTROL_PROBE, "none", 1, (0,), (), 0, 0)
            records = (*records, nothing)
        provenance = origin(config=config.to_dict(), text=config.probes.text or STAND_IN)
        scores = HeadScores(
            shape, loaded.meta["teacher_config_hash"], records, {**effects, **controls},
            config.combination(), provenance, loaded.meta["teacher_weights_hash"],
        )  # fmt: skip
        scores.save(config.out, overwrite)
        partial.remove()
    seconds |= {**scoring.seconds, "scores": time.perf_counter() - start}
    return Scoring(scores, seconds, measured_s)


def _what_makes_the_run(
    config: ScoringConfig, loaded: LoadedCheckpoint, is_checkpoint: bool, probes: list[Probe]
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


def _check_world_size(config: ScoringConfig) -> None:
    size, tensor = int(os.environ.get("WORLD_SIZE", "1")), config.model.tensor_model_parallel_size
    if size % tensor:
        raise UserError(
            f"the number of ranks, {size}, is not divisible by "
            f"model.tensor_model_parallel_size {tensor}: start "
            f"torchrun with a multiple of {tensor} ranks"
        )


def _check_parallel_size(config: ScoringConfig) -> None:
    sizes = stored_sizes(config.model.teacher)
    if sizes is not None:
        tensor = config.model.tensor_model_parallel_size
        sizes.check(f"model.teacher {config.model.teacher}", tensor, section="model.")


def _load_teacher(config: ScoringConfig) -> LoadedCheckpoint:
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


def _choose_length(config: ScoringConfig, built_for: int, tell: Callable[[str], None]) -> None:
    """Fill in the default of `probes.length`, or hold what was asked for against the teacher."""
    if config.probes.length is None:
        config.probes.length = min(_PAPER_LENGTH, built_for)
        tell(f"probes of {config.probes.length:,} tokens (probes.length)")
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


def _check_memory(
    config: ScoringConfig, model: Any, probes: list[Probe], tell: Callable[[str], None]
) -> None:
    """Say what the run needs of the GPU, and refuse it where the GPU has less."""
    import torch

    from megatron_hydra.selection.scoring_memory import check_memory, scoring_peak_bytes

    if not torch.cuda.is_available():
        return
    peak = scoring_peak_bytes(model, probes, config.scorers.names, config.run.batch_tokens)
    tell(f"predicted peak {peak / 2**30:.1f} GiB of GPU memory")
    free, _ = torch.cuda.mem_get_info()
    check_memory(peak, free + torch.cuda.memory_reserved())


def _make_scorers(config: ScoringConfig) -> list[Any]:
    from megatron_hydra.selection.scorers.ablation import (
        MeanAblation,
        WindowAblation,
        ZeroAblation,
    )
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
        "window_ablation": lambda: WindowAblation(section.window_tokens),
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
