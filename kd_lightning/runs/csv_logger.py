"""A logger that appends to the metrics.csv of a resumed run."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from kd_lightning.errors import InputError


class ResumableCSVLogger(CSVLogger):
    """A CSVLogger that appends to the metrics.csv of a resumed run; Lightning's CSVLogger deletes it.

    If the file cannot be written, such as on a full disk, the rows are written with the next ones.

    Args:
        save_dir: Root folder of all runs.
        name: The run's name.
        version: The run's version.
        purge_step: Rows from this step on are dropped first, since the resumed run writes them again. If None, all
            rows stay.
    """

    def __init__(self, save_dir: str, name: str, version: int | str | None, purge_step: int | None = None) -> None:
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
    """Writes rows whole or not at all. Rows that a full disk refuses are written with the next ones."""

    purge_step: int | None = None
    may_repeat: Sequence[dict[str, str]] = ()  # of the last epoch's end, which the resumed run may repeat

    def _check_log_dir_exists(self) -> None:
        """Read the rows of an existing file, and drop those from ``purge_step`` on."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        rows = self._read(path)
        self.metrics_keys = list(rows.fieldnames or [])
        kept = [row for row in rows if None not in row.values()]  # a full disk cuts off the last row
        if self.purge_step is not None:
            kept = [row for row in kept if int(row["step"]) < self.purge_step]
            self.may_repeat = [_cells(row) for row in kept if int(row["step"]) == self.purge_step - 1]
        self._rewrite(path, self.metrics_keys, kept)

    def save(self) -> None:
        """Write the recorded rows, without those that a resumed run has repeated."""
        self.metrics = [row for row in self.metrics if not self._repeats(row)]
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        columns = sorted({*self.metrics_keys}.union(*self.metrics))
        if columns == self.metrics_keys and path.is_file():
            self._append(path, columns, self.metrics)
        else:
            self._rewrite(path, columns, [*(self._read(path) if path.is_file() else ()), *self.metrics])
            self.metrics_keys = columns
        self.metrics = []

    def _repeats(self, row: dict[str, Any]) -> bool:
        return any(_cells(row).items() <= before.items() for before in self.may_repeat)

    @staticmethod
    def _read(path: Path) -> csv.DictReader[str]:
        return csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))

    @staticmethod
    def _rewrite(path: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        try:
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    @staticmethod
    def _append(path: Path, columns: list[str], rows: list[dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns).writerows(rows)
        data = text.getvalue().encode()
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                file.truncate(size)
                raise


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row as texts, without the empty ones."""
    return {key: str(value) for key, value in row.items() if value not in ("", None)}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.csv`` without their empty cells; none if there is no file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def validations(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows of the validations of a fit.

    The command ``validate`` adds a row to the same file, with step 0 and with the figures of any weights. It is left
    out: the steps of a fit do not fall.
    """
    found: list[dict[str, float]] = []
    for row in rows:
        last = found[-1]["step"] if found else 0
        if any(name.startswith("val/") for name in row) and row.get("step", -1) >= last:
            found.append(row)
    return found
