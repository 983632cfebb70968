"""`convert`: a pretrained model's folder and a head plan become a checkpoint of the hybrid."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.selection.cost import ServeDtype, weight_bytes
from megatron_hydra.selection.policy import read_shape
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.tasks.text_files import TextOptions, find_texts
from megatron_hydra.teachers.config_json import config_hash, read_config, teacher_hash
from megatron_hydra.teachers.license import read_license
from megatron_hydra.teachers.model_folder import check_model_folder, weights_hash
from megatron_hydra.unfinished import num_bytes_kept

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from megatron_hydra.teachers.weight_reuse import ReuseSummary

logger = logging.getLogger(__name__)

LONGEST_CALIBRATION = 2048
_BATCH_TOKENS = 2048
_SHORTEST_FOR_RECURRENCE = 16
_FORMATS: dict[str, ServeDtype] = {"float32": "fp32", "bfloat16": "bf16"}

Reuse = Literal["all", "no_attention", "nothing"]
"""What of a hybrid starts from its teacher's weights; controls, but for `all`."""


@dataclass(frozen=True)
class Calibration:
    """The text that a teacher's heads are measured on, and what is measured beside their scales.

    Attributes:
        text: A file, a folder or a pattern; None for Python's documentation, which stands in for
            text like what the model is for.
        options: How text files are read.
        num_tokens: Of the text; 0 measures nothing, and every scale starts at 1.
        length_tokens: Of a sequence; None for what the teacher is built for,
            `LONGEST_CALIBRATION` at most.
        how_to_name: What names a text, for the warning where none is.
        recurrence: Let recurrent heads forget and write as their teacher's heads look
            (`teachers/attention_statistics.py`), in place of the layer's own start.
    """

    text: str | None = None
    options: TextOptions = field(default_factory=TextOptions)
    num_tokens: int = 8192
    length_tokens: int | None = None
    how_to_name: str = "calibration.text"
    recurrence: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: The checkpoint.
        plan: None for a teacher.
        reuse: Which values came from the teacher and which are new; None for a teacher.
        num_tokens: That the heads' scales were measured on.
        length_tokens: Of their sequences.
        parallel_sizes: That can train it.
    """

    folder: Path
    plan: HeadPlan | None
    reuse: ReuseSummary | None
    num_tokens: int
    length_tokens: int
    parallel_sizes: ParallelSizes


def convert(
    teacher: Path,
    out: Path,
    plan: Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    calibration: Calibration = Calibration(),
    reuse: Reuse = "all",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Conversion:
    """Write a checkpoint of a hybrid, started from its teacher's weights, or of the teacher itself.

    Args:
        teacher: Hugging Face folder.
        out: The checkpoint folder.
        plan: What :meth:`HeadPlan.save` wrote; None converts the teacher.
        options: Fields of :class:`~megatron_hydra.model.config.HydraConfig`, such as `fa_rope`.
            Where they do not say what the LA heads are, it is what the plan's costs were told for.
        dtype: Of the weights.
        calibration: For a hybrid whose fusion has a scale for each head and reuses all.
        reuse: What of a hybrid starts from the teacher's weights, the rest at random.
        overwrite: Replace an earlier checkpoint.
        progress: Shows how far it is.

    Raises:
        UserError: For a folder, plan, option or text that cannot be used, or an output that is in
            the way; nothing is written then.
    """
    texts = find_texts(filter(None, [calibration.text]), calibration.options)
    check_outputs([out], (teacher, plan, calibration.text, *texts))
    check_output(out, overwrite, "folder", marker="model.json")
    _check_calibration(calibration)
    if plan is None and reuse != "all":
        raise UserError(f"reuse is {reuse}, but without a plan the teacher itself is converted")
    if calibration.recurrence and (plan is None or reuse != "all"):
        raise UserError(
            "the calibration of recurrent heads needs a plan, and reuse to be all: it measures "
            "what the hybrid takes from its teacher"
        )
    if check_model_folder(teacher):
        raise UserError(f"the teacher {teacher} is a checkpoint folder: it is converted already")
    hash_of_weights, found = weights_hash(teacher), read_license(teacher)
    license_of_teacher = None if found is None else asdict(found)
    head_plan = None if plan is None else _load_plan(plan, teacher, hash_of_weights)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    import torch

    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers import checkpoint
    from megatron_hydra.teachers.converted import Converted
    from megatron_hydra.teachers.loading import hydra_config
    from megatron_hydra.teachers.tokenizer import check_tokenizer
    from megatron_hydra.teachers.unfinished_checkpoint import UnfinishedCheckpoint
    from megatron_hydra.teachers.weight_reuse import ReuseSummary
    from megatron_hydra.teachers.weights import TeacherWeights

    fields = {**_planned(head_plan), **(options or {})}
    checkpoint.check_stored("hybrid" if head_plan else "teacher", fields)
    config = hydra_config(teacher, **fields, params_dtype=getattr(torch, dtype))
    # At the least: vectors and what the format adds come on top.
    needed = weight_bytes(ModelShape.from_config(config), _FORMATS[dtype]).of(head_plan)
    check_space(out, needed - num_bytes_kept(out))
    tokenizer = check_tokenizer(teacher, config.vocab_size)
    batches: list[Tensor] = []
    measures = calibration.recurrence or (config.has_head_scales and reuse == "all")
    if head_plan and calibration.num_tokens and measures:
        batches = _batches(calibration, tokenizer, config.seq_length)
    provenance = origin(reuse=reuse, **_record(calibration, batches))
    initialize_model_parallel()
    fingerprint = {
        "teacher": {"weights": hash_of_weights, "config": teacher_hash(config)},
        "plan": None if head_plan is None else head_plan.to_dict(),
        "options": {name: str(value) for name, value in fields.items()},
        "dtype": dtype,
        "reuse": reuse,
        "calibration": [batch.tolist() for batch in batches],
        "recurrence": calibration.recurrence,
    }
    work = UnfinishedCheckpoint(out, fingerprint, overwrite)
    model = Converted(config, head_plan, TeacherWeights(teacher), reuse)
    with work.going_on():
        if batches:
            model.measure(work, batches, calibration.recurrence, progress)
        counted = work.fill(config, model.part, progress)
        checkpoint.save_checkpoint(
            out, work.join, config, head_plan, teacher, provenance, overwrite,
            teacher_weights_hash=hash_of_weights, teacher_license=license_of_teacher,
        )  # fmt: skip
    return Conversion(
        folder=out,
        plan=head_plan,
        reuse=None if head_plan is None else ReuseSummary.total(counted),
        num_tokens=sum(batch.numel() for batch in batches),
        length_tokens=batches[0].shape[1] if batches else 0,
        parallel_sizes=ParallelSizes.of(vars(config)),
    )


def _load_plan(path: Path, teacher: Path, hash_of_weights: str) -> HeadPlan:
    """Read a plan for this teacher; warn if it was made for another training of its shape."""
    plan, config = HeadPlan.load(path), read_config(teacher)
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


def _planned(plan: HeadPlan | None) -> dict[str, Any]:
    """What a plan's costs were counted for, as options; nothing where it does not say."""
    shape = None if plan is None else read_shape(plan)
    if shape is None:
        return {}
    return {
        name: value for name, value in shape.la_heads.items() if value != getattr(ModelShape, name)
    }


