"""One trial: a fit with some settings, or one of each fold, and the value of what it would deploy."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.callbacks import (
    ActivationCalibration,
    BoardWriter,
    EvaluationWriter,
    PredictionWriter,
    QuantizedWeightHistograms,
    SampleFigures,
    StudentWriter,
)
from kd_lightning.cli.baseline import baseline_of
from kd_lightning.cli.fit_once import config_file
from kd_lightning.cli.introduction import Introduction
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import Config
from kd_lightning.cli.quiet import is_verbose
from kd_lightning.cli.tuning.judge import Judge, of_fold
from kd_lightning.errors import InputError
from kd_lightning.runs.csv_logger import ResumableCSVLogger

REPORTS = 8
"""Number of reports of a fit to the pruner, at equal shares of its length."""
_ONLY_WRITE = (
    ActivationCalibration,
    BoardWriter,
    EvaluationWriter,
    Introduction,
    ModelCheckpoint,
    PredictionWriter,
    QuantizedWeightHistograms,
    SampleFigures,
    StudentWriter,
)
"""Callbacks that change no weight, and write what a trial does not need."""
_OF_THE_DEVICE: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""Errors after which no further trial can run."""
Report = Callable[[int, float], bool]
"""Called with the number of a report and the value so far; returns whether the trial is pruned."""


@dataclass(frozen=True)
class Metric:
    """What decides.

    Attributes:
        name: Name of the metric of validation.
        mode: ``"max"`` or ``"min"``.
        best: Whether a run deploys its best weights. If not, its last ones.
    """

    name: str
    mode: str
    best: bool

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one."""
        return value > other if self.mode == "max" else value < other


class TrialPrunedError(Exception):
    """Raised where a trial is worse than others were at the same share of their length."""


class TrialFailedError(Exception):
    """Raised for a trial without a value, with the reason in one line.

    Attributes:
        trained: Whether it failed by its training, and not since the config is wrong.
    """

    def __init__(self, reason: str, *, trained: bool) -> None:
        super().__init__(reason)
        self.trained = trained


class Watch(Callback):
    """Follows the metric of a trial's fit, and reports it.

    Args:
        metric: The metric.
        report: Called at each eighth of the fit with its number, from 1 on, and the value of what the run would deploy
            now.

    Attributes:
        value: The value of what the run would deploy now. None before the first validation.
        has_started: Whether training has begun.
    """

    def __init__(self, metric: Metric, report: Report) -> None:
        self.metric = metric
        self.report = report
        self.value: float | None = None
        self.has_started = False
        self._reported = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first step."""
        self.has_started = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of each validation. Notes the value, and reports it.

        Raises:
            TrialFailedError: If a weight or the value is not finite, or if validation does not log the metric.
            TrialPrunedError: If the report says so.
        """
        if trainer.sanity_checking:
            return
        found = trainer.callback_metrics.get(self.metric.name)
        if found is None:
            logged = ", ".join(name for name in trainer.callback_metrics if "val" in name.lower()) or "none"
            raise TrialFailedError(
                f"checkpoint.monitor: {self.metric.name} is not logged by validation, so --tune cannot follow it; set "
                f"it to a metric of validation, of which there are: {logged}",
                trained=False,
            )
        value, epoch = float(found), trainer.current_epoch + 1
        weights = [parameter.isfinite().all() for parameter in pl_module.parameters() if parameter.numel()]
        if weights and not torch.stack([one.cpu() for one in weights]).all():
            raise TrialFailedError(f"weights are not finite after epoch {epoch}", trained=True)
        if not math.isfinite(value):
            raise TrialFailedError(f"{self.metric.name} is {value} after epoch {epoch}", trained=True)
        if self.value is None or not self.metric.best or self.metric.is_better(value, self.value):
            self.value = value
        share = int(REPORTS * self._share(trainer) + 1e-9)
        if share > self._reported:
            self._reported = share
            if self.report(share, self.value):
                raise TrialPrunedError(f"after epoch {epoch}")

    def _share(self, trainer: Trainer) -> float:
        """Return the share of the fit that is done."""
        shares = [0.0]
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            shares.append((trainer.current_epoch + 1) / trainer.max_epochs)
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        return min(1.0, max(shares))


class _TrialCLI(DistillCLI):
    """A fit that writes its metrics alone.

    Args:
        args: Arguments of ``fit``.
        watch: Follows the fit.
    """

    def __init__(self, args: list[str], watch: Watch) -> None:
        self._watch = watch
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer without the callbacks that only write."""
        trainer = super().instantiate_trainer(**kwargs)
        kept = [one for one in trainer.callbacks if not isinstance(one, _ONLY_WRITE)]  # type: ignore[attr-defined]
        trainer.callbacks = [*kept, self._watch]  # type: ignore[attr-defined]
        return trainer

    def _loggers(self, root: str | None, name: str) -> list[Any]:
        return [ResumableCSVLogger(root or str(Path.cwd()), name=name, version=None)]


