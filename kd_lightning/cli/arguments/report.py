"""The arguments of ``report``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, command
from kd_lightning.errors import InputError


@command("Write one HTML page about finished runs: verdict, figures, mistakes, data, commands.")
def report(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    text = "a run's folder, the folder of all runs of a name, or that of an experiment's comparison"
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help=text)
    text = "the page (default: report.html in the folder of the run or comparison, or in the one that holds all runs)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    options = parser.parse_args(args)
    check_folders(*options.runs)
    if options.out is not None and options.out.suffix not in (".html", ".htm"):
        raise InputError(f"--out must end in .html, got {options.out}")
    return options
