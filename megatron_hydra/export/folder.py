"""The exported folder: configuration, model code, tokenizer, generation settings, model card."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig

from megatron_hydra.export.code import AUTO_MAP, CODE, code_hash
from megatron_hydra.export.config import exported_config
from megatron_hydra.files import write_json
from megatron_hydra.teachers.config_json import FIELDS
from megatron_hydra.teachers.families import family_of
from megatron_hydra.teachers.license import license_of
from megatron_hydra.teachers.rope_json import PLAIN_ROPE
from megatron_hydra.teachers.token_ids import ends_of_generation
from megatron_hydra.teachers.tokenizer import find_tokenizer, load_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from megatron_hydra.head_plan import HeadPlan
    from megatron_hydra.model.config import HydraConfig

PLAN, CHECKPOINT = "plan.json", "checkpoint.json"
"""What the model's own configuration does not say of the checkpoint that it comes from."""


@dataclass(frozen=True)
class CardFigures:
    """What a model card tells of memory, in bytes at the exported number format.

    Attributes:
        cache_per_token: Keys and values that a token adds, of the hybrid and of its teacher.
        state: That a sequence keeps whatever its length.
        dtype: The number format in words.
        versions: Of the packages that wrote the folder.
        results: Markdown of an evaluation; empty without one.
    """

    cache_per_token: tuple[int, int]
    state: int
    dtype: str
    versions: Mapping[str, str]
    results: str = ""


def write_hybrid_parts(
    folder: Path,
    config: HydraConfig,
    plan: HeadPlan,
    meta: Mapping[str, Any],
    tokenizer_folder: Path,
    dtype: torch.dtype,
    figures: CardFigures,
) -> None:
    """All but the weights of a hybrid.

    Args:
        folder: Exists.
        config: The hybrid's.
        plan: Its plan.
        meta: The checkpoint's model.json, kept with the plan for the way back.
        tokenizer_folder: Its tokenizer files are copied.
        dtype: Of the weights.
        figures: For the model card.
    """
    _write_tokenizer(folder, tokenizer_folder)
    write_model_parts(folder, config, plan, dtype, family_of(config).tokenizer_class)
    plan.save(folder / PLAN)
    write_json(folder / CHECKPOINT, dict(meta))
    _write_card(folder, config, plan, meta, figures)


def write_model_parts(
    folder: Path,
    config: HydraConfig,
    plan: HeadPlan,
    dtype: torch.dtype,
    tokenizer_class: str | None = None,
) -> None:
    """Of a hybrid what transformers needs beside the weights to run it: configuration and code.

    Args:
        folder: As the others of :func:`write_hybrid_parts`.
        config: See there.
        plan: See there.
        dtype: See there.
        tokenizer_class: For a tokenizer that names no class.
    """
    exported = exported_config(config, plan)
    exported.architectures = ["HydraForCausalLM"]
    exported.auto_map = AUTO_MAP
    exported.dtype = dtype
    exported.tokenizer_class = tokenizer_class
    exported.save_pretrained(folder)
    for file in CODE:
        shutil.copy(file, folder / file.name)


def write_teacher_parts(
    folder: Path,
    config: HydraConfig,
    meta: Mapping[str, Any],
    tokenizer_folder: Path,
    dtype: torch.dtype,
    figures: CardFigures,
) -> None:
    """All but the weights of a teacher, as its family's own model; arguments as above."""
    family = family_of(config)
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
    }
    if config.rope_scaling_factor != PLAIN_ROPE["rope_scaling_factor"]:
        data["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    (folder / "config.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    _write_tokenizer(folder, tokenizer_folder)
    _write_card(folder, config, None, meta, figures)


def _write_tokenizer(folder: Path, source: Path) -> None:
    """The tokenizer's files, and what ends a generated text: a turn's end or a document's."""
    for file in tokenizer_files(find_tokenizer(source)):
        shutil.copy(file, folder / file.name)
    tokenizer = load_tokenizer(source)
    ends, pad = ends_of_generation(tokenizer), tokenizer.pad_token_id
    settings = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=ends[-1] if pad is None and ends else pad,
    )
    settings.save_pretrained(folder)


