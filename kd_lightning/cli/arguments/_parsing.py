"""The table of commands, and what their arguments share."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kd_lightning.errors import InputError
from kd_lightning.packages import is_installed

_OVERRIDES = "Overrides of the config may follow, such as --trainer.max_epochs 5; 'fit --help' lists them."
_SUFFIXES = (".yaml", ".yml", ".json")
_BINARY = (".ckpt", ".onnx", ".pt", ".pt2", ".pth", ".safetensors")
_FLAGS = ("-h", "--help", "--print_config")  # options without a value
CONFIG, _STATE = "config.yaml", "run.json"  # files of a run, as in runs/run.py, which loads torch

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
    options = read(_Parser(prog=f"kd-lightning {command}", description=summary), args)
    check_configs_exist(args)
    return options


class _Parser(ArgumentParser):
    """A parser that takes whole names of options alone: an abbreviation may be a misspelled option, or one of fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Print the message, with the option that was probably meant, and exit."""
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        super().error(message + f"; did you mean {close[0]}?" if close else message)


def expand_configs(args: Sequence[str], flags: Iterable[str] = _FLAGS) -> list[str]:
    """Return a command line with each config that is an argument of its own as ``--config=FILE``, in the same place.

    Leading arguments are configs, and so is a later YAML file that is no option's value.

    Args:
        args: The command line after the command.
        flags: Options that take no value.

    Raises:
        InputError: If a config does not exist, or is a run.
    """
    expanded: list[str] = []
    may_be_config = True
    leading = True
    for argument in args:
        is_option = argument.startswith("-")
        if not is_option and may_be_config and (leading or argument.endswith(_SUFFIXES)):
            check_config(argument, exists=True)
            argument = f"--config={argument}"
        leading = leading and not is_option
        may_be_config = not is_option or "=" in argument or argument in flags
        expanded.append(argument)
    return expanded


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


def check_config(value: str, *, exists: bool = False) -> None:
    """Raise InputError if a config does not exist, or is a run or a file of weights.

    Args:
        value: A path, or YAML text.
        exists: Whether it must be a file, also if it has no suffix of YAML.
    """
    path = Path(value).expanduser()
    if ": " in value and not exists:
        return
    if run := _run_of(path):
        raise InputError(f"config: {value} belongs to a run, whose config is {run / CONFIG}")
    if path.is_dir():
        raise InputError(f"config: {value} is a folder; a config is a YAML file")
    if path.suffix in _BINARY:
        raise InputError(f"config: {value} is a file of weights; a config is a YAML file")
    if (exists or value.endswith(_SUFFIXES)) and not path.exists():
        hint = f"; did you mean {near}?" if (near := _nearest_file(path)) else ""
        if not hint and path.parts[:1] == ("configs",) and not Path("configs").is_dir():
            hint = "; is it a config of the repository? Then run this line in the clone"
        raise InputError(f"config: no file at {value}{hint}")


def _nearest_file(path: Path) -> Path | None:
    """Return the YAML file of the same folder whose name is most similar."""
    files = [file for file in path.parent.glob("*") if file.suffix in _SUFFIXES] if path.parent.is_dir() else []
    if same := next((file for file in files if file.stem == path.name), None):
        return same
    close = difflib.get_close_matches(path.name, [file.name for file in files], n=1, cutoff=0.75)
    return path.parent / close[0] if close else None


def _run_of(path: Path) -> Path | None:
    """Return the run's folder that a path is or lies in, None if there is none or if the path is the config itself."""
    if path.suffix in _SUFFIXES or not path.exists():
        return None
    folders = [path, *path.absolute().parents[:3]] if path.is_dir() else [*path.parents[:3]]
    return next((folder for folder in folders if (folder / CONFIG).is_file() and (folder / _STATE).is_file()), None)


def is_config(value: str) -> bool:
    """Return whether a path ends as a config does."""
    return value.endswith(_SUFFIXES)


def check_folders(*folders: Path) -> None:
    """Raise InputError for what is no folder of a run, or of the runs of a name. The command reads what lies in it."""
    for folder in folders:
        if not folder.exists():
            raise InputError(f"{folder} is no run: it does not exist")
        if folder.is_dir():
            continue
        if folder.suffix in _SUFFIXES:
            raise InputError(
                f"{folder} is a file, and a run is needed: the folder that 'kd-lightning fit CONFIG' writes, such as "
                "runs/NAME/version_0"
            )
        if run := _run_of(folder):
            raise InputError(f"{folder} is a file of a run; name the run: {run}")
        raise InputError(f"{folder} is a file; a run is a folder")


def check_range(options: Namespace, name: str, least: int, most: int | None = None) -> None:
    """Raise InputError for an option out of range."""
    value = getattr(options, name)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"--{name} must be {allowed}, got {value}")


def check_package(module: str, what: str, extra: str) -> None:
    """Raise InputError if a package of an extra is not installed, before anything is loaded or read.

    Args:
        module: Name by which it is imported.
        what: The part that needs it, for the message.
        extra: The extra of this package that installs it.
    """
    if not is_installed(module):
        raise InputError(f"{what} needs {module}: pip install 'kd-lightning[{extra}]'")


def command(summary: str) -> Callable[[_Parse], _Parse]:
    """Enter a function into ``COMMANDS``; its name is the command's."""

    def enter(function: _Parse) -> _Parse:
        COMMANDS[function.__name__] = Command(summary, function)
        return function

    return enter


def with_overrides(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command's own arguments; ``overrides`` has the rest, which is that of ``fit``."""
    parser.epilog = parser.epilog or _OVERRIDES
    options, overrides = parser.parse_known_args(args)
    options.overrides = overrides
    return options


def flags_of(parser: ArgumentParser) -> list[str]:
    """Return the options without a value, also those of ``fit``."""
    return [*_FLAGS, *(flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings)]


def with_configs(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command that takes configs, as arguments or as ``--config FILE``, and overrides of ``fit``.

    ``overrides`` has the configs and the overrides, in their order, which counts.

    Args:
        parser: The parser, with the command's own options.
        args: The command line after the command.

    Raises:
        InputError: If there is no config, or one does not exist.
    """
    name, own = parser.prog.split()[-1], len(parser._actions) > 1
    parser.usage = parser.usage or f"{parser.prog} [-h] CONFIG ... {'[options] ' if own else ''}[overrides of fit]"
    if {"-h", "--help"} & {*args}:  # else the value of an override would count as a config
        parser.add_argument("configs", metavar="CONFIG", nargs="*", help="YAML, as for fit; or --config CONFIG")
    args = expand_configs(args, flags_of(parser))
    if not args:
        raise InputError(f"{name} needs a config: kd-lightning {name} CONFIG.yaml")
    return with_overrides(parser, args)
