"""Formulas as MathML, which browsers show without a script and without a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)


def convert(formula: str, *, inline: bool) -> str:
    """Return MathML for LaTeX; ``aligned`` rows without a column of their own are one column.

    Raises:
        MathError: If the formula has a command that is not known.
    """
    return str(tex2mathml(formula.strip(), as_block=not inline))


def visit(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula. One that cannot be converted is a warning."""
    inline = isinstance(node, nodes.math)
    try:
        text = convert(node.astext(), inline=inline)
    except MathError as error:
        _LOGGER.warning("formula: %s in %s", error, node.astext(), location=node)
        text = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(text if inline else f'<div class="math">{text}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the renderer."""
    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
