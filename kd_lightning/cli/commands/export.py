"""``export RUN``: write a finished run's student to files, and check each file against PyTorch."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kd_lightning.deploy.comparison import Accuracy, Comparison
from kd_lightning.deploy.export import FLOAT_ONLY, FORMATS, format_of, load_exported
from kd_lightning.deploy.exporter import Exported, Exporter
from kd_lightning.deploy.latency import Latency, measure_latency
from kd_lightning.deploy.onnx_files import OPSET
from kd_lightning.deploy.signature import BATCH, INPUT, LENGTH, named_tensors, token_inputs
from kd_lightning.errors import InputError
from kd_lightning.quantization.sizes import precision_of, size_of


def main(options: Namespace) -> None:
    """Write the files, and print the comparison; exit with status 1 if one does not agree."""
    arguments = options.run, options.out
    if options.all:
        if options.format is not None:
            raise InputError("format: --all writes all formats; leave out one of --format and --all")
        agree = export_all(*arguments, options.checkpoint, options.tolerance)
    else:
        agree = export(*arguments, options.format, options.checkpoint, options.tolerance)
    if not agree:
        sys.exit(1)


def export(
    folder: Path,
    out: Path | None = None,
    file_format: str | None = None,
    checkpoint: Path | None = None,
    tolerance: float | None = None,
) -> bool:
    """Write a run's student to a file, and compare it with PyTorch on the run's validation images.

    The file gets its name only if it agrees, see :meth:`~kd_lightning.deploy.exporter.Exporter.write`. If not, an older
    file of that name stays.

    Args:
        folder: The run's folder.
        out: The file. Default: None, which means ``export/student`` with the format's suffix in the run's folder.
        file_format: The format, one of :data:`~kd_lightning.deploy.export.FORMATS`. Default: None, which means the one
            of the file's suffix, or ``onnx``.
        checkpoint: Checkpoint or weights. Default: None, which means the run's ``student.safetensors``.
        tolerance: Largest allowed difference, at least 0. Default: None, which means that of the format.

    Returns:
        Whether the file agrees with PyTorch.

    Raises:
        InputError: If the folder is not a run with a student and a datamodule, the weights are missing or do not fit,
            the data cannot be read, the format is unknown or cannot express the student, a package is missing, or the
            file cannot be written.
    """
    file_format = _resolve_format(out, file_format)
    _check_tolerance(tolerance)
    exporter = Exporter(folder, checkpoint)
    found = exporter.write(exporter.default_path(file_format) if out is None else out, file_format, tolerance)
    result, quantized = found.comparison, exporter.quantized
    print(f"checked on {result.images} {exporter.part} images against PyTorch: {_describe(result)}")
    if found.accuracy is not None and exporter.accuracy is not None:
        print(f"accuracy {_percent(found.accuracy)}, of PyTorch {_percent(exporter.accuracy)}")
    if found.problem is not None:
        print(f"STOP: the file does not agree with PyTorch ({found.problem}); {found.path} is not written")
        return False
    if found.rewritten is not None:
        print(f"with onnxruntime's default settings, which may also round biases: {_describe(found.rewritten)}")
    opset = f", opset {OPSET}" if file_format.startswith("onnx") else ""
    precision = {"onnx_fp16": "fp16", "onnx_int8": "int8"}.get(file_format, precision_of(exporter.student))
    kilobytes = f"{found.bytes / 1000:.1f} KB"
    print(f"written to {found.path}: {file_format}{opset}, {precision}, input {_inputs(exporter, found)}, {kilobytes}")
    _print_origin(exporter)
    if exporter.preprocessing is None and [*named_tensors(exporter.batches[0])] == [INPUT]:
        print("its metadata do not describe the way from a picture to the input: the data have no transform that can")
    if quantized:
        storage = "this format stores quantised weights as floats, before their rounding"
        if file_format == "onnx":
            storage = "an ONNX file stores each quantised weight in 8 bits, at any number of levels"
        size = size_of(exporter.student)
        sizes = f"{size.stored / 1000:.1f} KB, coded {size.coded / 1000:.1f}"
        print(f"{storage}; at their own number of bits, all weights take {sizes}")
    return True


def export_all(
    folder: Path, out: Path | None = None, checkpoint: Path | None = None, tolerance: float | None = None
) -> bool:
    """Write a run's student to files of all formats whose packages are installed, and print a table of them.

    Args:
        folder: The run's folder.
        out: Folder of the files. Default: None, which means ``export`` in the run's folder.
        checkpoint: See :func:`export`.
        tolerance: See :func:`export`.

    Returns:
        Whether all files that were written agree with PyTorch.

    Raises:
        InputError: See :func:`export`. A format without its package, or that cannot express the student, is left out.
    """
    _check_tolerance(tolerance)
    if out is not None and out.is_file():
        raise InputError(f"out must be a folder with --all, got the file {out}")
    exporter = Exporter(folder, checkpoint)
    x, agree = exporter.batches[0], True
    rows = [_row("PyTorch", None, exporter.accuracy, measure_latency(partial(exporter.logits, exporter.student), x))]
    left_out = []
    for name in FORMATS:
        if name in FLOAT_ONLY and exporter.quantized:
            left_out.append(f"{name}: takes float students")
            continue
        try:
            found = exporter.write(exporter.default_path(name, out), name, tolerance)
        except InputError as error:
            left_out.append(f"{error}" if str(error).startswith(name) else f"{name}: {error}")
            continue
        if found.problem is not None:
            agree = False
            left_out.append(f"{name}: STOP: it does not agree with PyTorch: {found.problem}")
            continue
        network = load_exported(found.path, name, exporter.run.build_student, as_written=False, logits=exporter.logits)
        rows.append(_row(name, found, found.accuracy, measure_latency(network, x)))
    _print_table(rows, exporter)
    for text in left_out:
        print(f"left out: {text}")
    print(f"files in {exporter.default_path('onnx', out).parent}")
    _print_origin(exporter)
    return agree


def _resolve_format(out: Path | None, file_format: str | None) -> str:
    if file_format is None:
        file_format = "onnx" if out is None else format_of(out)
        if file_format is None:
            raise InputError(f"out must end in {', '.join(FORMATS.values())}, or --format must be set, got {out}")
    elif file_format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    return file_format


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")


def _inputs(exporter: Exporter, found: Exported) -> str:
    """The shapes of a file's inputs."""
    shapes: dict[str, list[Any]] = {n: [*part.shape[1:]] for n, part in named_tensors(exporter.batches[0]).items()}
    for name in token_inputs(exporter.batches[0]):
        shapes[name][0] = LENGTH
    first = 1 if found.file_format == "executorch" else BATCH
    return ", ".join(f"[{', '.join(map(str, [first, *shape]))}]" for shape in shapes.values())


