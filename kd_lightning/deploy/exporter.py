"""Write a run's student to files of any format, each compared with PyTorch on the run's validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from kd_lightning.data.batch_transfer import own_hooks
from kd_lightning.data.evaluation_batches import batches_of, calibration_batches, evaluation_batches
from kd_lightning.data.preprocessing import Description, describe_data, transform_of
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.deploy.comparison import (
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    Accuracy,
    Comparison,
    Predict,
    collect_logits,
    compare_logits,
    join_labels,
    measure_accuracy,
)
from kd_lightning.deploy.export import (
    FLOAT_ONLY,
    FORMATS,
    LOSSES,
    check_packages,
    export_student,
    load_exported,
    temporary_file,
)
from kd_lightning.deploy.metadata import describe_accuracy, describe_file
from kd_lightning.deploy.onnx_files import set_metadata
from kd_lightning.deploy.signature import named_tensors, token_inputs, without_last_token
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, rows_of, take_rows
from kd_lightning.losses.base import Task, predicted_labels
from kd_lightning.modules.seams import Seams
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights, metadata_texts

FOLDER = "export"
"""Folder of exported files in that of a run."""
_MOST_OUTPUTS = 2**27  # numbers that a file is compared on
_CALIBRATION = 512  # samples; the ranges of activations change little with more
_PICTURES = 16  # pictures that a description of the preprocessing is compared on


class Exported(NamedTuple):
    """A file that was written and compared.

    Attributes:
        path: The file, or where it would lie.
        file_format: The format.
        problem: Why the file was not kept; None if it was.
        comparison: The differences of the logits.
        accuracy: Right predictions of the file; None without labels.
        bytes: Size of the file.
        rewritten: The differences with onnxruntime's default settings, for ONNX files of low precision.
    """

    path: Path
    file_format: str
    problem: str | None
    comparison: Comparison
    accuracy: Accuracy | None
    bytes: int
    rewritten: Comparison | None = None


class Exporter:
    """A run's student with the samples that its files are compared on.

    Args:
        folder: The run's folder.
        checkpoint: Checkpoint or weights. Default: None, which means the run's ``student.safetensors``.

    Attributes:
        run: The run.
        student: The student, in eval mode.
        logits: From the student and inputs to its logits, as the run's module calls it.
        quantized: Whether it has layers of low precision.
        batches: Inputs, the first of one sample.
        part: Where they come from: ``validation`` or ``training``.
        expected: PyTorch's logits.
        accuracy: Right predictions of PyTorch; None without labels.
        preprocessing: From a picture to the input; None if it cannot be described.

    Raises:
        InputError: If the folder is not a run with a student and a datamodule, the weights are missing or do not fit,
            the data cannot be read, or no step shows what a taught network is called with.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None) -> None:
        self.run = Run(folder)
        self.checkpoint = checkpoint
        self.student = _load_student(self.run, checkpoint).eval()
        self.quantized = bool(quantized_layers(self.student))
        seams = Seams.of_run(self.run)
        self.logits = seams.logits
        network = partial(self.logits, self.student)
        self.data = seams.read(self.run.datamodule())
        samples, labels, self.part = _evaluation_samples(self.data, self.run)
        self.batches = _check_batches(network, samples)
        self.expected = collect_logits(network, self.batches)
        self.task = infer_task(self.run, self.expected)
        self.predict = predictor(self.task, self.run.model_arguments.get("class_dim"))
        count = sum(map(rows_of, self.batches)) - bool(token_inputs(self.batches[0]))
        self.labels = None if labels is None else labels[:count]
        self.accuracy = measure_accuracy(self.expected, self.labels, self.predict)
        self.preprocessing = _checked_description(self.data, samples[0], is_plain=seams.is_plain)
        self._calibration: list[Inputs] = []

    @property
    def origin(self) -> str:
        """Where the weights come from: a checkpoint, or a step."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        return self.run.metadata.get("weights", self.run.weights.name)

    def default_path(self, file_format: str, folder: Path | None = None) -> Path:
        """Return the path of a file in a folder. Default: None, which means ``export`` in the run's folder."""
        return (folder or self.run.folder / FOLDER) / f"student{FORMATS[file_format]}"

    def write(self, out: Path, file_format: str, tolerance: float | None = None) -> Exported:
        """Write a file. It gets its name only if it agrees with PyTorch. If not, an older file of that name stays.

        Args:
            out: The file.
            file_format: One of :data:`~kd_lightning.deploy.export.FORMATS`.
            tolerance: Largest allowed difference. For ``onnx_fp16`` and ``onnx_int8`` it is the share of predictions
                that may be wrong beside those that are wrong in PyTorch; default 0.005 and 0.01. Without labels it is
                the share that may change. For the other formats it is a share of the largest magnitude of a logit, see
                :meth:`~kd_lightning.deploy.comparison.Comparison.agrees`; default 1e-4, and 5e-2 for a student of low
                precision.

        Raises:
            InputError: If the format cannot express the student, a package is missing, or the file cannot be written.
        """
        if file_format in FLOAT_ONLY and self.quantized:
            raise InputError(f"{file_format} takes float students; onnx holds the integers of one of low precision")
        check_packages(file_format, quantized=self.quantized)
        if file_format == "onnx_int8" and not self._calibration:
            found = calibration_batches(self.data, torch.device("cpu"), _CALIBRATION)
            self._calibration = [batch.x for batch in found]
        x, described = self.batches[0], {"task": self.task, "data": self.data, "preprocessing": self.preprocessing}
        metadata = describe_file(self.run, self.student, x, file_format, **described)
        metadata |= {"file": (self.checkpoint or self.run.weights).name, "weights": self.origin}
        metadata["accuracy"] = describe_accuracy(self.accuracy, self.part)
        with temporary_file(out, file_format) as path:
            export_student(self.student, x, path, file_format, metadata, self._calibration, self.logits)
            load = partial(load_exported, path, file_format, self.run.build_student, logits=self.logits)
            logits = collect_logits(load(), self.batches)
            result = compare_logits(self.expected, logits, self.predict)
            accuracy = measure_accuracy(logits, self.labels, self.predict)
            problem = self._problem(file_format, result, accuracy, tolerance)
            rewritten = None
            if file_format == "onnx" and self.quantized and problem is None:
                rewritten = compare_logits(
                    self.expected, collect_logits(load(as_written=False), self.batches), self.predict
                )
            if file_format in LOSSES and problem is None:
                metadata["accuracy"] = describe_accuracy(accuracy, self.part)
                set_metadata(path, metadata_texts(metadata))
            size = path.stat().st_size
            if problem is None:
                path.replace(out)
        return Exported(out, file_format, problem, result, accuracy, size, rewritten)

    def _problem(
        self, file_format: str, result: Comparison, accuracy: Accuracy | None, tolerance: float | None
    ) -> str | None:
        """Return why a file does not agree; None if it does."""
        if file_format not in LOSSES or not result.predictions:
            own = QUANTIZED_TOLERANCE if self.quantized or file_format in LOSSES else TOLERANCE
            limit = own if tolerance is None else tolerance
            if result.agrees(limit):
                return None
            return f"at most {limit:g} of the largest |logit|, the typical image at most {limit / 10:g}"
        limit = LOSSES[file_format] if tolerance is None else tolerance
        if accuracy is None or self.accuracy is None:
            wrong, count, what = result.changed, result.predictions, "changed"
        else:
            wrong, count, what = (
                self.accuracy.correct - accuracy.correct,
                accuracy.n,
                "wrong that PyTorch has right",
            )
        if wrong <= 1 + limit * count and result.is_finite:
            return None
        return f"{wrong} of {count} predictions are {what}, allowed are 1 + {limit:g} of them"


