"""The arguments of ``clean``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._folder import add_student, folder_of
from kd_lightning.cli.arguments._parsing import check_package, command, with_configs, with_overrides
from kd_lightning.errors import InputError

ACTIONS = ("drop", "downweight", "relabel")
"""Corrections of a label that is probably wrong."""


@command("Find labels that are probably wrong, and write a file that drops, down-weights or relabels them.")
def clean(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    text = "which labels: those of training (default), or those of validation, by one fit without folds"
    parser.add_argument("--part", choices=("train", "val"), default="train", help=text)
    parser.add_argument("--folds", type=int, metavar="K", help="fits, each without 1/K of the labels (default 5)")
    parser.add_argument("--action", choices=ACTIONS, default="drop", help="correction of the suspects (default drop)")
    parser.add_argument("--weight", type=float, metavar="W", help="weight for --action downweight (default 0.1)")
    text = "folder of the files (default: <root>/<name>_clean, or its folder val for --part val)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=text)
    add_student(parser)
    parser.usage = f"{parser.prog} [-h] (CONFIG ... | FOLDER) [options] [overrides of fit]"
    if folder := folder_of(args):
        options = with_overrides(parser, args[1:])
    else:
        options = with_configs(parser, args)
        for name in ("student", "epochs", "image_size"):
            if (value := getattr(options, name)) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is for a FOLDER of pictures, and a config has its own, got {value}")
    options.folder = folder
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
    check_package("cleanlab", "clean", "weak")
    return options
