"""The arguments of ``crossfit``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import command, with_configs


@command("Train teachers that each lack a fold of the labels, for soft targets of what they have not seen.")
def crossfit(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    text = "number of teachers, each trained without 1/K of the labels (default 5)"
    parser.add_argument("--folds", type=int, metavar="K", default=5, help=text)
    return with_configs(parser, args)
