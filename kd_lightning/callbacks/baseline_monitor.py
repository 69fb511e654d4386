"""Compare a semi-supervised run with its baseline: the same student trained without pseudo-labels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_lightning.callbacks.any_batch import count_labeled
from kd_lightning.errors import InputError
from kd_lightning.runs.csv_logger import read_metrics, validations
from kd_lightning.runs.figures.statistics import LEAST_SAMPLES
from kd_lightning.runs.metric_direction import direction_of
from kd_lightning.runs.run import METRICS, SPLIT, Run

ACCURACY = "val/accuracy"
BASELINE_ACCURACY = "val/baseline_accuracy"


class BaselineMonitor(Callback):
    """Log the accuracy of a baseline run beside that of this run, and compare them at the end of the fit.

    The baseline is the same student, trained on the labeled samples of the same split alone. Its accuracy is logged as
    ``val/baseline_accuracy``. The two compared accuracies are those of the deployed weights: at the best checkpoint if
    a checkpoint callback monitors a metric, else at the last epoch. At the end, one line has both, the number of
    validation samples, and the 95 % interval of the difference. It is a warning if this run is below its baseline. With
    fewer than 100 samples there is no verdict. Nothing is saved: a resumed run reads the baseline again. Works on any
    LightningModule that logs ``val/accuracy``. If the datamodule has a ``split``, it must be the baseline's.

    Args:
        baseline: Folder of the baseline, a finished run of the command line. It is read only for a fit.

    Raises:
        InputError: If the folder is not a finished run with validation metrics, or if it was validated on other
            samples: its split or its ``trainer.limit_val_batches`` differs.
    """

    def __init__(self, baseline: str | Path) -> None:
        self.baseline = Path(baseline)
        self._accuracy = math.nan
        self._samples = 0  # labeled samples of the last validation, in this process
        self._rows: list[dict[str, float]] = []
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Before a fit, reads the baseline's accuracy and checks its samples."""
        if stage != TrainerFn.FITTING:
            return
        try:
            run = Run(self.baseline)
            self._accuracy = read_accuracy(run)
            split: Any = getattr(getattr(trainer, "datamodule", None), "split", None)
            if hasattr(split, "val") and hasattr(split, "labeled"):  # another datamodule's split may be of any type
                check_split(run, split)
            if not getattr(trainer, "fast_dev_run", False):
                _check_limit(run, trainer.limit_val_batches)
        except InputError as error:
            raise InputError(f"baseline: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of training. Reads the metrics that a resumed run has logged before."""
        files = [Path(logger.log_dir) / METRICS for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        rows = validations(read_metrics(files[0])) if files else []
        self._rows = [row for row in rows if row["step"] < trainer.global_step]
        self._warned = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of each validation. Begins to count its samples."""
        self._samples = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs after each validation batch. Counts its labeled samples."""
        self._samples += count_labeled(pl_module, batch)

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
        """Runs at the end of training. Compares this run with its baseline."""
        if getattr(trainer, "fast_dev_run", False):
            return
        count = torch.tensor(self._samples, device=pl_module.device)
        samples = int(trainer.strategy.reduce(count, reduce_op="sum"))
        accuracy = self._deployed_accuracy(trainer)
        if accuracy is None:
            self._warn_once(
                f"BaselineMonitor: the run logged no {ACCURACY}, so it cannot be compared with {self.baseline}"
            )
            return
        text = f"BaselineMonitor: {ACCURACY} is {accuracy:.4f}, that of the baseline {self._accuracy:.4f} "
        text += f"({self.baseline}): {describe_difference(accuracy, self._accuracy, samples)}"
        if accuracy >= self._accuracy or samples < LEAST_SAMPLES:
            rank_zero_info(text)
            return
        advice = "Compare several seeds"
        if difference_interval(accuracy, self._accuracy, samples)[1] < 0:
            advice = "Try a higher threshold, a smaller unsupervised_weight or a later warm-up, or deploy the baseline"
        self._warn_once(f"{text}. {advice}")

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


def read_accuracy(run: Run) -> float:
    """Return the validation accuracy of the weights that a run deployed.

    Raises:
        InputError: If the run is not finished, or was not validated.
    """
    if not run.finished:
        text = "--ckpt_path last in fit resumes it" if run.checkpoints() else "fit it again"
        raise InputError(f"{run.folder} is not finished; {text}")
    checkpoint = run.config.get("checkpoint") or {}
    monitor = checkpoint.get("monitor")
    mode = checkpoint.get("mode") or (direction_of(monitor) if monitor else None) or "max"
    accuracy = select_accuracy(run.validations(), monitor, mode)
    if accuracy is None:
        raise InputError(
            f"{run.folder / METRICS} has no {ACCURACY}; the baseline must have a validation part (data.val_size above "
            "0) and the default loggers"
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


def check_split(run: Run, split: Any) -> None:
    """Check that a run was trained and validated on the samples of ``split``.

    Raises:
        InputError: If the data, ``val`` or ``labeled`` differ, or the run has no readable split file.
    """
    path = run.folder / SPLIT
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in ("val", "labeled") if [*saved[name]] != [*getattr(split, name)]]
        seed, other_data = saved.get("seed"), saved.get("data") != getattr(split, "data", saved.get("data"))
        if (names := getattr(split, "samples", None)) and isinstance(saved.get("samples"), dict):
            other_data = other_data or saved["samples"].get("contents") != names.contents
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or is not a split file, so its samples cannot be compared") from error
    if other_data:
        raise InputError(f"{run.folder} was trained on other data: the source's labels or images differ")
    if differ:
        mine = getattr(split, "seed", seed)
        seeds = "" if seed == mine else f" (seed {seed}, not {mine})"
        raise InputError(
            f"{run.folder} has another split{seeds}, its {' and '.join(differ)} samples differ; train both runs with "
            f"the same labeled, val_size and seed, or with labeled: {path}"
        )


def _check_limit(run: Run, limit: float) -> None:
    """Raise InputError if a run was validated on another part of its batches; 1 is one batch, 1.0 is all of them."""
    before = (run.config.get("trainer") or {}).get("limit_val_batches")
    before = 1.0 if before is None else before
    if limit and (type(before), before) != (type(limit), limit):
        raise InputError(f"{run.folder} has trainer.limit_val_batches {before}, this run {limit}; it must be the same")


def describe_difference(accuracy: float, baseline: float, samples: int) -> str:
    """Describe how large and how reliable the difference of two accuracies is.

    Args:
        accuracy: Of a run.
        baseline: Of its baseline.
        samples: Number of validation samples; 0 if it is unknown.
    """
    text = f"{100 * (accuracy - baseline):+.2f} points"
    if not samples:
        return f"{text}; the number of validation samples is unknown, so there is no verdict"
    low, high = difference_interval(accuracy, baseline, samples)
    text += f" on {samples} validation samples, 95% interval {100 * low:+.2f} to {100 * high:+.2f}"
    if samples < LEAST_SAMPLES:
        return f"{text}; {samples} samples are too few to judge, {LEAST_SAMPLES} are needed"
    return f"{text}; {'it may be chance' if low <= 0 <= high else 'chance is an unlikely cause'}"


def difference_interval(first: float, second: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares, each of so many samples.

    Newcombe's hybrid score interval: "Interval estimation for the difference between independent proportions" (1998),
    method 10. Two runs on the same samples are not independent: the interval is rather too wide than too narrow.

    >>> [round(limit, 4) for limit in difference_interval(1.0, 0.9, 100)]
    [0.0419, 0.1744]
    """
    (low, high), (other_low, other_high) = (_score_interval(share, samples) for share in (first, second))
    below, above = math.hypot(first - low, other_high - second), math.hypot(high - first, second - other_low)
    return first - second - below, first - second + above


def _score_interval(share: float, samples: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval of a share of samples."""
    scale = 1 + z * z / samples
    centre = (share + z * z / (2 * samples)) / scale
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples)) / scale
    return centre - half, centre + half