def predictor(task: Task, class_dim: int | None) -> Predict | None:
    """Return a function from logits to predicted labels; None for the regression task."""
    if task == "regression":
        return None
    return lambda logits: predicted_labels(logits if class_dim is None else logits.movedim(class_dim, -1), task)


def infer_task(run: Run, logits: Tensor) -> Task:
    """Return the task of the run's module, or if it has none, the one that fits the shape of the logits."""
    tasks: dict[str, Task] = {name: name for name in get_args(Task)} | {"features": "regression"}
    task = tasks.get(run.model_arguments.get("task") or run.metadata.get("task", ""))  # a taught module has its own
    return task or ("binary" if logits[0].numel() == 1 else "multiclass")


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


def _check_batches(network: Callable[[Any], Any], batches: Sequence[Inputs]) -> list[Inputs]:
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


def _evaluation_samples(data: Any, run: Run) -> tuple[list[Inputs], Tensor | None, str]:
    """Return batches of the datamodule's evaluation samples, their labels, and the name of their part."""
    try:
        device = torch.device("cpu")
        sample = evaluation_batches(data, device) or evaluation_batches(data, device, labeled=False)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the data of {run.folder} cannot be read: {' '.join(str(error).split())}") from error
    if sample is None:
        raise InputError(f"the data of {run.folder} has no images to check the file on")
    part = "validation" if sample[1].startswith("validation") else "training"
    return [batch.x for batch in sample[0]], join_labels([batch.y for batch in sample[0]]), part


def _checked_description(data: Any, x: Inputs, *, is_plain: bool) -> Description | None:
    """Describe the preprocessing, and compare it with the inputs of some pictures; None if it gives others.

    Args:
        data: The datamodule, whose batches are read as the module reads them.
        x: Inputs of the student.
        is_plain: Whether the student gets what a batch holds, as it is.
    """
    parts = named_tensors(x)
    found = describe_data(data, [*next(iter(parts.values())).shape[1:]]) if len(parts) == 1 else None
    if found is None:
        return None
    loader = data.val_dataloader()
    loader = loader if isinstance(loader, ViewLoader) else data.train_dataloader()
    if not isinstance(loader, ViewLoader) or not isinstance(loader.dataset, ViewDataset):
        return found if is_plain and not own_hooks(data) else None  # a stream, or a datamodule of the user
    indices, labels = loader.dataset.indices[:_PICTURES], loader.labels
    views = ViewLoader(loader.dataset.of(indices, data.eval_transform), labels, batch_size=_PICTURES)
    expected = next(batches_of(views, data, torch.device("cpu"))).x
    transform = transform_of(found)
    for row, index in enumerate(indices.tolist()):
        pixels = read_pixels(loader.dataset.images, index)
        if pixels.is_floating_point() and not bool(((pixels >= 0) & (pixels <= 1)).all()):
            return None  # no picture
        own = next(iter(named_tensors(take_rows(expected, slice(row, row + 1), len(indices))).values()))
        if not torch.allclose(transform(pixels), own[0], rtol=1e-5, atol=1e-5):
            return None
    return found