def _check_calibration(calibration: Calibration) -> None:
    length, wanted = calibration.length_tokens, calibration.num_tokens
    if wanted < 0:
        raise UserError(f"the number of calibration tokens is {wanted}; it must be 0 or more")
    if not wanted:
        if calibration.recurrence:
            raise UserError(
                "the calibration of recurrent heads needs calibration tokens, 0 are asked"
            )
        return
    if length is not None and not 0 < length <= wanted:
        raise UserError(
            f"the calibration length is {length} tokens; allowed: 1 to the calibration tokens, "
            f"{wanted}"
        )


def _record(calibration: Calibration, batches: Sequence[Tensor]) -> dict[str, Any]:
    """What the heads' scales were measured on, for provenance."""
    from megatron_hydra.tasks.text import STAND_IN

    record: dict[str, Any] = {"calibration_tokens": sum(batch.numel() for batch in batches)}
    if batches:
        record["calibration_length"] = batches[0].shape[1]
        record["calibration_text"] = str(calibration.text or STAND_IN)
        record["calibrated_recurrence"] = calibration.recurrence
    return record


def _batches(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, built_for: int
) -> list[Tensor]:
    """The calibration text in token batches `[b, s]`, int64, for a teacher that takes so many."""
    import torch

    from megatron_hydra.tasks.text import read_text, stand_in_text

    wanted = calibration.num_tokens
    length = calibration.length_tokens or min(built_for, LONGEST_CALIBRATION, wanted)
    if calibration.recurrence and length < _SHORTEST_FOR_RECURRENCE:
        raise UserError(
            f"the calibration length is {length} tokens; how far back heads look is measured on "
            f"{_SHORTEST_FOR_RECURRENCE} or more"
        )
    enough = 16 * wanted  # characters, for any language and tokenizer
    if calibration.text is None:
        text = stand_in_text(calibration.how_to_name)
    else:
        text = read_text(calibration.text, calibration.options, enough)
    tokens = tokenizer(text[:enough], add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < wanted:
        raise UserError(
            f"the calibration text has {len(tokens)} tokens, fewer than the calibration tokens, "
            f"{wanted}"
        )
    sequences = torch.tensor(tokens[: wanted // length * length]).view(-1, length)
    return list(sequences.split(max(1, _BATCH_TOKENS // length)))
