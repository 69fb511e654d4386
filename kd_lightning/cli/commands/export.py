"""``export RUN --out student.onnx``: write a finished run's student to a file, and check the file against PyTorch."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kd_lightning.data.evaluation_batches import evaluation_batches
from kd_lightning.deploy.export import (
    BATCH,
    FORMATS,
    INPUT,
    LENGTH,
    OPSET,
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    Comparison,
    check_packages,
    collect_logits,
    compare_logits,
    export_student,
    load_exported,
    named_tensors,
    package_versions,
    temporary_file,
    token_inputs,
    without_last_token,
)
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, call, rows_of, take_rows
from kd_lightning.losses.base import Task, predicted_labels
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights

_MOST_OUTPUTS = 2**27  # numbers that a file is compared on


def main(options: Namespace) -> None:
    """Write the file, and print the comparison; exit with status 1 if it does not agree."""
    if not export(options.run, options.out, options.format, options.checkpoint, options.tolerance):
        sys.exit(1)


def export(
    folder: Path,
    out: Path,
    file_format: str | None = None,
    checkpoint: Path | None = None,
    tolerance: float | None = None,
) -> bool:
    """Write a run's student to a file, and compare its logits with PyTorch's on the run's validation images.

    The file gets its name only if it agrees (:meth:`~kd_lightning.deploy.export.Comparison.agrees`). If not, an older
    file of that name stays.

    Args:
        folder: The run's folder.
        out: The file.
        file_format: The format, one of :data:`~kd_lightning.deploy.export.FORMATS`. Default: None, which means the one
            of the file's suffix.
        checkpoint: Checkpoint or weights. Default: None, which means the run's ``student.safetensors``.
        tolerance: Largest allowed difference, at least 0, as a share of the largest magnitude of a logit. Default:
            None, which means 1e-4, or 5e-2 for a quantised student.

    Returns:
        Whether the file agrees with PyTorch.

    Raises:
        InputError: If the folder is not a run with a student and a datamodule, the weights are missing or do not fit,
            the data cannot be read, the format is unknown or cannot express the student, a package is missing, or the
            file cannot be written.
    """
    file_format = _resolve_format(out, file_format)
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")
    run = Run(folder)
    student = _load_student(run, checkpoint).eval()
    quantized = bool(quantized_layers(student))
    check_packages(file_format, quantized=quantized)
    data = run.datamodule()
    batches, what = _evaluation_images(data, run)
    network = partial(call, student)
    batches = _check_batches(network, batches)
    expected = collect_logits(network, batches)
    task, class_dim = _infer_task(run, expected), run.model_arguments.get("class_dim")
    shapes: dict[str, list[Any]] = {name: [*part.shape[1:]] for name, part in named_tensors(batches[0]).items()}
    origin = run.metadata.get("weights", run.weights.name) if checkpoint is None else checkpoint.name
    metadata = package_versions(file_format, quantized=quantized) | {
        "task": task,
        **({} if class_dim is None else {"class_dim": class_dim}),
        "input_shape": shapes[INPUT] if [*shapes] == [INPUT] else shapes,
        "classes": run.class_names or getattr(data, "class_names", None),  # those of the data may have changed since
        "preprocessing": repr(getattr(data, "eval_transform", None)),
        "precision": precision_of(student),
        "file": (checkpoint or run.weights).name,
        "weights": origin,
        **({"opset": OPSET} if file_format == "onnx" else {}),
    }
    size = size_of(student)
    with temporary_file(out, file_format) as part:
        export_student(student, batches[0], part, file_format, metadata)
        build_network, predict = run.build_student, _predictor(task, class_dim)
        logits = collect_logits(load_exported(part, file_format, build_network), batches)
        result = compare_logits(expected, logits, predict)
        limit = tolerance if tolerance is not None else QUANTIZED_TOLERANCE if quantized else TOLERANCE
        print(f"checked on {result.images} {what} against PyTorch: {_describe(result)}")
        if not result.agrees(limit):
            limits = f"at most {limit:g} of the largest |logit|, the typical image at most {limit / 10:g}"
            print(f"STOP: the file does not agree with PyTorch ({limits}); {out} is not written")
            return False
        if file_format == "onnx" and quantized:
            logits = collect_logits(load_exported(part, file_format, build_network, as_written=False), batches)
            difference = _describe(compare_logits(expected, logits, predict))
            print(f"with onnxruntime's default settings, which may also round biases: {difference}")
        kilobytes = part.stat().st_size / 1000
        part.replace(out)
    for name in token_inputs(batches[0]):
        shapes[name][0] = LENGTH
    inputs = ", ".join(f"[{', '.join(map(str, [BATCH, *shape]))}]" for shape in shapes.values())
    opset = f", opset {OPSET}" if file_format == "onnx" else ""
    print(f"written to {out}: {file_format}{opset}, {precision_of(student)}, input {inputs}, {kilobytes:.1f} KB")
    which = f"the deployed ones, {run.weights} ({origin})" if checkpoint is None else f"those of {checkpoint}"
    print(f"its weights are {which}")
    if quantized:
        storage = "this format stores quantised weights as floats, before their rounding"
        if file_format == "onnx":
            storage = "an ONNX file stores each quantised weight in 8 bits, at any number of levels"
        sizes = f"{size.stored / 1000:.1f} KB, coded {size.coded / 1000:.1f}"
        print(f"{storage}; at their own number of bits, all weights take {sizes}")
    return True


def _resolve_format(out: Path, file_format: str | None) -> str:
    if file_format is None:
        file_format = next((name for name, suffix in FORMATS.items() if out.suffix == suffix), None)
        if file_format is None:
            raise InputError(f"out must end in {', '.join(FORMATS.values())}, or --format must be set, got {out}")
    elif file_format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    return file_format


def _load_student(run: Run, checkpoint: Path | None) -> nn.Module:
    """Return the student with the weights of a file. Default: None, which means the deployed ones."""
    if checkpoint is not None:
        return load_weights(run.build_student(), checkpoint)
    try:
        return run.student()
    except InputError as error:
        if run.weights.is_file() or not (found := run.checkpoints()):
            raise
        raise InputError(f"{error}, or name one of {', '.join(map(str, found))} with --checkpoint") from error


def _check_batches(network: Callable[[Any], Any], batches: list[Inputs]) -> list[Inputs]:
    """Return a batch of one, the rest of the first batch, and whole batches: several sizes reveal a fixed batch size.

    One sample more has a token less, which reveals a fixed length. Large outputs, as maps, are compared on fewer
    samples.
    """
    sizes = [rows_of(x) for x in batches]
    one = take_rows(batches[0], slice(0, 1), sizes[0])
    most = max(2, _MOST_OUTPUTS // max(collect_logits(network, [one]).numel(), 1))
    parts, taken = [one], 1
    for number, (x, size) in enumerate(zip(batches, sizes, strict=True)):
        start = 1 if number == 0 else 0
        stop = min(size, start + most - taken)
        if stop > start:
            parts.append(take_rows(x, slice(start, stop), size))
            taken += stop - start
    return [*parts, without_last_token(one)] if token_inputs(one) else parts


def _predictor(task: Task, class_dim: int | None) -> Callable[[Tensor], Tensor] | None:
    """Return a function from logits to predicted labels; None for the regression task."""
    if task == "regression":
        return None
    return lambda logits: predicted_labels(logits if class_dim is None else logits.movedim(class_dim, -1), task)


def _evaluation_images(data: Any, run: Run) -> tuple[list[Inputs], str]:
    """Return batches of the datamodule's evaluation images, and the name of their part."""
    try:
        device = torch.device("cpu")
        sample = evaluation_batches(data, device) or evaluation_batches(data, device, labeled=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the data of {run.folder} cannot be read: {' '.join(str(error).split())}") from error
    if sample is None:
        raise InputError(f"the data of {run.folder} has no images to check the file on")
    what = "validation" if sample[1].startswith("validation") else "training"
    return [batch.x for batch in sample[0]], f"{what} images"


def _infer_task(run: Run, logits: Tensor) -> Task:
    """Return the task of the run's module, or if it has none, the one that fits the shape of the logits."""
    tasks: dict[str, Task] = {name: name for name in get_args(Task)}
    task = tasks.get(run.model_arguments.get("task") or run.metadata.get("task", ""))  # a taught module has its own
    return task or ("binary" if logits[0].numel() == 1 else "multiclass")


def _describe(result: Comparison) -> str:
    text = (
        f"largest difference of a logit {result.largest:.2g}, {result.relative:.2g} of the largest |logit|, the "
        f"typical image's {result.typical:.2g}"
    )
    if not result.predictions:
        return text
    agree = f"{100 * result.agreement:.2f} % of the predictions agree"
    return f"{text}; {agree} ({result.changed} of {result.predictions} differ)"
