"""The examples: each launch line that a file shows or runs starts a layout that its YAML fits."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.generated import generated_results  # noqa: E402
from kit.published import CONFIGS as PUBLISHED  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.hydra_attention import HydraAttention  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.training.config import load_config  # noqa: E402

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/stage*.yaml"))
SHOW = '#!/bin/sh\nprintf "%s " "$(basename "$0")" "$@"; echo\n'
TEACHER = {"num_attention_heads": 8, "vocab_size": 1024, "intermediate_size": 384}


@dataclass(frozen=True)
class Launch:
    """A torchrun line: ranks in all, and the stage's YAML."""

    num_ranks: int
    config: Path

    @classmethod
    def read(cls, line: str) -> Launch:
        words = shlex.split(line.replace("=", " "))
        value = dict(zip(words, words[1:], strict=False))
        num_ranks = int(value.get("--nnodes", "1")) * int(value["--nproc-per-node"])
        return cls(num_ranks, ROOT / value["--config"])


def _run_with_stubs(
    folder: Path, command: str, stubs: dict[str, str], **environment: str
) -> list[str]:
    """Run a shell line from the root with some programs replaced; return what was printed."""
    for name, text in stubs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={"PATH": path, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.splitlines()


def _check(launch: Launch) -> None:
    """What training checks of the layout, from the YAML's numbers alone."""
    config = load_config(launch.config)
    tensor, data = config.strategy.tensor_model_parallel_size, config.data
    replicas, rest = divmod(launch.num_ranks, config.strategy.model_parallel_size)
    assert rest == 0 and replicas > 0
    assert data.global_batch_size % (data.micro_batch_size * replicas) == 0
    shape = {"quickstart": TEACHER, **PUBLISHED}[launch.config.parent.name]
    assert all(shape[size] % tensor == 0 for size in TEACHER)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_line_in_each_yaml_starts_it(path: Path) -> None:
    (line,) = re.findall(r"^# (torchrun .*)$", path.read_text(), re.MULTILINE)
    launch = Launch.read(line)
    assert launch.config == path
    _check(launch)


SLURM = EXAMPLES / "slurm/transfer.sbatch"
NODE_LIST = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NAME": "transfer", "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip


def test_the_slurm_script_starts_three_stages_that_fit(tmp_path: Path) -> None:
    """With Slurm's programs replaced by ones that show their arguments, and its own sizes.

    So many nodes are listed that a reader of the first one alone would break the pipe.
    """
    sizes = dict(re.findall(r"^#SBATCH --(\S+)=(\d+)$", SLURM.read_text(), re.MULTILINE))
    assert (sizes["nodes"], sizes["gpus-per-node"]) == ("2", "8")
    more = "stage1_align.optim.lr=5e-4 stage3_long_context.data.seed=3 resume.keep=2"
    printed = _run_with_stubs(
        tmp_path,
        f"bash {SLURM} {more}",
        {"srun": SHOW, "scontrol": "#!/bin/sh\nseq -f node%g 0 19999\n"},
        **NODE_LIST,
        SLURM_CPUS_PER_TASK=sizes["cpus-per-task"],
        SRUN_OPTIONS="--container-image=an.sqsh --mpi=none",
        TORCHRUN_OPTIONS="--max-restarts=3",
    )
    lines = [line for line in printed if " hydra_tools.train " in line]
    launches = [Launch.read(line) for line in lines]
    assert [launch.config for launch in launches] == sorted(EXAMPLES.glob("qwen3_1p7b/stage*.yaml"))
    for line, launch in zip(lines, launches, strict=True):
        assert launch.num_ranks == 16
        assert "--rdzv-endpoint=node0:10007 " in line and "--max-restarts=3 -m hydra_" in line
        _check(launch)
    options = (
        "srun --kill-on-bad-exit=1 --cpus-per-task=64 --container-image=an.sqsh --mpi=none bash "
    )
    assert sum(line.startswith(options) for line in printed) == 3
    overrides = [line.split(".yaml ")[1].split() for line in lines]
    assert overrides == [
        ["optim.lr=5e-4", "resume.keep=2"], ["resume.keep=2"], ["data.seed=3", "resume.keep=2"]
    ]  # fmt: skip
    assert len(set(re.findall(r"--rdzv-id=\S+", " ".join(lines)))) == 3


def test_the_slurm_script_starts_as_many_ranks_as_it_was_given_gpus(tmp_path: Path) -> None:
    given = {**NODE_LIST, "SLURM_GPUS_ON_NODE": "4"}
    for told, expected in (({}, 4), ({"GPUS_PER_NODE": "2"}, 2)):
        stubs = {"srun": SHOW, "scontrol": SCONTROL}
        printed = _run_with_stubs(tmp_path, f"bash {SLURM}", stubs, **given, **told)
        lines = [line for line in printed if " hydra_tools.train " in line]
        assert [Launch.read(line).num_ranks for line in lines] == [2 * expected] * 3


@pytest.mark.parametrize(
    ("saved", "restarts", "code", "said"),
    [
        ("date +%N", "0", 75, "stage1_align failed with code 3, but steps were saved since this"),
        ("echo 40", "0", 3, "stage1_align failed with code 3, and no step was saved since this"),
        ("date +%N", "2", 3, "stage1_align failed with code 3, after MAX_RESTARTS starts"),
    ],
)
def test_the_slurm_script_requeues_what_gets_on(
    tmp_path: Path, saved: str, restarts: str, code: int, said: str
) -> None:
    """Catches a next stage without its input, and a job that fails for ever."""
    srun = f"#!/bin/sh\ncase $* in *hydra_tools.status*) {saved} ;; *) exit 3 ;; esac\n"
    printed = _run_with_stubs(
        tmp_path,
        f"bash {SLURM}; echo code $?",
        {"srun": srun, "scontrol": '#!/bin/sh\necho "scontrol $*"\n'},
        **NODE_LIST,
        SLURM_RESTART_COUNT=restarts,
        MAX_RESTARTS="2",
    )
    assert printed[-1] == f"code {code}"
    assert ("scontrol requeue 7" in printed) is (code == 75)
    assert said in "\n".join(printed) and "stage2" not in "\n".join(printed)


# transfer, as far as the script sees it: what is finished, a step by its launcher, and its end.
TRANSFER = """#!/bin/bash
case "$*" in
*--dry-run) {finished}; exit ;;
esac
launcher=${{@: -1:1}} # the last word stands above the user's own
yaml=examples/qwen3_1p7b/stage1_align.yaml
${{launcher#run.launcher=}} -m hydra_tools.train --config $yaml "log.folder=a b"
exit {code}
"""
SCONTROL = '#!/bin/sh\ncase $1 in show) echo node0 ;; *) echo "scontrol $*" ;; esac\n'


@pytest.mark.parametrize(
    ("finished", "code", "ends", "said"),
    [
        ("echo done", 0, 0, "job 7, start 0: my transfer.yaml on node"),
        ("date +%N", 3, 75, "my transfer.yaml failed with code 3, but steps were saved since"),
        ("echo done", 3, 3, "my transfer.yaml failed with code 3, and no step was saved since"),
        ("date +%N", 2, 2, "my transfer.yaml cannot run as it was asked to: not requeued"),
    ],
)
def test_the_slurm_script_is_the_launcher_of_a_transfer(
    tmp_path: Path, finished: str, code: int, ends: int, said: str
) -> None:
    """Catches ranks on the first node alone, and bad input that is queued again and again."""
    python = TRANSFER.format(finished=finished, code=code)
    printed = _run_with_stubs(
        tmp_path,
        f"bash {SLURM} 'my transfer.yaml' run.launcher=torchrun; echo code $?",
        {"srun": SHOW, "python": python, "scontrol": SCONTROL},
        **NODE_LIST,
    )
    (line,) = [line for line in printed if " hydra_tools.train " in line]
    launch = Launch.read(line)
    assert launch.num_ranks == 16 and line.endswith("/stage1_align.yaml log.folder=a b ")
    _check(launch)
    assert printed[-1] == f"code {ends}" and said in "\n".join(printed)
    assert ("scontrol requeue 7" in printed) is (ends == 75)


# Of a container: the only place with PyTorch. Its options must be there, or the step has none.
CONTAINER = """#!/bin/bash
echo "srun $*" | tr '\\n' ' ' >> "$SRUN_LOG"; echo >> "$SRUN_LOG"
while [[ $1 == --* ]]; do
    [[ $1 != --container-image=an.sqsh ]] || export IN_CONTAINER=1
    shift
done
exec "$@"
"""
OUTSIDE = """
import os, sys

class Outside:
    def find_spec(self, name, *_):
        if name in ("torch", "megatron", "nemo", "transformers"):
            raise ModuleNotFoundError(name)

if "IN_CONTAINER" not in os.environ:
    sys.meta_path.insert(0, Outside())
"""


@pytest.mark.slow
@pytest.mark.exhaustive  # four launches
def test_every_step_of_a_transfer_is_in_the_container(tmp_path: Path) -> None:
    """Two real steps by a stand-in for srun, which alone finds PyTorch, as far as the ranks'.

    Catches a step outside of the container, and a chain that needs PyTorch by itself.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(OUTSIDE)
    (tmp_path / "bin").mkdir()
    paths = [tmp_path / "site", *(ROOT / folder for folder in ("", "kernels", "tools"))]
    run = ["examples/quickstart/transfer.yaml", "run.teacher=examples/quickstart/teacher"]
    run += [f"run.folder={tmp_path}/a run"]
    stages = [path.stem for path in EXAMPLES.glob("quickstart/stage*.yaml")]
    run += [f"{stage}.data.paths=[{tmp_path}/data]" for stage in stages]
    for ending in ("idx", "bin"):
        (tmp_path / f"data.{ending}").write_text("looked at by the stages alone")
    printed = _run_with_stubs(
        tmp_path / "bin",
        f"bash {SLURM} {shlex.join(run)} 2>&1; echo code $?",
        {"srun": CONTAINER, "scontrol": SCONTROL, "ft_launcher": "#!/bin/sh\nexit 5\n"},
        **NODE_LIST,
        TORCHRUN="ft_launcher",
        PYTHONPATH=os.pathsep.join(map(str, paths)),
        SRUN_LOG=f"{tmp_path}/srun.log",
        SRUN_OPTIONS="--container-image=an.sqsh --container-workdir=/here",
        LOGS=f"{tmp_path}/logs",
    )
    assert printed[-1] == "code 75", "\n".join(printed)
    assert "megatron-hydra: score failed with code 5" in "\n".join(printed)
    assert (tmp_path / "a run/teacher/model.json").is_file()
    calls = (tmp_path / "srun.log").read_text().splitlines()
    options = " --container-image=an.sqsh --container-workdir=/here "
    assert len(calls) == 2 and all(options in line for line in calls)
    assert calls[0].startswith("srun --nodes=1 --ntasks=1 ") and " convert " in calls[0]
    assert calls[1].startswith("srun --kill-on-bad-exit=1 ") and " hydra_tools.score " in calls[1]


def test_the_script_for_several_machines_starts_what_its_head_shows(tmp_path: Path) -> None:
    text = (EXAMPLES / "multinode/torchrun.sh").read_text()
    line = re.search(r"HEAD_NODE=.*\\\n.*--config \S+", text)
    assert line is not None
    command = line[0].replace("\\\n#", "")
    options = {"IS_HEAD": "0", "TORCHRUN_OPTIONS": "--max-restarts=3", "TORCHRUN": "ft_launcher"}
    (printed,) = _run_with_stubs(tmp_path, command, {"ft_launcher": SHOW}, **options)
    assert " --rdzv-conf=is_host=0 --max-restarts=3 -m hydra_tools.train " in printed
    launch = Launch.read(printed)
    assert launch.num_ranks == 16
    for stage in sorted(launch.config.parent.glob("stage*.yaml")):
        _check(Launch(launch.num_ranks, stage))


def test_the_quickstart_shows_lines_that_can_be_pasted() -> None:
    """A model's name has spaces and a comma: pasted unquoted, the line would mean another thing."""
    text = (EXAMPLES / "quickstart/run.sh").read_text()
    step = re.search(r"^step\(\) \{.*?^\}", text, re.MULTILINE | re.DOTALL)
    assert step is not None
    words = ["printf", "[%s]", "--model", "hybrid, untrained=a folder", "$HOME", "it's", "*", ""]
    script = f'started=0; {step[0]}; step title nowhere/output "$@"'
    run = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True
    )
    title, shown, output = run.stdout.splitlines()
    assert title.startswith("== title (")
    assert shlex.split(shown) == words
    assert output == "".join(f"[{word}]" for word in words[2:])


