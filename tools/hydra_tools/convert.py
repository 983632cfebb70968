"""``megatron-hydra convert``: a Qwen3 folder and a head plan become a checkpoint folder."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_tools.progress import progress
from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs, parse_json, versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.selection.cost import ModelShape, ServeDtype, weight_bytes
from megatron_hydra.tasks.text_files import add_text_options, find_texts, text_options
from megatron_hydra.teachers.model_folder import check_model_folder, weights_hash
from megatron_hydra.teachers.qwen3_config import config_hash, read_qwen3_config

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

    from megatron_hydra.model.config import HydraConfig

logger = logging.getLogger(__name__)

_SERVE_DTYPES: dict[str, ServeDtype] = {"float32": "fp32", "bfloat16": "bf16"}

_BATCH_TOKENS = 2048
_LONGEST_CALIBRATION = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--teacher", required=True, type=Path, help="Hugging Face Qwen3 folder")
    parser.add_argument(
        "--plan", type=Path, help="what `plan` wrote; else the teacher is converted"
    )
    parser.add_argument("--out", required=True, type=Path, help="the checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--calibration-text",
        help="text to measure the scale of each teacher head on: a file, folder or quoted pattern "
        "(default: Python's documentation, which stands in for text like what the model is for)",
    )
    add_text_options(parser)
    parser.add_argument("--calibration-tokens", type=int, default=8192, metavar="N")
    parser.add_argument(
        "--calibration-length",
        type=int,
        metavar="N",
        help="tokens a sequence (default: what the teacher is built for, "
        f"{_LONGEST_CALIBRATION} at most)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="name=value", help="model options, such as fa_rope=true"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; print what came from the teacher and what is new."""
    texts = find_texts(filter(None, [args.calibration_text]), text_options(args))
    check_outputs([args.out], (args.teacher, args.plan, args.calibration_text, *texts))
    check_output(args.out, args.overwrite, "folder", marker="model.json")
    overrides = parse_overrides(args.overrides)
    _check_calibration(args)
    if check_model_folder(args.teacher):
        raise UserError(f"--teacher {args.teacher} is a checkpoint folder: it is converted already")
    hash_of_weights = weights_hash(args.teacher)
    plan = _load_plan(args.plan, args.teacher, hash_of_weights) if args.plan else None
    from megatron_hydra import cpu

    cpu.install_if_needed()
    import torch

    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers import checkpoint, qwen3
    from megatron_hydra.teachers.tokenizer import check_tokenizer

    checkpoint.check_stored("hybrid" if args.plan else "teacher", overrides)
    overrides["params_dtype"] = getattr(torch, args.dtype)
    config = qwen3.hydra_config(args.teacher, **overrides)
    # At the least: vectors and what the format adds come on top.
    size = weight_bytes(ModelShape.from_config(config), _SERVE_DTYPES[args.dtype]).of(plan)
    check_space(args.out, size)
    check_tokenizer(args.teacher, config.vocab_size)
    batches = (
        _calibration_batches(args, config.seq_length)
        if plan and config.fusion in ("scale", "gate")
        else []
    )
    tensors = qwen3.read_weights(args.teacher)
    initialize_model_parallel()
    if plan is None:
        model = _build_teacher(config, tensors)
    else:
        model = _build_hybrid(config, plan, tensors, batches)
    provenance = {
        "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
        "versions": versions(),
        **_calibration(args, batches),
    }
    checkpoint.save_checkpoint(
        args.out,
        model,
        config,
        plan,
        args.teacher,
        provenance,
        args.overwrite,
        teacher_weights_hash=hash_of_weights,
    )
    print(ParallelSizes.of(vars(config)).describe())
    print(f"checkpoint: {args.out}")
    return 0


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` arguments; values are JSON (``true``, ``4``, ``1e-6``) or plain words.

    Raises:
        UserError: For an argument without ``=`` and for a name that stands twice.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name and equals and text):
            raise UserError(f"model option {argument!r} must be name=value, as in fa_rope=true")
        if name in overrides:
            raise UserError(f"model option {name} is given twice")
        try:
            overrides[name] = parse_json(text)
        except ValueError:
            overrides[name] = text
    return overrides


def _load_plan(path: Path, teacher: Path, hash_of_weights: str) -> HeadPlan:
    """Read a plan for this teacher; warn if it was made for another training of its shape."""
    plan, config = HeadPlan.load(path), read_qwen3_config(teacher)
    plan.check_teacher(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config_hash(teacher),
    )
    measured = plan.provenance.get("teacher_weights_hash")
    if measured and measured != hash_of_weights:
        logger.warning(
            "%s was made from scores of other weights than those in %s: the heads that mattered "
            "there need not be those that matter here, which a new `score` would tell",
            path,
            teacher,
        )
    return plan


def _check_calibration(args: argparse.Namespace) -> None:
    length, wanted = args.calibration_length, args.calibration_tokens
    if length is not None and not 0 < length <= wanted:
        raise UserError(
            f"--calibration-length is {length}; allowed: 1 to --calibration-tokens, {wanted}"
        )


def _calibration(args: argparse.Namespace, batches: Sequence[Tensor]) -> dict[str, Any]:
    """What the heads' scales were measured on, for provenance."""
    from megatron_hydra.tasks.text import STAND_IN

    record: dict[str, Any] = {"calibration_tokens": sum(batch.numel() for batch in batches)}
    if batches:
        record["calibration_length"] = batches[0].shape[1]
        record["calibration_text"] = str(args.calibration_text or STAND_IN)
    return record


def _calibration_batches(args: argparse.Namespace, built_for: int) -> list[Tensor]:
    """Cut the calibration text into token batches `[b, s]`, int64.

    Args:
        args: The verb's.
        built_for: Tokens that the teacher can take.
    """
    import torch

    from megatron_hydra.tasks.text import read_text, stand_in_text
    from megatron_hydra.teachers.qwen3 import load_tokenizer

    wanted = args.calibration_tokens
    length = args.calibration_length
    if length is None:
        length = min(built_for, _LONGEST_CALIBRATION, wanted)
    enough = 16 * wanted  # characters, for any language and tokenizer
    name, options = args.calibration_text, text_options(args)
    text = read_text(name, options, enough) if name else stand_in_text("--calibration-text")
    text = text[:enough]
    tokenizer = load_tokenizer(args.teacher)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < wanted:
        raise UserError(
            f"the calibration text has {len(tokens)} tokens, fewer than "
            f"--calibration-tokens, {wanted}"
        )
    sequences = torch.tensor(tokens[: wanted // length * length]).view(-1, length)
    print(f"scales of the heads: on {sequences.numel():,} tokens, {length:,} a sequence")
    return list(sequences.split(max(1, _BATCH_TOKENS // length)))


def _build_teacher(config: HydraConfig, tensors: Mapping[str, Tensor]) -> GPTModel:
    from megatron_hydra.model.build import build_model
    from megatron_hydra.teachers.qwen3 import load_weights_into

    model = build_model(config, None)
    load_weights_into(model, tensors)
    return model


def _build_hybrid(
    config: HydraConfig, plan: HeadPlan, tensors: Mapping[str, Tensor], batches: Sequence[Tensor]
) -> GPTModel:
    from megatron_hydra.model.build import build_model
    from megatron_hydra.teachers.qwen3 import megatron_tensors
    from megatron_hydra.teachers.weight_reuse import measure_head_rms, reuse_teacher_weights

    head_rms = None
    if batches:
        teacher = _build_teacher(config, tensors)
        head_rms = measure_head_rms(teacher, progress(batches, "head scales", "batch"))
        del teacher
    model = build_model(config, plan)
    summary = reuse_teacher_weights(
        model,
        megatron_tensors(config, tensors),
        head_rms,
        progress=lambda layers: progress(layers, "weights", "layer"),
    )
    num_heads = plan.num_layers * plan.num_heads
    print(f"heads: {plan.num_fa_heads} with full attention of {num_heads}")
    for title, counts in (("from the teacher", summary.reused), ("new", summary.new)):
        print(f"{title}: {counts.total():,} values")
        for part, count in counts.most_common():
            print(f"  {count:>15,}  {part}")
    return model
