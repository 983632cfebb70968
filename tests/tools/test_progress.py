"""Tests of progress: plain lines where there is no terminal, the first of them at once."""

from __future__ import annotations

import pytest
from hydra_tools import progress as module
from hydra_tools.progress import meter, progress


def test_lines_are_whole_few_and_begin_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seen = []
    for item in progress(range(5000), "heads", "head"):
        if not item:
            first = capsys.readouterr().err
            assert first.startswith("heads:   0% 0/5000 ")
            assert first.endswith("\n")
        seen.append(item)
        now[0] += 0.01
    assert seen == list(range(5000))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("heads: 100% 5000/5000 ")
    assert len(lines) <= 3
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_what_has_no_length_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress((i for i in range(3)), "texts", "text")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1].startswith("texts: 3text ")


def test_nothing_is_said_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([], "heads", "head")) == []
    assert capsys.readouterr().err == ""


def test_the_last_state_stands_when_the_loop_is_another_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with meter("align", "step", 10, initial=3) as steps:
        steps.set_postfix_str("loss 0.5", refresh=False)
        steps.update(7)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("align: 100% 10/10 ")
    assert last.endswith("loss 0.5]")
