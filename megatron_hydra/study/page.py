"""The page of a study: a table, a picture and the orderings of each question, from the results.

Nothing is written by hand but the study's own titles, notes and findings: every figure is a
result's, and a finding stands where the results bear it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median

from megatron_hydra.errors import UserError
from megatron_hydra.files import write_beside
from megatron_hydra.study.config import IN_NATS, Run, StudyConfig
from megatron_hydra.study.figures import ArmFigures, most_in_a_layer, of_able_teachers
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.sections import Evidence, Question
from megatron_hydra.study.speeds import RATES, Speeds, timed_arms
from megatron_hydra.study.statistics import (
    Difference,
    difference_in_nats,
    paired_difference,
)

Results = Mapping[Run, ArmResult]
_MOST_NAMED = 6
_HOW_FAST = "How fast?"
_TEACHERS = "The teachers"
_OF_A_LAYER = "How many heads of one layer?"
_OF_A_LAYER_NOTE = (
    "All runs, at {} and at ratios of their own, of arms that differ in their plan alone, whatever "
    "it is chosen by, in the order of the FA heads that the layer with most of them has. Retrieval "
    "is that beyond the training length, in %: the run that finds least, and the one that finds "
    "most."
)


def write_page(
    study: StudyConfig, results: Results, out: Path, speeds: Speeds | None = None
) -> None:
    """Write the page, and its pictures to `pictures/` beside it, in earlier ones' places.

    Pictures have the page's name before theirs, so that two studies' pages can lie side by side.

    Args:
        study: The study.
        results: Of its runs.
        out: The page.
        speeds: Of its timed arms; None: not measured.

    Raises:
        UserError: If there is no result, or the page cannot be written.
    """
    if not any(result.status == "finished" for result in results.values()):
        raise UserError(f"{study.results} holds no result of the study: run it first")
    from megatron_hydra.report.chart_style import chart_style, save_png
    from megatron_hydra.study.charts import question_figure

    lines = [f"# {study.run.title}", "", *_head(study, results, speeds)]
    everything, results = results, of_able_teachers(study, results)
    lines += _findings(study, results) + _papers_orderings(study, results)
    for key, question in study.questions.items():
        lines += ["", f"## {question.title}", *(["", question.note] if question.note else [])]
        for budget in study.budgets_of(question):
            figures = list(_figures(study, results, question, budget))
            lines += ["", f"### {budget} of the heads FA"]
            if not _compares(study, figures):
                lines += ["", "Nothing to compare yet."]
                lines += _absent(study, everything, question, budget)
                continue
            name = f"{out.stem}_{key}_{budget.replace('/', '_')}.png"
            with chart_style():
                figure = question_figure(study, figures)
                save_png(out.parent / "pictures" / name, figure, overwrite=True)
            lines += ["", *_table(study, question, figures)]
            lines += ["", f"![{question.title}](pictures/{name})"]
            lines += _absent(study, everything, question, budget)
            lines += _orderings(study, results, question, budget)
    lines += _by_layer(study, results) + _teachers(study, everything, results)
    lines += _how_fast(study, speeds) if speeds else []
    with write_beside(out, overwrite=True) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(study: StudyConfig, results: Results, speeds: Speeds | None) -> list[str]:
    finished = [result for result in results.values() if result.status == "finished"]
    failed = len(results) - len(finished)
    devices = sorted({str(result.provenance["device"]) for result in finished})
    asked_of = {result.teacher for result in finished}
    teachers = [name for name in study.teachers if name in asked_of]
    asked = study.evaluation
    lengths = ", ".join(f"{length:,}" for length in study.lengths)
    stages = ", ".join(f"{stage} {study.stages[stage].tokens:,}" for stage in study.stages)
    lines = [
        f"Of {len(study.runs())} runs {len(finished)} are finished, {failed} failed and "
        f"{len(study.runs()) - len(results)} have not run. Device: {', '.join(devices)}. This page "
        "is made from the JSON files of the runs by `megatron-hydra study --report`.",
        "",
        f"Every arm trains on the same data, in tokens: {stages}, where its row does not say "
        f"otherwise. Teachers: {', '.join(teachers)}, at {study.data.length} tokens. "
        f"Accuracy is in % of {asked.samples} prompts per cell, answered by generated text, at "
        f"{lengths} tokens; all are asked the same. Loss is in nats on held-out text up to the "
        "training length, KL is the divergence of the next token from the teacher's there, cache "
        "is in bytes of bf16 per token, state in KiB per sequence; beside the number of FA heads "
        "stands how many the layer has that has most. Figures are means over runs: "
        "pairs of a teacher and a seed: rows of arms that have not run for the same ones do not "
        "compare, orderings do, for they take the pairs that both arms have; beside them stands "
        "what each run finds beyond the training length, in %. An ordering is read off all "
        "lengths beyond the training length, or off a probe; its interval is a paired bootstrap's, "
        "95%, over runs and prompts. By loss or KL the lower is the better, and the interval is "
        "Student's over runs. One run alone decides nothing. Arms share a device, so that "
        + (
            f"speeds are measured apart: [{_HOW_FAST}](#how-fast)"
            if speeds
            else "nothing is said of speed"
        )
        + ".",
    ]
    return [*([study.run.note, ""] if study.run.note else []), *lines]


def _runs(study: StudyConfig, arm: str, budget: str) -> list[Run]:
    """Of an arm where the study is at a budget; none where it does not run there."""
    if not study.is_at(study.arms[arm], budget):
        return []
    at = study.budget_of(arm, budget)
    return [run for run in study.runs() if (run.arm, run.budget) == (arm, at)]


def _figures(
    study: StudyConfig, results: Results, question: Question, budget: str
) -> Iterator[ArmFigures]:
    """Of the arms that have a finished run."""
    for arm in question.arms:
        found = [results[run] for run in _runs(study, arm, budget) if run in results]
        if found := [result for result in found if result.status == "finished"]:
            yield ArmFigures(arm, found, study.data.length)


def _compares(study: StudyConfig, figures: Sequence[ArmFigures]) -> bool:
    """Whether there is something to compare, of which some was made at the budget itself."""
    return len(figures) > 1 and any(study.arms[each.name].ratio is None for each in figures)


def _table(study: StudyConfig, question: Question, figures: Sequence[ArmFigures]) -> list[str]:
    asked = study.evaluation
    heads = [
        "arm",
        "",
        "FA heads",
        "of a layer",
        *(task.replace("niah_", "") for task in asked.tasks),
    ]
    heads += [*asked.probes, "loss", "KL", "cache", "state", "tokens", "by run"]
    heads += ["paper"] if question.paper else []
    rows, above = [], study.retrieval_above
    for each in figures:
        cache, state = each.cache
        cells = [each.name, study.arms[each.name].about, each.num_fa_heads, each.most_in_a_layer]
        for task in asked.tasks:
            cells.append(_shares_text(each.accuracy(task)))
        cells += [f"{100 * each.probe(name):.0f}" for name in asked.probes]
        cells += [f"{each.loss_nats:.3f}", f"{each.divergence_nats:.3f}"]
        cells += [f"{cache:,.0f}", f"{state / 1024:,.0f}", f"{each.tokens:,}"]
        cells += [", ".join(f"{100 * run.retrieval(above):.0f}" for run in each.runs)]
        rows.append([*cells, *([question.paper.get(each.name, "")] if question.paper else [])])
    return _markdown(heads, rows)


def _absent(study: StudyConfig, results: Results, question: Question, budget: str) -> list[str]:
    """What failed, and what has not run."""
    failed, waiting = [], []
    for arm in question.arms:
        for run in _runs(study, arm, budget):
            if run not in results:
                waiting.append(f"{arm} ({run.teacher}, seed {run.seed})")
            elif results[run].status == "failed":
                failed.append(f"{arm} ({run.teacher}, seed {run.seed}): {results[run].reason}")
    lines = [f"- Failed: {each}" for each in failed]
    words = ", ".join(waiting) if len(waiting) <= _MOST_NAMED else f"{len(waiting)} runs"
    lines += [f"- Not run: {words}"] if waiting else []
    return ["", *lines] if lines else []


def _orderings(study: StudyConfig, results: Results, question: Question, budget: str) -> list[str]:
    rows = []
    for ordering, by in (
        (each, by) for each in question.orderings for by in question.measures(each)
    ):
        if not all(_runs(study, arm, budget) for arm in (ordering.better, ordering.worse)):
            continue  # one of the two is of other budgets
        pair = (ordering.better, ordering.worse)
        row = [" over ".join(pair), by, ordering.paper if by == "retrieval" else ""]
        rows.append([*row, *_verdict(compare(study, results, pair, by, budget))])
    if not rows:
        return []
    heads = ["claim", "by", "paper", "difference", "95% interval", "runs", "verdict"]
    return ["", *_markdown(heads, rows)]


def _verdict(found: Difference | None) -> list[str]:
    if found is None:
        return ["", "", "0", "undecided: not run"]
    return [*found.words, str(found.num_runs), found.verdict]


def _papers_orderings(study: StudyConfig, results: Results) -> list[str]:
    """Those that the paper has a figure for, of all questions, where one has run."""
    rows = []
    for question in study.questions.values():
        for ordering in (each for each in question.orderings if each.paper):
            pair = (ordering.better, ordering.worse)
            for budget in study.budgets_of(question):
                if found := compare(study, results, pair, "retrieval", budget):
                    rows.append([" over ".join(pair), budget, ordering.paper, *_verdict(found)])
    if not rows:
        return []
    heads = ["claim", "FA heads", "paper", "difference", "95% interval", "runs", "verdict"]
    return ["", "## The paper's orderings", "", *_markdown(heads, rows)]


def _findings(study: StudyConfig, results: Results) -> list[str]:
    """Each with its numbers; those that the results do not bear out are said to be so."""
    if not study.findings:
        return []
    lines = ["", "## What to take along", ""]
    without = []
    for finding in study.findings.values():
        numbers = [_number(study, results, each) for each in finding.rests_on]
        if all(numbers):
            lines.append(f"- {finding.says} ({'; '.join(map(str, numbers))})")
        else:
            without.append(f"- Not borne out by these results: {finding.says}")
    return lines + without


def _number(study: StudyConfig, results: Results, evidence: Evidence) -> str | None:
    """What a comparison found, in words; None if it is not what the finding says."""
    pair = (evidence.better, evidence.worse)
    found = compare(study, results, pair, evidence.by, evidence.budget)
    if found is None:
        return None
    low, high = found.interval
    if evidence.within is None:
        holds = found.verdict == "holds"
    else:
        holds = found.num_runs > 1 and max(-low, high) <= evidence.within
    value, interval = found.words
    words = f"{' over '.join(pair)} at {evidence.budget}, {evidence.by}: {value}, {interval}"
    return words if holds else None


def compare(
    study: StudyConfig, results: Results, arms: tuple[str, str], by: str, budget: str
) -> Difference | None:
    """Two arms on the teachers and seeds that both have finished; None if there are none.

    Args:
        study: The study.
        results: Of its runs.
        arms: The better first.
        by: As of :class:`~megatron_hydra.study.sections.Ordering`.
        budget: At which both ran, where they have none of their own.
    """
    found: list[dict[tuple[str, int], ArmResult]] = []
    for arm in arms:
        done = [results[run] for run in _runs(study, arm, budget) if run in results]
        found.append({(r.teacher, r.seed): r for r in done if r.status == "finished"})
    both = [key for key in found[0] if key in found[1]]
    if not both:
        return None
    if by in IN_NATS:
        ours, theirs = ([_nats(study, by, each[key]) for key in both] for each in found)
        return difference_in_nats(ours, theirs)
    above = study.retrieval_above
    better, worse = ([each[key].bits(by, above) for key in both] for each in found)
    return paired_difference(better, worse)


def _by_layer(study: StudyConfig, results: Results) -> list[str]:
    """Runs whose arms differ in their plan alone, by the FA heads of the layer with most."""
    found: dict[tuple[Fraction, int], list[ArmFigures]] = {}
    for run, result in results.items():
        if result.status == "finished" and study.differs_by_plan(run.arm):
            key = Fraction(run.budget), most_in_a_layer(result)
            found.setdefault(key, []).append(ArmFigures(run.arm, [result], study.data.length))
    if len(found) < 2:
        return []
    rows = []
    for (budget, most), runs in sorted(found.items()):
        shares = [round(100 * each.retrieval(study.retrieval_above)) for each in runs]
        names = dict.fromkeys(each.name for each in runs)
        rows.append([str(budget), str(most), str(len(runs)), str(min(shares)), str(max(shares)),
                     ", ".join(names)])  # fmt: skip
    heads = ["at", "FA heads of the layer with most", "runs", "lowest", "highest", "arms"]
    note = _OF_A_LAYER_NOTE.format(" and ".join(study.run.budgets))
    return ["", f"## {_OF_A_LAYER}", "", note, "", *_markdown(heads, rows)]


def _teachers(study: StudyConfig, everything: Results, counted: Results) -> list[str]:
    """What each finds itself, and the runs of those that find too little."""
    tasks, rows = study.evaluation.tasks, dict[str, list[str]]()
    for run, result in everything.items():
        if study.is_teacher(run) and result.status == "finished":
            found = ArmFigures(run.arm, [result], study.data.length)
            shares = [_shares_text(found.accuracy(task)) for task in tasks]
            rows[run.teacher] = [run.teacher, *shares, "yes" if run in counted else "no"]
    if not rows:
        return []
    heads = ["teacher", *(task.replace("niah_", "") for task in tasks), "counted"]
    lines = ["", f"## {_TEACHERS}", "", *_markdown(heads, [*rows.values()])]
    apart = {run: each for run, each in everything.items() if run not in counted}
    if not apart:
        return lines
    names = dict.fromkeys(run.teacher for run in apart)
    lines += ["", f"Runs of {' and '.join(names)} are in no other table, ordering, picture or "
              f"finding: they had learnt less than {study.run.least_teacher_accuracy:.0%} of a "
              f"task at {study.data.length:,} tokens, and what a teacher does not do its hybrids "
              "are not tried by. These are they."]  # fmt: skip
    asked = Question(_TEACHERS, [*study.arms])
    for budget in study.budgets:
        if figures := list(_figures(study, apart, asked, budget)):
            lines += ["", f"### {budget}, {' and '.join(names)}"]
            lines += ["", *_table(study, asked, figures)]
    return lines


def _shares_text(shares: Mapping[int, float]) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in shares.values())


def _how_fast(study: StudyConfig, speeds: Speeds) -> list[str]:
    """Medians, and their ratios to the teacher's, which was measured with them."""
    teacher = next((each for each in speeds.speeds if Fraction(each.budget) == 1), None)
    rows = []
    for each in speeds.speeds:
        cells = [each.arm, study.arms[each.arm].about, each.budget, str(each.fa_heads)]
        for number, rate in enumerate(each.rates):
            cells += [f"{rate:,.0f}", f"{rate / teacher.rates[number]:.2f}" if teacher else ""]
        cells += [_spread(each.training_ms), _spread(each.token_ms)]
        rows.append([*cells, ", ".join(each.stands_for)])
    heads = ["arm", "", "at", "FA heads"]
    for what in RATES:
        heads += [what, "/ teacher"]
    heads += ["ms per step of training", "of answers", "stands for"]
    return ["", f"## {_HOW_FAST}", "", _how_measured(study, speeds), "", *_markdown(heads, rows)]


