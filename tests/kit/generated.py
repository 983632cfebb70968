"""The results of a whole transfer, by the text that its models generated."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any


def generated_results(run: Path) -> dict[str, dict[str, Any]]:
    """The models of `generation.json` by name, whose figures stand in the page beside it.

    Args:
        run: Folder of the transfer.

    Raises:
        AssertionError: If the page has other figures, or its top speaks of something else.
    """
    models = json.loads((run / "generation.json").read_text())["models"]
    source = (run / "report.html").read_text(encoding="utf-8")
    page = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())
    cells = models[0]["tasks"]
    words = "cell" if len(cells) == 1 else "cells"
    assert f"Accuracy of generated text: median and worst of {len(cells)} {words}" in page
    for model in models:
        row = f"{model['name']} {model['fa_heads']} of {model['total_heads']} heads FA"
        for task in model["tasks"]:
            share, (low, high) = task["num_right"] / task["num_samples"], task["interval"]
            figures = (100 * value for value in (share, low, high, task["match_all"]))
            row += " {:.1f} {:.1f}–{:.1f} {:.1f}".format(*figures)
        assert row in page, row
    return {model["name"]: model for model in models}
