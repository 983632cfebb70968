"""Which parallel sizes a shape allows: held to what Megatron builds and runs, and to a sentence.

Catches: a size that is called allowed and ends in a traceback while the model is built or run, a
size that is refused though Megatron takes it, and a refusal that says neither why nor what fits.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hydra_tools import cli
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.distributed import run_distributed
from kit.scores import make_scores
from kit.tiny import tiny_fields
from kit.tiny_qwen3 import write_tiny_qwen3

from megatron_hydra.certify.checks import Limits, plan_checks
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import ParallelSizes, padded_size, real_part
from megatron_hydra.teachers.model_folder import stored_sizes
from megatron_hydra.training.config import load_config

QWEN3_1P7B = ParallelSizes(28, 16, 8, 128, 6144, 151936)
THREE_GROUPS = ParallelSizes(5, 6, 3, 8, 48, 60)


def test_a_real_model_allows_what_it_is_divisible_by() -> None:
    assert QWEN3_1P7B.describe() == (
        "parallel sizes: TP 1, 2, 4, 8, 16; PP 1, 2, 4, 7, 14, 28; "
        "CP any (sequence length divisible by 2 x CP)"
    )


def test_sizes_that_pad_are_named() -> None:
    odd = dataclasses.replace(QWEN3_1P7B, ffn_hidden_size=6152, vocab_size=151940)
    assert "TP 1, 2, 4, 8, 16 (8, 16 pad the vocabulary; 16 pads the MLP's width); PP" in (
        odd.describe()
    )
    odd.check("it", tensor=16)


def test_a_vocabulary_that_leaves_a_rank_empty_is_refused() -> None:
    tiny = dataclasses.replace(QWEN3_1P7B, vocab_size=5)  # 2, 2, 1 and nothing on the fourth
    with pytest.raises(UserError, match="the vocabulary of 5 is too small to be shared by 4 ranks"):
        tiny.check("it", tensor=4)


def test_a_refusal_names_the_reason_and_what_fits() -> None:
    QWEN3_1P7B.check("it", tensor=8, pipeline=7)
    for sizes, reason in (
        (
            dict(tensor=2),
            "a.tensor_model_parallel_size 2 does not fit it: of 2 and the 3 query groups of a "
            "layer neither is divisible by the other, as the teacher's attention, Megatron's, "
            "needs; allowed: 1, 3, 6",
        ),
        (dict(tensor=4), "the 6 query heads of a layer are not divisible by 4; allowed: 1, 3, 6"),
        (
            dict(tensor=3, pipeline=2),
            "a.pipeline_model_parallel_size 2 does not fit it: the 5 layers are not divisible by "
            "2; allowed: 1, 5",
        ),
    ):
        with pytest.raises(UserError) as caught:
            THREE_GROUPS.check("it", **sizes, section="a.")
        assert str(caught.value).endswith(reason)


@given(st.integers(1, 300), st.integers(1, 40))
def test_parts_of_one_size_hold_everything_once_and_the_padding_last(size: int, ranks: int) -> None:
    part = padded_size(size, ranks) // ranks
    assert 0 <= part * ranks - size < ranks
    places = []
    for rank in range(ranks):
        first, number = real_part(size, ranks, rank)
        assert 0 <= number <= part
        places += range(first, first + number)
        assert number == part or len(places) == size, "only the last ranks hold padding"
    assert places == list(range(size))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], int, int]:
    """A shape with sizes that are often divisible and sometimes not, and a layout for it."""
    groups = draw(st.integers(1, 6))
    tensor = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    shape = dict(
        num_layers=draw(st.integers(1, 4)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 8)),
        kv_channels=draw(st.sampled_from([2, 4, 8])),
        ffn_hidden_size=draw(st.integers(8, 60)),
        vocab_size=draw(st.integers(8, 60)),
    )
    return shape, tensor, draw(st.integers(1, 3))


@contextmanager
def fake_ranks(tensor: int, pipeline: int, rank: int) -> Iterator[None]:
    """Megatron's groups as one rank of many sees them; collectives do nothing."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=tensor * pipeline, store=FakeStore())
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_and_run(fields: dict[str, Any], is_hybrid: bool, rank: int) -> None:
    """What one rank does of a model: build, and with one stage also run forward and backward."""
    from kit.tiny import token_batch
    from megatron.core import parallel_state

    from megatron_hydra.model.build import build_model
    from megatron_hydra.model.config import HydraConfig

    plan = None
    layers, heads, groups = (
        fields[name] for name in ("num_layers", "num_attention_heads", "num_query_groups")
    )
    if is_hybrid:
        fa_heads = {layer: tuple(range(layer % 2, heads, 2)) for layer in range(layers)}
        plan = HeadPlan.from_fa_heads(fa_heads, layers, heads, groups)
    tensor, pipeline = (fields[f"{name}_model_parallel_size"] for name in ("tensor", "pipeline"))
    with fake_ranks(tensor, pipeline, rank):
        config = HydraConfig(**fields)
        model = build_model(
            config,
            plan,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        if pipeline == 1:
            tokens, positions = token_batch(config, length=4)
            model(tokens, positions, None, labels=tokens).sum().backward()


def check_every_layout() -> None:
    """Either a rank builds and runs its part, or a sentence names what is allowed."""

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(layouts(), st.booleans(), st.booleans())
    def check(layout: tuple[dict[str, Any], int, int], is_hybrid: bool, is_last: bool) -> None:
        shape, tensor, pipeline = layout
        fields = tiny_fields(
            **shape, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
        )
        rank = tensor * pipeline - 1 if is_last else 0
        sizes = ParallelSizes.of(fields)
        fits = sizes.why_not_tensor(tensor) is None and sizes.why_not_pipeline(pipeline) is None
        assert fits == (tensor in sizes.tensor and pipeline in sizes.pipeline)
        if fits:
            build_and_run(fields, is_hybrid, rank)
            return
        with pytest.raises(UserError, match="does not fit the model: .*; allowed: 1"):
            build_and_run(fields, is_hybrid, rank)

    check()


def check_nothing_is_refused_in_vain() -> None:
    """Without our check, Megatron's own teacher fails at each size that we would refuse."""
    from megatron_hydra.model.parallel_sizes import ParallelSizes

    refused = 0
    for groups, per_group, channels, tensor in itertools.product(
        (1, 2, 3, 4, 6), (1, 2, 3, 4), (2, 8), (2, 3, 4, 8)
    ):
        fields = tiny_fields(
            num_layers=1,
            num_query_groups=groups,
            num_attention_heads=groups * per_group,
            kv_channels=channels,
            vocab_size=48,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=1,
        )
        if ParallelSizes.of(fields).why_not_tensor(tensor) is None:
            build_and_run(fields, False, 0)
            continue
        refused += 1
        with (
            mock.patch.object(ParallelSizes, "check"),
            pytest.raises((ValueError, AssertionError)) as caught,
        ):
            build_and_run(fields, False, 0)
        assert not isinstance(caught.value, UserError)
    assert refused > 20


def test_each_layout_of_each_shape_runs_or_gets_a_sentence() -> None:
    run_distributed(check_every_layout, 1)


def test_what_is_refused_is_what_megatron_cannot_do() -> None:
    run_distributed(check_nothing_is_refused_in_vain, 1)


# --- where a user meets it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted teacher and hybrid of 3 query groups and 6 heads, with scores, and a run."""
    folder = tmp_path_factory.mktemp("three_groups")
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 3}
    source = write_tiny_qwen3(folder / "qwen3", **shape)
    make_scores([[0.1] * 6] * 3, num_query_groups=3).save(folder / "scores.json")
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3], 2: [0]}, 3, 6, 3).save(folder / "plan.json")
    convert = ["convert", "--teacher", str(source), "--out"]
    assert cli.main([*convert, f"{folder}/teacher"]) == 0
    planned = ["--plan", f"{folder}/plan.json", "fusion=none"]
    assert cli.main([*convert, f"{folder}/hybrid", *planned]) == 0
    run = {
        "data": {"paths": ["d"], "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "trainer": {"max_steps": 3},
        "optim": {"lr": 1e-3},
        "transfer": {
            "stage": "distill",
            "init_from": f"{folder}/hybrid",
            "teacher": f"{folder}/teacher",
        },
        "log": {"folder": f"{folder}/run"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_plan_and_convert_say_what_will_fit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "parallel sizes: TP 1, 3, 6; PP 1, 3; CP any (sequence length divisible by 2 x CP)\n"
    teacher = ["--teacher", f"{folder}/qwen3", "--out", f"{folder}/teacher", "--overwrite"]
    assert cli.main(["convert", *teacher]) == 0
    assert line in capsys.readouterr().out
    budget = ["--fa-heads", "4", "--out", f"{folder}/chosen.json"]
    assert cli.main(["plan", "--scores", f"{folder}/scores.json", *budget]) == 0
    assert "parallel sizes: TP 1, 3, 6" in capsys.readouterr().out


def test_training_refuses_before_anything_slow(folder: Path) -> None:
    load_config(folder / "run.yaml", ["strategy.tensor_model_parallel_size=3"])
    for override, sentence in (
        (
            "strategy.tensor_model_parallel_size=2",
            f"_size 2 does not fit transfer.init_from {folder}/hybrid: of 2 and the 3 query groups",
        ),
        ("strategy.pipeline_model_parallel_size=2", "the 3 layers are not divisible by 2"),
        (
            "strategy.cp_comm_type=a2a strategy.context_parallel_size=2",
            f"is a2a, but the 3 query groups of transfer.teacher {folder}/teacher on a tensor-",
        ),
    ):
        with pytest.raises(UserError) as caught:
            load_config(folder / "run.yaml", override.split())
        assert sentence in str(caught.value)


def test_verbs_refuse_in_one_sentence_without_pytorch(folder: Path) -> None:
    """The sentence comes before PyTorch, Megatron and NeMo are imported."""
    score = f"score --teacher {folder}/teacher --out {folder}/s.json model.tensor_"
    train = f"train --config {folder}/run.yaml strategy.tensor_"
    for words in (score, train):
        code = (
            "import sys; from hydra_tools import cli; "
            f"code = cli.main({(words + 'model_parallel_size=2').split()}); "
            "print(sorted({'torch', 'megatron', 'nemo'} & set(sys.modules))); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        (sentence,) = done.stderr.splitlines()
        assert "2 does not fit" in sentence and sentence.endswith("allowed: 1, 3, 6")
        assert done.stdout.strip() == "[]"


def test_certificates_try_what_fits_and_say_what_does_not() -> None:
    fields = tiny_fields(num_attention_heads=12, num_query_groups=3)
    plan = HeadPlan.from_fa_heads({0: (1, 2, 5), 1: (0,)}, 2, 12, 3)
    checks, not_run = plan_checks(fields, plan, 12, Limits(tp=4))
    assert {check.layout.tp for check in checks} == {1, 3}
    assert {item.name for item in not_run} >= {"tensor parallel 2", "tensor parallel 4"}


def test_certify_refuses_a_size_that_leaves_nothing_to_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    names += ("num_query_groups", "kv_channels", "vocab_size")
    fields = tiny_fields(num_attention_heads=6, num_query_groups=3)
    model = {"model": {name: fields[name] for name in names}, "fa_heads_per_layer": 2}
    (tmp_path / "certify.yaml").write_text(yaml.safe_dump(model))
    words = ["certify", "--config", f"{tmp_path}/certify.yaml", "--out", f"{tmp_path}/out.json"]
    assert cli.main([*words, "--tp", "2"]) == 2
    refusal = capsys.readouterr().err.strip()
    assert refusal.endswith(
        "--tp 2 does not fit the model: of 2 and the 3 query groups of a layer neither is "
        "divisible by the other, as the teacher's attention, Megatron's, needs; allowed: 1, 3, 6"
    )


def test_damaged_or_missing_folders_are_left_to_their_readers(tmp_path: Path) -> None:
    assert stored_sizes(tmp_path) is None
    for text in ("{", "[]", '{"config": {"num_layers": 2}}', '{"config": null}'):
        (tmp_path / "model.json").write_text(text)
        assert stored_sizes(tmp_path) is None, text