def _write_card(
    folder: Path,
    config: HydraConfig,
    plan: HeadPlan | None,
    meta: Mapping[str, Any],
    figures: CardFigures,
) -> None:
    """The model card, Markdown with the hub's front matter; without a plan a teacher's."""
    license = license_of(meta, "model.json")
    versions = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
    header = "" if license is None else license.front_matter
    sentence = (
        "Which that is, the checkpoint does not say." if license is None else license.sentence
    )
    card = _teacher_card(config, figures) if plan is None else _card(config, plan, figures)
    text = f"""---
{header}library_name: transformers
pipeline_tag: text-generation
tags: [{card.tags}]
---
{card.title} Written by megatron_hydra.

| | |
|---|---|
| layers | {config.num_layers} |
{card.rows}| longest sequence the model was built for | {config.seq_length:,} tokens |

```python
from transformers import pipeline

print(pipeline("text-generation", "THIS FOLDER"{card.argument})("Once upon a time"))
```
{card.needs}
{figures.results}License: that of {card.origin}. {sentence}

Versions: {versions}.{card.end}
"""
    (folder / "README.md").write_text(text, "utf-8")


class _Card(NamedTuple):
    """What a hybrid's card and a teacher's do not have in common."""

    tags: str
    title: str
    """With what it is."""
    rows: str
    """Of the table."""
    argument: str
    """Of the call that runs it."""
    needs: str
    origin: str
    """Whose licence it has."""
    end: str


def _card(config: HydraConfig, plan: HeadPlan, figures: CardFigures) -> _Card:
    kinds = Counter(kind for layer in plan.resolved(config.la_kind).layers for kind in layer.kinds)
    total = plan.num_layers * plan.num_heads
    stored = sum(len(plan.fa_groups(layer)) for layer in range(plan.num_layers))
    groups = plan.num_layers * plan.num_query_groups
    hybrid, teacher = figures.cache_per_token
    others = "".join(
        f"| heads of kind `{kind}` | {count} |\n" for kind, count in kinds.items() if kind != "fa"
    )
    title = """# A head-level hybrid

Each attention head of the teacher is of one kind: the few that retrieve keep full attention (FA),
the others do not keep keys and values of every token
([HydraHead, arXiv 2606.20097](https://arxiv.org/abs/2606.20097))."""
    rows = f"""| heads with full attention | {kinds["fa"]} of {total} |
{others}| query groups whose keys and values are stored | {stored} of {groups} |
| cache per token, {figures.dtype} | {hybrid:,} bytes (teacher: {teacher:,}) |
| state per sequence, whatever its length | {figures.state:,} bytes |
"""
    needs = """\
It needs PyTorch and transformers; on a GPU also flash-linear-attention (`pip install fla-core`),
without which recurrent heads run on PyTorch, slowly. Batches may be padded anywhere; the cache is
dynamic, or static (`cache_implementation="static"`). Assisted decoding is refused.
"""
    return _Card(
        tags="hybrid-attention, linear-attention, custom_code",
        title=title,
        rows=rows,
        argument=", trust_remote_code=True",
        needs=needs,
        origin="the teacher, whose weights it started from",
        end=f" Hash of the model code: `{code_hash()}`.",
    )


def _teacher_card(config: HydraConfig, figures: CardFigures) -> _Card:
    title = f"""# A teacher

As transformers' own `{family_of(config).architecture}`: all its heads have full attention."""
    rows = f"""| heads with full attention | {config.num_layers * config.num_attention_heads} |
| cache per token, {figures.dtype} | {figures.cache_per_token[1]:,} bytes |
"""
    return _Card(
        tags="teacher",
        title=title,
        rows=rows,
        argument="",
        needs="It needs PyTorch and transformers.\n",
        origin="the model that was converted",
        end="",
    )
