"""Drawings of matplotlib as SVG inside the page, in the colours of the page's light and dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Each colour of the page is drawn in a stand-in, which a variable of the style sheet replaces.
_VARIABLES = ("ink", "muted", "rule", "page", "alone", "method", "teacher", "other1", "other2", "other3")
_STAND_INS = {name: f"#01010{number:x}" for number, name in enumerate(_VARIABLES, 1)}
OTHERS = ("other1", "other2", "other3")


def color(name: str) -> str:
    """Return what stands for a colour of the page in a drawing: ``ink``, ``muted``, ``alone``, ``teacher`` ..."""
    return _STAND_INS[name]


@contextmanager
def drawing_style() -> Iterator[None]:
    """Within it, figures have the page's style. Names are no formulas, and text stays text."""
    ink, muted, rule = color("ink"), color("muted"), color("rule")
    settings: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": rule,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": rule,
        "grid.linewidth": 0.6,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "axes.labelsize": 9,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        yield


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return a figure as an ``<svg>`` element that a screen reader reads as its alternative text.

    Args:
        figure: The figure, drawn within :func:`drawing_style` with colours of :func:`color`.
        name: Name of the drawing, unique on the page.
        alt: The alternative text.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # rules for the page
    text = re.sub(r' id="[A-Za-z]\w*(\.\w+)?_\d+"', "", text)  # figure_1, axes_1 ... are in every drawing
    text = re.sub(r"font-family: [^;\"]*;?", "", text)  # the page's font
    text = re.sub(r"\s*\n\s*", "\n", text)
    view = re.search(r'viewBox="[^"]*"', text)
    start = f'<svg {view.group() if view else ""} role="img" aria-label="{escape(alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: start, text, count=1)
    for key, value in _STAND_INS.items():
        text = text.replace(value, f"var(--{key})")
    return Markup(text)
