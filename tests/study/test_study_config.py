"""A study's YAML: what runs in which order, what its arms' plans are, bad input."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kit.scores import make_scores

from megatron_hydra.api.plan import recombine
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.schema import as_overrides
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.policy import plan_from_scores, random_plan
from megatron_hydra.selection.scorers.controls import CONTROL_PROBE, CONTROLS, control_effects
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.study.config import Run, StudyConfig, budget_for, load_study
from megatron_hydra.study.teacher import scores_hash, script_arguments
from megatron_hydra.tasks.probes import find_sub_probe

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "examples/study").glob("*.yaml"))
LAYERS, HEADS, GROUPS = 8, 16, 8
SCORERS = "score.scorers.names=[activation_patching, path_patching"
FINDS = "findings.layers.rests_on=[{better: head, worse: "


@pytest.fixture(scope="module")
def study() -> StudyConfig:
    return load_study(ROOT / "examples/study/study.yaml")


@pytest.fixture(scope="module")
def scores(study: StudyConfig) -> HeadScores:
    """Effects at random of all that the study scores by."""
    names = [find_sub_probe(name) for name in study.score["probes"]["names"]]
    capabilities = {probe.name: probe.capability for probe in names} | {
        CONTROL_PROBE: CONTROL_PROBE
    }
    rng = np.random.default_rng(0)
    effects: dict[str, dict[str, np.ndarray]] = {}
    for scorer in study.score["scorers"]["names"]:
        if scorer in CONTROLS:
            every = study.score["scorers"]["every"]
            effects[scorer] = {CONTROL_PROBE: control_effects(scorer, LAYERS, HEADS, every=every)}
        else:
            effects[scorer] = {probe.name: rng.random((3, LAYERS, HEADS)) for probe in names}
    combine = study.score["combine"]
    chosen = Combination(tuple(combine["scorers"]), weights=combine["weights"])
    return make_scores(effects, GROUPS, capabilities, chosen)


def planned(study: StudyConfig, scores: HeadScores, run: Run) -> HeadPlan:
    """As the arm's own first step has it."""
    arm, budget = study.arms[run.arm], budget_for(study, run)
    combined = recombine(scores, as_overrides({"combine": arm.combine}))
    if arm.random:
        summary = random_plan(combined, budget, arm.constraints, seed=run.seed, num_resamples=2)
    else:
        ratio = Fraction(arm.window_ratio)
        summary = plan_from_scores(
            combined, budget, arm.constraints, window_ratio=ratio, num_resamples=2
        )
    return summary.plan


def by_layer(plan: HeadPlan) -> list[int]:
    return [len(layer.fa_heads) for layer in plan.layers]


