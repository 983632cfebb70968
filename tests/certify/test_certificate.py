"""The certificate's parts that need one process: batches, comparisons, checks, tables, the tool."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_tools import certify as tool
from hydra_tools import cli
from kit.distributed import run_distributed
from kit.plans import all_fa
from kit.tiny import tiny_fields, tiny_plan
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_hydra.certify.certified_model import certified_model
from megatron_hydra.certify.checks import Limits, plan_checks, row_lengths
from megatron_hydra.certify.comparison import bit_differences_of_tensors, differences, heads_of
from megatron_hydra.certify.global_tensors import Piece
from megatron_hydra.certify.layouts import Layout, local_index, micro_batches, random_batch
from megatron_hydra.certify.tables import (
    BEGIN,
    END,
    CertificateFile,
    NotRun,
    Row,
    layouts_table,
    read_certificate,
    text_table,
    with_table,
)
from megatron_hydra.certify.training import Record, Run, Trainer, save_first_weights
from megatron_hydra.certify.worlds import Ranks
from megatron_hydra.errors import UserError
from megatron_hydra.teachers.loading import megatron_fields

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/certify.yaml"))
IN_PROJ = "decoder.layers.0.self_attention.in_proj.weight.la_query"


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_unpacked_rows_are_split_as_megatron_splits_them(monkeypatch, cp_size):
    row = torch.arange(48)
    monkeypatch.setattr("megatron.core.utils.get_pg_size", lambda group: cp_size)
    for rank in range(cp_size):
        monkeypatch.setattr("megatron.core.utils.get_pg_rank", lambda group, rank=rank: rank)
        expected = get_batch_on_this_cp_rank({"x": row[None]}, cp_group=object())["x"][0]
        assert torch.equal(row[local_index([48], cp_size, rank)], expected)


@pytest.mark.parametrize("layout", [Layout(packed=True), Layout(cp=2, packed=True)])
def test_every_token_of_a_packed_batch_is_on_one_rank(layout):
    batch = random_batch(row_lengths(24, 1)[1], vocab_size=50)
    seen = [torch.zeros(len(document)) for document in batch.documents]
    layout = Layout(cp=layout.cp, packed=True, num_micro_batches=len(batch.rows))
    for rank in range(layout.cp):
        for micro_batch in micro_batches(batch, layout, 0, 1, rank):
            places = zip(
                micro_batch.document.flatten().tolist(),
                micro_batch.place.flatten().tolist(),
                micro_batch.tokens.flatten().tolist(),
                micro_batch.loss_mask.flatten().tolist(),
                strict=True,
            )
            for document, place, token, counted in places:
                if document < 0:
                    assert counted == 0, "padding is no token"
                    continue
                seen[document][place] += 1
                assert token == batch.documents[document].tokens[place]
                assert counted == batch.documents[document].loss_mask[place]
    assert all((count == 1).all() for count in seen)


def test_a_wrong_head_is_named_though_its_values_are_small():
    expected = torch.ones(40, 4)  # five LA heads of eight rows
    expected[8:16] *= 0.2
    found = expected.clone()
    found[9, 2] += 0.02
    worst = differences(
        Record(gradients={IN_PROJ: found}, losses=[1.0], grad_norms=[1.0]),
        Record(gradients={IN_PROJ: expected}, losses=[1.0], grad_norms=[1.0]),
        tiny_plan().resolved("gated_delta_net"),
    )
    assert worst["gradients"].at == f"{IN_PROJ}, head 3", "LA heads are 0, 3, 4, 6 and 7"
    assert worst["gradients"].value == pytest.approx(0.1)


def test_what_is_not_a_number_is_infinitely_far():
    bad, good = {"x": torch.tensor([torch.nan, 1.0])}, {"x": torch.ones(2)}
    assert bit_differences_of_tensors(bad, good).value == float("inf")
    record = dict(losses=[1.0], grad_norms=[1.0])
    plan = tiny_plan().resolved("gated_delta_net")
    found = differences(Record(logits=bad, **record), Record(logits=good, **record), plan)
    assert found["logits"].value == float("inf")
    worse = Record(losses=[1.0, float("nan")], grad_norms=[1.0])
    fine = Record(losses=[1.0, 1.0], grad_norms=[1.0])
    assert differences(worse, fine, plan)["loss"].value == float("inf")


@pytest.mark.parametrize(
    "name, axis, names",
    [
        ("in_proj.weight.fa_gate", 0, ["head 1", "head 2", "head 5"]),
        ("in_proj.weight.fa_key", 0, ["query group 0", "query group 1", "query group 2"]),
        ("linear_attention.conv_weight.key", 0, [f"head {i}" for i in (0, 3, 4, 6, 7)]),
        ("linear_proj.weight", 1, [f"head {i}" for i in range(8)]),
    ],
)
def test_heads_have_their_teachers_names(name, axis, names):
    plan = tiny_plan().resolved("gated_delta_net")
    assert heads_of(f"decoder.layers.0.self_attention.{name}", plan) == (axis, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_recorded_leaves_the_training_alone(one_rank, dtype, tmp_path):
    """Hooks bring gradients to Megatron's buffers; a parameter may lose its own without a word."""
    fields = {**tiny_fields(), **megatron_fields(dtype)}
    run = Run(fields, tiny_plan(), tmp_path / "weights", tmp_path)
    save_first_weights(run)
    batch = random_batch(row_lengths(24, 1)[0], fields["vocab_size"])
    recorded, quiet = (Trainer(run, Layout(), batch) for _ in range(2))
    quiet.gradients.append(Piece("nothing", (), (), torch.zeros(())))  # as if they were recorded
    for trainer in (recorded, quiet):
        trainer.load_weights(run.weights)
    recorded.record(3)
    for _ in range(3):
        quiet.step()
    for ours, theirs in zip(recorded.chunks[0].parameters(), quiet.chunks[0].parameters()):
        assert torch.equal(ours, theirs)
        if theirs.requires_grad:
            assert torch.equal(ours.main_grad, theirs.main_grad)
            assert theirs.main_grad.any(), "a gradient in the last step"


