"""The arguments of ``compare``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, command


@command("Compare finished runs: accuracy, size, cost.")
def compare(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    text = "a run's folder, or the folder of all runs of a name"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=text)
    parser.add_argument("--part", choices=("test", "val"), default="test", help="part of the data (default test)")
    text = "folder for comparison.json, .md and .png (default: none are written)"
    parser.add_argument("--out", metavar="DIR", type=Path, help=text)
    options = parser.parse_args(args)
    check_folders(*options.runs)
    return options
