"""The progress bar of the command line: one line, also in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from kd_lightning.runs.folder import folder_on_rank_zero


class OneLineProgress(RichProgressBar):
    """Lightning's progress bar with the version of the run, epochs from 1 on, and metrics that are cut, not wrapped."""

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return the columns before the metrics, which take what is left of the line."""
        return [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=8, table_column=Column(no_wrap=True)),
            _Batches(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        ]

    def _init_progress(self, trainer: Trainer) -> None:
        """Let the metrics be cut at the end of the line."""
        super()._init_progress(trainer)
        if self._metric_component is not None:
            self._metric_component._table_column = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._metric_component._generate_metrics_texts = self._texts_of_metrics  # type: ignore[method-assign]
            if self.progress is not None:
                self.progress.expand = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Ends the bar, so that later lines stand below it."""
        self._stop_progress()

    def _stop_progress(self) -> None:
        if not self._progress_stopped:
            super()._stop_progress()

    def _texts_of_metrics(self) -> Generator[str, None, None]:
        metrics = {} if self._metric_component is None else self._metric_component._metrics
        for name, value in metrics.items():
            yield f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        epochs = f"epoch {current_epoch + 1}" + ("" if last in (None, -1) else f"/{last}")
        version = _version(self.trainer)
        return f"{version} {epochs}" if version else epochs

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics of the progress bar; the version stands at the start of the line."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {name: items[name] for name in sorted(items, key=lambda name: not name.startswith("val/"))}


class _Batches(ProgressColumn):
    """The number of batches."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        total = "?" if task.total in (None, float("inf")) else f"{task.total:.0f}"
        return Text(f"{task.completed:.0f}/{total}")


def _version(trainer: Trainer) -> str:
    """Return the name of the run's folder, empty without a logger that has one."""
    return folder_on_rank_zero(trainer).name if trainer.loggers else ""
