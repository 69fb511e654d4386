"""Settings and commands, from the code.

- ``{settings} kd_lightning.DistillModule``: key, meaning, default and allowed values of each argument, from the
  signature and the docstring. ``:own:`` leaves out those that come through ``**kwargs``. ``:only: a, b`` takes
  some of them.
- ``{command} distill``: the help of a command; without a name, the list of all commands.
- ``{docstring} kd_lightning.losses.KDLoss``: what a docstring has before its arguments: text, formulas, the paper.
- ``{mapping} kd_lightning.teachers.reasons.REASONS``: the values of a dict, as a numbered list.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kd_lightning.cli.arguments import COMMANDS, VERBS, parse, verb_help
from kd_lightning.cli.start import overview
from kd_lightning.runs.class_paths import Argument, describe_arguments, find_class

_TYPES = {
    "float": "number",
    "int": "whole number",
    "str": "text",
    "bool": "true, false",
    "None": "null",
    "Path": "path",
    "nn.Module": "a module",
    "OptimizerCallable": "an optimiser",
    "LRSchedulerCallable": "a scheduler",
}
_SECTION = re.compile(r"^(?:Args|Attributes|Shape|Shapes|Raises|Returns|Example|Examples|Yields):$|^>>> ", re.M)
_RANGE = re.compile(r"\b(?:in [\[(][^\])]*[\])]|at least \d[\d.]*\d?|from \d+ to \d+|above \d+)")


def plain(text: str) -> str:
    r"""Return a docstring's text as Markdown on one line.

    >>> plain("Weight, see :class:`~a.b.KDLoss`\n    and ``x | y``.")
    'Weight, see `KDLoss` and `x \\| y`.'
    """
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", r"\|").replace("*args", r"\*args").replace("**kw", r"\*\*kw")


def annotation_of(owner: Any, name: str) -> str:
    """Return the annotation of an argument as the code has it, also of one that comes through ``**kwargs``."""
    makers = [one.__init__ for one in owner.__mro__] if inspect.isclass(owner) else [owner]
    for make in makers:
        with contextlib.suppress(TypeError, ValueError):
            parameter = inspect.signature(make).parameters.get(name)
            if parameter is not None and parameter.annotation is not parameter.empty:
                kind = parameter.annotation
                alias = getattr(importlib.import_module(make.__module__), str(kind), None)
                return str(alias) if str(alias).startswith("typing.Literal") else str(getattr(kind, "__name__", kind))
    return ""


def allowed(owner: Any, one: Argument) -> str:
    """Return the values that an argument takes: its choices, or its type with the range that its text names."""
    kind = annotation_of(owner, one.name).replace("typing.", "")
    words = []
    for part in re.split(r" \| (?![^\[]*\])", kind):
        choices = re.fullmatch(r"Literal\[(.*)\]", part)
        words.append(_quote(choices[1]) if choices else _TYPES.get(part, f"`{part}`" if part else ""))
    text = ", ".join(word for word in words if word).replace("|", r"\|")
    span = _RANGE.search(" ".join(one.text.split()))
    return f"{text} {span[0]}" if span else text


def _quote(choices: str) -> str:
    return choices.replace("'", "`").replace('"', "`")


def default(one: Argument) -> str:
    """Return a default as YAML has it."""
    if one.needed:
        return "*needed*"
    value = one.default.get("class_path", one.default) if isinstance(one.default, dict) else one.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, int | float | str | list | tuple | dict):
        value = getattr(value, "__name__", type(value).__name__)
    text = str(value)
    return f"`{text.rpartition('.')[2] if text.replace('.', '').isidentifier() else text}`" if text else "(empty)"


class _Generated(SphinxDirective):
    """What the directives share."""

    optional_arguments = 1

    def parse(self, lines: list[str]) -> list[nodes.Node]:
        """Parse Markdown."""
        return self.parse_text_to_nodes("\n".join(lines))

    def find(self) -> Any:
        """Return the class or function that the directive names."""
        found = find_class(self.arguments[0])
        if found is None:
            raise self.error(f"no class or function {self.arguments[0]}")
        return found


class Settings(_Generated):
    """``{settings} PATH``."""

    option_spec: ClassVar[dict[str, Any]] = {"own": directives.flag, "only": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        owner = self.find()
        found = describe_arguments(owner)
        if "own" in self.options:
            own = inspect.signature(owner).parameters
            found = [one for one in found if one.name in own]
        if "only" in self.options:
            names = [name.strip() for name in self.options["only"].split(",")]
            if unknown := {*names} - {one.name for one in found}:
                raise self.error(f"{self.arguments[0]} has no arguments {sorted(unknown)}")
            found = [one for one in found if one.name in names]
        if not found:
            return self.parse(["It takes no arguments."])
        rows = [f"| `{one.name}` | {plain(one.text)} | {default(one)} | {allowed(owner, one)} |" for one in found]
        found_nodes = self.parse(["| key | meaning | default | allowed |", "|---|---|---|---|", *rows])
        for table in (table for one in found_nodes for table in one.findall(nodes.table)):
            table["classes"].append("settings")  # a phone shows a row as a block, see _static/site.css
        return found_nodes


def described(owner: Any) -> str:
    """Return a docstring's text before the first of its sections, as Markdown."""
    text = _SECTION.split(inspect.getdoc(owner) or "")[0]
    text = re.sub(r"\.\. math::((?: .*)?(?:\n\n? +.*)+| .*)", r"$$\n\1\n$$", text)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = re.sub(r"(?<!`)(https?://[^\s,;()]+[^\s,;().])", r"<\1>", text)
    return text.replace("``", "`")


class Docstring(_Generated):
    """``{docstring} PATH``."""

    def run(self) -> list[nodes.Node]:
        """Return the text."""
        return self.parse(described(self.find()).splitlines())


class Mapping(_Generated):
    """``{mapping} PATH``."""

    def run(self) -> list[nodes.Node]:
        """Return the list."""
        module, _, name = self.arguments[0].rpartition(".")
        values = getattr(importlib.import_module(module), name).values()
        return self.parse([f"1. {plain(text)}" for text in values])


class Command(_Generated):
    """``{command} NAME``."""

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block."""
        text = command_help(self.arguments[0]) if self.arguments else overview()
        return [nodes.literal_block(text, text, language="text")]


def command_help(name: str) -> str:
    """Return what ``kd-lightning NAME --help`` prints."""
    if name in VERBS and name not in COMMANDS:
        return verb_help(name)
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "84"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parse(name, ["--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue().rstrip()


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("settings", Settings)
    app.add_directive("docstring", Docstring)
    app.add_directive("mapping", Mapping)
    app.add_directive("command", Command)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
