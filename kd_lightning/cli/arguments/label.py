"""The arguments of ``label``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._folder import NAMES, add_folder, check_folder
from kd_lightning.cli.arguments._parsing import command


@command("From a folder with few labels: learns from pseudo-labels of the other pictures, and labels these.")
def label(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    add_folder(parser)
    parser.add_argument("--student", metavar="NAME", default="resnet20", help=f"{NAMES} (default resnet20)")
    text = "hide all but N labels of each class (default: the pictures in FOLDER/unlabeled have none)"
    parser.add_argument("--labels-per-class", metavar="N", type=int, help=text)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="seeds (default 1)")
    options = parser.parse_args(args)
    check_folder(options)
    return options
