"""Write predictions to a CSV file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.callbacks.any_batch import read_batch, rows_of_batch
from kd_lightning.callbacks.sample_names import sample_names
from kd_lightning.ranks import gather
from kd_lightning.runs.folder import run_folder

Kind = Literal["classes", "probabilities", "outputs"]
_TOLERANCE = 0.02  # of the sum of a row's probabilities, which may be bfloat16


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns to ``predictions.csv`` in the run's folder.

    The file has one row for each sample: its index, the path of its file and the hash of its content (empty where the
    datamodule does not know them), the predicted class name, and one column for each returned number. Rows are sorted
    by index, those of a second loader after those of the first. Several processes write one file. If batches have no
    index, samples are numbered in the order of each loader.

    - Probabilities (B, C), or (B,) of the binary task: the columns are the class names.
    - Integers (B,): they are the predicted classes, and there is no further column. Of the multilabel task (B, L).
    - Other floats (B, C) or (B,), such as logits or regressed values: the columns are ``output_<class>``, or
      ``output``. The highest of them is the predicted class if the module has the multiclass task, or the datamodule
      as many classes; else no class is predicted.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Accepts a ``predict_step`` with ``dataloader_iter``, unlike the base class.

        The base class refuses it because Lightning then has no sample indices. This writer does not use them.
        """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of ``predict``. Clears the rows of an earlier call."""
        self._clear()

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
        self._problem = _problem_of(prediction, rows, getattr(pl_module, "task", None))
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
        numbers = prediction.detach().reshape(len(prediction), -1)
        self._kinds.add((_kind_of(numbers, getattr(pl_module, "task", None)), numbers.shape[1]))
        keys = [(dataloader_idx, number) for number in index.tolist()]
        self.rows += zip(keys, numbers.tolist(), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of ``predict``. Gathers the rows of all processes and writes the file."""
        parts = gather(trainer, (self.rows, self._kinds, self._problem))
        rows = [row for part, _, _ in parts for row in part]
        kinds = {kind for _, part, _ in parts for kind in part}
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        path = folder / "predictions.csv"
        problem = next((problem for _, _, problem in parts if problem), "")
        if len({(kind == "classes", width) for kind, width in kinds}) > 1:
            problem = "predict_step returned outputs of several kinds or widths"
        if problem:
            before = f"; {path} is that of an earlier call" if path.exists() else ""
            rank_zero_info(f"no {path.name} is written: {problem}{before}")
        if problem or not rows:
            return
        data = getattr(trainer, "datamodule", None)
        known = data if self._has_index else None
        name_of = sample_names(known, getattr(trainer, "predict_dataloaders", None), "test")
        table = _Table(min(kinds), getattr(data, "class_names", None), pl_module)  # outputs if any batch has some
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "path", "content", "prediction", *table.columns])
            for (loader, number), numbers in sorted(dict(rows).items()):
                name = name_of(number) if loader == 0 else ("", "")
                cells = [f"{value:.6g}" for value in numbers] if table.columns else []
                writer.writerow([number, *name, table.predicted(numbers), *cells])
        rank_zero_info(f"predictions written to {path}")


def _problem_of(prediction: Any, rows: int | None, task: str | None) -> str:
    """Return why a prediction is not one class, or one row of numbers, for each row of its batch; else empty."""
    if not isinstance(prediction, Tensor):
        return f"predict_step returned {type(prediction).__name__}, no tensor"
    shape = [*prediction.shape]
    if prediction.is_complex():
        return f"predict_step returned complex numbers {shape}"
    if rows is None:
        return "the number of rows of a batch is not known; the module's unpack(batch) can convert it"
    if not shape or shape[0] != rows:
        return f"predict_step returned {shape} for a batch of {rows} rows"
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
