"""The arguments of ``query``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, check_range, command


@command("Select the samples to label next, and write a file for their labels.")
def query(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
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
    check_range(options, "n", 1)
    check_range(options, "images", 1)
    check_folders(*options.runs)
    return options
