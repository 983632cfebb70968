"""The training YAML: resolution, overrides, and the one sentence that each mistake gets."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.training.config import (
    MAY_CHANGE,
    OptimSection,
    RunConfig,
    differences,
    load_config,
)

MINIMAL = {
    "data": {"paths": ["d"], "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
    "trainer": {"max_steps": 3},
    "optim": {"lr": "1e-3"},
    "transfer": {"stage": "distill", "init_from": "hybrid", "teacher": "teacher"},
    "log": {"folder": "run"},
}
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_win_and_values_are_read_as_yaml(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["optim.lr=2e-4", "strategy.tensor_model_parallel_size=2", "data.weights=[1]",
         "strategy.sequence_parallel=true", "transfer.teacher=other"],
    )  # fmt: skip
    assert config.optim.lr == 2e-4  # YAML 1.1 reads both spellings as text
    assert config.strategy.tensor_model_parallel_size == 2
    assert config.strategy.sequence_parallel is True
    assert config.data.weights == [1.0]
    assert config.transfer.teacher == "other"


def test_resolved_config_reads_back_as_itself(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(resolved) == config
    assert yaml.safe_load(resolved.read_text())["optim"]["beta2"] == 0.95


@pytest.mark.parametrize(
    ("stage", "weights"),
    [("align", (None, None)), ("distill", (1.0, 1.0)), ("long_context", (0.0, 1.0))],
)
def test_loss_weights_follow_the_stage(
    config_file: Path, stage: str, weights: tuple[float | None, float | None]
) -> None:
    transfer = load_config(config_file, [f"transfer.stage={stage}"]).transfer
    assert (transfer.kl_weight, transfer.ce_weight) == weights


def _numbers(section: type) -> Iterator[str]:
    """Names of a section's fields that hold numbers."""
    for name, kind in typing.get_type_hints(section).items():
        kinds = {kind, *typing.get_args(kind)}
        if kinds & {int, float} and bool not in kinds:
            yield name


def test_the_yaml_sets_every_option_of_the_loss(config_file: Path) -> None:
    options = dict(kl_weight=0.5, ce_weight=0.25, jsd_beta=0.1, temperature=2.0, chunk_tokens=7,
                   float32_logits=True)  # fmt: skip
    overrides = [f"transfer.{name}={value}" for name, value in {"kl": "jsd", **options}.items()]
    transfer = load_config(config_file, overrides).transfer
    assert asdict(transfer.loss) == {"kind": "jsd", **options}


