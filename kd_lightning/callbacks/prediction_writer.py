"""Write predictions to files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.callbacks.any_batch import read_batch, rows_of_batch
from kd_lightning.callbacks.dense_predictions import positions_of, predicted_positions, token_predictions, write_mask
from kd_lightning.callbacks.sample_names import Names, file_stems, sample_names
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.ranks import gather
from kd_lightning.runs.folder import run_folder
from kd_lightning.runs.spreadsheet import SafeWriter, unescape_cell

CSV, LINES, MASKS = "predictions.csv", "predictions.jsonl", "predictions"
"""Names of the files of predictions, and of the folder of masks."""
Kind = Literal["classes", "probabilities", "outputs"]
_TOLERANCE = 0.02  # of the sum of a row's probabilities, which may be bfloat16


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns to the run's folder: ``predictions.csv``, masks, or ``predictions.jsonl``.

    ``predictions.csv`` has one row for each sample: its index, the path of its file and the hash of its content (empty
    where the datamodule does not know them), the predicted class name, and one column for each returned number. Rows
    are sorted by index, those of a second loader after those of the first. Several processes write one file. If batches
    have no index, samples are numbered in the order of each loader.

    - Probabilities (B, C), or (B,) of the binary task: the columns are the class names.
    - Integers (B,): they are the predicted classes, and there is no further column. Of the multilabel task (B, L).
    - Other floats (B, C) or (B,), such as logits, regressed values or features: the columns are ``output_<class>``, or
      ``output``. The highest of them is the predicted class if the module has the multiclass task, or the datamodule
      as many classes; else no class is predicted.

    Where the module has ``class_dim``, outputs are dense:

    - Maps: the predicted classes of each sample are a PNG in ``predictions/``, of the size of the outputs. It has a
      palette, or 16 bits if a class number needs them. Its name is that of the sample's file, or else its index.
      ``predictions.csv`` lists the files as ``prediction``. Several labels or values of each pixel are not written.
    - Token sequences: ``predictions.jsonl`` has one line for each sample: its index, path and content, and the
      ``prediction`` of each token without padding, as class names (numbers without names), lists of the multilabel
      task's names, or lists of values. Of causal modules they are of the next token.

    Files of an earlier call that are no longer listed are deleted.

    Anything else is no prediction of one class for each sample: a line names it, and no file is written. The command
    line adds this callback to every run.

    The write interval is ``"batch"``: the rows are collected batch by batch, so the file is complete even with
    ``trainer.predict(return_predictions=False)``, and Lightning stores no second copy of the predictions.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._clear()

    def _clear(self) -> None:
        self.rows: list[tuple[tuple[int, int], list[float]]] = []  # by loader and index
        self._kinds: set[tuple[Kind, int]] = set()  # of the batches, each with the number of columns
        self._problem = ""  # why no file can be written
        self._has_index = True
        self._seen: Counter[int] = Counter()  # samples of this process, by loader
        self._dense: list[tuple[tuple[int, int], Any]] = []  # files of masks, or lists of tokens, by loader and index
        self._folder = Path()
        self._stem_of: Callable[[int], str] = str

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Accepts a ``predict_step`` with ``dataloader_iter``, unlike the base class.

        The base class refuses it because Lightning then has no sample indices. This writer does not use them.
        """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of ``predict``. Clears the rows of an earlier call."""
        self._clear()
        self._folder = run_folder(trainer)
        if getattr(pl_module, "class_dim", None) is not None:
            data = getattr(trainer, "datamodule", None)
            names = sample_names(data, getattr(trainer, "predict_dataloaders", None), "test")
            self._stem_of = file_stems(data, names, "test")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Runs after each predicted batch. Collects its rows."""
        if self._problem:
            return
        known = read_batch(pl_module, batch)
        rows = rows_of_batch(pl_module, batch) if known is None else len(known)
        dense = getattr(pl_module, "class_dim", None) is not None
        self._problem = _problem_of(prediction, rows, getattr(pl_module, "task", None), dense)
        if self._problem or (known is not None and known.is_padding):
            return
        index = None if known is None else known.index
        if index is None:  # in the order in which Lightning's sampler distributes samples to processes
            numbers = self._seen[dataloader_idx] + torch.arange(len(prediction))
            index = numbers * trainer.world_size + trainer.global_rank
            self._has_index = False
        self._seen[dataloader_idx] += len(prediction)
        if not len(prediction):
            return
        keys = [(dataloader_idx, number) for number in index.tolist()]
        if dense:
            try:
                self._collect_dense(trainer, pl_module, prediction, known, keys)
            except InputError as error:
                self._problem = str(error)
            return
        numbers = prediction.detach().reshape(len(prediction), -1)
        self._kinds.add((_kind_of(numbers, getattr(pl_module, "task", None)), numbers.shape[1]))
        self.rows += zip(keys, numbers.tolist(), strict=True)

    def _collect_dense(
        self, trainer: Trainer, module: Any, prediction: Tensor, batch: Batch | None, keys: list[tuple[int, int]]
    ) -> None:
        """Write the masks of a batch, or collect its sequences."""
        task: Task = getattr(module, "task", "multiclass")
        values = predicted_positions(prediction, task, module.class_dim)
        many = task in ("multilabel", "regression")
        there = positions_of(batch, values.shape[: values.ndim - many])
        if values.ndim - many == 2:
            names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
            self._dense += zip(keys, token_predictions(values, there, task, names), strict=True)
            return
        for row, (loader, number) in enumerate(keys):
            if number < 0:
                continue
            stem = self._stem_of(number) if loader == 0 and self._has_index else f"{number:06d}"
            file = Path(MASKS, *[f"loader_{loader}"] * (loader > 0), f"{stem}.png")
            write_mask(self._folder / file, values[row], None if there is None else there[row])
            self._dense.append(((loader, number), file.as_posix()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of ``predict``. Gathers the rows of all processes and writes the file."""
        parts = gather(trainer, (self.rows, self._kinds, self._problem, self._dense))
        rows = dict(row for part in parts for row in part[0])
        dense = dict(row for part in parts for row in part[3])
        kinds = {kind for part in parts for kind in part[1]}
        if not trainer.is_global_zero:
            return
        problem = next((part[2] for part in parts if part[2]), "")
        if len({(kind == "classes", width) for kind, width in kinds}) > 1 or len({*map(type, dense.values())}) > 1:
            problem = "predict_step returned outputs of several kinds or widths"
        before = [path for name in (CSV, LINES) if (path := self._folder / name).exists()]
        if problem:
            earlier = f"; {before[0]} is that of an earlier call" if before else ""
            rank_zero_info(f"no {CSV} is written: {problem}{earlier}")
        if problem or not (rows or dense):
            return
        data = getattr(trainer, "datamodule", None)
        known = data if self._has_index else None
        name_of = sample_names(known, getattr(trainer, "predict_dataloaders", None), "test")
        # outputs if any batch has some
        table = _Table(min(kinds), getattr(data, "class_names", None), pl_module) if rows else None
        self._folder.mkdir(parents=True, exist_ok=True)
        listed = [file for file in dense.values() if isinstance(file, str)]
        _delete_masks(self._folder, {*listed})
        path = self._folder / (LINES if dense and not listed else CSV)
        for other in before:
            if other != path:
                other.unlink()
        if path.name == LINES:
            _write_lines(path, dense, name_of)
        else:
            _write_table(path, rows, dense, name_of, table)
        rank_zero_info(f"predictions written to {path}")


def _write_table(
    path: Path,
    rows: dict[tuple[int, int], list[float]],
    files: dict[tuple[int, int], str],
    name_of: Names,
    table: _Table | None,
) -> None:
    """Write a row for each sample: of numbers, or of the file of its mask."""
    columns = [] if table is None else table.columns
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = SafeWriter(file)
        writer.writerow(["index", "path", "content", "prediction", *columns])
        for loader, number in sorted({**rows, **files}):
            name = name_of(number) if loader == 0 else ("", "")
            if table is None:
                writer.writerow([number, *name, files[loader, number]])
                continue
            numbers = rows[loader, number]
            cells = [f"{value:.6g}" for value in numbers] if columns else []
            writer.writerow([number, *name, table.predicted(numbers), *cells])


def _write_lines(path: Path, sequences: dict[tuple[int, int], list[Any]], name_of: Names) -> None:
    """Write a line for each sample, with what is predicted for its tokens."""
    with path.open("w", encoding="utf-8") as file:
        for loader, number in sorted(sequences):
            if number < 0:
                continue
            names = name_of(number) if loader == 0 else ("", "")
            line = {"index": number, "path": names[0], "content": names[1]} | ({"loader": loader} if loader else {})
            text = json.dumps(line | {"prediction": sequences[loader, number]}, ensure_ascii=False)
            file.write(text + "\n")


def _delete_masks(folder: Path, listed: set[str]) -> None:
    """Delete the masks that the table of an earlier call lists and this one does not."""
    try:
        with (folder / CSV).open(newline="", encoding="utf-8") as file:
            before = [unescape_cell(row["prediction"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error):
        return
    for name in before:
        path = PurePosixPath(name or "")
        is_mask = path.parts[:1] == (MASKS,) and path.suffix == ".png" and ".." not in path.parts
        if is_mask and name not in listed:
            (folder / name).unlink(missing_ok=True)


def _problem_of(prediction: Any, rows: int | None, task: str | None, dense: bool = False) -> str:
    """Return why a prediction is not one class, or one row of numbers, for each row of its batch; else empty.

    If the outputs are dense, only the number of rows is checked.
    """
    if not isinstance(prediction, Tensor):
        return f"predict_step returned {type(prediction).__name__}, no tensor"
    shape = [*prediction.shape]
    if prediction.is_complex():
        return f"predict_step returned complex numbers {shape}"
    if rows is None:
        return "the number of rows of a batch is not known; the module's unpack(batch) can convert it"
    if not shape or shape[0] != rows:
        return f"predict_step returned {shape} for a batch of {rows} rows"
    if dense:
        return ""
    if any(size != 1 for size in shape[2:]):
        return f"predict_step returned dense outputs {shape}, not one row of numbers for each sample"
    width = prediction[0].numel() if rows else 1
    if not prediction.is_floating_point() and task != "multilabel" and width != 1:
        return f"predict_step returned integers {shape}, not one class for each sample"
    return ""


class _Table:
    """What the columns are, and which class a row predicts.

    Args:
        kind: What the numbers of a sample are, and how many it has.
        names: Names of the datamodule's classes; None if they are not known.
        module: The module, whose ``task`` counts if it has one.
    """

    def __init__(self, kind: tuple[Kind, int], names: Any, module: Any) -> None:
        self.task = getattr(module, "task", None)
        self.kind, width = kind
        names = None if self.task == "features" else names
        wanted = None if self.kind == "classes" and self.task != "multilabel" else max(width, 2)
        self.is_named = isinstance(names, list | tuple) and wanted in (None, len(names))
        self.names = [str(name) for name in names] if self.is_named else [str(number) for number in range(wanted or 0)]
        self.columns = [] if self.kind == "classes" else self.names if width > 1 else self.names[1:]
        if self.kind == "outputs":
            self.columns = [f"output_{name}" for name in self.names] if width > 1 else ["output"]

    def predicted(self, numbers: Sequence[float]) -> str:
        """Return the class name; of the multilabel task all names above 0.5, joined by ``;``."""
        if any(value != value for value in numbers):  # NaN
            return ""
        if self.kind == "outputs" and not (len(numbers) > 1 and (self.task == "multiclass" or self._are_classes)):
            return ""
        if self.task == "multilabel":
            return ";".join(
                name for name, value in zip(self.names[-len(numbers) :], numbers, strict=True) if value > 0.5
            )
        if self.kind == "classes":
            number = int(numbers[0])
            return self.names[number] if 0 <= number < len(self.names) else str(number)
        if len(numbers) == 1:
            return self.names[int(numbers[0] > 0.5)]
        return self.names[max(range(len(numbers)), key=numbers.__getitem__)]

    @property
    def _are_classes(self) -> bool:
        return self.task is None and self.is_named


def _kind_of(numbers: Tensor, task: str | None) -> Kind:
    """Return what the numbers (B, C) of a batch are. NaN may be a probability."""
    if not numbers.is_floating_point():
        return "classes"
    if ((numbers < 0) | (numbers > 1)).any():
        return "outputs"
    if task in ("multilabel", "binary"):
        return "probabilities"
    far = (numbers.float().sum(dim=1) - 1).abs() > _TOLERANCE
    return "outputs" if numbers.shape[1] == 1 or far.any() else "probabilities"
