"""The arguments that the commands on a folder of pictures share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from kd_lightning.errors import InputError


def add_folder(parser: ArgumentParser) -> None:
    """Add the folder, and the options of its fits."""
    text = "folders of classes; train/ and test/ with such folders; or pictures and a table of their labels"
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the YAML, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before fits that take long")


def add_settings(parser: ArgumentParser) -> None:
    """Add the options of the fits on a folder."""
    parser.add_argument(
        "--epochs", metavar="N", type=int, help="epochs of each fit (default: by the number of pictures)"
    )
    text = "side of the training pictures in pixels (default: by the pictures and the networks)"
    parser.add_argument("--image-size", metavar="PIXELS", type=int, help=text)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the folder of all runs in OUT (default: that of FOLDER)"
    )
    parser.add_argument(
        "--out", metavar="OUT", type=Path, default=Path("runs"), help="folder of all runs (default runs)"
    )


def check_folder(options: Namespace) -> None:
    """Raise InputError for a folder that does not exist."""
    if not options.folder.expanduser().exists():
        raise InputError(f"FOLDER: {options.folder} does not exist")
    if options.folder.suffix in (".yaml", ".yml", ".json") and options.folder.is_file():
        raise InputError(f"FOLDER: {options.folder} is a config; kd-lightning experiment {options.folder} trains it")
