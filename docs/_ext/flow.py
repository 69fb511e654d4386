"""``{flow}``: a picture of a method, drawn from lines such as ``batch > student* > logits > hard loss``.

Each line is a row of boxes with arrows between them; a dot leaves a column empty. A name that stands in an earlier line
is the same box, so that such a line adds arrows. A star marks what trains. The lines also describe the picture.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

_COLUMN, _ROW, _WIDTH, _HEIGHT = 152, 58, 126, 36
_LONGEST = 18  # characters that fit into a box
_SMALLEST = 0.58  # of the size: text of 14 px has 8 px then; a picture that is wider than a phone scrolls
_ARROW = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z"/></marker>'
)


def place(lines: list[str]) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Return the (column, row) of each box, and the arrows between boxes.

    >>> place(["a > b*", ". > c", "a > c"])
    ({'a': (0, 0), 'b*': (1, 0), 'c': (1, 1)}, [('a', 'b*'), ('a', 'c')])
    """
    places: dict[str, tuple[int, int]] = {}
    arrows: list[tuple[str, str]] = []
    row = 0
    for line in lines:
        names = [name.strip() for name in line.split(">")]
        new = {name: (column, row) for column, name in enumerate(names) if name != "." and name not in places}
        places |= new
        row += bool(new)
        arrows += [(a, b) for a, b in pairwise(names) if "." not in (a, b)]
    return places, arrows


def draw(lines: list[str]) -> str:
    """Return the SVG.

    Raises:
        ExtensionError: If a name does not fit into its box.
    """
    places, arrows = place(lines)
    if long := [name for name in places if len(name.rstrip("*")) > _LONGEST]:
        raise ExtensionError(f"flow: names must have at most {_LONGEST} characters, got {', '.join(long)}")
    width = (max(column for column, _ in places.values()) + 1) * _COLUMN - _COLUMN + _WIDTH + 4
    height = (max(row for _, row in places.values()) + 1) * _ROW - _ROW + _HEIGHT + 4
    parts = []
    for start, end in arrows:
        (x0, y0), (x1, y1) = places[start], places[end]
        left, right = x0 * _COLUMN + 2 + _WIDTH, x1 * _COLUMN + 2
        top, bottom = y0 * _ROW + 2 + _HEIGHT // 2, y1 * _ROW + 2 + _HEIGHT // 2
        if x0 == x1:
            left = right = left - _WIDTH // 2
            edge = _HEIGHT // 2 if y1 > y0 else -_HEIGHT // 2
            top, bottom = top + edge, bottom - edge
        middle = (left + right) // 2
        path = f"M{left} {top}C{middle} {top} {middle} {bottom} {right} {bottom}"
        parts.append(f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>')
    for name, (column, row) in places.items():
        x, y = column * _COLUMN + 2, row * _ROW + 2
        kind = "trains" if name.endswith("*") else "fixed"
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>')
        text = escape(name.rstrip("*"))
        parts.append(f'<text x="{x + _WIDTH // 2}" y="{y + _HEIGHT // 2 + 5}">{text}</text>')
    label = escape("; ".join(lines).replace("*", " (trains)"), quote=True)
    head = (
        f'<svg class="flow" role="img" aria-label="{label}" viewBox="0 0 {width} {height}" '
        f'style="min-width:{width * _SMALLEST:.0f}px;max-width:{width}px">'
    )
    return f'<div class="flow">{head}<defs>{_ARROW}</defs>{"".join(parts)}</svg></div>'


class Flow(SphinxDirective):
    """``{flow}``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        return [nodes.raw("", draw([*self.content]), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("flow", Flow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
