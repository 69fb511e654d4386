"""Write to TensorBoard and other loggers what a reader needs beside the curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import hparams

from kd_lightning.runs.figures.log_figure import only_warn

_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
"""Settings of the trainer that are hyperparameters; the others are about the machine and the output."""
_LEFT_OUT = ("config", "checkpoint", "ckpt_path", "early_stopping", "name", "fast")


class BoardWriter(Callback):
    """Log the learning rates and the config: its scalars as hyperparameters, in TensorBoard also as text.

    Each logger but a ``CSVLogger`` gets ``lr/<optimiser>`` (of parameter groups with different rates
    ``lr/<optimiser>/<group>``) at the first step, and whenever the training metrics are logged. It also gets the config
    once, as hyperparameters such as ``model.soft_weight``; the HPARAMS tab of TensorBoard shows the last value of each
    figure of the run beside them. A failure is a warning. Runs on rank 0 and works on any LightningModule.

    Args:
        config: The config of the run.
        resumes: Whether the fit goes on in the folder of an earlier one, whose events of TensorBoard hold the config
            already. Other loggers get it again, since most of them begin a new run.
    """

    def __init__(self, config: Mapping[str, Any], *, resumes: bool = False) -> None:
        self.config = config
        self.resumes = resumes
        self._last: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit. Writes the config."""
        self._last = None
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        for logger in (logger for logger in trainer.loggers if not isinstance(logger, CSVLogger)):
            if not isinstance(logger, TensorBoardLogger):
                with only_warn(f"the config in {type(logger).__name__}"):
                    logger.log_hyperparams(dict(scalars(self.config)))
                continue
            if self.resumes:
                continue
            with only_warn("the config in TensorBoard"):
                text = yaml.safe_dump(plain(self.config), sort_keys=False)
                board = logger.experiment
                board.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), trainer.global_step)
                _, start, _ = hparams(dict(scalars(self.config)), {})  # type: ignore[no-untyped-call]
                writer = board._get_file_writer()  # add_hparams() would begin a run of its own
                writer.add_summary(start)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Logs the learning rates of its step."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of Lightning's own metrics
        each = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.loggers or step == self._last or not (step == 0 or (each and (step + 1) % each == 0)):
            return
        self._last = step
        rates = learning_rates(trainer.optimizers) if trainer.is_global_zero else {}
        for logger in (logger for logger in trainer.loggers if rates and not isinstance(logger, CSVLogger)):
            with only_warn("the learning rate"):
                logger.log_metrics(rates, step=step)


def learning_rates(optimizers: list[Optimizer]) -> dict[str, float]:
    """Return the learning rate of each optimiser, by name; of its parameter groups if they differ."""
    times = Counter(type(one).__name__ for one in optimizers)
    found = {}
    for number, optimizer in enumerate(optimizers):
        name = f"lr/{type(optimizer).__name__}" + (f"_{number}" if times[type(optimizer).__name__] > 1 else "")
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if len(set(rates)) == 1:
            found[name] = rates[0]
        else:
            found |= {f"{name}/{place}": rate for place, rate in enumerate(rates)}
    return found


def scalars(config: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """Return the scalars of a config by short names: an object is its class, with its arguments below.

    >>> dict(scalars({"model": {"class_path": "a.Net", "init_args": {"width": 8}}, "trainer": {"max_epochs": 2}}))
    {'model': 'Net', 'model.width': 8, 'trainer.max_epochs': 2}
    """
    shown = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    if isinstance(trainer := shown.get("trainer"), Mapping):
        shown["trainer"] = {key: trainer.get(key) for key in _TRAINER}
    yield from _walk("", plain(shown))


def _walk(place: str, value: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    if isinstance(value, Mapping):
        if isinstance(kind := value.get("class_path"), str):
            yield place, kind.rpartition(".")[2]
            value = value.get("init_args") or {}
        for key, inner in value.items():
            yield from _walk(f"{place}.{key}" if place else str(key), inner)
    elif isinstance(value, list):
        if all(isinstance(one, bool | int | float | str) for one in value):
            yield place, ", ".join(map(str, value))
        else:
            for number, inner in enumerate(value):
                yield from _walk(f"{place}.{number}", inner)
    elif isinstance(value, bool | int | float | str):
        yield place, value


def plain(value: Any) -> Any:
    """Return a config of plain mappings, lists and scalars; anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
