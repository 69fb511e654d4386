"""Files of predictions: CSV, Parquet and JSON Lines."""

from __future__ import annotations

import importlib
import json
import unicodedata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from kd_lightning.callbacks.dense_predictions import write_mask
from kd_lightning.errors import InputError
from kd_lightning.runs.predictions import Predictions
from kd_lightning.runs.spreadsheet import SafeWriter

_GROUP = 10_000  # rows of a group in a Parquet file
Row = dict[str, Any]


class PredictionFile(ABC):
    """Rows of predictions, written batch by batch.

    The columns are ``path``, ``class``, ``probability`` and ``error``, and with ``every`` the probability of each
    class. Of the multilabel task, a cell holds several classes and probabilities. Of the regression task, the columns
    are ``path``, ``value`` (or ``value_0``, ...) and ``error``; of dense outputs ``path``, ``mask`` (the path of a PNG,
    relative to the table) and ``error``. A file that cannot be read has a path and an error alone.

    Args:
        every: Whether the probabilities of all classes are written.
        masks: Folder that masks are written to, of dense outputs. Default: None, which means that there is none.
        masks_name: Name of that folder in the table.
    """

    def __init__(self, *, every: bool = False, masks: Path | None = None, masks_name: str = "") -> None:
        self.every = every
        self.masks = masks
        self.masks_name = masks_name
        self._names: set[str] = set()

    def write(self, predictions: Predictions) -> None:
        """Write the rows of a batch.

        Raises:
            InputError: If the predictions do not fit ``every``, or if they need a folder for masks.
        """
        if predictions.masks and self.masks is None:
            raise InputError("--out must name a file: masks of the predicted classes are written beside it")
        if self.every and (predictions.masks or predictions.task == "regression"):
            kind = "dense outputs" if predictions.masks else "the regression task"
            raise InputError(f"--all is for probabilities of the classes of a picture, not for {kind}")
        self._write([self._row(predictions, number) for number in range(len(predictions))], predictions)

    @abstractmethod
    def _write(self, rows: list[Row], predictions: Predictions) -> None:
        """Write rows of the same columns."""

    def _row(self, predictions: Predictions, number: int) -> Row:
        path, name, probability, error = predictions[number]
        values = [None if value != value else value for value in predictions.values[number].tolist()]
        row: Row = {"path": path}
        if predictions.masks:
            mask = predictions.masks[number]
            row["mask"] = None if mask is None else self._write_mask(path, mask)
        elif predictions.task == "regression":
            row |= zip(predictions.names, values, strict=True)
        else:
            row |= {"class": name, "probability": probability}
        row["error"] = error or None
        return row | ({"probabilities": dict(zip(predictions.names, values, strict=True))} if self.every else {})

    def _write_mask(self, path: str, mask: Tensor) -> str:
        """Write a mask under a name that no other has, and return its path relative to the table."""
        assert self.masks is not None
        stem = name = Path(path).stem
        number = 1
        while (key := unicodedata.normalize("NFC", name).casefold()) in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(key)
        write_mask(self.masks / f"{name}.png", mask)
        return f"{self.masks_name}/{name}.png"


class CSVFile(PredictionFile):
    """A CSV file; texts that a spreadsheet would run are escaped."""

    def __init__(self, file: IO[str], end: str = "\r\n", **options: Any) -> None:
        super().__init__(**options)
        self._table = SafeWriter(file, end)
        self._is_empty = True

    def _write(self, rows: list[Row], predictions: Predictions) -> None:
        flat = [*map(_flatten, rows)]
        if self._is_empty:
            self._table.writerow(flat[0])
            self._is_empty = False
        for row in flat:
            self._table.writerow(map(_cell, row.values()))


class LinesFile(PredictionFile):
    """A file of JSON Lines."""

    def __init__(self, file: IO[str], **options: Any) -> None:
        super().__init__(**options)
        self._file = file

    def _write(self, rows: list[Row], predictions: Predictions) -> None:
        for row in rows:
            is_text = row["path"].isprintable()  # a name in another encoding than UTF-8 has escapes in JSON
            self._file.write(json.dumps(row, ensure_ascii=not is_text, allow_nan=False) + "\n")


class ParquetFile(PredictionFile):
    """A Parquet file. Bytes of a path that are no UTF-8 are written as escapes."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(**options)
        check_parquet()
        self._arrow: Any = importlib.import_module("pyarrow")
        self._parquet: Any = importlib.import_module("pyarrow.parquet")
        self._path = path
        self._file: Any = None
        self._rows: list[Row] = []

    def _write(self, rows: list[Row], predictions: Predictions) -> None:
        flat = [_flatten(row) for row in rows]
        if self._file is None:
            several = predictions.task == "multilabel"
            self._file = self._parquet.ParquetWriter(self._path, self._schema([*flat[0]], several))
        self._rows += flat
        if len(self._rows) >= _GROUP:
            self._flush()

    def _schema(self, columns: list[str], several: bool) -> Any:
        text, number = self._arrow.string(), self._arrow.float32()
        kinds = dict.fromkeys(columns, number) | dict.fromkeys(("path", "mask", "error"), text) | {"class": text}
        if several:
            kinds |= {"class": self._arrow.list_(text), "probability": self._arrow.list_(number)}
        return self._arrow.schema([(name, kinds[name]) for name in columns])

    def _flush(self) -> None:
        rows = [row | {key: _valid(row[key]) for key in ("path", "error")} for row in self._rows]
        self._file.write_table(self._arrow.Table.from_pylist(rows, schema=self._file.schema))
        self._rows.clear()

    def close(self) -> None:
        """Write the last rows."""
        if self._file is not None:
            self._flush()
            self._file.close()


def check_parquet() -> None:
    """Raise InputError if Parquet files cannot be written."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(f"--out: Parquet needs pyarrow: pip install 'kd-lightning[weak]' ({error})") from error


def _flatten(row: Row) -> Row:
    """Return a row with a column for each probability."""
    found = {key: value for key, value in row.items() if key != "probabilities"}
    return found | {f"probability_{name}": value for name, value in row.get("probabilities", {}).items()}


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ";".join(map(_cell, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _valid(text: str | None) -> str | None:
    return None if text is None else text.encode(errors="surrogateescape").decode(errors="backslashreplace")
