"""One number format for a comparison of costs: what serves, whatever the weights have in memory."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra_tools import cli
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.cost import costs_of
from megatron_hydra.selection.pareto import ParetoTable, pareto_table
from megatron_hydra.selection.policy import read_budget
from megatron_hydra.selection.scores import HeadScores

LAYERS, HEADS, GROUPS, DIM = 4, 8, 4, 32
# At 32,768 tokens a query group takes 32768 * 2 * 32 values: 4 MiB in bf16, 8 MiB in fp32. In
# 0.05 GiB there is room for twelve of the first and six of the second, and for the state.
BUDGET = ("--cache-gib", "0.05", "--context", "32768")


def scores() -> HeadScores:
    """One head of each query group matters, each in another measure."""
    rows = [[0.0] * HEADS for _ in range(LAYERS)]
    for group in range(LAYERS * GROUPS):
        rows[group // GROUPS][group % GROUPS * 2] = 1.0 - group / 100
    return make_scores(rows, GROUPS, head_dim=DIM)


@pytest.fixture
def scores_file(tmp_path: Path) -> Path:
    """As an earlier release wrote it for a bf16 teacher that it had loaded in float32."""
    path = tmp_path / "scores.json"
    data = scores().to_dict()
    data["shape"]["value_bytes"] = 4
    path.write_text(json.dumps(data))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "dtype", "num_fa_heads"),
    [
        ((), "bf16", 12),
        (("--serve-dtype", "fp16"), "fp16", 12),
        (("--serve-dtype", "fp32"), "fp32", 6),
    ],
)
def test_a_cache_budget_is_counted_in_the_format_that_serves(
    scores_file: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    dtype: str,
    num_fa_heads: int,
) -> None:
    out = scores_file.with_name("plan.json")
    printed = run(capsys, "plan", "--scores", scores_file, "--out", out, *BUDGET, *options)
    plan = HeadPlan.load(out)
    assert plan.num_fa_heads == num_fa_heads
    assert plan.provenance["budget"]["serve_dtype"] == dtype
    assert plan.provenance["costs"]["plan"]["serve_dtype"] == dtype
    for text in (printed, run(capsys, "inspect", out)):
        assert f"0.05 GiB of cache and state at 32,768 tokens ({dtype})" in text
        kept = f"{num_fa_heads * 32768 * 2 * DIM * (4 if dtype == 'fp32' else 2) / 2**30:.4g}"
        assert re.search(rf"KV cache, GiB \({dtype}\) +\S+ +{kept} ", text)
        assert f"predicted decode, ms per token (H100 SXM, {dtype})" in text
        state = "fp32" if dtype == "fp32" else f"fp32, else {dtype}"
        assert f"LA state, GiB ({state})" in text


def test_scores_keep_sizes_and_no_format(scores_file: Path) -> None:
    assert HeadScores.load(scores_file).shape == scores().shape
    assert "value_bytes" not in scores().to_dict()["shape"]


@pytest.mark.parametrize(("value_bytes", "dtype"), [(4, "fp32"), (2, "bf16")])
def test_a_budget_of_an_earlier_release_is_named_in_its_own_format(
    scores_file: Path, capsys: pytest.CaptureFixture[str], value_bytes: int, dtype: str
) -> None:
    out, earlier = scores_file.with_name("plan.json"), scores_file.with_name("earlier.json")
    run(capsys, "plan", "--scores", scores_file, "--out", out, *BUDGET, "--serve-dtype", dtype)
    data = json.loads(out.read_text())
    for record in (data["provenance"]["budget"], *data["provenance"]["costs"].values()):
        del record["serve_dtype"]
    data["provenance"]["shape"]["value_bytes"] = value_bytes
    earlier.write_text(json.dumps(data))
    assert read_budget(HeadPlan.load(earlier)) == read_budget(HeadPlan.load(out))
    assert run(capsys, "inspect", earlier) == run(capsys, "inspect", out)
    # A ratio is of no format: costs are told in the default.
    data["provenance"]["budget"] |= {"kind": "fa_ratio", "amount": "1/4", "context_tokens": None}
    earlier.write_text(json.dumps(data))
    assert "KV cache, GiB (bf16)" in run(capsys, "inspect", earlier)


def test_inspect_tells_any_plan_in_the_format_asked_for(
    scores_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scores_file.with_name("plan.json")
    run(capsys, "plan", "--scores", scores_file, "--out", out, "--fa-heads", "4")
    told = run(capsys, "inspect", out, "--serve-dtype", "fp32", "--against", out)
    assert "KV cache, GiB (fp32)" in told and "tokens, served in fp32: cache and state" in told


def test_the_pareto_table_names_its_format(
    scores_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scores_file.with_name("pareto.json")
    command = ["pareto", "--scores", scores_file, "--out", out, "--budgets", "1/4,1/2"]
    assert "in bf16" in run(capsys, *command)
    narrow = ParetoTable.load(out)
    printed = run(capsys, *command, "--serve-dtype", "fp32", "--overwrite")
    assert "cache+state GiB (fp32)" in printed and "decode ms (fp32)" in printed
    wide = ParetoTable.load(out)
    assert (narrow.teacher.serve_dtype, wide.teacher.serve_dtype) == ("bf16", "fp32")
    assert wide.teacher.kv_cache_bytes == 2 * narrow.teacher.kv_cache_bytes
    assert wide.rows[0].costs == costs_of(scores().shape, _highest(8), 32768, "h100", "fp32"), (
        "budget 1/4"
    )


def _highest(number: int) -> HeadPlan:
    heads = [(group // GROUPS, group % GROUPS * 2) for group in range(number)]
    by_layer = {layer: [h for i, h in heads if i == layer] for layer in range(LAYERS)}
    return HeadPlan.from_fa_heads(by_layer, LAYERS, HEADS, GROUPS)


def test_a_pareto_table_that_names_no_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "pareto.json"
    pareto_table(scores(), [Budget("fa_heads", 4)], Constraints(), 128, "h100").save(path, {})
    data: dict[str, Any] = json.loads(path.read_text())
    for costs in (data["teacher"], *(row["costs"] for row in data["rows"])):
        del costs["serve_dtype"]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="number format .* anew with megatron-hydra pareto"):
        ParetoTable.load(path)


def test_the_state_stays_float32_and_the_rest_halves() -> None:
    shape, plan = dataclasses.replace(scores().shape, conv_kernel_size=0), _highest(4)
    wide, narrow = (costs_of(shape, plan, 4096, "h100", dtype) for dtype in ("fp32", "bf16"))
    assert wide.state_bytes == narrow.state_bytes > 0
    assert wide.kv_cache_bytes == 2 * narrow.kv_cache_bytes > 0
