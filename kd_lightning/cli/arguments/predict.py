"""The arguments of ``predict`` for pictures of any files; with a config it is LightningCLI's command."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_package, check_range, command
from kd_lightning.errors import InputError

FORMATS = (".csv", ".parquet", ".jsonl")
_EPILOG = """\
A SOURCE is a file, a folder, a pattern such as 'photos/**/*.jpg', a CSV or Parquet table with a column path, or - for
a list of paths on standard input. Files that cannot be read are listed, and have an error in the table; the exit status
is 1 if none can be read. Networks with dense outputs write masks into a folder beside FILE.

'predict CONFIG.yaml' writes the predictions for the test part of a run's own data."""


@command("Predict pictures of any files with a run's deployed weights, or with an exported file.")
def predict(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.formatter_class, parser.epilog = RawDescriptionHelpFormatter, _EPILOG
    text = "folder of a run, or .onnx, .pt2 or .safetensors (with the run's config.yaml beside it)"
    parser.add_argument("model", metavar="RUN_OR_FILE", type=Path, help=text)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="what to predict, see below")
    text = f"file to write, {', '.join(FORMATS)} (default: CSV on standard output)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    parser.add_argument("--all", action="store_true", help="also write the probabilities of all classes")
    parser.add_argument("--batch_size", metavar="N", type=int, default=64, help="pictures of a batch (default 64)")
    text = "processes that read pictures (default: up to 4, by the number of processors; 0 for few pictures)"
    parser.add_argument("--workers", metavar="N", type=int, help=text)
    options = parser.parse_args(args)
    check_range(options, "batch_size", 1)
    if options.workers is not None:
        check_range(options, "workers", 0)
    if not options.model.expanduser().exists():
        raise InputError(f"{options.model} is no run and no exported file: it does not exist")
    if options.out is not None and options.out.suffix.lower() not in FORMATS:
        raise InputError(f"--out must end in {', '.join(FORMATS)}, got {options.out}")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out must be a file, but {options.out} is a folder")
    if options.out is not None and options.out.suffix.lower() == ".parquet":
        check_package("pyarrow", "--out: Parquet", "weak")
    if not any(map(_may_exist, options.sources)):
        raise InputError(f"source: there is no file at {', '.join(options.sources[:3])}")
    return options


def _may_exist(source: str) -> bool:
    """Return whether a source may have pictures, as far as that is known before the libraries are loaded."""
    has_signs = any(sign in source for sign in "*?[")
    return source == "-" or has_signs or os.path.lexists(Path(source).expanduser())
