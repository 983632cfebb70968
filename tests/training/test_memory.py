"""Predicted memory against what an H100 measured (kernels/benchmarks/RESULTS.md says how)."""

from __future__ import annotations

import pytest

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.memory import training_memory

SHAPE = ModelShape(28, 16, 8, 128, 2048, 6144, 151936, tied_embeddings=True)
PLAN = HeadPlan.from_fa_heads({i: tuple(range(i % 4, 16, 4)) for i in range(28)}, 28, 16, 8)
# Stage, plan, tokens, layers recomputed; weights, gradients and optimizer, peak in MiB.
ONE_GPU = [
    ("distill", PLAN, 4096, 0, 36962, 49309),
    ("long_context", None, 4096, 0, 29541, 38937),
    ("long_context", PLAN, 8192, 0, 33615, 56216),
    ("align", PLAN, 4096, 0, 13448, 20287),
    ("align", PLAN, 16384, 0, 13540, 39784),
    ("distill", PLAN, 16384, 28, 36942, 41892),
    ("distill", None, 16384, 28, 32838, 37468),
    ("long_context", PLAN, 16384, 28, 33621, 38634),
    ("long_context", None, 16384, 28, 29548, 34203),
    ("distill", PLAN, 65536, 28, 36957, 53144),
    ("distill", None, 65536, 28, 32885, 47706),
    ("long_context", PLAN, 65536, 28, 33645, 49960),
    ("align", PLAN, 16384, 28, 13415, 18479),
    ("align", PLAN, 65536, 28, 13438, 33367),
    ("align", PLAN, 16384, 14, 13413, 28706),
    ("distill", PLAN, 16384, 14, 36942, 60580),
    ("long_context", PLAN, 8192, 1, 33649, 55562),
]
# The same of one of two GPUs, and its tensor- and context-parallel ranks.
TWO_GPUS = [
    ("align", PLAN, 4096, 0, 6737, 10280, 2, 1),
    ("distill", PLAN, 4096, 0, 18453, 24825, 2, 1),
    ("long_context", PLAN, 4096, 0, 16810, 23114, 2, 1),
    ("align", PLAN, 16384, 28, 6711, 9266, 2, 1),
    ("distill", PLAN, 16384, 28, 18465, 21014, 2, 1),
    ("long_context", PLAN, 16384, 28, 16816, 19381, 2, 1),
    ("long_context", None, 4096, 0, 14805, 19552, 2, 1),
    ("distill", None, 4096, 0, 16416, 21269, 2, 1),
    ("long_context", None, 16384, 28, 14779, 17124, 2, 1),
    ("distill", None, 16384, 28, 16428, 18781, 2, 1),
    ("align", PLAN, 65536, 28, 10113, 20561, 1, 2),
    ("distill", PLAN, 65536, 28, 25722, 34807, 1, 2),
    ("long_context", PLAN, 65536, 28, 22424, 31541, 1, 2),
    ("align", PLAN, 131072, 28, 10068, 31039, 1, 2),
    ("distill", PLAN, 131072, 28, 25757, 42689, 1, 2),
    ("long_context", PLAN, 131072, 28, 22443, 39439, 1, 2),
    ("long_context", None, 65536, 28, 19742, 27686, 1, 2),
    ("distill", None, 65536, 28, 23009, 31001, 1, 2),
    ("long_context", None, 131072, 28, 19729, 34476, 1, 2),
    ("distill", None, 131072, 28, 23043, 37822, 1, 2),
]


@pytest.mark.parametrize(
    ("stage", "plan", "num_tokens", "layers", "state", "peak", "tp_size", "cp_size"),
    [*((*row, 1, 1) for row in ONE_GPU), *TWO_GPUS],
)
def test_prediction_is_within_5_percent(
    stage, plan, num_tokens, layers, state, peak, tp_size, cp_size
):
    recompute = "full" if layers else "none"
    memory = training_memory(
        SHAPE,
        plan,
        stage,
        num_tokens,
        recompute,
        recompute_layers=layers or None,
        tp_size=tp_size,
        cp_size=cp_size,
    )
    assert memory.state / 2**20 == pytest.approx(state, rel=0.02)
    assert (memory.kept + memory.passing) / 2**20 == pytest.approx(peak - state, rel=0.05)
    assert memory.peak / 2**20 == pytest.approx(peak, rel=0.02)


