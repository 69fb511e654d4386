"""The arguments of ``export``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, command


@command("Write a finished run's student as ONNX, torch.export or safetensors, and check the file.")
def export(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    text = "format of the file (default: by its suffix)"
    parser.add_argument("--format", metavar="onnx|torch_export|safetensors", help=text)
    text = "checkpoint or weights to export (default: RUN/student.safetensors)"
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help=text)
    text = "largest allowed difference, as a share of the largest |logit|; default 0.0001, for quantised students "
    text += "0.05, since a runtime may round an activation between two levels the other way"
    parser.add_argument("--tolerance", metavar="T", type=float, help=text)
    options = parser.parse_args(args)
    check_folders(options.run)
    return options
