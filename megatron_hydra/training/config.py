"""The training configuration: its YAML sections and their defaults; imports no NeMo.

The section `model` is in `model_section`; the weights of a loss follow from its stage, in
`config_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra_kernels.loss_options import Kind, LossOptions

from megatron_hydra.schema import Limits, PathText, read_config
from megatron_hydra.training.config_checks import check
from megatron_hydra.training.model_section import ModelSection

Stage = Literal["align", "distill", "long_context"]
_Count = Annotated[int, Limits(least=1, below=2**31)]
_CountOr0 = Annotated[int, Limits(least=0, below=2**31)]
_Seed = Annotated[int, Limits(least=0, below=2**32)]
_Workers = Annotated[int, Limits(least=0, most=1024)]
# Far below float32's largest number, which PyTorch's optimizer must be able to hold.
_Positive = Annotated[float, Limits(above=0, below=1e30)]
_PositiveOr0 = Annotated[float, Limits(least=0, below=1e30)]
_Below1 = Annotated[float, Limits(least=0, below=1)]

MAY_CHANGE = (
    "model.overlap_branches",
    "model.placement",
    "model.recompute",
    "model.recompute_layers",
    "model.cuda_graphs",
    "data.micro_batch_size",
    "data.num_workers",
    "data.validation_paths",
    "trainer.max_steps",
    "trainer.num_threads",
    "trainer.validate_every_n_steps",
    "trainer.validation_steps",
    "trainer.needles_every_n_steps",
    "trainer.needle_samples",
    "trainer.needle_task",
    "trainer.needle_tokens",
    "transfer.chunk_tokens",
    "strategy",
    "log",
    "resume",
    "bad_numbers",
)
"""What a run that goes on may change, sections and keys: it decides how a step is computed, or how
many there are, but not what a step is. What is not here is held to what the run began with."""
HELD_BY_CONTENT = ("transfer.init_from", "transfer.teacher", "data.paths")
"""What else a run is held to: the contents that these name, however they are spelt."""


@dataclass
class DataSection:
    """Megatron indexed datasets, as `megatron-hydra preprocess` writes them."""

    paths: list[PathText]
    """Prefixes: `PREFIX.bin` and `PREFIX.idx` exist for each."""
    seq_length: _Count
    """Tokens of a sample."""
    micro_batch_size: _Count
    """Samples that a rank computes at one time."""
    global_batch_size: _Count
    """Samples of a step, of all replicas together."""
    weights: list[_Positive] = field(default_factory=list)
    """Share of each path in the blend; empty: by size."""
    long_document_tokens: _Count | None = None
    """Documents of so many tokens or more, their end included, are up-sampled by
    `long_document_factor`, within their dataset; None: none are. `train --dry-run` says what share
    of the tokens they have, and what it becomes."""
    long_document_factor: Annotated[int, Limits(least=1, most=1000)] = 1
    """How often an epoch holds each long document; the others it holds once. A dataset counts as
    that much larger where `weights` are empty."""
    mask_end_of_document: bool = False
    """Leave the prediction that follows an end-of-document token out of the loss."""
    reset_at_document_end: bool = False
    """Restart positions, attention, convolution and recurrence after each end-of-document token.

    So documents of one sample do not see one another; includes `mask_end_of_document`.
    """
    end_of_document: str | None = None
    """Text of the token that ends documents; None: the one noted beside the datasets, else
    `<|endoftext|>` or `<|end_of_text|>` where the tokenizer has it, else its `eos_token`."""
    num_workers: _Workers = 0
    """Processes per rank that read samples; 0 reads them in the rank's own."""
    seed: _Seed = 1234
    """Of the order of samples."""
    validation_paths: list[PathText] = field(default_factory=list)
    """Prefixes of held-out datasets, whose loss is measured now and then; empty: none is."""

    @property
    def validation(self) -> DataSection:
        """The same of the held-out datasets, blended by size, each document as often as it is."""
        return replace(
            self,
            paths=self.validation_paths,
            weights=[],
            validation_paths=[],
            long_document_tokens=None,
            long_document_factor=1,
        )


@dataclass
class TrainerSection:
    """Length of the run and the device it runs on."""

    max_steps: _Count
    """Optimizer steps of the whole run."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """`bf16` computes in bfloat16; the optimizer's weights are float32 either way. `fp8` is bf16
    with the layers' matrix products in FP8 (Transformer Engine's, on a GPU alone): E4M3 forward,
    E5M2 backward, each tensor scaled by its own largest value."""
    num_threads: _Workers = 0
    """CPU threads per rank; 0 leaves PyTorch's default."""
    seed: _Seed = 1234
    """Of all random numbers of the run but the order of samples."""
    validate_every_n_steps: _CountOr0 = 0
    """Steps between two measurements of the loss on `data.validation_paths`, which is measured
    after the last step too; 0: never."""
    validation_steps: _Count = 10
    """Global batches of a measurement, each time the same samples."""
    needles_every_n_steps: _CountOr0 = 0
    """Steps between two rounds of questions about needles in held-out text (without any, in what is
    trained on), which the model answers by generated text; after the last step too; 0: never."""
    needle_samples: _Count = 32
    """Questions of a round, each time the same, at depths from start to end."""
    needle_task: str = "single"
    """`single`, `multi_key` of 8 needles, or `multi_key:N` of N."""
    needle_tokens: _Count | None = None
    """Tokens of a question's text, question and answer; None: `data.seq_length`."""


