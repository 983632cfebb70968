"""The layout must not show: any split over ranks computes and trains the same model.

Catches: heads in the wrong order, collectives that differ between ranks, a gradient that is not
summed over ranks (shared norms) or summed twice, query groups split over ranks, gradient norms
that count a rank's own parameters once only, replicas that drift apart, checkpoint shards at the
wrong place, means of means over unequal parts of a batch, state that leaks over packed documents'
borders or is lost between context-parallel ranks.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from kit.distributed import run_distributed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# Some heads FA (groups split, whole and missing), all, one, none.
PLAN = {0: (1, 2, 5), 1: tuple(range(8)), 2: (3,), 3: ()}
TWO_LAYERS = {0: (1, 2, 5), 1: (0, 1, 6, 7)}
# Longer than a context-parallel rank's pieces; a fusion that lets the sink's gradient through.
WINDOW = dict(sliding_window_tokens=40, fusion="none")
# Rank 0 of two has more values in the first half of the layers: with two replicas some norms lie in
# the first half of the one rank's gradients and in the second of the other's.
LOPSIDED = {
    **dict.fromkeys(range(4), (0, 1, 2, 3)),
    4: (4, 5, 6, 7),
    5: tuple(range(8)),
    6: (),
    7: (),
}
OTHER_KINDS = {0: {"kda": (0, 6), "sliding_window": (3, 7)}, 1: {"sliding_window": (2, 3, 4, 5)}}
VARIANTS = {
    "default": {},
    "dynamic gate, RoPE on FA": dict(fusion="gate", fa_rope=True, la_output_gate="sigmoid"),
    "KDA": dict(la_kind="kda"),
    "window": dict(la_kind="sliding_window", **WINDOW),
    "no gates": dict(fusion="norm", fa_output_gate=False, la_output_gate="none", la_qk_norm=False),
    "biases, no norms, scaled RoPE": dict(
        add_qkv_bias=True,
        qk_layernorm=False,
        fa_rope=True,
        rope_scaling_factor=8.0,
        rope_original_length=32,
    ),
}
# What `make test` keeps: each kind of split once, in the combination that has most to go wrong.
# Tensor beside context or pipeline parallelism, on four ranks, is in test_padding.py, and a way of
# checkpoints to data and context parallel in test_optimizer_checkpoint.py. Two steps show what Adam
# makes of the first one's gradients.
COVERING_ON_TWO = {
    "tensor parallel, ranks of one kind: tp2 balanced",
    "sequence parallel, ranks of one kind: tp2 sp by_type",
    "pipeline, virtual stages: pp2 vpp2 micro4",
    "distributed optimizer: tp2 sp by_type distopt",
    "packed documents: cp2 micro4 packed",
    "recomputation, selective: tp2 sp by_type recompute=selective",
    "checkpoint there and back: tp2 sp by_type, pp2 vpp2 micro4",
}
COVERING_OF_BIASES = {
    "sequence parallel, ranks of one kind: tp2 sp by_type",
    "distributed optimizer: tp2 sp by_type distopt",
    "packed documents: cp2 micro4 packed",
    "checkpoint there and back: tp2 sp by_type, tp2 sp balanced",
}
COVERING_ON_FOUR = {
    "sequence parallel, ranks of one kind: tp4 sp by_type",
    "tensor and context parallel: tp2 cp2 sp by_type",
    "packed documents: tp2 cp2 sp by_type micro4 packed",
}


def test_a_covering_part_of_the_matrix_on_two_ranks(tmp_path):
    """Four layers, as pipeline stages and checkpoints need several, and four kinds of head."""
    kinds = {0: OTHER_KINDS[0], 3: OTHER_KINDS[1]}
    window = dict(sliding_window_tokens=40)
    rows = _certify(tmp_path, 2, window, PLAN, (2, 2, 2), COVERING_ON_TWO, kinds, num_steps=2)
    assert _names(rows) == COVERING_ON_TWO


@pytest.mark.exhaustive  # tensor parallelism and a checkpoint of biases: test_families.py
def test_biases_of_a_teacher_without_norms_on_two_ranks(tmp_path):
    variant = VARIANTS["biases, no norms, scaled RoPE"]
    rows = _certify(tmp_path, 2, variant, TWO_LAYERS, (2, 2, 1), COVERING_OF_BIASES)
    assert _names(rows) == COVERING_OF_BIASES


@pytest.mark.exhaustive  # the same checks with four kinds are below
def test_a_covering_part_of_the_matrix_on_four_ranks(tmp_path):
    variant = VARIANTS["dynamic gate, RoPE on FA"]
    rows = _certify(tmp_path, 4, variant, TWO_LAYERS, (4, 2, 1), COVERING_ON_FOUR)
    assert _names(rows) == COVERING_ON_FOUR


@pytest.mark.exhaustive  # five layouts on four ranks
def test_the_optimizer_is_shared_out_over_replicas_of_unlike_ranks(tmp_path):
    """Norms' gradients are summed over tensor-parallel ranks that own other parts of them."""
    wanted = {
        "tensor parallel, ranks of one kind: tp2 by_type",
        "distributed optimizer: tp2 sp by_type distopt",
        "distributed optimizer: tp2 cp2 sp by_type distopt",
        "overlapped gradient sums: tp2 sp by_type overlap",
        "overlapped gradient sums: tp2 sp by_type distopt overlap",
    }
    rows = _certify(tmp_path, 4, {}, LOPSIDED, (2, 2, 1), wanted, num_steps=2)
    assert _names(rows) == wanted


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", ["KDA", "biases, no norms, scaled RoPE"])
def test_the_optimizer_is_shared_out_beside_context_and_pipeline_parallelism(variant, tmp_path):
    wanted = {
        "distributed optimizer: tp2 cp2 sp by_type distopt",
        "distributed optimizer: tp2 pp2 sp by_type distopt micro4",
        "distributed optimizer: tp2 cp2 pp2 sp by_type distopt micro4",
    }
    rows = _certify(tmp_path, 8, VARIANTS[variant], LOPSIDED, (2, 2, 2), wanted, num_steps=2)
    assert _names(rows) == wanted