def test_every_number_has_a_range(config_file: Path) -> None:
    """No number that a YAML can give reaches Megatron unchecked: none takes -1, and none NaN."""
    num_fields = 0
    for section, kind in typing.get_type_hints(RunConfig).items():
        for name in _numbers(kind):
            for value in ("-1", ".nan", ".inf"):
                text = f"[{value}]" if name == "weights" else value
                with pytest.raises(
                    UserError, match=rf"^{section}\.{name}(\[0\])? is .*(must|need)"
                ):
                    load_config(config_file, [f"{section}.{name}={text}"])
            num_fields += 1
    assert num_fields > 20


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.warmup=3", "unknown config key optim.warmup: did you mean optim.warmup_steps?"),
        ("optimizer.lr=3", "unknown config key optimizer: did you mean optim?"),
        ("trainer.max_steps=many", "trainer.max_steps is 'many'; an integer is needed"),
        ("trainer.max_steps=true", "trainer.max_steps is True; an integer is needed"),
        ("trainer.max_steps=1.5", "trainer.max_steps is 1.5; an integer is needed"),
        ("trainer.max_steps=0", "trainer.max_steps is 0; it must be 1 or more"),
        ("strategy.sequence_parallel=1", "strategy.sequence_parallel is 1; true or false"),
        ("data.paths=text", "data.paths is 'text'; a list is needed"),
        ("data.paths=[]", "data.paths is empty"),
        ("log.wandb_name=a", "log.wandb_name is a, which needs log.wandb_project"),
        ("log.wandb_api_key=a", "unknown config key log.wandb_api_key"),
        ("data.long_document_tokens=9", "up-sampling needs a length and a factor of 2 or more"),
        ("data.long_document_factor=2", "up-sampling needs a length and a factor of 2 or more"),
        ("data.weights=[1, 2]", "data.weights has 2 values for 1 data.paths"),
        (
            "data.validation_paths=[v]",
            "trainer.validate_every_n_steps is 0: a validation loss needs",
        ),
        ("trainer.validate_every_n_steps=5", "data.validation_paths is [] and trainer.validate"),
        ("data.micro_batch_size=3", "data.global_batch_size 2 is not divisible"),
        ("transfer.stage=align1", "transfer.stage is 'align1'; allowed: align, distill, long_c"),
        ("optim.beta1=1.5", "optim.beta1 is 1.5; it must be 0 or more, and below 1"),
        ("optim.eps=0", "optim.eps is 0.0; it must be above 0, and below 1e30"),
        ("data.weights=[0]", "data.weights[0] is 0.0; it must be above 0, and below 1e30"),
        ("data.seed=4294967296", "data.seed is 4294967296; it must be 0 or more, and below 2^32"),
        ("transfer.teacher=null", "transfer.teacher is needed for stage distill"),
        (
            "strategy.context_parallel_size=3",
            "data.seq_length 8 is not divisible by 2 x strategy.c",
        ),
        ("trainer.precision=fp8", "precision is fp8, but a micro-batch has 8 tokens per rank, whi"),
        ("model.recompute_layers=2", "_layers is 2, which needs model.recompute full, not none"),
        ("optim.min_lr=1", "optim.min_lr 1.0 is above optim.lr 0.001"),
        ("optim.lr", "override 'optim.lr' must read section.key=value"),
        ("optim.lr=[", "the value of override 'optim.lr=[' is not valid YAML"),
    ],
)
def test_each_mistake_gets_its_sentence(config_file: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("transfer.stage=align", "transfer.stage is align, with which model.cuda_graphs does not"),
        ("data.reset_at_document_end=true", "data.reset_at_document_end is True, with which"),
        ("model.recompute=full", "model.recompute is full, with which"),
        ("strategy.pipeline_model_parallel_size=2", "_parallel_size is 2, with which"),
        ("strategy.context_parallel_size=2", "it needs 1"),
    ],
)
def test_cuda_graphs_refuse_what_changes(config_file: Path, override: str, sentence: str) -> None:
    graphs = ["model.cuda_graphs=true", "strategy.tensor_model_parallel_size=2"]
    load_config(config_file, graphs)
    with pytest.raises(UserError) as caught:
        load_config(config_file, [*graphs, override])
    assert sentence in str(caught.value)


def test_sequence_length_is_divisible_by_ranks_that_share_it(config_file: Path) -> None:
    shared = ["strategy.tensor_model_parallel_size=4", "strategy.sequence_parallel=true",
              "strategy.context_parallel_size=2"]  # fmt: skip
    load_config(config_file, shared)
    shared.append("data.seq_length=12")  # divisible by 2 x 2, but not by 4 x 2
    with pytest.raises(UserError, match=r"data\.seq_length 12 is not divisible by tensor_.* = 8$"):
        load_config(config_file, shared)
    load_config(config_file, [*shared, "data.reset_at_document_end=true"])  # padded to fit


