"""Watch that pseudo-labels do no harm."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.errors import InputError

ACCURACY = "val/accuracy"
LABELED_ONLY = "val/labeled_only_accuracy"


class BaselineMonitor(Callback):
    """Compare a semi-supervised run with its twin: the same student trained on the labels alone, on the same split.

    Charts the twin's accuracy as ``val/labeled_only_accuracy`` beside ``val/accuracy``, and warns at the end of a fit
    that stays below it. What is compared is what the runs deploy: the accuracy at the best checkpoint where one is
    monitored, else the last. Nothing is saved: a resumed run reads the twin again. Works on any LightningModule that
    logs ``val/accuracy``; where the datamodule has a ``split``, it must be the twin's.

    Args:
        twin: Folder of the finished run of the twin. Only a fit reads it.

    Raises:
        InputError: If the folder is no finished run that was validated, or its split is another.
    """

    def __init__(self, baseline: str | Path) -> None:
        self.baseline = Path(baseline)
        self._accuracy = math.nan
        self._images: int | None = None
        self._rows: list[dict[str, float]] = []
        self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the twin's accuracy, and check its split."""
        if stage != TrainerFn.FITTING:
            return
        self._accuracy = read_accuracy(self.baseline)
        self._images = None
        split: Any = getattr(getattr(trainer, "datamodule", None), "split", None)
        if hasattr(split, "val") and hasattr(split, "labeled"):  # somebody else's split may be anything
            check_split(self.baseline, split)
            if isinstance(trainer.limit_val_batches, float) and trainer.limit_val_batches == 1:  # an int is a count
                self._images = len(split.val)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the figures that a resumed run has logged before."""
        files = [Path(a.log_dir) / "metrics.csv" for a in trainer.loggers if isinstance(a, CSVLogger)]
        rows = _read_rows(files[0]) if files and files[0].is_file() else []
        self._rows = [row for row in rows if row.get("step", math.inf) < trainer.global_step]
        self._told = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chart the twin's accuracy."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.log(LABELED_ONLY, self._accuracy, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the run's own accuracy."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if ACCURACY not in trainer.callback_metrics:
            self._tell(f"BaselineMonitor needs a module that logs {ACCURACY}, {type(pl_module).__name__} logs none")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the run stayed below its twin."""
        if getattr(trainer, "fast_dev_run", False):
            return
        accuracy = self._reached(trainer)
        if accuracy is None:
            self._tell(
                f"BaselineMonitor: the run logged no {ACCURACY}, so it is not known whether pseudo-labels did harm"
            )
        elif accuracy < self._accuracy:
            self._tell(
                f"BaselineMonitor: {ACCURACY} is {accuracy:.4f}, below the {self._accuracy:.4f} of the same student trained "
                f"on the labels alone ({self.baseline}){explain_difference(accuracy, self._accuracy, self._images)}. Try a "
                f"higher threshold, a smaller unsupervised_weight or a later warm-up, or deploy the twin"
            )

    def _reached(self, trainer: Trainer) -> float | None:
        """The accuracy of what this run deploys; None where it is not known."""
        monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        if not monitors:
            return choose_accuracy(self._rows)
        best = monitors[0]
        if best.monitor == ACCURACY and best.best_model_score is not None:  # knows of all epochs, without a metrics.csv
            return float(best.best_model_score)
        return choose_accuracy(self._rows, best.monitor, best.mode)

    def _tell(self, text: str) -> None:
        if not self._told:
            rank_zero_warn(text)
        self._told = True


def read_accuracy(folder: Path) -> float:
    """The validation accuracy of what a finished run deployed.

    Raises:
        InputError: If the folder is no finished run, or was not validated.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        versions = sorted(folder.glob("version_*/metrics.csv"))
        what = "has no metrics.csv" if folder.is_dir() else "is not there"
        hint = f", such as {versions[-1].parent}" if versions else ""
        raise InputError(f"baseline: {folder} {what}; allowed: the folder of a finished run on the labels alone{hint}")
    checkpoint: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            checkpoint = config.get("checkpoint") or {}
        except (yaml.YAMLError, AttributeError) as error:
            raise InputError(f"baseline: {folder / 'config.yaml'} is no run's config") from error
    accuracy = choose_accuracy(_read_rows(path), checkpoint.get("monitor"), checkpoint.get("mode", "max"))
    if accuracy is None:
        raise InputError(
            f"baseline: {path} has no {ACCURACY}; the twin must have a validation part (data.val_size above 0)"
        )
    return accuracy


def choose_accuracy(rows: Sequence[dict[str, float]], monitor: str | None = None, mode: str = "max") -> float | None:
    """The accuracy where ``monitor`` was best first; the last one without a monitor, or where it was never logged.

    >>> rows = [{"val/accuracy": 0.5, "val/loss": 1.0}, {"val/accuracy": 0.4, "val/loss": 2.0}]
    >>> choose_accuracy(rows), choose_accuracy(rows, "val/accuracy"), choose_accuracy(rows, "val/loss", "max")
    (0.4, 0.5, 0.4)
    """
    rows = [row for row in rows if ACCURACY in row]
    scored = [row for row in rows if monitor in row and not math.isnan(row[monitor])] if monitor else []
    if not scored:
        return rows[-1][ACCURACY] if rows else None
    best = (max if mode == "max" else min)(scored, key=lambda row: row[str(monitor)])
    return best[ACCURACY]


def check_split(folder: Path, split: Any) -> None:
    """Refuse a twin that was trained or validated on other samples.

    Raises:
        InputError: If its ``val`` or ``labeled`` differ; the message says which.
    """
    path = folder / "split.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in ("val", "labeled") if [*saved[name]] != [*getattr(split, name)]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"baseline: {path} is missing or no split file, so it is not known what it learned from"
        ) from error
    if differ:
        raise InputError(
            f"baseline: {folder} was made on another split, its {' and '.join(differ)} samples differ; train both with "
            f"the same labeled, val and seed, or with labeled: {path}"
        )


def explain_difference(accuracy: float, before: float, images: int | None) -> str:
    """What a difference of two accuracies stands for; nothing where the number of images is not known.

    The standard error is that of two independent binomials. Two runs on the same images differ by less chance, how
    much less is not known.
    """
    if not images:
        return ""
    error = math.sqrt((accuracy * (1 - accuracy) + before * (1 - before)) / images)
    gap = before - accuracy
    chance = "of so few images it may be chance" if gap < 2 * error else "that is hardly chance"
    return (
        f": {100 * gap:.2f} points, {gap * images:.0f} of {images} validation images, with a standard error of "
        f"{100 * error:.2f} points; {chance}"
    )


def _read_rows(path: Path) -> list[dict[str, float]]:
    """The figures of a metrics.csv, row by row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
