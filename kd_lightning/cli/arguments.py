"""The arguments of this package's commands; ``cli/commands/`` has the work of each command.

This file loads neither torch nor Lightning, so that help and refusals are quick.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

from kd_lightning.errors import InputError

ACTIONS = ("drop", "downweight", "relabel")
"""Corrections of a label that is probably wrong."""
DISTANCE = 6
"""Most bits in which the hashes of similar pictures differ."""
_SMALL_DISTANCE = 16  # above it pictures that have nothing in common are pairs
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
        _check_config(value)


def _check_config(value: str) -> None:
    if value.endswith(_SUFFIXES) and ": " not in value and not Path(value).expanduser().exists():
        raise InputError(f"config: no file at {value}")


def _check_folders(*folders: Path) -> None:
    """Raise InputError for the folder of a run that does not exist. The command reads what lies in it."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no run: it does not exist")


def _check_range(options: Namespace, name: str, least: int, most: int | None = None) -> None:
    value = getattr(options, name)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"--{name} must be {allowed}, got {value}")


def _command(summary: str) -> Callable[[_Parse], _Parse]:
    """Enter a function into ``COMMANDS``; its name is the command's, after an underscore."""

    def enter(function: _Parse) -> _Parse:
        COMMANDS[function.__name__.removeprefix("_")] = Command(summary, function)
        return function

    return enter


