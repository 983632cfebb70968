"""The scoring configuration: its YAML sections and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.schema import Count, Limits, PathText, read_config
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.scorers.controls import CONTROLS
from megatron_hydra.tasks.probes import find_sub_probe
from megatron_hydra.tasks.text_files import TextFormat, TextOptions

SCORERS = (
    "activation_patching",
    "path_patching",
    "attribution_patching",
    "zero_ablation",
    "mean_ablation",
    "window_ablation",
    "attention_score",
)
_PAPER = ("activation_patching", "path_patching")  # receivers and senders
_AboveZero = Annotated[float, Limits(above=0)]
_Scorer = Annotated[str, Limits(choices=(*SCORERS, *CONTROLS))]


@dataclass
class ModelSection:
    """The teacher and how it is laid out; what ranks are left are data parallel."""

    teacher: PathText
    """Hugging Face folder (one rank), or a checkpoint folder (any layout)."""
    backend: Literal["local", "transformer_engine"] | None = None
    """None: Transformer Engine on a GPU, `local` on a CPU."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """None: that of a checkpoint folder; float32 for a Hugging Face folder, whatever it stores.
    Costs are told in the format that serves, which this is not: see `plan --serve-dtype`."""
    tensor_model_parallel_size: Count = 1


@dataclass
class ProbesSection:
    """What the teacher is asked; see ``megatron_hydra.tasks.probes`` for the sub-probes."""

    names: list[str] = field(
        default_factory=lambda: [
            "niah_single_1",
            "niah_single_2",
            "niah_single_3",
            "niah_multikey_1",
            "niah_multikey_2",
        ]
    )
    pairs: Count = 12
    """Counterfactual pairs per sub-probe."""
    pairs_of: dict[str, Count] = field(default_factory=dict)
    """Other numbers for some sub-probes: noisy ones, such as `text`, need more."""
    length: Count | None = None
    """Tokens of a sample with its answer. None: 4,096 as in the paper, or as many as the teacher is
    built for."""
    seed: int = 0
    text: PathText | None = None
    """Text to hide needles in: a file, folder or pattern; a tenth of it, held out, is used. None:
    Python's docs."""
    text_key: str = "text"
    """Field or column of the text in JSON lines and parquet."""
    text_format: TextFormat = "auto"
    """What the text's files hold; `auto` goes by their names."""
    min_gap_logits: _AboveZero = 1.0
    """Pairs whose clean and corrupt run differ by less are dropped: the model hardly tells the
    two answers apart, and the effect is a quotient of noise."""
    min_gap_nats: _AboveZero = 0.05
    """The same for sub-probes read by log-probability, in nats per token."""

    @property
    def text_options(self) -> TextOptions:
        """How :attr:`text` is read."""
        return TextOptions(self.text_key, self.text_format)


@dataclass
class PathPatchingSection:
    """See :class:`~megatron_hydra.selection.scorers.path_patching.PathPatching`."""

    min_effect: float = 0.02
    max_rounds: int = 2


@dataclass
class ScorersSection:
    """Who measures."""

    names: list[_Scorer] = field(default_factory=lambda: list(_PAPER))
    path_patching: PathPatchingSection = field(default_factory=PathPatchingSection)
    num_rechecked: int = 16
    """Heads that attribution patching measures exactly."""
    window_tokens: Count = 512
    """Of the scorer `window_ablation`: tokens that a head still sees, itself counted in."""
    control_seed: int = 0
    """Of the scorer `random`."""
    every: int = 4
    """Of the scorer `every_nth`: which layers come first."""


@dataclass
class CombineSection:
    """How effects become one score; changed later without a new run by `plan combine.…`."""

    scorers: list[str] = field(default_factory=list)
    """Empty: activation and path patching where they ran, else the only scorer there is."""
    consistency: bool = True
    normalise: bool = True
    weights: dict[str, Annotated[float, Limits(least=0)]] = field(default_factory=dict)
    """Weight of a capability; 1 where it is not named."""
    weigh_by_gap: bool = True


@dataclass
class RunSection:
    """Where the scores go, and how much is run at once."""

    out: PathText
    """Scores file; `OUT.partial/` beside it holds what is finished while the run lasts."""
    batch_tokens: Count = 8192
    """Tokens of one forward, unless a single sample is longer."""


@dataclass
class ScoringConfig:
    """A whole scoring run; one field per section of the YAML file."""

    model: ModelSection
    run: RunSection
    probes: ProbesSection = field(default_factory=ProbesSection)
    scorers: ScorersSection = field(default_factory=ScorersSection)
    combine: CombineSection = field(default_factory=CombineSection)

    @property
    def out(self) -> Path:
        """The scores file."""
        return Path(self.run.out)

    def combination(self) -> Combination:
        """The combination that the section stands for.

        Raises:
            UserError: If it is not clear which scorers' effects to combine.
        """
        chosen = tuple(self.combine.scorers)
        if not chosen:
            chosen = tuple(name for name in self.scorers.names if name in _PAPER)
        if not chosen and len(self.scorers.names) == 1:
            chosen = tuple(self.scorers.names)
        if not chosen:
            raise UserError(
                f"combine.scorers must say which of {', '.join(self.scorers.names)} make the score"
            )
        return Combination(**{**asdict(self.combine), "scorers": chosen})

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration, every default spelled out."""
        return asdict(self)


def load_scoring_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> ScoringConfig:
    """Read and check a scoring configuration; arguments as ``schema.read_config``.

    Raises:
        UserError: If the file cannot be read, or a key or value is not allowed.
    """
    config = read_config(ScoringConfig, path, overrides, values)
    names = config.scorers.names
    probes = [find_sub_probe(name).name for name in config.probes.names]
    for name, num_pairs in config.probes.pairs_of.items():
        if name not in probes:
            raise UserError(
                f"probes.pairs_of has {name}: {num_pairs}; it takes a sub-probe of probes.names"
            )
    for what, listed in (("scorers.names", names), ("probes.names", probes)):
        if not listed or len(set(listed)) < len(listed):
            raise UserError(f"{what} is empty or names one twice: {', '.join(listed)}")
    if "path_patching" in names and "activation_patching" not in names:
        raise UserError(
            "scorers.names has path_patching, which starts from the receivers that "
            "activation_patching finds: name both"
        )
    for name in config.combination().scorers:
        if name not in names:
            raise UserError(f"combine.scorers has {name!r}, which scorers.names does not run")
    return config
