"""What a study's YAML says, section by section; :mod:`~megatron_hydra.study.config` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_hydra.api.convert import Reuse
from megatron_hydra.schema import Count, Limits, PathText, Share
from megatron_hydra.selection.budget import Constraints


@dataclass
class Replicate:
    """Arms that are compared have the same of both: teacher, and seed of data and new weights."""

    teacher: str
    seed: Annotated[int, Limits(least=0, below=1000)]
    runs: dict[str, list[str]] | None = None
    """Arms by budget that run on it; None: all whose `replicates` count it."""


@dataclass
class RunSection:
    """Where the study lies, and how often each arm runs."""

    folder: PathText
    """Teachers, and the arms that are unfinished."""
    budgets: list[str]
    """FA heads as a share of all: 1/8 is LA:FA 7:1. Of arms that name none of their own."""
    replicates: list[Replicate]
    least_teacher_accuracy: Share = 0.0
    """Of each task, at the training length, what an untrained arm that is all FA must find: runs of
    a teacher that finds less are in a table of their own."""
    results: PathText | None = None
    """Folder of one JSON file for each finished or failed arm; None: `results` in `folder`."""
    title: str = "The study"
    """Of its page."""
    note: str = ""
    """What a reader of the page should know first."""


@dataclass
class Teacher:
    """A pretrained model; one of the two is said."""

    folder: PathText | None = None
    """Hugging Face folder."""
    script: PathText | None = None
    """Python file that trains one and writes it to its `--out`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the script, without their dashes."""


@dataclass
class DataSection:
    """What every arm trains on: `preprocess`'s documents, half of needles, of Python's docs."""

    length: Count
    """Tokens of a document in stages 1 and 2: the teacher's own length."""
    documents: Count
    long_length: Count
    """The same in stage 3."""
    long_documents: Count
    retrieval_fraction: Share = 0.5


@dataclass
class Stage:
    """What a stage is for every arm."""

    tokens: Count
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections and keys of the stage's training, as in a stage's own YAML."""


@dataclass
class EvaluationSection:
    """What every arm is asked."""

    times: list[Count]
    """Lengths, in times of `data.length`."""
    tasks: list[str] = field(default_factory=lambda: ["niah_single_2", "niah_multikey_1"])
    samples: Count = 200
    """Prompts of each task at each length, and of each probe."""
    probes: list[str] = field(default_factory=list)
    """Sub-probes, other than those that `tasks` ask, at `data.length`."""
    text_tokens: Count = 16384
    """Held-out text for loss and divergence, in tokens."""
    seed: int = 2_000_003
    batch_tokens: Count = 16384
    """Of prompts that are answered together."""
    forward_tokens: Count | None = None
    """Most of one forward pass over them; None: all. Neither of the two changes a result."""


@dataclass
class SpeedsSection:
    """What `study --speeds` measures, one arm after another, alone on the device."""

    out: PathText
    """JSON file of what was measured."""
    arms: list[str]
    """The most important first; each at all its budgets, and one of those that compute alike."""
    steps: Count = 20
    """Of stage 3 that are timed."""
    warmup_steps: Count = 5
    """Before them."""
    new_tokens: Annotated[int, Limits(least=2)] = 33
    """Of each answer: the first follows from the prompt, the others are timed."""


@dataclass
class Arm:
    """One way to make a hybrid; what it does not say is as everywhere."""

    about: str
    ratio: str | None = None
    """FA heads as a share of all, whatever the budget is."""
    budget: Literal["fa_ratio", "kv_cache_ratio"] = "fa_ratio"
    constraints: Constraints = field(default_factory=Constraints)
    combine: dict[str, Any] = field(default_factory=dict)
    """Of the scores, as `plan combine.KEY=VALUE`."""
    window_ratio: str = "0"
    """Share of all heads that become windows, as `plan --window-ratio`."""
    random: bool = False
    """Heads by lot, drawn anew for each replicate."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of the hybrid, as `convert model.KEY=VALUE`."""
    calibration_tokens: Annotated[int, Limits(least=0)] = 8192
    """Each head's scale starts at what the teacher's head has on so much text; 0: at 1."""
    calibrates_recurrence: bool = False
    """As `convert --calibrate-recurrence`."""
    reuse: Reuse = "all"
    """What of the hybrid starts from the teacher's weights."""
    tokens: dict[str, Annotated[float, Limits(least=0)]] = field(default_factory=dict)
    """Of a stage, in times of the study's; 0 leaves the stage out."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of a stage's settings."""
    replicates: Annotated[int, Limits(least=0)] = 1
    """It runs on the first so many of those that name no arms, and on those that name it."""
    budgets: list[str] | None = None
    """It runs at these; None: at `run.budgets`."""


@dataclass
class Ordering:
    """A claim: one arm is better than another."""

    better: str
    worse: str
    by: str | None = None
    """`retrieval`: tasks beyond the training length; `loss` or `KL`, in nats; or a probe. None: by
    all that the question says."""
    paper: str = ""
    """What the paper has for the two."""


@dataclass
class Question:
    """A table of the page."""

    title: str
    arms: list[str]
    paper: dict[str, str] = field(default_factory=dict)
    """The paper's figures of an arm."""
    orderings: list[Ordering] = field(default_factory=list)
    by: list[str] = field(default_factory=lambda: ["retrieval"])
    """What orderings are by, where they do not say."""
    note: str = ""

    def measures(self, ordering: Ordering) -> list[str]:
        """What one of its orderings is by."""
        return [ordering.by] if ordering.by else self.by


@dataclass
class Evidence:
    """A comparison that a finding rests on: one arm is better than another, or as good."""

    better: str
    worse: str
    budget: str
    by: str = "retrieval"
    """As an ordering's."""
    within: Annotated[float, Limits(above=0)] | None = None
    """They are as good: the interval lies within so many points, or nats. None: one is better."""


@dataclass
class Finding:
    """A sentence of the page, which stands there while the results bear it out."""

    says: str
    rests_on: list[Evidence]
    """All must hold."""
