"""``compare RUN...``: compare finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from kd_lightning.runs.report.comparison import compare_runs


def main(args: list[str]) -> None:
    """Parse the command line, and print the tables."""
    parser = argparse.ArgumentParser(prog="kd_lightning compare", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="a run's folder, or the folder of all runs of a name"
    )
    parser.add_argument("--part", choices=("test", "val"), default="test", help="part of the data (default test)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for comparison.json, .md and .png (default: none are written)"
    )
    options = parser.parse_args(args)
    compare_runs(options.runs, options.out, options.part)
