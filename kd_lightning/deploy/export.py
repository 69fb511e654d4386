"""Export a student to a file, and load the file: one entry for all formats."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.deploy.onnx_files import load_onnx, read_onnx_metadata, write_half, write_integers, write_onnx
from kd_lightning.deploy.program_files import (
    load_executorch,
    load_torch_export,
    quiet_executorch,
    read_executorch_metadata,
    read_torch_export_metadata,
    write_executorch,
    write_torch_export,
)
from kd_lightning.deploy.signature import Logits, PositionalStudent, named_tensors, plain_logits
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, take_rows
from kd_lightning.packages import is_installed
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.runs.weights import load_weights, metadata_texts, read_metadata, save_weights

FORMATS = {
    "onnx": ".onnx",
    "onnx_fp16": ".fp16.onnx",
    "onnx_int8": ".int8.onnx",
    "torch_export": ".pt2",
    "executorch": ".pte",
    "safetensors": ".safetensors",
}
"""The end of a file's name by format."""
LOSSES = {"onnx_fp16": 0.005, "onnx_int8": 0.01}
"""Formats that round: the largest share of predictions that may become wrong, by default."""
FLOAT_ONLY = ("onnx_fp16", "onnx_int8", "executorch")
"""Formats that hold float students alone."""
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "executorch": ("executorch.exir",)}
_EXTRAS = {"onnx": "export", "executorch": "edge"}


def format_of(path: Path) -> str | None:
    """Return the format of a file by the end of its name; None if it has another end.

    >>> format_of(Path("student.int8.onnx"))
    'onnx_int8'
    """
    found = [name for name, suffix in FORMATS.items() if path.name.endswith(suffix)]
    return max(found, key=lambda name: len(FORMATS[name]), default=None)


def check_packages(file_format: str, *, quantized: bool) -> None:
    """Check that the packages that a format needs are installed.

    Raises:
        InputError: If a package is missing.
    """
    kind = file_format.partition("_")[0]
    names = [*_PACKAGES.get(kind, ()), *["onnxoptimizer"] * (quantized and kind == "onnx")]
    try:
        with quiet_executorch():
            for name in names:
                if not is_installed(name):
                    raise ModuleNotFoundError(f"No module named {name!r}")
                importlib.import_module(name)
    except ImportError as error:
        raise _missing_extra(file_format, file_format, error) from error


def _missing_extra(what: str | Path, file_format: str, error: ImportError) -> InputError:
    extra = _EXTRAS[file_format.partition("_")[0]]
    return InputError(f"{what} needs the extra {extra}: pip install 'kd-lightning[{extra}]' ({error})")


def package_versions(file_format: str, *, quantized: bool) -> dict[str, str]:
    """Return the versions of the packages that write a file."""
    kind = file_format.partition("_")[0]
    names = ["torch", *[kind] * (kind in _PACKAGES), *["brevitas"] * quantized]
    names += ["onnxruntime"] * (file_format in ("onnx_fp16", "onnx_int8"))
    return {"kd_lightning": version("kd-lightning")} | {name: version(name) for name in names}


