"""The quickstart's main job in Python: score, plan, convert, train, export, evaluate and report.

    OMP_NUM_THREADS=1 python examples/api/transfer.py

Every step is the function that the verb of the same name calls. One process does all of it here;
`examples/quickstart/run.sh` has two ranks train, and a control beside the hybrid.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_hydra.api.convert import Calibration, convert
from megatron_hydra.api.export import export
from megatron_hydra.api.generate import Prompts, generate
from megatron_hydra.api.plan import plan
from megatron_hydra.api.preprocess import Retrieval, preprocess
from megatron_hydra.api.report import report
from megatron_hydra.api.score import score
from megatron_hydra.api.train import train
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.scoring_config import load_scoring_config
from megatron_hydra.training.config import load_config

EXAMPLE = Path("examples/quickstart")
STAGES = ("stage1_align", "stage2_distill", "stage3_long_context")
TASKS = ("niah_single_2", "niah_multikey_1")


def transfer(
    teacher: Path = EXAMPLE / "teacher",
    out: Path = Path("runs/api"),
    *,
    lengths: tuple[int, ...] = (256, 512, 1024),
    scoring: Sequence[str] = (),
    training: Sequence[str] = ("strategy.tensor_model_parallel_size=1",),
    documents: int = 4000,
    samples: int = 60,
) -> Path:
    """Run every step below `out`; return the report's page.

    Args:
        teacher: Hugging Face folder.
        out: A folder that is made.
        lengths: Tokens per document of stages 1 and 2, of an evaluation between, and of stage 3.
        scoring: What to change in the example's `score.yaml`, each `section.key=value`.
        training: The same of its stages.
        documents: Of stages 1 and 2; an eighth of that for stage 3.
        samples: Of each task at each length of the evaluation, by generated text.
    """
    short, _, long = lengths
    data = {
        short: preprocess(teacher, out / "short", retrieval=Retrieval(0.5, short, documents)),
        long: preprocess(teacher, out / "long", retrieval=Retrieval(0.5, long, documents // 8, 1)),
    }
    values = {"model.teacher": str(teacher), "run.out": str(out / "scores.json")}
    score(load_scoring_config(EXAMPLE / "score.yaml", scoring, values))
    budget, constraints = Budget("fa_ratio", Fraction(1, 4)), Constraints(min_fa_per_layer=1)
    plan(out / "scores.json", out / "plan.json", budget, constraints)
    convert(teacher, out / "teacher")
    convert(
        teacher, out / "converted", out / "plan.json", calibration=Calibration(length_tokens=short)
    )
    previous = out / "converted"
    for stage in STAGES:
        length = long if stage == STAGES[-1] else short
        folders = [f"data.paths=[{data[length].prefix}]", f"data.seq_length={length}"]
        folders += [f"transfer.init_from={previous}", f"log.folder={out / stage}"]
        folders += [] if stage == STAGES[-1] else [f"transfer.teacher={out / 'teacher'}"]
        previous = train(
            load_config(EXAMPLE / f"{stage}.yaml", [*training, *folders])
        ).folder.hybrid
    exported = export(previous, out / "hydra-hf").folder
    models = {"teacher": teacher, "trained": exported, "untrained": out / "converted"}
    asked = Prompts(TASKS, lengths, samples, perplexity_tokens=16 * long, wording="short")
    generate(models, out / "generation.json", asked, serve_dtype="fp32")
    return report(
        out / "report.html", scores=out / "scores.json", plan=out / "plan.json", teacher=teacher,
        generation=out / "generation.json", runs={stage: out / stage for stage in STAGES},
    )  # fmt: skip


if __name__ == "__main__":
    print(transfer())
