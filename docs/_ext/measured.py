"""Tables and sections of ``benchmarks/RESULTS.md``, so that each figure stands in one place.

- ``{results} Few labels``: the section's tables, and a link to it. ``Weak labels / Settings`` lies below another one.
  ``:table: TEXT`` takes the tables whose first row has this text, ``:rows: TEXT`` the rows that have one, ``:all:`` the
  whole section.
- ``{results-file}``: the whole file, with a target ``results-few-labels`` at each heading.
- ``{results-index}``: a list of its headings, with the date of each.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
_PICTURE = re.compile(r"(!\[[^\]]*\])\(([^):]+)\)")
_HEADING = re.compile(r"(?P<marks>#+) (?P<title>.+?)(?: \((?P<date>\d{4}-\d\d-\d\d)\))?$")


class Section(NamedTuple):
    """A section of the file.

    Attributes:
        level: 1 for the file's title.
        title: Its heading, without the date.
        date: When it was measured; empty if the heading does not have it.
        above: The title of the section that it is a part of; empty for those of level 2.
        lines: Its text, without the heading and without the sections below it.
    """

    level: int
    title: str
    date: str
    above: str
    lines: list[str]

    @property
    def path(self) -> str:
        """Its title, after that of the section that it is a part of."""
        return f"{self.above} / {self.title}" if self.above else self.title

    @property
    def target(self) -> str:
        """The name of the section's target on the page of all results."""
        return "results-" + "-".join(re.findall(r"[a-z0-9]+", self.path.lower()))


def sections(text: str) -> list[Section]:
    """Return the sections of a Markdown file, in its order; code blocks have no headings."""
    found: list[Section] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else _HEADING.fullmatch(line)
        if heading:
            level = len(heading["marks"])
            above = next((one.title for one in reversed(found) if 1 < one.level < level), "")
            found.append(Section(level, heading["title"], heading["date"] or "", above, []))
        elif found:
            found[-1].lines.append(line)
    return found


def tables(lines: list[str]) -> list[list[str]]:
    """Return the tables among lines: runs of lines that start with a bar."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def section(title: str) -> Section:
    """Return the section of a title or path.

    Raises:
        ExtensionError: If there is none, or there are several.
    """
    found = [one for one in sections(RESULTS.read_text()) if title in (one.title, one.path)]
    if len(found) != 1:
        raise ExtensionError(f"{RESULTS.name} has {len(found)} sections {title!r}")
    return found[0]


class _FromResults(SphinxDirective):
    """What the directives share."""

    def parse(self, text: str) -> list[nodes.Node]:
        """Parse Markdown, which may have headings and pictures, and note that the page depends on the file."""
        self.env.note_dependency(str(RESULTS))
        folder = os.path.relpath(RESULTS.parent, Path(self.env.doc2path(self.env.docname)).parent)
        text = _PICTURE.sub(lambda found: f"{found[1]}({Path(folder, found[2]).as_posix()})", text)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Results(_FromResults):
    """``{results} TITLE``."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {
        "table": directives.unchanged_required,
        "rows": directives.unchanged_required,
        "all": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        """Return the tables, and a link to the section."""
        found = section(self.arguments[0])
        if "all" in self.options:
            return self.parse("\n".join(found.lines))
        wanted = self.options.get("table", "")
        chosen = [table for table in tables(found.lines) if wanted in table[0]]
        if not chosen:
            raise self.error(f"section {found.title!r} of {RESULTS.name} has no table with {wanted!r} in its first row")
        if rows := self.options.get("rows", ""):
            chosen = [[*table[:2], *(row for row in table[2:] if rows in row)] for table in chosen]
            if any(len(table) == 2 for table in chosen):
                raise self.error(f"a table of section {found.title!r} has no row with {rows!r}")
        when = f", measured on {found.date}" if found.date else ""
        source = f"*[Results: {found.title}](#{found.target}){when}*"
        return self.parse("\n\n".join([*map("\n".join, chosen), source]))


class ResultsFile(_FromResults):
    """``{results-file}``."""

    def run(self) -> list[nodes.Node]:
        """Return the whole file below its title."""
        parts = []
        for one in sections(RESULTS.read_text()):
            if one.level > 1:
                parts += [f"({one.target})=", f"{'#' * one.level} {one.title}", ""]
            parts += [f"Measured on {one.date}.", ""] if one.date else []
            parts += [*one.lines, ""]
        return self.parse("\n".join(parts))


class ResultsIndex(_FromResults):
    """``{results-index}``."""

    def run(self) -> list[nodes.Node]:
        """Return a list of links."""
        found = [one for one in sections(RESULTS.read_text()) if one.level > 1]
        lines = [
            f"{'  ' * (one.level - 2)}- [{one.title}](#{one.target}){f' ({one.date})' if one.date else ''}"
            for one in found
        ]
        return self.parse("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("results", Results)
    app.add_directive("results-file", ResultsFile)
    app.add_directive("results-index", ResultsIndex)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