def test_data_parallel_ranks_share_the_optimizer_alone():
    one, four = (training_memory(SHAPE, PLAN, "distill", 4096, dp_size=n) for n in (1, 4))
    assert four.kept == one.kept and four.passing == one.passing
    trained = (one.state - four.state) / (12 * 3 / 4)
    assert one.state == pytest.approx(18 * trained + 2 * 1.72e9, rel=1e-3)


def test_pipeline_stages_share_the_layers_and_hold_several_micro_batches():
    """Two stages of tied embeddings: each has the vocabulary's matrix and half of the layers."""
    one = training_memory(SHAPE, PLAN, "long_context", 4096)
    two, filled = (
        training_memory(SHAPE, PLAN, "long_context", 4096, pp_size=2, num_micro_batches=num)
        for num in (1, 8)
    )
    vocabulary = 18 * 151936 * 2048
    assert two.state - vocabulary == pytest.approx((one.state - vocabulary) / 2, rel=1e-3)
    final_norm = 4096 * 4 * 2048
    assert two.kept - final_norm == pytest.approx((one.kept - final_norm) / 2, rel=1e-3)
    assert filled.kept - final_norm == pytest.approx(one.kept - final_norm, rel=1e-3)
    # A long pipeline's first stage holds as many as there are stages, and no more than there are.
    kept = [
        training_memory(SHAPE, PLAN, "distill", 4096, pp_size=7, num_micro_batches=num).kept
        for num in (1, 3, 7, 100)
    ]
    assert kept[0] < kept[1] < kept[2] == kept[3]


def test_the_pipeline_stage_that_needs_most_counts():
    full, linear = tuple(range(16)), ()
    plans = {
        "full": [full] * 28,
        "linear": [linear] * 28,
        "full first": [full] * 14 + [linear] * 14,
        "full last": [linear] * 14 + [full] * 14,
    }
    peaks = {
        name: training_memory(
            SHAPE,
            HeadPlan.from_fa_heads(dict(enumerate(heads)), 28, 16, 8),
            "align",
            4096,
            pp_size=2,
        ).peak
        for name, heads in plans.items()
    }
    assert peaks["full"] != pytest.approx(peaks["linear"], rel=1e-3)
    most = max(peaks["full"], peaks["linear"])
    assert peaks["full first"] == peaks["full last"] == pytest.approx(most, rel=1e-12)


def test_recomputation_keeps_less_in_every_stage():
    for stage in ("align", "distill", "long_context"):
        none, full = (
            training_memory(SHAPE, PLAN, stage, 65536, recompute) for recompute in ("none", "full")
        )
        assert full.kept < none.kept / 4 and full.peak < none.peak


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_dearest_recomputed_layer_counts_where_it_lies(stage):
    """Of its inputs, the layers after it have let go by then."""
    # Stage 1's backward pass is widest in LA heads; of what other stages keep, an FA head with a
    # query group of its own is more.
    la, fa = (), (0, 2)
    kinds = {"dear": la, "cheap": fa} if stage == "align" else {"dear": fa, "cheap": la}
    plans = {
        "all dear": ["dear"] * 28,
        "all cheap": ["cheap"] * 28,
        "dear first": ["dear"] + ["cheap"] * 27,
        "dear last": ["cheap"] * 27 + ["dear"],
    }
    passing = {
        name: training_memory(
            SHAPE,
            HeadPlan.from_fa_heads({i: kinds[kind] for i, kind in enumerate(layers)}, 28, 16, 8),
            stage,
            65536,
            "full",
        ).passing
        for name, layers in plans.items()
    }
    assert passing["all dear"] > passing["all cheap"]
    assert passing["dear last"] == pytest.approx(passing["all dear"], rel=1e-12)
    assert passing["dear first"] == pytest.approx(passing["all cheap"], rel=1e-12)
