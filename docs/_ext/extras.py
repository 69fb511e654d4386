"""``{extras}``: the optional packages of ``pyproject.toml``, with the reason that stands beside each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_FOR_CONTRIBUTORS = ("bench", "test", "docs", "all")
_REQUIREMENT = re.compile(r'"(?P<package>[^"]+)",?\]?\s+# (?P<reason>.+)$')


def extras(text: str) -> dict[str, list[tuple[str, str]]]:
    """Return for each extra of users its packages, each with the comment beside it.

    Args:
        text: The file.
    """
    names = [name for name in tomllib.loads(text)["project"]["optional-dependencies"] if name not in _FOR_CONTRIBUTORS]
    found = {}
    for name in names:
        block = re.search(rf"^{name} = \[(.*?)^(?=\w+ = \[|\[)", text, re.M | re.S)
        lines = block[1].splitlines() if block else []
        matches = filter(None, map(_REQUIREMENT.search, lines))
        found[name] = [(match["package"], match["reason"]) for match in matches]
    return found


class Extras(SphinxDirective):
    """``{extras}``."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.env.note_dependency(str(PROJECT))
        rows = []
        for name, packages in extras(PROJECT.read_text()).items():
            names = [f"`{name}`", *[""] * (len(packages) - 1)]
            rows += [
                f"| {extra} | `{package}` | {reason} |"
                for extra, (package, reason) in zip(names, packages, strict=True)
            ]
        return self.parse_text_to_nodes("\n".join(["| extra | package | why |", "|---|---|---|", *rows]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("extras", Extras)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
