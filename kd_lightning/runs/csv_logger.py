"""A logger that appends to the metrics.csv of a resumed run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class ResumableCSVLogger(CSVLogger):
    """A CSVLogger that appends to the metrics.csv of a resumed run; Lightning's CSVLogger deletes it.

    Args:
        save_dir: Root folder of all runs.
        name: The run's name.
        version: The run's version.
        purge_step: Rows from this step on are dropped first, since the resumed run writes them again. If None, all
            rows stay.
    """

    def __init__(self, save_dir: str, name: str, version: int | str, purge_step: int | None = None) -> None:
        # flush at every log, so that a killed run has all rows up to its last checkpoint
        super().__init__(save_dir, name=name, version=version, flush_logs_every_n_steps=1)
        self.purge_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer; on ranks other than 0 a dummy, which leaves the file alone."""
        if self._experiment is None:
            _Writer.purge_step = self.purge_step
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    purge_step: int | None = None

    def _check_log_dir_exists(self) -> None:
        """Read the rows of an existing file, and drop those from ``purge_step`` on."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or [])
            rows = [row for row in reader if None not in row.values()]  # a full disk cuts off the last row
        if self.purge_step is not None:
            rows = [row for row in rows if int(row["step"]) < self.purge_step]
        part = path.with_suffix(".tmp")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)