def run_trial(
    method: Config, judge: Judge, metric: Metric, folder: Path, report: Report, *, alone: bool, warn: bool
) -> list[float]:
    """Fit a config, on each fold if folds decide, and return the value of each fit.

    Args:
        method: The config of the method, with the settings of the trial.
        judge: What decides.
        metric: The metric.
        folder: Folder of the fits. No checkpoint is left there.
        report: Called with the number of a report, counted over the folds, and the mean over the folds so far.
        alone: Whether the baseline of the config is fitted.
        warn: Whether warnings are printed.

    Raises:
        TrialFailedError: If a fit has no value: its loss is not finite, a value of the settings is not allowed, or it
            fails in another way, such as for lack of memory.
        TrialPrunedError: If a report returns true.
    """
    values: list[float] = []
    for number, split in enumerate(judge.splits or [None]):
        done = [*values]

        def report_fold(share: float, value: float, number: int = number, done: list[float] = done) -> bool:
            return report(number * REPORTS + int(share), mean_over_folds([*done, value], judge))

        watch = Watch(metric, report_fold)
        try:
            config = deepcopy(method) if split is None else of_fold(deepcopy(method), split, joins_val=judge.joins_val)
            config = _quiet_config(baseline_of(config) if alone else config, folder, number)
            with config_file(config) as path, _quiet_fit(warn and not number):
                _TrialCLI(["fit", "--config", path], watch)
        except (InputError, MisconfigurationException, RuntimeError, ValueError) as error:
            if isinstance(error, _OF_THE_DEVICE):
                raise
            diverges = watch.has_started and isinstance(error, InputError)
            raise TrialFailedError(_line(error), trained=diverges) from error
        finally:
            for checkpoint in [*folder.rglob("*.ckpt")]:
                checkpoint.unlink(missing_ok=True)
        if watch.value is None:
            raise TrialFailedError("no validation ran", trained=False)
        values.append(watch.value)
    return values


def mean_over_folds(values: list[float], judge: Judge) -> float:
    """Return the mean over the samples of the first folds."""
    return statistics.fmean(values, judge.sizes[: len(values)])


def remove_folder(folder: Path) -> None:
    """Remove the folder of a trial that has not ended."""
    shutil.rmtree(folder, ignore_errors=True)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text:.300}"


def _quiet_config(config: Config, folder: Path, number: int) -> Config:
    trainer = {
        "default_root_dir": str(folder),
        "logger": True,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    checkpoint = config["checkpoint"] | {"dirpath": None}
    return config | {"name": f"fit_{number}", "trainer": config["trainer"] | trainer, "checkpoint": checkpoint}


@contextmanager
def _quiet_fit(warn: bool) -> Iterator[None]:
    """Within it, a fit prints nothing but warnings; these only if wanted."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    try:
        with warnings.catch_warnings():
            if not is_verbose():
                for one in loggers:
                    one.setLevel(logging.WARNING if warn else logging.ERROR)
                if not warn:
                    warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
