"""The arguments of ``export``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_folders, command


@command("Write a finished run's student to files to deploy, and check each file against PyTorch.")
def export(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    text = "the file to write, or with --all the folder (default: RUN/export/student.onnx, RUN/export)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    text = "format of the file (default: by the end of FILE: .onnx, .fp16.onnx, .int8.onnx, .pt2, .pte, .safetensors)"
    names = "onnx|onnx_fp16|onnx_int8|torch_export|executorch|safetensors"
    parser.add_argument("--format", metavar=names, help=text)
    text = "write all formats whose packages are installed, and print their size, latency and accuracy"
    parser.add_argument("--all", action="store_true", help=text)
    text = "checkpoint or weights to export (default: RUN/student.safetensors)"
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help=text)
    text = "largest allowed difference, as a share of the largest |logit|; default 0.0001, for quantised students "
    text += "0.05, since a runtime may round an activation between two levels the other way; of onnx_fp16 and "
    text += "onnx_int8: share of predictions that may become wrong; default 0.005 and 0.01"
    parser.add_argument("--tolerance", metavar="T", type=float, help=text)
    options = parser.parse_args(args)
    check_folders(options.run)
    return options