@pytest.mark.exhaustive  # two ranks have the same kinds above
def test_four_kinds_in_a_layer_on_four_ranks(tmp_path):
    """Full attention, Gated DeltaNet, Kimi Delta Attention and sliding windows."""
    wanted = {
        *COVERING_ON_FOUR,
        "checkpoint there and back: tp4 sp by_type, tp4 sp balanced",
        "pipeline: pp2 micro4",
        "exported and reloaded: tp4 sp by_type",
    }
    rows = _certify(tmp_path, 4, WINDOW, TWO_LAYERS, (4, 2, 2), wanted, OTHER_KINDS, num_steps=2)
    assert _names(rows) == wanted


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_ranks, limits", [(1, (1, 1, 1)), (4, (4, 4, 4)), (8, (8, 4, 2))])
def test_the_whole_matrix(tmp_path, variant, num_ranks, limits):
    rows = _certify(tmp_path, num_ranks, VARIANTS[variant], PLAN, limits)
    if num_ranks == 8:
        sizes = {word for row in rows for word in row["layout"].split()}
        assert {"tp2", "tp4", "tp8", "cp2", "cp4", "pp2", "vpp2", "sp", "distopt"} <= sizes
        assert any(row["layout"].startswith("tp2 cp2 pp2") for row in rows)


def _certify(
    folder: Path,
    num_ranks: int,
    overrides: dict,
    fa_heads: dict,
    limits: tuple[int, int, int],
    wanted: set[str] | None = None,
    other_kinds: dict | None = None,
    num_steps: int = 3,
) -> list[dict]:
    """Certify on so many ranks; every row must pass."""
    folder.mkdir(exist_ok=True)
    heads = (fa_heads, other_kinds)
    run_distributed(_certify_rank, num_ranks, folder, overrides, heads, limits, wanted, num_steps)
    certificate = json.loads((folder / "certificate.json").read_text())
    failed = [row for row in certificate["rows"] if not row["passed"]]
    assert certificate["passed"] and not failed, failed
    return certificate["rows"]


def _names(rows: list[dict]) -> set[str]:
    return {_name(row["check"], row["layout"], row["compared_with"]) for row in rows}


def _name(check: str, layout: str, compared_with: str) -> str:
    """Of a checkpoint's journey, where it goes to too."""
    journey = f", {compared_with}" if check.startswith("checkpoint") else ""
    return f"{check}: {layout}{journey}"


def _certify_rank(
    folder: Path,
    overrides: dict,
    heads: tuple,
    limits: tuple,
    wanted: set[str] | None,
    num_steps: int,
) -> None:
    from kit.tiny import tiny_fields

    from megatron_hydra.certify.certificate import WELL_CONDITIONED, certify
    from megatron_hydra.certify.checks import Limits
    from megatron_hydra.certify.training import Run
    from megatron_hydra.certify.worlds import Ranks
    from megatron_hydra.head_plan import HeadPlan

    fa_heads, other_kinds = heads
    num_layers = len(fa_heads)
    fields = tiny_fields(num_layers=num_layers, **{**WELL_CONDITIONED, **overrides})
    plan = HeadPlan.from_fa_heads(fa_heads, num_layers, 8, 4, other_kinds=other_kinds)
    certificate = certify(
        Run(fields, plan, folder / "weights", folder, num_steps),
        Limits(*limits),
        96,
        Ranks(),
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=int(os.environ["RANK"]),
        select=lambda check: (
            wanted is None or _name(check.name, check.layout.name, check.compared_with) in wanted
        ),
    )
    if os.environ["RANK"] == "0":
        (folder / "certificate.json").write_text(json.dumps(asdict(certificate.file)))
