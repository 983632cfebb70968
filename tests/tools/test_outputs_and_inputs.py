"""No verb writes onto, into or around what it reads, with --overwrite or without.

Catches: a verb that does not hold an output against an input. The inputs need not be good ones:
where outputs go is looked at before anything is read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra_tools import cli

# A verb with all of its inputs, and the option of its output; `{}` is the folder.
VERBS = {
    "score": (["--teacher", "{}/teacher", "probes.text={}/text.txt"], "--out"),
    "plan": (["--scores", "{}/scores.json", "--fa-heads", "1"], "--out"),
    "plan_picture": (
        ["--scores", "{}/scores.json", "--fa-heads", "1", "--out", "{}/new.json"],
        "--png",
    ),
    "pareto": (["--scores", "{}/scores.json", "--budgets", "1/2"], "--out"),
    "convert": (
        ["--teacher", "{}/teacher", "--plan", "{}/plan.json", "--calibration-text", "{}/text.txt"],
        "--out",
    ),
    "evaluate": (["--model", "a={}/teacher", "--model", "b={}/hybrid", "--text", "{}/text.txt"],
                 "--out"),
    "certify": (["--config", "{}/config.yaml"], "--out"),
    "report": (
        ["--scores", "{}/scores.json", "--plan", "{}/plan.json", "--evaluation",
         "{}/evaluation.json", "--pareto", "{}/pareto.json", "--run", "one={}/run",
         "--teacher", "{}/teacher"],
        "--out",
    ),
}  # fmt: skip
FILES = ("scores.json", "plan.json", "evaluation.json", "pareto.json", "text.txt", "config.yaml",
         "teacher/config.json", "hybrid/model.json", "run/run_config.yaml",
         "run/config.yaml", "run/hybrid/model.json")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    return tmp_path


def places(verb: str) -> list[str]:
    """Each input of a verb, what lies in it and what holds it."""
    found = ["."]
    for word in VERBS[verb][0]:
        name = word.partition("{}/")[2]
        if name == "run":
            found += ["run", "run/run_config.yaml", "run/config.yaml", "run/hybrid/model.json"]
        elif name in ("teacher", "hybrid"):
            found += [name, f"{name}/model.json", f"{name}/new"]
        elif name and name != "new.json":
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("verb", "place"), [(verb, place) for verb in VERBS for place in places(verb)]
)
def test_no_input_is_lost(
    folder: Path, verb: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, option = VERBS[verb]
    words = [word.format(folder) for word in inputs]
    out = [option, str(folder / place), "--overwrite"]
    assert cli.main([verb.partition("_")[0], *words, *out]) == 2
    error = capsys.readouterr().err
    assert "would replace the input" in error or "lies in the input" in error
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(FILES)
    assert all((folder / name).read_text() == "precious" for name in FILES)


@pytest.mark.parametrize("out", ["teacher/tokenizer", "teacher", "text"])
def test_no_tokenizer_is_lost_to_a_data_set(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A data set's three files are its prefix and an ending each.
    (folder / "text.bin").write_text("precious")
    words = ["--input", f"{folder}/text.bin", "--tokenizer", f"{folder}/teacher", "--overwrite"]
    code = cli.main(["preprocess", *words, "--out", f"{folder}/{out}"])
    error = capsys.readouterr().err
    assert code == 2
    if out == "teacher":
        assert "cannot load a tokenizer" in error  # teacher.bin lies beside, and harms nothing
    else:
        assert "would replace the input" in error or "lies in the input" in error
    assert (folder / "text.bin").read_text() == "precious"
    assert sorted(path.name for path in (folder / "teacher").iterdir()) == ["config.json"]
