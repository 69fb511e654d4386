"""Write predictions to a file that a person can open."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import Batch


class PredictionWriter(Callback):
    """Collect the probabilities of ``predict`` and write ``predictions.csv`` into the run's folder.

    One row a sample: its index, the decision by class name, and the probability of each class. Several processes
    give one file, ordered by index. Rows of a loader that knows no index are numbered as they come.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, list[float]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch."""
        if not isinstance(outputs, Tensor):  # somebody else's module
            return
        index = Batch.from_any(batch).index
        if index is None:  # as Lightning deals samples out to processes
            index = (len(self.rows) + torch.arange(len(outputs))) * trainer.world_size + trainer.global_rank
        self.rows += zip(index.tolist(), outputs.reshape(len(outputs), -1).tolist(), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, and write."""
        rows = self.rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        folder = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero or not rows:
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        width = len(rows[0][1])
        if names is None or len(names) != max(width, 2):
            names = [str(number) for number in range(max(width, 2))]
        path = Path(folder) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["index", "prediction", *(names if width > 1 else names[1:])])
            for number, probabilities in sorted(dict(rows).items()):
                decision = _decision(probabilities, names, getattr(pl_module, "task", "multiclass"))
                table.writerow([number, decision, *(f"{p:.6g}" for p in probabilities)])
        rank_zero_info(f"predictions written to {path}")


def _decision(probabilities: list[float], names: list[str], task: str) -> str:
    if task == "multilabel":
        return ";".join(name for name, p in zip(names, probabilities, strict=False) if p > 0.5)
    if task == "binary":
        return names[int(probabilities[0] > 0.5)]
    return names[max(range(len(probabilities)), key=probabilities.__getitem__)]