@dataclass
class StrategySection:
    """Megatron's parallel layout; the data-parallel size is what is left of the world size."""

    tensor_model_parallel_size: _Count = 1
    """Ranks that share each layer's heads and matrices."""
    pipeline_model_parallel_size: _Count = 1
    """Stages that the layers are cut into, equal in size."""
    context_parallel_size: _Count = 1
    """Ranks that share each sample's tokens."""
    cp_comm_type: Literal["p2p", "a2a", "all_gather"] | None = None
    """How Transformer Engine brings keys and values to the queries of other context-parallel ranks:
    around a ring, by exchanging heads for tokens, or gathered. None is Megatron's own choice, the
    ring. What LA heads exchange does not depend on it."""
    sequence_parallel: bool = False
    """Share the tokens between layers among the tensor-parallel ranks too."""
    use_distributed_optimizer: bool = False
    """Split the optimizer's state over the data- and context-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data- and context-parallel ranks while the backward pass still computes
    others, a bucket of 40 million values or more at a time; false: all once it has ended. A bad
    gradient is then named on all ranks that it was summed over, not on the one it began on."""
    timeout_minutes: Annotated[float, Limits(above=0, most=1440)] = 30.0
    """How long a rank waits for others before all end: a hang is noticed by it. The first steps,
    which compile kernels, and the slowest rank's part of a checkpoint have to fit."""
    heartbeat_seconds: Annotated[float, Limits(above=0, most=86400)] | None = None
    """A rank that takes longer for a step, with what is measured after it, or a save is killed by
    `ft_launcher` of nvidia-resiliency-ext, which has to start the ranks in torchrun's place; None:
    never. It sees what `timeout_minutes` cannot, ranks that wait for a disk and not for others."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one sample together."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


@dataclass
class OptimSection:
    """AdamW and its learning-rate schedule."""

    lr: _PositiveOr0
    """The highest learning rate, after the warm-up."""
    min_lr: _PositiveOr0 = 0.0
    """Where the cosine ends, at `trainer.max_steps`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to `min_lr` along half a cosine, or at `lr` to the end."""
    warmup_steps: _CountOr0 = 0
    """Steps of a linear rise to `lr`."""
    weight_decay: _PositiveOr0 = 0.0
    """Of matrices alone: norms, biases and vectors per head are not decayed."""
    beta1: _Below1 = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: _Below1 = 0.95
    """AdamW's decay of the squared gradient's mean."""
    eps: _Positive = 1e-8
    """What AdamW adds to the root of that mean."""
    clip_grad: _PositiveOr0 = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def learning_rate(self, step: int, max_steps: int) -> float:
        """The rate of optimizer step ``step``, counted from 0, in a run of ``max_steps``."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.min_lr + (self.lr - self.min_lr) * cosine


@dataclass
class TransferSection:
    """Which stage of the transfer runs, from which weights, held to which teacher."""

    stage: Stage
    """`align` holds each hybrid attention to the teacher's, `distill` the predictions to its
    predictions; `long_context` trains on long text."""
    init_from: PathText
    """Hybrid checkpoint folder that gives configuration, plan and first weights."""
    teacher: PathText | None = None
    """Teacher checkpoint folder (`megatron-hydra convert` without `--plan`)."""
    kl_weight: _PositiveOr0 | None = None
    """Weight of the Kullback-Leibler loss; default 1 to distill, 0 for long context.

    None to align, where neither loss exists.
    """
    ce_weight: _PositiveOr0 | None = None
    """Weight of the next-token loss; default 1; None to align."""
    kl: Kind = LossOptions.kind
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence:
    `jsd_beta` times the teacher's KL to the mixture, plus the rest times the student's."""
    jsd_beta: Annotated[float, Limits(above=0, below=1)] = LossOptions.jsd_beta
    """Share of the teacher in the mixture of `kl: jsd`."""
    temperature: Annotated[float, Limits(above=0)] = LossOptions.temperature
    """Softens teacher and student in the divergence, which is multiplied by its square."""
    float32_logits: bool = LossOptions.float32_logits
    """Do not round the loss's logits to bfloat16, as Megatron's output layer does: late in the
    distillation, rounding is what the divergence's gradient mostly shows."""
    chunk_tokens: _Count = LossOptions.chunk_tokens
    """Tokens whose logits exist at one time in the loss."""

    @property
    def loss(self) -> LossOptions:
        """The loss of stages 2 and 3; their weights are set."""
        names = [item.name for item in fields(LossOptions) if item.name != "kind"]
        return LossOptions(kind=self.kl, **{name: getattr(self, name) for name in names})