@pytest.mark.parametrize("budget", ["1/8", "1/4"])
def test_arms_have_the_plans_that_their_words_say(study, scores, budget):
    plans = {
        run.arm: planned(study, scores, run)
        for run in study.runs() if run.budget == budget and run.seed == 0
    }  # fmt: skip
    number = LAYERS * HEADS // int(budget[-1])
    others = {name: plan for name, plan in plans.items() if name != "groups_cache"}
    assert {name: plan.num_fa_heads for name, plan in others.items()} == dict.fromkeys(
        others, number
    )
    retrieval = scores.scores
    best = np.argsort(-retrieval.ravel())[:number]
    chosen = {tuple(divmod(int(place), HEADS)) for place in best}
    kept = {(i, h) for i, layer in enumerate(plans["global"].layers) for h in layer.fa_heads}
    assert kept == chosen
    assert min(by_layer(plans["head"])) >= 1 and plans["head"] != plans["global"]
    # Every choice of layers, by brute force.
    num_layers = number // HEADS
    sums = retrieval.sum(1)
    top = max(itertools.combinations(range(LAYERS), num_layers), key=lambda c: sums[list(c)].sum())
    assert by_layer(plans["layer_scored"]) == [HEADS * (i in top) for i in range(LAYERS)]
    spread = {1: [3], 2: [3, 7]}[num_layers]
    assert by_layer(plans["layer_spread"]) == [HEADS * (i in spread) for i in range(LAYERS)]
    if budget == "1/4":
        assert min(by_layer(plans["head_beside"])) >= 1
        assert max(by_layer(plans["head_beside"]) + by_layer(plans["global_beside"])) <= 12
    for layer in range(LAYERS):
        groups = plans["groups"].layers[layer].fa_heads
        assert {h // 2 * 2 for h in groups} | {h // 2 * 2 + 1 for h in groups} == {*groups}
        assert plans["fixed"].layers[layer].fa_heads == tuple(range(number // LAYERS))
    windows = sum(len(layer.heads_of("sliding_window")) for layer in plans["three_kinds"].layers)
    assert windows == LAYERS * HEADS // 4 and by_layer(plans["three_kinds"]) == by_layer(
        plans["head"]
    )
    in_layer = f"in_layer_{number // LAYERS}"
    for layer, own in enumerate(plans[in_layer].layers):
        order = np.argsort(-retrieval[layer])[: number // LAYERS]
        assert sorted(own.fa_heads) == sorted(order.tolist())
    assert by_layer(plans[f"random_{in_layer}"]) == [number // LAYERS] * LAYERS
    stored = sum(len(plans["groups_cache"].fa_groups(i)) for i in range(LAYERS))
    assert stored == LAYERS * GROUPS // int(budget[-1])
    assert len({json.dumps(plans[name].to_dict()["layers"]) for name in (
        "global", "zero_ablation", "attention_score", "capabilities", "random_global"
    )}) == 5  # fmt: skip


def test_layers_but_a_head_or_two_have_fa_heads_in_that_layer_alone(study, scores):
    for name, number in (("layer_but_one", 15), ("layer_but_two", 14)):
        run = next(run for run in study.runs() if run.arm == name)
        layers = [number if layer == 3 else 0 for layer in range(LAYERS)]
        assert by_layer(planned(study, scores, run)) == layers


def test_lots_are_drawn_anew_for_each_replicate(study, scores):
    runs = [run for run in study.runs() if run.arm == "random_global" and run.budget == "1/8"]
    drawn = [by_layer(planned(study, scores, run)) for run in runs]
    assert len(runs) == 3 and len({tuple(each) for each in drawn}) == 3
    assert drawn == [by_layer(planned(study, scores, run)) for run in runs]


def test_runs_come_question_by_question_and_their_first_replicates_first(study):
    runs = study.runs()
    assert len({run.name for run in runs}) == len(runs)
    eighth, quarter = (study.runs([f"granularity@{budget}"]) for budget in ("1/8", "1/4"))
    begin = runs.index(quarter[0])
    assert runs[: len(eighth)] == eighth and runs[begin : begin + len(quarter)] == quarter
    assert {run.budget for run in runs[begin:]}.isdisjoint({"1/8", "1"})
    heads = [(run.budget, run.teacher, run.seed) for run in runs if run.arm == "head"]
    assert heads == [
        (budget, each.teacher, each.seed)
        for budget in ("1/8", "1/4")
        for each in study.run.replicates
        if each.runs is None or "head" in each.runs.get(budget, ())
    ]
    assert len(heads) == 8 + 10
    assert [run.budget for run in runs if run.arm == "recipe"] == ["1"] * 3, "once for all budgets"
    firsts = ("layer_spread", "global", "window", "recipe", "fusion_none", "no_align", "fa_rope")
    seen = [[run.arm for run in runs].index(arm) for arm in firsts]
    assert seen == sorted(seen)


def test_a_replicate_that_names_its_arms_runs_these_alone_at_their_budgets():
    def runs(of_second: str) -> list[Run]:
        second = f"{{teacher: second, seed: 7, runs: {{{of_second}}}}}"
        replicates = f"run.replicates=[{second}, {{teacher: first, seed: 0}}]"
        return load_study(ROOT / "examples/study/study.yaml", [replicates]).runs()

    found = runs("1/4: [head], 1/8: [layer_but_two]")
    assert {run.name for run in found if run.seed == 7} == {
        "1-4.head.second.7", "7-64.layer_but_two.second.7",
    }  # fmt: skip
    first = [run.arm for run in found if run.seed == 0]
    assert "layer_but_two" not in first and first.count("head_slower") == 2, (
        "of one it is the first"
    )
    with pytest.raises(UserError, match="run.replicates at 1/4 names 'layer_but_two'"):
        runs("1/4: [layer_but_two]")  # which is of 1/8 alone
    with pytest.raises(UserError, match="run.replicates names '1/5'"):
        runs("1/5: [head]")


def test_scores_are_known_by_what_was_measured(scores, tmp_path):
    """Whoever scores the same teacher elsewhere goes on with the same results."""
    other = replace(scores, provenance={"command": "elsewhere", "seconds": 3})
    effects = {scorer: dict(of_probes) for scorer, of_probes in scores.effects.items()}
    effects["path_patching"]["kv_retrieval"] = 2 * effects["path_patching"]["kv_retrieval"]
    changed = replace(scores, effects=effects)
    hashes = []
    for name, each in (("here", scores), ("elsewhere", other), ("changed", changed)):
        each.save(tmp_path / name)
        hashes.append(scores_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]


def test_all_arms_train_on_the_same(study):
    """But for those whose row says otherwise; the recipe alone has stage 1's tokens in stage 2."""
    stages = ("align", "distill", "long_context")
    sums = {run.arm: sum(study.tokens(run, stage) for stage in stages) for run in study.runs()}
    usual = sums.pop("head")
    early = {arm for key in ("early", "early_kinds") for arm in study.questions[key].arms}
    assert {sums[arm] for arm in early} == {usual // 10}
    assert {arm for arm, tokens in sums.items() if tokens != usual} == early | {
        "teacher", "window_untrained", "no_align", "calibrated_no_align", "no_distill",
        "no_long_context", "quarter", "half", "double",
    }  # fmt: skip
    place = Path("there")
    head, window = (
        study.stage_config(Run(arm, "1/8", "first", 2), "distill", place, place, place, place)
        for arm in ("head", "window")
    )
    assert head == window and head.data.seed == 2002


def test_what_decides_a_result_changes_its_inputs_and_words_do_not(study):
    run = Run("head", "1/8", "first", 0)
    known = study.inputs(run)

    def changed(*overrides: str) -> set[str]:
        other = load_study(ROOT / "examples/study/study.yaml", overrides)
        return {key for key, value in other.inputs(run).items() if known[key] != value}

    assert changed("arms.head.about=words", "arms.head.replicates=1", "run.folder=there") == set()
    assert changed("stages.distill.settings.optim.lr=1e-4") == {"stages"}
    assert changed("arms.head.tokens={align: 0.5}") == {"stages"}
    assert changed("arms.head.model={la_rope: false}") == {"arm"}
    assert changed("evaluation.samples=7") == {"evaluation"}
    assert changed("evaluation.batch_tokens=9", "evaluation.forward_tokens=9") == set()
    assert changed("arms.window.model={}") == set()
    # What results that came before the limit lack, and what it is to them.
    limited = study.inputs(replace(run, arm="head_beside", budget="1/4"))
    assert "max_fa_per_layer" not in known["arm"] and '"max_fa_per_layer": 12' in limited["arm"]


def test_questions_are_asked_in_the_order_in_which_they_are_named(study):
    asked = study.runs(["few@1/128", "granularity@1/4", "recipe"])
    names = [run.name for run in asked]
    few = study.runs(["few"])
    half = len(few) // 2
    assert [run for run in asked if run.budget == "1/128"] == few[half:] == asked[:half]
    assert {run.budget for run in few} == {"1/32", "1/128"}
    assert names[half] == "1-4.head.first.0" and len(names) == len({*names})
    assert [name for name in names if ".recipe." in name][0] == "1.recipe.first.0"
    assert {*asked} < {*study.runs()}
    with pytest.raises(UserError, match=r"question few is at 1/32, 1/128, not at '1/8'"):
        study.runs(["few@1/8"])
    with pytest.raises(UserError, match=r"there is no question 'fwe'; there is granularity, "):
        study.runs(["fwe"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("questions.kinds.arms=[heads]", r"questions\.kinds\.arms names 'heads'; there is head, "),
        (f"{FINDS}heads, budget: 1/8}}]", r"findings\.layers names 'heads'; there is head, "),
        (f"{FINDS}kda, budget: 1/9}}]", r"findings\.layers names '1/9'; there is 1/8, 1/4, "),
        (f"{FINDS}kda, budget: 1/8, by: los}}]", r"findings\.layers names 'los'; there is retri"),
        ("arms.head.tokens={algin: 1}", r"arms\.head names 'algin'; there is align, "),
        ("arms.head.constraints={per_head: 1}", r"unknown config key arms\.head\.constraints\.per"),
        ("run.budgets=[1/8, 1/4, many]", r"a budget is 'many'; a ratio such as 1/8 is needed"),
        ("arms.window.window_ratio=some", r"a window_ratio is 'some'; a ratio such as 1/8 is"),
        (f"{SCORERS}]", r"arms\.layer_spread: the plan needs every_nth, which scorers\.names of"),
        (f"{SCORERS}, every_nth, fixed, zero_ablation, attention_score]",
         r"arms\.three_kinds\w*: the plan needs mean_ablation and window_ablation, which"),
        ("arms.head.combine.weights={maths: 2}", r"arms\.head: the plan weighs 'maths', for which"),
        ("run.budgets=[1/8, 1/4, 0/8]", r"a budget is '0/8'; a ratio such as 1/8 is needed"),
        ("stages.align.settings.optim.rate=1", r"arm head, stage align: unknown config key optim"),
        ("score.scorers.names=[magic]", r"score: scorers\.names\[0\] is 'magic'"),
        ("evaluation.tasks=[niah]", r"unknown generation task 'niah'"),
        ("teachers.first.folder=here", r"teachers\.first must say one of folder and script"),
        ("evaluation.probes=[]", r"questions\.selection names 'kv_retrieval'; there is retr"),
        ("evaluation.times=[]", r"evaluation\.times is empty"),
        ("evaluation.times=[2, 4]", r"run\.least_teacher_accuracy is at 1 of evaluation\.times"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(override, message):
    with pytest.raises(UserError, match=message):
        load_study(ROOT / "examples/study/study.yaml", [override])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_examples_are_read(path):
    assert load_study(path).runs()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_arm_is_a_model_that_can_be_built(path):
    """What no layer takes would fail on the GPU, an hour later."""
    from megatron_hydra.cpu import install_if_needed

    install_if_needed()
    from kit.tiny import tiny_config, tiny_plan

    from megatron_hydra.model.build import build_model
    from megatron_hydra.parallel import initialize_model_parallel

    initialize_model_parallel()
    arms = load_study(path).arms
    for options in {json.dumps(arm.model, sort_keys=True) for arm in arms.values()}:
        build_model(tiny_config(**json.loads(options)), tiny_plan())


def test_the_script_takes_the_options_of_all_teachers(study, monkeypatch):
    """And all have the size that is said; any two fit into a file of 64 MiB with their results."""
    import torch

    script = ROOT / "examples/quickstart/make_teacher.py"
    monkeypatch.syspath_prepend(str(script.parent))
    spec = importlib.util.spec_from_file_location("make_teacher", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    num_bytes, seeds = list[int](), set()
    for teacher in study.teachers.values():
        words = script_arguments(teacher, Path("out"), 200.0)
        monkeypatch.setattr(sys, "argv", ["make_teacher", *words])
        args = module.parse_arguments()
        assert (args.max_seconds, args.out, args.no_ablation) == (200.0, "out", True)
        assert args.length == study.data.length
        assert args.max_positions >= max(study.lengths)
        tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
        with torch.device("meta"):
            model = module.make_model(tokenizer, args)
        size = sum(parameter.numel() for parameter in model.parameters())
        assert 10e6 < size < 12e6
        num_bytes.append(size * getattr(torch, args.dtype).itemsize)
        seeds.add(args.seed)
    assert 2 * max(num_bytes) < 48 * 2**20 and len(seeds) == len(study.teachers) == 8