def test_learning_rate_warms_up_then_falls_to_its_least_value() -> None:
    cosine = OptimSection(lr=1.0, min_lr=0.2, warmup_steps=3)
    rates = [cosine.learning_rate(step, 103) for step in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[53] == pytest.approx(0.6)  # half way between
    assert rates[103] == pytest.approx(0.2)
    assert all(before > after for before, after in pairwise(rates[3:]))
    constant = OptimSection(lr=1.0, schedule="constant", warmup_steps=1)
    assert [constant.learning_rate(step, 9) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    with pytest.raises(UserError, match=r"cannot read the config .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    broken.write_text("data: {paths: [d]}")
    with pytest.raises(UserError, match=r"config key data\.seq_length is missing"):
        load_config(broken)


def test_alignment_refuses_weights_of_losses_that_it_has_not(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"transfer\.ce_weight is given, but stage align does not"):
        load_config(config_file, ["transfer.stage=align", "transfer.ce_weight=1"])


def test_what_was_left_open_differs_from_nothing(config_file: Path) -> None:
    def found(old: list[str], new: list[str]) -> list[str]:
        configs = (load_config(config_file, overrides) for overrides in (old, new))
        return [key for key, _, _ in differences(*configs)]

    chosen = ["model.backend=local", "model.la_kernel=reference", "trainer.accelerator=cpu"]
    assert found(chosen, []) == []
    assert found(chosen, ["model.backend=transformer_engine"]) == ["model.backend"]
    assert found(chosen, ["trainer.accelerator=gpu"]) == ["trainer.accelerator"]
    assert found([], ["optim.lr=5", "data.seed=5"]) == ["data.seed", "optim.lr"]
    assert found([], ["model.recompute=full", "model.recompute_layers=2"]) == []
    assert found([], ["model.cuda_graphs=true"]) == []


def test_what_may_change_is_there() -> None:
    """A key that is renamed would silently be held to what the run began with."""
    sections = typing.get_type_hints(RunConfig)
    keys = {
        f"{name}.{key}" for name, kind in sections.items() for key in typing.get_type_hints(kind)
    }
    assert set(MAY_CHANGE) <= keys | set(sections)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/stage*.yaml")), ids=str)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.transfer.stage == path.stem.split("_", 1)[1]


RECIPES = sorted({path.parent.name for path in EXAMPLES.glob("*/stage*.yaml")} - {"quickstart"})


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_on_the_papers_tokens(recipe: str) -> None:
    """0.3B, 1.0B and 1.0B tokens (arXiv 2606.20097), within one step, at its batches and rates."""
    wanted = {
        "stage1_align": (0.3e9, 32, 512, 1e-3, 1e-5),
        "stage2_distill": (1.0e9, 96, 512, 1e-4, 1e-5),
        "stage3_long_context": (1.0e9, 128, 16384, 1e-5, 1e-5),
    }
    for name, (num_tokens, batch, length, first, last) in wanted.items():
        config = load_config(EXAMPLES / recipe / f"{name}.yaml")
        data, optim, max_steps = config.data, config.optim, config.trainer.max_steps
        assert (data.global_batch_size, data.seq_length) == (batch, length)
        assert abs(max_steps * batch * length - num_tokens) <= batch * length
        assert optim.learning_rate(optim.warmup_steps, max_steps) == pytest.approx(first)
        assert optim.learning_rate(max_steps, max_steps) == pytest.approx(last)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.validation_paths=[v, d]", "data.validation_paths names d, which data.paths has too"),
        ("model.cuda_graphs=true", "validate_every_n_steps does not go with model.cuda_graphs"),
    ],
)
def test_validation_refuses_what_tells_nothing(
    config_file: Path, override: str, sentence: str
) -> None:
    validation = ["data.validation_paths=[v]", "trainer.validate_every_n_steps=5"]
    load_config(config_file, validation)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config(config_file, [*validation, override])


def test_validation_may_change_when_a_run_goes_on(config_file: Path) -> None:
    validation = ["data.validation_paths=[v]", "trainer.validate_every_n_steps=5"]
    old, new = (load_config(config_file, more) for more in ([], validation))
    assert list(differences(old, new)) == list(differences(new, old)) == []


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (
            ["strategy.pipeline_model_parallel_size=2"],
            "strategy.pipeline_model_parallel_size",
        ),
        (["strategy.context_parallel_size=2"], "strategy.context_parallel_size"),
        (["model.cuda_graphs=true"], "model.cuda_graphs"),
        (["trainer.precision=fp8", "data.seq_length=16"], "trainer.precision fp8"),
    ],
)
def test_needles_refuse_what_decoding_does_not_know(
    config_file: Path, overrides: list[str], what: str
) -> None:
    load_config(config_file, overrides)
    with pytest.raises(UserError, match=f"needles_every_n_steps does not go with {what}: hyb"):
        load_config(config_file, [*overrides, "trainer.needles_every_n_steps=5"])


def test_needles_may_change_when_a_run_goes_on(config_file: Path) -> None:
    needles = [
        "trainer.needles_every_n_steps=5",
        "trainer.needle_samples=4",
        "trainer.needle_task=multi_key:3",
        "trainer.needle_tokens=900",
    ]
    old, new = (load_config(config_file, more) for more in ([], needles))
    assert list(differences(old, new)) == list(differences(new, old)) == []