@contextmanager
def temporary_file(path: Path, file_format: str) -> Iterator[Path]:
    """Provide an empty file beside ``path``, to write to and then rename. If it is not renamed, it is deleted.

    Raises:
        InputError: If the path cannot be written.
    """
    part = path.with_name(f".{path.stem}.part{FORMATS[file_format]}")
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def export_student(
    student: nn.Module,
    x: Inputs,
    path: Path,
    file_format: str,
    metadata: Mapping[str, Any],
    calibration: Sequence[Inputs] = (),
    logits: Logits = plain_logits,
) -> None:
    """Write a student to a file. The number of samples, and of tokens of an ``attention_mask``, may vary.

    Args:
        student: The student, in eval mode.
        x: Inputs (B, ...). The first sample is used to trace the student.
        path: The file.
        file_format: One of ``FORMATS``:

            - ``onnx``: float, or of low precision: quantised weights are 8-bit integers with QuantizeLinear and
              DequantizeLinear;
            - ``onnx_fp16``: a float student in half precision, with inputs and outputs of float32;
            - ``onnx_int8``: a float student with static integers of 8 bits;
            - ``torch_export``: a program of float weights, which rounds those of low precision in each call;
            - ``executorch``: a program for phones and boards, of one sample at a time;
            - ``safetensors``: the weights alone.
        metadata: Strings, or values that JSON can express.
        calibration: Batches of inputs that set the ranges of ``onnx_int8``.
        logits: From the student and inputs to its logits. Default: a plain call.

    Raises:
        InputError: If the format cannot express the student.
    """
    if file_format in FLOAT_ONLY and quantized_layers(student):
        raise InputError(f"{file_format} takes float students; onnx holds the integers of one of low precision")
    writers: dict[str, Callable[..., None]] = {
        "onnx": write_onnx,
        "onnx_fp16": write_half,
        "onnx_int8": write_integers,
        "torch_export": write_torch_export,
        "executorch": write_executorch,
        "safetensors": _write_safetensors,
    }
    further = [calibration] if file_format == "onnx_int8" else []
    try:
        # a batch of two, since torch.export treats a batch size of one as a constant
        count = len(next(iter(named_tensors(x).values())))
        two = take_rows(x, torch.tensor([0, 0]), count)
        network = PositionalStudent(student, x, logits).eval()
        writers[file_format](network, two, path, metadata_texts(metadata), *further)
    except InputError:
        raise
    except Exception as error:  # exporters raise errors of any type
        reason = str(error).strip().partition("\n")[0]
        name = type(student).__name__
        raise InputError(f"{name} cannot be exported as {file_format}: {type(error).__name__}: {reason}") from error
    finally:
        gc.collect()  # torch.export leaves copies of the student's class, and a config's class name would be ambiguous


def load_exported(
    path: Path,
    file_format: str,
    build_network: Callable[[], nn.Module],
    *,
    as_written: bool = True,
    logits: Logits = plain_logits,
) -> Callable[[Any], Tensor]:
    """Load an exported file as a function from inputs (B, ...) to logits.

    Args:
        path: The file.
        file_format: One of ``FORMATS``.
        build_network: Function that builds the network for the weights of ``safetensors``.
        as_written: Whether onnxruntime runs the quantised graph of ``onnx`` as it is written. If False, it uses its
            default, which rewrites the graph and rounds the biases of layers with a quantised output to integers (if
            there is no BatchNorm between). It always uses its default for ``onnx_fp16`` and ``onnx_int8``.
        logits: From the network of ``safetensors`` and inputs to its logits. Default: a plain call.

    Raises:
        InputError: If the runtime cannot load the file.
    """
    if file_format == "safetensors":
        network = load_weights(build_network(), path).eval()
        return lambda x: logits(network, x)
    try:
        if file_format == "torch_export":
            return load_torch_export(path)
        if file_format == "executorch":
            return load_executorch(path)
        return load_onnx(path, as_written=as_written and file_format == "onnx")
    except Exception as error:  # runtimes raise errors of their own types
        raise InputError(f"the {file_format} file cannot be loaded: {' '.join(str(error).split())}") from error


def read_file_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an exported file, see :mod:`kd_lightning.deploy.metadata`; empty if it has none.

    Raises:
        InputError: If it is no exported file, or if the package that reads it is missing.
    """
    file_format = format_of(path)
    if file_format is None or not path.is_file():
        raise InputError(f"{path} must be a file that ends in {', '.join(FORMATS.values())}")
    if file_format == "safetensors":
        return read_metadata(path)
    readers = {"torch_export": read_torch_export_metadata, "executorch": read_executorch_metadata}
    try:
        return readers.get(file_format, read_onnx_metadata)(path)
    except ImportError as error:
        raise _missing_extra(path, file_format, error) from error
    except Exception as error:  # of a runtime
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _write_safetensors(network: PositionalStudent, x: Inputs, path: Path, metadata: dict[str, str]) -> None:
    save_weights(network.student.state_dict(), path, metadata)
