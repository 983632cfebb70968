"""How every chart looks, and how it leaves as a PNG or as SVG inside a page."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from megatron_hydra.files import write_beside

INK = "#1f2933"
MUTED = "#7b8794"
# Okabe and Ito's palette, told apart by readers with any colour vision.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LA_COLOUR, FA_COLOUR = PALETTE[:2]
SCORE_SCALE = LinearSegmentedColormap.from_list(
    "head_scores", ["#e9eef3", "#9cc3e4", "#2f78b7", "#0b3866"]
)
_STYLE: Any = {
    "svg.fonttype": "none",  # Text stays text: it can be searched, and takes the page's font.
    "svg.hashsalt": "megatron_hydra",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Picture(NamedTuple):
    """A chart in a page.

    Attributes:
        svg: An SVG element.
        label: What screen readers call it; plain text.
        caption: Stands below; plain text, empty for none.
    """

    svg: Markup
    label: str
    caption: str


@contextmanager
def chart_style() -> Iterator[None]:
    """matplotlib's settings for every chart, while it is drawn and while it is written."""
    with matplotlib.rc_context(_STYLE):
        yield


def to_picture(figure: Figure, name: str, label: str, caption: str = "") -> Picture:
    """``figure`` as it stands in a page; the ids inside start with ``name``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Many figures share the page, so their ids must differ.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return Picture(Markup(svg), label, caption)  # matplotlib escapes the texts that it writes


def save_png(path: str | os.PathLike[str], figure: Figure, overwrite: bool = False) -> None:
    """Write ``figure`` as a PNG.

    Raises:
        UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
    """
    with write_beside(path, overwrite) as temporary:
        figure.savefig(temporary, format="png", dpi=160, bbox_inches="tight", pad_inches=0.1)


def plain_text(name: str) -> str:
    """A user's name as matplotlib text or label: it shows whatever it starts with or holds.

    A dollar sign starts no formula. A legend leaves out labels that start with an underscore, so
    that a space of no width stands before one.
    """
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")