def test_what_does_not_fit_is_said():
    checks, not_run = plan_checks(tiny_fields(), tiny_plan(), 2, Limits(tp=2, cp=2, pp=2))
    assert all(2 % check.layout.model_ranks == 0 for check in checks)
    reasons = {item.name: item.reason for item in not_run}
    assert reasons["tensor and context parallel"].endswith("needs a multiple of 4 ranks")
    assert reasons["pipeline 2, virtual stages"] == "2 layers are not divisible by 4"
    assert {check.name.partition(",")[0] for check in checks} >= {
        "tensor parallel", "sequence parallel", "context parallel", "pipeline", "data parallel",
        "gradient accumulation", "distributed optimizer", "overlapped gradient sums",
        "packed documents", "recomputation", "deterministic rerun",
        "checkpoint there and back", "exported and reloaded",
    }  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_models(path):
    fields, plan = certified_model(path, num_layers=2, backend="local")
    assert fields["num_layers"] == plan.num_layers == 2
    assert len({layer.fa_heads for layer in plan.layers}) == 2, "shifted from layer to layer"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (("hidden_size", "hiden_size"), "unknown config key model.hiden_size: did you mean"),
        (("num_query_groups: 4", "num_query_groups: 3"), "3 query groups"),
        (("vocab_size: 1024", "vocab_size: none"), "model.vocab_size is 'none'"),
        (("fa_heads_per_layer: 2", "fa_heads_per_layer: 9"), "fa_heads_per_layer is 9"),
        (("fa_heads_per_layer: 2", ""), "either plan"),
        (("model:", "checkpoint: folder\nmodel:"), "either checkpoint"),
    ],
)
def test_a_wrong_model_is_one_sentence(tmp_path, change, sentence):
    path = tmp_path / "certify.yaml"
    path.write_text((ROOT / "examples/quickstart/certify.yaml").read_text().replace(*change))
    with pytest.raises(UserError, match=sentence):
        certified_model(path)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--layers", "0"], "--layers is 0"),
        (["--layers", "5"], "--layers is 5, but the model has 4"),
        (["--tp", "-1"], "--tp is -1"),
        (["--length", "8"], "--length is 8"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, capsys, arguments, sentence):
    config = str(ROOT / "examples/quickstart/certify.yaml")
    out = str(tmp_path / "c.json")
    assert cli.main(["certify", "--config", config, "--out", out, *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_tool_certifies_one_rank(tmp_path):
    """End to end, where nothing is split: packing, recomputation, reruns and checkpoints."""
    out = tmp_path / "certificate.json"
    command = [
        sys.executable, "-m", "hydra_tools.certify", "--out", str(out), "--layers", "1",
        "--config", str(ROOT / "examples/quickstart/certify.yaml"), "--steps", "2",
        "--length", "24", "model.hidden_size=32", "model.kv_channels=8", "--precision", "bf16",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    data = json.loads(out.read_text())
    assert data["passed"] and data["precision"] == "bfloat16" and data["num_ranks"] == 1
    assert {row["check"] for row in data["rows"]} >= {"packed documents", "recomputation, full"}
    assert "checkpoint there and back" in {item["name"] for item in data["not_run"]}
    assert "every check passed" in result.stdout
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"


def _certificate(**changes: Any) -> CertificateFile:
    row = Row(
        check="tensor parallel", layout="tp2 by_type", compared_with="one rank",
        quantity="logits", difference=1e-6, at="document 1", tolerance=1e-5, passed=True,
    )  # fmt: skip
    worse = replace(row, quantity="gradients", difference=9e-6, at="x, head 3")
    rows = [row, replace(worse, **changes)]
    return CertificateFile(
        schema_version=1, kind="certificate", passed=all(row.passed for row in rows), versions={},
        device="CPU", backend="local", precision="float32", num_ranks=2, limits={"tp": 2},
        length_tokens=24, num_steps=2, config={}, changed_for_certification={}, plan_hash="",
        fa_heads={}, rows=rows, peak_bytes={"tp2 by_type": [2**20]},
        not_run=[NotRun("pipeline", "--pp is 1")],
    )  # fmt: skip


def test_a_certificate_is_read_as_it_was_written_and_a_bad_one_refused(tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(asdict(_certificate())))
    assert read_certificate(path) == _certificate()
    data = json.loads(path.read_text())
    del data["rows"][1]["tolerance"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"certificate\.json: key rows\[1\]\.tolerance is missing"):
        read_certificate(path)


def test_the_table_shows_the_worst_and_all_that_failed():
    (_, line, last) = text_table(_certificate()).splitlines()
    assert line.split("  ")[0] == "tensor parallel" and "gradients" in line and "9.0e-06" in line
    assert last.split() == ["pipeline", "not", "run:", "--pp", "is", "1"]
    failed = text_table(_certificate(difference=1.0, passed=False))
    assert "FAIL at x, head 3" in failed


def test_layouts_are_written_between_the_readmes_markers(tmp_path):
    table = layouts_table([_certificate()])
    assert "| tensor parallel | tp2 | 2, CPU, float32, local | gradients 9e-06 (1e-05) |" in table
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert with_table(page, table) == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="has no place for the table"):
        with_table(page, table)
    with pytest.raises(UserError, match="has failed"):
        layouts_table([_certificate(passed=False)])


def test_the_documented_layouts_are_those_of_the_certificates():
    paths = sorted((ROOT / "tests/certificates").glob("*.json"))
    page = ROOT / "docs/layouts.md"
    table = layouts_table([read_certificate(path) for path in paths])
    assert paths and with_table(page, table) == page.read_text(encoding="utf-8")


@pytest.mark.dist
@pytest.mark.slow
def test_a_layout_leaves_no_model_and_no_process_group(tmp_path):
    """Of a matrix of layouts each would stay: in memory, and as threads that wake all the time."""
    run_distributed(_leave_worlds, 2, tmp_path)


def _leave_worlds(folder: Path) -> None:
    run = Run({**tiny_fields(), **megatron_fields(torch.float32)}, tiny_plan(), folder, folder)
    batch = random_batch(row_lengths(24, 2)[0], run.fields["vocab_size"])
    ranks, num_threads = Ranks(), []
    for layout in (Layout(tp=2), Layout(distributed_optimizer=True), Layout(tp=2)):
        ranks.enter(layout)
        trainer = Trainer(run, layout, batch)
        trainer.step()
        kept = [weakref.ref(module) for chunk in trainer.wrapped for module in chunk.modules()]
        del trainer
        ranks.leave()
        assert not any(each() for each in kept), layout.name
        num_threads.append(len(list(Path("/proc/self/task").iterdir())))
    assert max(num_threads) == num_threads[0], num_threads


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_that_hang_are_killed_and_named():
    start = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        run_distributed(_one_hangs, 2, limit_s=12)
    assert time.monotonic() - start < 60
    message = str(error.value)
    assert message.startswith("ranks [1] of 2 had not ended after 12 s")
    assert "_one_hangs" in message, "where it stood"


def _one_hangs() -> None:
    import os

    if os.environ["RANK"] == "1":
        time.sleep(600)


def test_the_tool_is_where_the_library_says(tmp_path):
    assert tool.__doc__ is not None and "certify" in cli.VERBS
    plan = all_fa(2, 8, 4)
    checks, _ = plan_checks(tiny_fields(), plan, 2, Limits(tp=2))
    assert not any("one kind" in check.name for check in checks), "there is one kind only"