@dataclass
class LogSection:
    """The run folder and what is written there."""

    folder: PathText
    """Of the run: checkpoints, scalars, and the trained model; one run per folder."""
    every_n_steps: _Count = 1
    """Steps between two points in TensorBoard and two lines in `metrics.jsonl`."""
    stragglers_every_n_steps: _CountOr0 = 0
    """Steps between two comparisons of how long each rank computes until its gradients are summed
    with the other replicas'; 0: never."""
    straggler_factor: Annotated[float, Limits(above=1)] = 1.3
    """From how many times the ranks' median a rank is named in a warning."""
    wandb_project: str | None = None
    """Weights & Biases' project that gets the same scalars as TensorBoard, and this configuration;
    None: no W&B. Needs the package wandb. The key comes from `wandb login` or `WANDB_API_KEY`,
    never from here."""
    wandb_name: str | None = None
    """What the run is called there; None: the name of `folder`."""
    wandb_mode: Literal["online", "offline"] | None = None
    """`offline` writes to `folder` alone, for `wandb sync` from a machine that has a network. None:
    as `WANDB_MODE` says, else `online`."""


@dataclass
class ResumeSection:
    """Checkpoints of the run; the same command again goes on from the newest finished one."""

    save_every_n_steps: _Count = 500
    """Steps between two checkpoints; what the last step gives is the trained model."""
    keep: _Count = 2
    """Checkpoints kept at a time; of two, one is left to go on from if the newest is damaged."""
    async_save: bool = False
    """Write checkpoints while the training goes on; needs the memory of one more copy of the
    weights and the optimizer's state, split over the ranks."""


@dataclass
class BadNumbersSection:
    """What a run does about NaN, Inf and jumps of the loss; a run that goes on may change it."""

    action: Literal["stop", "skip"] = "stop"
    """On NaN or Inf in a loss, gradient or head output: end the run, or leave the step out.

    A skipped step changes neither weights nor optimizer. It counts as a step all the same: the
    schedule goes on, and its samples are not fed again.
    """
    max_skipped_in_a_row: _CountOr0 = 10
    """The run ends at the next bad step after so many skipped ones without a good one between."""
    spike_factor: Annotated[float, Limits(above=1, below=1e30)] = 2.0
    """A loss above so many times the median of the last 100 steps is logged with its samples."""


@dataclass
class RunConfig:
    """A whole training run; one field per section of the YAML file."""

    data: DataSection
    trainer: TrainerSection
    optim: OptimSection
    transfer: TransferSection
    log: LogSection
    model: ModelSection = field(default_factory=ModelSection)
    strategy: StrategySection = field(default_factory=StrategySection)
    resume: ResumeSection = field(default_factory=ResumeSection)
    bad_numbers: BadNumbersSection = field(default_factory=BadNumbersSection)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.log.folder)

    def to_yaml(self) -> str:
        """The resolved configuration, every default spelled out."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides and check the result.

    Args:
        path: The YAML file; None: the overrides say all.
        overrides: Each `section.key=value`; the value is read as YAML.

    Raises:
        UserError: If the file cannot be read, or a key or value is not allowed.
    """
    config: RunConfig = read_config(RunConfig, path, overrides)
    check(config)
    return config


def overrides_of_stage(stage: str, stages: Collection[str], overrides: Sequence[str]) -> list[str]:
    """Of overrides for several stages those of one: for all, and its own without its name.

    Args:
        stage: One of ``stages``.
        stages: Names that an override may begin with, as `stage2_distill.optim.lr=1e-4`.
        overrides: Each `[stage.]section.key=value`.
    """
    own = []
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in stages:
            own.append(override)
        elif name == stage:
            own.append(rest)
    return own


def differences(old: RunConfig, new: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The keys, and both their values, whose change would make ``new`` another run than ``old``.

    What either leaves open, None or `auto`, differs from nothing. What is :data:`HELD_BY_CONTENT`
    is not looked at: see `run_inputs.check_same_inputs`.
    """
    for section in fields(RunConfig):
        for item in fields(getattr(old, section.name)):
            key = f"{section.name}.{item.name}"
            values = [getattr(getattr(config, section.name), item.name) for config in (old, new)]
            is_open = None in values or "auto" in values
            if values[0] != values[1] and not (
                is_open or key in HELD_BY_CONTENT or {key, section.name} & set(MAY_CHANGE)
            ):
                yield (key, *values)