def test_the_look_in_two_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README's lines on the scores in the repository, which are the shipped teacher's."""
    from megatron_hydra.teachers.model_folder import weights_hash

    folder, plan = ROOT / "examples/quickstart", tmp_path / "plan.json"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["teacher_weights_hash"] == weights_hash(folder / "teacher")
    scored = "--scores examples/quickstart/scores.json"
    lines = [f"plan {scored} --fa-ratio 1/4 --out plan.json",
             f"inspect plan.json {scored} --pictures pictures/"]  # fmt: skip
    readme = (ROOT / "README.md").read_text()
    for line in lines:
        assert f"\nmegatron-hydra {line}\n" in readme
        words = line.replace("examples/", f"{ROOT}/examples/").replace("plan.json", str(plan))
        assert cli.main(words.replace("pictures/", f"{tmp_path}/pictures").split()) == 0
    # The two heads without which this teacher finds nothing, see training_log.json.
    layers = HeadPlan.load(plan).layers
    assert 0 in layers[0].fa_heads and 6 in layers[2].fa_heads
    assert "of the teacher's" in capsys.readouterr().out
    assert {path.suffix for path in (tmp_path / "pictures").iterdir()} == {".png"}


def test_the_quickstart_trains_on_as_many_ranks_as_its_layout_has() -> None:
    text = (EXAMPLES / "quickstart/run.sh").read_text()
    (num_ranks,) = re.findall(r"--nproc-per-node (\d+)", text)
    for path in EXAMPLES.glob("quickstart/stage*.yaml"):
        _check(Launch(int(num_ranks), path))


def test_the_lines_for_plain_megatron_build_the_hybrid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/extending.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    write_tiny_qwen3(tmp_path / "DIR")
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    initialize_model_parallel()
    names: dict[str, Any] = {}
    exec(code, names)
    model = names["model"]
    attentions = [layer.self_attention for layer in model.decoder.layers]
    assert [type(attention) for attention in attentions] == [HydraAttention] * 2
    assert [attention.placement.fa_heads(0) for attention in attentions] == [(1,), (2, 3)]
    assert "output_layer.weight" not in dict(model.named_parameters()), "tied, as the teacher's"


# `make test` runs the same with a Llama, in teachers/test_families.py.
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_main_job_in_python(tmp_path: Path) -> None:
    """In a process of its own, as three trainings follow one another there, of unequal batches."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, "examples/api")
from transfer import transfer
transfer(
    out=Path({str(tmp_path / "run")!r}), documents=32, samples=5, lengths=(256, 384, 512),
    scoring=["probes.pairs=2", "probes.pairs_of={{}}", "probes.names=[niah_single_1,text]",
             "scorers.path_patching.max_rounds=1"],
    training=["strategy.tensor_model_parallel_size=1", "trainer.max_steps=2"],
)
"""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tools"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert all(stage in page for stage in ("stage1_align", "stage2_distill", "stage3_long_context"))
    results = generated_results(tmp_path / "run")
    # Of 65 to 128 tokens before, which the teacher was trained on.
    losses = {name: model["loss_by_position"][1]["loss_nats"] for name, model in results.items()}
    assert losses["teacher"] < losses["trained"] < losses["untrained"]
    found = {name: model["tasks"][0]["num_right"] for name, model in results.items()}
    assert found["teacher"] >= 4 and found["untrained"] <= 1, "of 5"
