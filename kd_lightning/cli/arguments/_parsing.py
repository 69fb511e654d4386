"""The table of commands, and what their arguments share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from kd_lightning.errors import InputError

_OVERRIDES = "Overrides of the config may follow, such as --trainer.max_epochs 5; 'fit --help' lists them."
_SUFFIXES = (".yaml", ".yml", ".json")

_Parse = Callable[[ArgumentParser, Sequence[str]], Namespace]


class Command(NamedTuple):
    """A command.

    Attributes:
        summary: One line on what it does.
        parse: Reads its arguments with a parser.
    """

    summary: str
    parse: _Parse


COMMANDS: dict[str, Command] = {}
"""The commands of this package by name."""


def parse(command: str, args: Sequence[str]) -> Namespace:
    """Return the arguments of a command. Print the help and exit if it is wanted.

    Args:
        command: One of ``COMMANDS``.
        args: The command line after the command.

    Raises:
        InputError: If an argument has a value that is not allowed, or names a run or a config that does not exist.
        SystemExit: After the help, or if an argument is unknown or missing.
    """
    summary, read = COMMANDS[command]
    options = read(ArgumentParser(prog=f"kd_lightning {command}", description=summary), args)
    check_configs_exist(args)
    return options


def configs_of(args: Sequence[str]) -> Iterator[str]:
    """Yield the values of ``--config`` on a command line."""
    for argument, following in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            yield value if equals else following


def check_configs_exist(args: Sequence[str]) -> None:
    """Raise InputError if the command line names a config that does not exist. A config may also be YAML text."""
    for value in configs_of(args):
        check_config(value)


def check_config(value: str) -> None:
    """Raise InputError if a config does not exist."""
    if value.endswith(_SUFFIXES) and ": " not in value and not Path(value).expanduser().exists():
        raise InputError(f"config: no file at {value}")


def check_folders(*folders: Path) -> None:
    """Raise InputError for the folder of a run that does not exist. The command reads what lies in it."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no run: it does not exist")


def check_range(options: Namespace, name: str, least: int, most: int | None = None) -> None:
    """Raise InputError for an option out of range."""
    value = getattr(options, name)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"--{name} must be {allowed}, got {value}")


def command(summary: str) -> Callable[[_Parse], _Parse]:
    """Enter a function into ``COMMANDS``; its name is the command's."""

    def enter(function: _Parse) -> _Parse:
        COMMANDS[function.__name__] = Command(summary, function)
        return function

    return enter


def with_overrides(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command's own arguments; ``overrides`` has the rest, which is that of ``fit``."""
    parser.allow_abbrev = False  # an abbreviated option may be one of fit
    parser.epilog = parser.epilog or _OVERRIDES
    options, overrides = parser.parse_known_args(args)
    options.overrides = overrides
    return options


def arguments_of_fit(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Return all arguments as ``overrides``, for a command that has none but those of ``fit``."""
    if not args:
        raise InputError(f"{parser.prog.split()[-1]} needs the arguments of fit, such as --config CONFIG")
    parser.usage = parser.usage or f"{parser.prog} [-h] --config CONFIG [arguments of fit]"
    parser.add_argument("--config", metavar="CONFIG", action="append", help="YAML, as for fit")
    with_overrides(parser, args)  # the order of configs and overrides counts, so that no argument is taken out
    return Namespace(overrides=[*args])