def _spread(milliseconds: Sequence[float]) -> str:
    ordered = sorted(milliseconds)
    return f"{median(ordered):.1f} ({ordered[0]:.1f} to {ordered[-1]:.1f})"


def _how_measured(study: StudyConfig, speeds: Speeds) -> str:
    asked, first, origin = study.evaluation, speeds.speeds[0], speeds.provenance
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    at_once = asked.forward_tokens
    return (
        f"{len(speeds.speeds)} of {len(timed_arms(study))} arms are timed, each alone on the "
        "device, one after another, with the heads of the first teacher and seed. Device: "
        f"{origin['device']}; {versions}. Figures are tokens per second. Training is a step of "
        f"stage 3 in the arms' own loop, {first.step_tokens:,} tokens in sequences of "
        f"{study.data.long_length:,}, with all that lies between two steps: the median of "
        f"{len(first.training_ms)}. Prompts and answers are of the evaluation's own function at "
        f"its longest length, {max(study.lengths):,} tokens, {first.num_prompts} prompts together: "
        "prompts are read"
        + (f" {at_once:,} tokens at once" if at_once else "")
        + " until each has its first new token, which is timed once; then a step is a new token of "
        f"each: the median of {len(first.token_ms)}. Arms are trained for these steps alone: the "
        "work does not depend on the weights. The teacher is the hybrid's own code with all heads "
        "FA. Of arms that compute the same, with the same choice of heads, one is timed. Models "
        "this small wait for Python to launch operations, on a processor that others use too: "
        "figures do not carry over to large ones, and steps, told with the fastest and the "
        "slowest, differ within an arm as much as between most."
    )


def _nats(study: StudyConfig, by: str, result: ArmResult) -> float:
    figures = ArmFigures(result.arm, [result], study.data.length)
    return figures.loss_nats if by == "loss" else figures.divergence_nats


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]
