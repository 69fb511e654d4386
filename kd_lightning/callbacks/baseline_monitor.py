"""Compare a semi-supervised run with its baseline: the same student trained without pseudo-labels."""

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
BASELINE_ACCURACY = "val/baseline_accuracy"


class BaselineMonitor(Callback):
    """Log the accuracy of a baseline run beside that of this run, and warn if this run ends below it.

    The baseline is the same student, trained on the labeled samples of the same split alone. Its accuracy is logged as
    ``val/baseline_accuracy``. The two compared accuracies are those of the deployed weights: at the best checkpoint if
    a checkpoint callback monitors a metric, else at the last epoch. Nothing is saved: a resumed run reads the baseline
    again. Works on any LightningModule that logs ``val/accuracy``. If the datamodule has a ``split``, it must be the
    baseline's.

    Args:
        baseline: Folder of the baseline's finished run. It is read only for a fit.

    Raises:
        InputError: If the folder is not a finished run with validation metrics, or its split differs.
    """

    def __init__(self, baseline: str | Path) -> None:
        self.baseline = Path(baseline)
        self._accuracy = math.nan
        self._images: int | None = None
        self._rows: list[dict[str, float]] = []
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Before a fit, reads the baseline's accuracy and checks its split."""
        if stage != TrainerFn.FITTING:
            return
        self._accuracy = read_accuracy(self.baseline)
        self._images = None
        split: Any = getattr(getattr(trainer, "datamodule", None), "split", None)
        if hasattr(split, "val") and hasattr(split, "labeled"):  # another datamodule's split may be of any type
            check_split(self.baseline, split)
            # a float limit of 1 means all batches, an integer is a number of batches
            if isinstance(trainer.limit_val_batches, float) and trainer.limit_val_batches == 1:
                self._images = len(split.val)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training. Reads the metrics that a resumed run has logged before."""
        files = [Path(a.log_dir) / "metrics.csv" for a in trainer.loggers if isinstance(a, CSVLogger)]
        rows = _read_rows(files[0]) if files and files[0].is_file() else []
        self._rows = [row for row in rows if row.get("step", math.inf) < trainer.global_step]
        self._warned = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of each validation epoch. Logs the baseline's accuracy."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pl_module.log(BASELINE_ACCURACY, self._accuracy, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after each validation. Records the metrics of this run."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if ACCURACY not in trainer.callback_metrics:
            self._warn_once(
                f"BaselineMonitor needs a module that logs {ACCURACY}, {type(pl_module).__name__} logs none"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Warns if this run is below its baseline."""
        if getattr(trainer, "fast_dev_run", False):
            return
        accuracy = self._deployed_accuracy(trainer)
        if accuracy is None:
            self._warn_once(
                f"BaselineMonitor: the run logged no {ACCURACY}, so it cannot be compared with {self.baseline}"
            )
        elif accuracy < self._accuracy:
            difference = describe_difference(accuracy, self._accuracy, self._images)
            self._warn_once(
                f"BaselineMonitor: {ACCURACY} is {accuracy:.4f}, below the {self._accuracy:.4f} of the baseline "
                f"without pseudo-labels ({self.baseline}){difference}. Try a higher threshold, a smaller "
                f"unsupervised_weight or a later warm-up, or deploy the baseline"
            )

    def _deployed_accuracy(self, trainer: Trainer) -> float | None:
        """Return the accuracy of the weights that this run deploys, or None if it is unknown."""
        monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        if not monitors:
            return select_accuracy(self._rows)
        best = monitors[0]
        if best.monitor == ACCURACY and best.best_model_score is not None:  # covers all epochs without a metrics.csv
            return float(best.best_model_score)
        return select_accuracy(self._rows, best.monitor, best.mode)

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            rank_zero_warn(text)
        self._warned = True


def read_accuracy(folder: Path) -> float:
    """Return the validation accuracy of the weights that a finished run deployed.

    Raises:
        InputError: If the folder is not a finished run, or the run was not validated.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        versions = sorted(folder.glob("version_*/metrics.csv"))
        problem = "has no metrics.csv" if folder.is_dir() else "does not exist"
        hint = f", such as {versions[-1].parent}" if versions else ""
        raise InputError(f"baseline: {folder} {problem}; allowed: the folder of a finished run{hint}")
    checkpoint: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            checkpoint = config.get("checkpoint") or {}
        except (yaml.YAMLError, AttributeError) as error:
            raise InputError(f"baseline: {folder / 'config.yaml'} is not the config of a run") from error
    accuracy = select_accuracy(_read_rows(path), checkpoint.get("monitor"), checkpoint.get("mode", "max"))
    if accuracy is None:
        raise InputError(
            f"baseline: {path} has no {ACCURACY}; the baseline must have a validation part (data.val_size above 0)"
        )
    return accuracy


def select_accuracy(rows: Sequence[dict[str, float]], monitor: str | None = None, mode: str = "max") -> float | None:
    """Return the accuracy of the first row in which ``monitor`` is best.

    If ``monitor`` is None or was never logged, return the last accuracy; if there is none, return None.

    >>> rows = [{"val/accuracy": 0.5, "val/loss": 1.0}, {"val/accuracy": 0.4, "val/loss": 2.0}]
    >>> select_accuracy(rows), select_accuracy(rows, "val/accuracy"), select_accuracy(rows, "val/loss", "max")
    (0.4, 0.5, 0.4)
    """
    rows = [row for row in rows if ACCURACY in row]
    scored = [row for row in rows if monitor in row and not math.isnan(row[monitor])] if monitor else []
    if not scored:
        return rows[-1][ACCURACY] if rows else None
    best = (max if mode == "max" else min)(scored, key=lambda row: row[str(monitor)])
    return best[ACCURACY]


def check_split(folder: Path, split: Any) -> None:
    """Check that the baseline in ``folder`` was trained and validated on the samples of ``split``.

    Raises:
        InputError: If ``val`` or ``labeled`` differ, or the baseline has no readable split file.
    """
    path = folder / "split.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in ("val", "labeled") if [*saved[name]] != [*getattr(split, name)]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"baseline: {path} is missing or is not a split file, so its samples cannot be compared"
        ) from error
    if differ:
        raise InputError(
            f"baseline: {folder} has another split, its {' and '.join(differ)} samples differ; train both runs with "
            f"the same labeled, val_size and seed, or with labeled: {path}"
        )


def describe_difference(accuracy: float, baseline: float, images: int | None) -> str:
    """Describe how large and how reliable the difference of two accuracies is; empty if ``images`` is unknown.

    The standard error is that of two independent binomial proportions. Two runs on the same images differ by less
    chance than that, by an unknown amount.
    """
    if not images:
        return ""
    error = math.sqrt((accuracy * (1 - accuracy) + baseline * (1 - baseline)) / images)
    gap = baseline - accuracy
    chance = "the difference may be chance" if gap < 2 * error else "chance is an unlikely cause"
    return (
        f": {100 * gap:.2f} points, {gap * images:.0f} of {images} validation images, with a standard error of "
        f"{100 * error:.2f} points; {chance}"
    )


def _read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.csv, without their empty cells."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error
