"""``completion SHELL``: print a script for the shell. It loads neither torch nor Lightning, and starts no Python."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from kd_lightning.cli.arguments import COMMANDS, VERBS
from kd_lightning.cli.arguments.verbs import VERB_OPTIONS
from kd_lightning.errors import InputError


def main(options: Namespace) -> None:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion needs shtab: pip install shtab") from error
    print(shtab.complete(whole_parser(shtab.FILE), options.shell))


def whole_parser(files: Any = None) -> ArgumentParser:
    """Return a parser with all commands and their options, which is only read.

    Args:
        files: What an argument completes that is a file or a folder.
    """
    parser = ArgumentParser(prog="kd-lightning")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--verbose", action="store_true", help="also print what libraries print")
    parsers = parser.add_subparsers()
    for name in dict.fromkeys([*VERBS, *COMMANDS]):
        child: ArgumentParser
        if name in COMMANDS:
            summary, read = COMMANDS[name]
            child = parsers.add_parser(name, help=summary)
            _add_arguments(child, read)
        else:
            child = parsers.add_parser(name, help=VERBS[name])
            child.add_argument("config", metavar="CONFIG", nargs="*", help="YAML")
        for option, text in VERB_OPTIONS[name if name == "fit" else "test"].items() if name in VERBS else ():
            if option not in child._option_string_actions:
                child.add_argument(option, help=text)
        for action in child._actions:
            if action.choices is None and action.nargs != 0:
                action.complete = files  # type: ignore[attr-defined]
    return parser


def _add_arguments(parser: ArgumentParser, read: Any) -> None:
    """Add what a command reads its arguments with, and read none."""

    def stop(args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        raise _Added

    reader: Any = parser
    reader.parse_args = reader.parse_known_args = stop
    try:
        read(reader, ["--help"])
    except _Added:
        return


class _Added(Exception):  # noqa: N818  (not an error: it ends the reading of arguments)
    """All arguments are added."""
