"""`megatron-hydra train --dry-run`: what it says of a run, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra_tools import cli
from kit.lives import write_inputs

from megatron_hydra.api.dry_run import dry_run
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.config import load_config
from megatron_hydra.training.indexed_dataset import write_indexed_dataset
from megatron_hydra.training.memory import training_memory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _command(inputs: Path, *more: str) -> list[str]:
    stage = ["transfer.stage=distill", f"log.folder={inputs}/run"]
    return ["train", "--config", str(inputs / "run.yaml"), "--dry-run", *stage, *more]


def test_it_says_what_a_run_would_be_without_pytorch(inputs: Path) -> None:
    program = (
        "import sys; from hydra_tools import cli; cli.main(sys.argv[1:]); "
        "print({'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, *_command(inputs, "--ranks", "4")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert said[0] == f"{inputs}/run: distill, 14 steps"
    assert said[1] == "  plan: 2 of 8 heads keep full attention"
    assert said[2] == "  ranks: 4, of which 2 data-parallel replicas"
    assert said[3] == "  tokens: 448, 0.998 times the 449 there are"
    assert said[4] == "  tokens by length of document: 100% below 4,096"
    assert said[6:] == ["  memory: not predicted, as trainer.precision is fp32", "set()"]
    assert not (inputs / "run").exists()


def test_it_says_what_up_sampling_makes_of_the_tokens(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_indexed_dataset(tmp_path / "d", [[1] * 60, [1] * 40, [1] * 50, [1] * 150], 257, {})
    more = [f"data.paths=[{tmp_path}/d]", "data.long_document_tokens=100"]
    assert cli.main(_command(inputs, *more, "data.long_document_factor=3")) == 0
    # 448 tokens of an epoch of 600, in which 450 are of the long document
    said = (
        "  up-sampled: the 1 of 4 documents of 100 tokens or more; they have 50% of the tokens, "
        "and 75% of those that the run sees, each 2.24 times\n"
    )
    assert said in capsys.readouterr().out


def test_its_memory_is_the_formulas(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_hydra.head_plan import HeadPlan
    from megatron_hydra.model.config import HydraConfig
    from megatron_hydra.teachers.checkpoint import model_fields, read_metadata

    assert cli.main(_command(inputs, "trainer.precision=bf16", "--ranks", "4")) == 0
    config = HydraConfig(**model_fields(read_metadata(inputs / "hybrid")))
    plan = HeadPlan.load(inputs / "hybrid/plan.json")
    shape = ModelShape.from_config(config)
    expected = training_memory(shape, plan, "distill", 16, dp_size=2, tp_size=2).peak
    assert f"memory: {expected / 2**30:.3g} GiB predicted" in capsys.readouterr().out


def test_it_says_what_needles_take(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """14 steps; 7 questions, of which a replica of two has 4, in batches of 1."""
    more = ["trainer.needles_every_n_steps=4", "trainer.needle_samples=7"]
    more += ["trainer.needle_tokens=100"]
    assert cli.main(_command(inputs, *more, "--ranks", "4")) == 0
    said = capsys.readouterr().out
    rounds = "needles: 4 rounds and one of the teacher of 7 questions of 100 tokens, each round "
    rounds += "4 times 4 forward passes"
    assert f"  {rounds} of a replica; caches of " in said and "in all" not in said
    assert cli.main(_command(inputs, *more, "trainer.precision=bf16", "--ranks", "4")) == 0
    said = capsys.readouterr().out
    assert rounds in said and "in all (counted, never measured)" in said
    assert cli.main(_command(inputs)) == 0
    assert "needles" not in capsys.readouterr().out


def test_needles_raise_the_memory_where_they_need_more_than_a_step(inputs: Path) -> None:
    few, many = (
        dry_run(
            load_config(
                inputs / "run.yaml",
                ["transfer.stage=distill", f"log.folder={inputs}/run", "trainer.precision=bf16",
                 "trainer.needles_every_n_steps=4", f"trainer.needle_tokens={tokens}"],
            )
        )
        for tokens in (16, 100_000)
    )  # fmt: skip
    assert few.memory is not None and many.memory is not None
    assert few.memory.decoding < few.memory.kept + few.memory.passing
    assert few.memory.peak == few.memory.state + few.memory.kept + few.memory.passing
    assert many.memory.peak == many.memory.state + many.memory.decoding > few.memory.peak
    assert many.memory.decoding > many.needle_cache_bytes
    # The teacher's, which keeps more than its hybrid: of two layers a group of 16 channels a rank.
    assert many.needle_cache_bytes == 100_000 * 2 * 2 * 16 * 2


def test_the_memory_of_a_pipeline_is_said_to_be_unmeasured(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["trainer.precision=bf16", "strategy.pipeline_model_parallel_size=2", "--ranks", "4"]
    assert cli.main(_command(inputs, *more)) == 0
    assert "activations (of pipeline stages: counted, never measured)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--ranks", "3"], "3 ranks are not divisible by tensor_model_parallel_size x"),
        (["--ranks", "8"], "global_batch_size 2 is not divisible by data.micro_batch_size 1 x 4"),
        (["--ranks", "0"], "--ranks is the number of GPUs, 1 or more"),
        (["transfer.init_from=IN/teacher"], "IN/teacher is a teacher checkpoint; a hybrid is"),
        (["data.seq_length=512"], "data.seq_length is 512, but"),
        (["data.validation_paths=[IN/none]", "trainer.validate_every_n_steps=1"],
         "no indexed dataset IN/none: IN/none.idx is missing"),
        (["data.long_document_tokens=500", "data.long_document_factor=2"],
         "is 500, but the longest document of data.paths has 449 tokens"),
        (["trainer.precision=bf16", "strategy.use_distributed_optimizer=false"], "bf16 needs"),
    ],
)  # fmt: skip
def test_what_would_fail_is_refused(
    inputs: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert cli.main(_command(inputs, *(word.replace("IN", str(inputs)) for word in more))) == 2
    assert sentence.replace("IN", str(inputs)) in capsys.readouterr().err
    assert not (inputs / "run").exists()


def test_print_config_tells_what_file_defaults_and_overrides_come_to(tmp_path: Path) -> None:
    """Read again it is the same run; what it names need not be there; nothing slow is loaded."""
    (tmp_path / "below.yaml").write_text(
        "data: {paths: [d], seq_length: 8, micro_batch_size: 1, global_batch_size: 2}\n"
        "trainer: {max_steps: 3}\n"
        "optim: {lr: 1e-3}\n"
        "transfer: {stage: distill, init_from: hybrid, teacher: teacher}\n"
        "log: {folder: run}\n"
    )
    (tmp_path / "run.yaml").write_text("defaults: below.yaml\ntrainer: {max_steps: 7}\n")
    program = (
        "import sys; from hydra_tools import cli; code = cli.main(sys.argv[1:]); "
        "print(code, {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules))"
    )
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    said = subprocess.run(
        [sys.executable, "-c", program, *command, "optim.lr=2e-3", "resume.keep=4"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    text, _, last = said.rstrip("\n").rpartition("\n")
    assert last == "0 set()"
    resolved = yaml.safe_load(text)
    assert resolved["trainer"]["max_steps"] == 7  # the file's own
    assert resolved["data"]["seq_length"] == 8  # of the file that it names
    assert (resolved["optim"]["lr"], resolved["resume"]["keep"]) == (0.002, 4)  # overrides
    assert resolved["transfer"]["kl_weight"] == 1.0  # by the stage
    assert resolved["strategy"]["timeout_minutes"] == 30.0  # a default
    (tmp_path / "printed.yaml").write_text(text)
    assert load_config(tmp_path / "printed.yaml").to_yaml().strip() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "below.yaml", "printed.yaml", "run.yaml",
    ]  # fmt: skip


def test_print_config_refuses_what_a_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("data: {}\n")
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert said.out == "" and "config key data.paths is missing" in said.err