def _print_origin(exporter: Exporter) -> None:
    which = f"the deployed ones, {exporter.run.weights} ({exporter.origin})"
    print(f"its weights are {which if exporter.checkpoint is None else f'those of {exporter.checkpoint}'}")


def _row(name: str, found: Exported | None, accuracy: Accuracy | None, latency: Latency) -> list[str]:
    return [
        name,
        "" if found is None else f"{found.bytes / 1000:,.1f}",
        f"{latency.median:.3g}",
        f"{latency.low:.3g} ... {latency.high:.3g}",
        "" if accuracy is None else _percent(accuracy),
        "" if found is None else f"{found.comparison.relative:.2g}",
    ]


def _print_table(rows: list[list[str]], exporter: Exporter) -> None:
    table = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(["format", "KB", "latency ms", "quartiles", "accuracy %", "difference"]):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    images = sum(len(next(iter(named_tensors(x).values()))) for x in exporter.batches)
    print(
        f"latency: one sample on this CPU, by each runtime's own threads; accuracy: on {exporter.part} labels, right of"
    )
    print(f"all; difference: largest on {images} {exporter.part} images, as a share of the largest |logit|")


def _percent(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.value:.2f} % ({accuracy.correct} of {accuracy.n})"


def _describe(result: Comparison) -> str:
    text = (
        f"largest difference of a logit {result.largest:.2g}, {result.relative:.2g} of the largest |logit|, the "
        f"typical image's {result.typical:.2g}"
    )
    if not result.predictions:
        return text
    agree = f"{100 * result.agreement:.2f} % of the predictions agree"
    return f"{text}; {agree} ({result.changed} of {result.predictions} differ)"
