"""Write predictions to a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.callbacks.sample_names import sample_names
from kd_lightning.ranks import gather
from kd_lightning.runs.folder import run_folder


class PredictionWriter(BasePredictionWriter):
    """Write the probabilities that ``predict_step`` returns to ``predictions.csv`` in the run's folder.

    The file has one row for each sample: its index, the path of its file and the hash of its content (empty where the
    datamodule does not know them), the predicted class name, and the probability of each class. Rows are sorted by
    index, those of a second loader after those of the first. Several processes write one file. If batches have no
    index, samples are numbered in the order of the loader. If ``predict_step`` returns no tensor, no file is written.
    The command line adds this callback to every run.

    The write interval is ``"batch"``: the rows are collected batch by batch, so the file is complete even with
    ``trainer.predict(return_predictions=False)``, and Lightning stores no second copy of the predictions.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.rows: list[tuple[tuple[int, int], list[float]]] = []  # by loader and index
        self._has_index = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Accepts a ``predict_step`` with ``dataloader_iter``, unlike the base class.

        The base class refuses it because Lightning then has no sample indices. This writer does not use them.
        """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of ``predict``. Clears the rows of an earlier call."""
        self.rows = []
        self._has_index = True

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
        if not isinstance(prediction, Tensor):  # another library's module
            return
        batch = Batch.from_any(batch)
        if batch.is_padding:
            return
        index = batch.index
        if index is None:  # in the order in which Lightning's sampler distributes samples to processes
            index = (len(self.rows) + torch.arange(len(prediction))) * trainer.world_size + trainer.global_rank
            self._has_index = False
        keys = [(dataloader_idx, number) for number in index.tolist()]
        self.rows += zip(keys, prediction.reshape(len(prediction), -1).tolist(), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of ``predict``. Gathers the rows of all processes and writes the file."""
        rows = [row for part in gather(trainer, self.rows) for row in part]
        folder = run_folder(trainer)
        if not trainer.is_global_zero or not rows:
            return
        data = getattr(trainer, "datamodule", None)
        known = data if self._has_index else None
        name_of = sample_names(known, getattr(trainer, "predict_dataloaders", None), "test")
        names = getattr(data, "class_names", None)
        width = len(rows[0][1])
        if names is None or len(names) != max(width, 2):
            names = [str(number) for number in range(max(width, 2))]
        path = folder / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["index", "path", "content", "prediction", *(names if width > 1 else names[1:])])
            for (loader, number), probabilities in sorted(dict(rows).items()):
                predicted = _predicted_class(probabilities, names, getattr(pl_module, "task", "multiclass"))
                name = name_of(number) if loader == 0 else ("", "")
                table.writerow([number, *name, predicted, *(f"{p:.6g}" for p in probabilities)])
        rank_zero_info(f"predictions written to {path}")


def _predicted_class(probabilities: list[float], names: list[str], task: str) -> str:
    """Return the class name; of the multilabel task all names above 0.5, joined by ``;``."""
    if task == "multilabel":
        return ";".join(name for name, p in zip(names, probabilities, strict=False) if p > 0.5)
    if task == "binary":
        return names[int(probabilities[0] > 0.5)]
    return names[max(range(len(probabilities)), key=probabilities.__getitem__)]