@_command("Train a method and its baseline without a teacher over several seeds, and compare them.")
def _experiment(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.add_argument("config", help="YAML of the method, on a SemiSupervisedDataModule")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N - 1 (default 3)")
    parser.add_argument("--out", metavar="DIR", help="folder of the comparison (default: <root>/<name>_comparison)")
    options = _with_overrides(parser, args)
    _check_range(options, "seeds", 1)
    _check_config(options.config)
    return options


@_command("Compare finished runs: accuracy, size, cost.")
def _compare(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    text = "a run's folder, or the folder of all runs of a name"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=text)
    parser.add_argument("--part", choices=("test", "val"), default="test", help="part of the data (default test)")
    text = "folder for comparison.json, .md and .png (default: none are written)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=text)
    options = parser.parse_args(args)
    _check_folders(*options.runs)
    return options


@_command("Write a finished run's student as ONNX, torch.export or safetensors, and check the file.")
def _export(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    text = "format of the file (default: by its suffix)"
    parser.add_argument("--format", metavar="onnx|torch_export|safetensors", help=text)
    text = "checkpoint or weights to export (default: RUN/student.safetensors)"
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help=text)
    text = "largest allowed difference, as a share of the largest |logit|; default 0.0001, for quantised students "
    text += "0.05, since a runtime may round an activation between two levels the other way"
    parser.add_argument("--tolerance", metavar="T", type=float, help=text)
    options = parser.parse_args(args)
    _check_folders(options.run)
    return options


@_command("Print the layers of a config's networks: output shapes, multiply-accumulates, parameters.")
def _layers(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    return _arguments_of_fit(parser, args)


@_command("Summarise a run's pseudo-labels, and show the images with the least confident ones.")
def _labels(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--round", metavar="K", type=int, help="the round to show (default: the last)")
    text = "number of images on the contact sheet (default 36)"
    parser.add_argument("--images", metavar="N", type=int, default=36, help=text)
    text = "contact sheet (default: RUN/pseudo_labels/doubtful.png)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    text = "also estimate the share of right pseudo-labels by cross-fitting: K fits, each without 1/K of the labels"
    parser.add_argument("--cross-fit", metavar="K", type=int, help=text)
    options = parser.parse_args(args)
    _check_range(options, "images", 1)
    _check_folders(options.run)
    return options


@_command("Find labels that are probably wrong, and write a file that drops, down-weights or relabels them.")
def _clean(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.add_argument("config", help="YAML of any method on a SemiSupervisedDataModule")
    text = "which labels: those of training (default), or those of validation, by one fit without folds"
    parser.add_argument("--part", choices=("train", "val"), default="train", help=text)
    parser.add_argument("--folds", type=int, metavar="K", help="fits, each without 1/K of the labels (default 5)")
    parser.add_argument("--action", choices=ACTIONS, default="drop", help="correction of the suspects (default drop)")
    parser.add_argument("--weight", type=float, metavar="W", help="weight for --action downweight (default 0.1)")
    text = "folder of the files (default: <root>/<name>_clean, or its folder val for --part val)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=text)
    options = _with_overrides(parser, args)
    if options.weight is not None and options.action != "downweight":
        raise InputError(f"--weight needs --action downweight, got {options.action}")
    if options.part == "val" and options.action == "downweight":
        raise InputError("--action downweight is for training labels; allowed with --part val: drop, relabel")
    if options.part == "val" and options.folds is not None:
        raise InputError(f"--folds is for training labels; --part val takes one fit, got --folds {options.folds}")
    options.folds = 5 if options.folds is None else options.folds
    options.weight = 0.1 if options.weight is None else options.weight
    if not 0 <= options.weight < 1:
        raise InputError(f"--weight must lie in [0, 1), got {options.weight}")
    _check_config(options.config)
    return options


@_command("Find samples of training, validation and test that are equal or alike, of a run or a config.")
def _duplicates(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.usage = "kd_lightning duplicates [-h] (RUN | CONFIG | --config CONFIG [overrides of fit]) [options]"
    parser.epilog = (
        "Equal samples are found by content, similar pictures by a perceptual hash. The hash means little for pictures "
        "of fewer than 32 x 32 pixels, and it does not find mirrored or cropped copies. 'fit --help' lists the "
        "overrides."
    )
    parser.add_argument("--config", metavar="CONFIG", action="append", default=[], help="YAML, as for fit")
    text = f"most bits of 64 in which the hashes of similar pictures differ (default {DISTANCE})"
    parser.add_argument("--distance", metavar="D", type=int, default=DISTANCE, help=text)
    parser.add_argument("--within", action="store_true", help="also find pairs within training, validation or test")
    text = "most pairs in the table, the closest ones (default 10000)"
    parser.add_argument("--pairs", metavar="N", type=int, default=10_000, help=text)
    text = "most images on the contact sheet, two for each pair (default 36)"
    parser.add_argument("--images", metavar="N", type=int, default=36, help=text)
    text = "CSV file to write (default: RUN/duplicates.csv, or <root>/<name>_duplicates.csv for a config)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    first, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    options = _with_overrides(parser, rest)
    options.run = None if first is None else Path(first)
    _check_range(options, "distance", 0, _SMALL_DISTANCE)
    _check_range(options, "pairs", 1)
    _check_range(options, "images", 2)
    if options.out is not None and options.out.suffix != ".csv":
        raise InputError(f"--out must end in .csv, got {options.out}")
    if first is not None and options.config:
        raise InputError(f"duplicates takes a run or --config, got {first} and --config {options.config[0]}")
    if first is None and not options.config:
        raise InputError("duplicates needs a run's folder or --config CONFIG")
    if first is not None and options.overrides and not options.run.is_file():
        raise InputError(f"duplicates takes no overrides with a run, got {' '.join(options.overrides)}")
    if first is not None and options.run.is_file():
        options.run, options.config = None, [first]
    if options.run is not None:
        _check_folders(options.run)
    return options


@_command("Select the samples to label next, and write a file for their labels.")
def _query(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    text = "folder of a run; several runs of the same split are used together"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=text)
    parser.add_argument("--n", type=int, required=True, help="number of samples to select")
    text = "least-confidence, margin, entropy, bald, k-centre, badge, disagreement, random (default margin)"
    parser.add_argument("--strategy", default="margin", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the strategy (default 0)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="CSV file to write (default: RUN/query.csv)")
    text = "most images on the contact sheet (default 36)"
    parser.add_argument("--images", metavar="N", type=int, default=36, help=text)
    options = parser.parse_args(args)
    _check_range(options, "n", 1)
    _check_range(options, "images", 1)
    _check_folders(*options.runs)
    return options


@_command("Fill the caches of a config's teachers before training, on all devices. Takes the arguments of fit.")
def _cache(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    parser.usage = "kd_lightning cache [-h] (CONFIG ... | --config CONFIG) [arguments of fit]"
    first = [*takewhile(lambda argument: not argument.startswith("-"), args)]
    for path in first:
        _check_config(path)
    return _arguments_of_fit(parser, [*(f"--config={path}" for path in first), *args[len(first) :]])


@_command("Check a config's teacher, student and labels before training. Takes the arguments of fit.")
def _doctor(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    return _arguments_of_fit(parser, args)


def _with_overrides(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command's own arguments; ``overrides`` has the rest, which is that of ``fit``."""
    parser.allow_abbrev = False  # an abbreviated option may be one of fit
    parser.epilog = parser.epilog or _OVERRIDES
    options, overrides = parser.parse_known_args(args)
    options.overrides = overrides
    return options


def _arguments_of_fit(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Return all arguments as ``overrides``, for a command that has none but those of ``fit``."""
    if not args:
        raise InputError(f"{parser.prog.split()[-1]} needs the arguments of fit, such as --config CONFIG")
    parser.usage = parser.usage or f"{parser.prog} [-h] --config CONFIG [arguments of fit]"
    parser.add_argument("--config", metavar="CONFIG", action="append", help="YAML, as for fit")
    _with_overrides(parser, args)  # the order of configs and overrides counts, so that no argument is taken out
    return Namespace(overrides=[*args])
