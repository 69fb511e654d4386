"""The arguments that the commands on a folder of pictures share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import CONFIG, is_config
from kd_lightning.errors import InputError

NAMES = "timm/NAME, torchvision/NAME, a class path, or a network of this package"
"""What a network may be named by."""


def add_folder(parser: ArgumentParser) -> None:
    """Add the folder, and the options of its fits."""
    text = "folders of classes; train/ and test/ with such folders; or pictures and a table of their labels"
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    _add_sizes(parser)
    text = "name of the folder of all runs in OUT (default: that of FOLDER)"
    parser.add_argument("--name", metavar="NAME", help=text)
    text = "folder of all runs (default runs)"
    parser.add_argument("--out", metavar="OUT", type=Path, default=Path("runs"), help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the YAML, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before fits that take long")


def add_student(parser: ArgumentParser) -> None:
    """Add the options of a command that takes a config, or a folder as its first argument."""
    text = f"for a FOLDER (class folders, or pictures and a table): what learns its labels, {NAMES} (default resnet20)"
    parser.add_argument("--student", metavar="NAME", help=text)
    _add_sizes(parser)


def _add_sizes(parser: ArgumentParser) -> None:
    text = "epochs of each fit (default: by the number of pictures)"
    parser.add_argument("--epochs", metavar="N", type=int, help=text)
    text = "side of the training pictures in pixels (default: by the pictures and the networks)"
    parser.add_argument("--image-size", metavar="PIXELS", type=int, help=text)


def folder_of(args: Sequence[str]) -> Path | None:
    """Return the folder of pictures, or the table of their labels, that the first argument is; None for others."""
    if not args or args[0].startswith("-"):
        return None
    path = Path(args[0]).expanduser()
    is_table = path.suffix.lower() in (".csv", ".parquet") and path.is_file()
    return path if is_table or (path.is_dir() and not (path / CONFIG).is_file()) else None


def check_folder(options: Namespace) -> None:
    """Raise InputError for a folder that does not exist, a config and a run."""
    folder = options.folder.expanduser()
    if not folder.exists():
        raise InputError(f"FOLDER: {folder} does not exist")
    if folder.is_file() and is_config(folder.name):
        raise InputError(f"FOLDER: {folder} is a config; kd-lightning experiment {folder} trains it")
    if (folder / CONFIG).is_file():
        raise InputError(f"FOLDER: {folder} is a run, and a folder of pictures is needed")
