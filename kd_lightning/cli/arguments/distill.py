"""The arguments of ``distill``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._folder import NAMES, add_folder, check_folder
from kd_lightning.cli.arguments._parsing import command
from kd_lightning.errors import InputError


@command("From a folder of pictures to a distilled student: writes the YAML, trains, tests, compares and exports.")
def distill(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("--teacher", metavar="NAME", required=True, help=f"{NAMES}, such as resnet20")
    parser.add_argument("--student", metavar="NAME", help=f"{NAMES}, such as resnet8")
    parser.add_argument("--students", metavar="A,B,C", help="several students; the most accurate one is exported")
    add_folder(parser)
    text = "largest size of the student in MB; without students, some of this package and torchvision are tried"
    parser.add_argument("--max-size", metavar="MB", type=float, help=text)
    parser.add_argument("--max-latency", metavar="MS", type=float, help="largest time of a picture on this CPU in ms")
    parser.add_argument("--labels-per-class", metavar="N", type=int, help="labels of each class (default: all)")
    text = "the teacher's weights: a file, or without FILE those in the caches of torchvision and timm; weights of "
    text += "other classes get a new last layer and are trained (default: new weights, which are trained)"
    parser.add_argument("--pretrained", metavar="FILE", nargs="?", const="cache", help=text)
    text = "download the teacher's weights if no cache has them; without it nothing is downloaded"
    parser.add_argument("--download", action="store_true", help=text)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="seeds of each student (default 1)")
    options = parser.parse_args(args)
    check_folder(options)
    if options.student is not None and options.students is not None:
        raise InputError("--student and --students: give one of them")
    several = [] if options.students is None else [name.strip() for name in options.students.split(",")]
    if "" in several:
        raise InputError(f"--students must be names with commas between them, got {options.students!r}")
    options.students = several or ([] if options.student is None else [options.student])
    return options
