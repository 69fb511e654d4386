"""The arguments of ``labels``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, check_range, command


@command("Summarise a run's pseudo-labels, and show the images with the least confident ones.")
def labels(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--round", metavar="K", type=int, help="the round to show (default: the last)")
    text = "number of images on the contact sheet (default 36)"
    parser.add_argument("--images", metavar="N", type=int, default=36, help=text)
    text = "contact sheet (default: RUN/pseudo_labels/doubtful.png)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    text = "also estimate the share of right pseudo-labels by cross-fitting: K fits, each without 1/K of the labels"
    parser.add_argument("--cross-fit", metavar="K", type=int, help=text)
    options = parser.parse_args(args)
    check_range(options, "images", 1)
    check_folders(options.run)
    return options
