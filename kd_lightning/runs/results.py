"""The figures of one part of the data, and the predictions that they come from."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.runs.spreadsheet import SafeWriter, unescape_cell

PARTS = ("test", "transductive/test", "val")
# the end of the name of a metric of another data loader than the first
_OTHER_LOADER = re.compile(r"/(dataloader_idx_)?[1-9]\d*$")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One evaluated sample.

    Attributes:
        index: Index of the sample in its part.
        label: The label; of the multilabel task its labels, of the regression task its targets, joined by ``;``; empty
            if it is not known. Of a dense sample the number and a hash of its labels.
        prediction: The predicted one; empty for a dense sample.
        correct: Share of right labels: 1 or 0, in the multilabel task and of a dense sample a fraction; NaN if no label
            is known.
        path: Path of its file relative to the folder of its part; empty if it is not known.
        content: Hash of its content; empty if it is not known. The second sample of equal content has the suffix
            ``#2``, and so on.
        error: Mean absolute error, of the regression task; else NaN.
        labels: Number of labels behind ``correct`` or ``error``, where figures count each of them, and not each sample.
    """

    index: int
    label: str
    prediction: str
    correct: float
    path: str = ""
    content: str = ""
    error: float = math.nan
    labels: int = 1

    @property
    def value(self) -> float:
        """What is compared: ``correct``, or ``error`` of the regression task; NaN if no label is known."""
        return self.correct if math.isnan(self.error) else self.error


COLUMNS = ["index", "path", "content", "label", "prediction", "correct"]
_NAMES = COLUMNS[:-1]
_COLUMNS_BEFORE = ["index", "label", "prediction", "correct"]  # of files that do not name their samples


@dataclass(frozen=True)
class Result:
    """What was measured on one part of the data.

    Attributes:
        part: ``"test"``, ``"transductive/test"`` or ``"val"``.
        samples: Number of samples with a label.
        figures: Metrics by name, such as ``accuracy``.
        weights: SHA-256 of the file of the deployed weights that were measured; None for a module without a student.
        folder: The run's folder.
    """

    part: str
    samples: int
    figures: dict[str, float]
    weights: str | None
    folder: Path

    def predictions(self) -> list[Prediction]:
        """Read the predictions of all samples, by index."""
        path = _path(self.folder, self.part, "_predictions.csv.gz")
        try:
            with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
                if header == _COLUMNS_BEFORE:
                    rows = [[row[0], "", "", *row[1:]] for row in rows]
                elif header in ([*_NAMES, "correct", "labels"], [*_NAMES, "error", "labels"]):
                    return [_prediction(row, header[5] == "error", int(row[6])) for row in rows]
                elif header != COLUMNS:
                    raise ValueError(f"its columns must be {', '.join(COLUMNS)}")
                return [_prediction(row) for row in rows]
        except FileNotFoundError:
            return []
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise InputError(f"{path} is damaged: {error}") from error


def _prediction(row: list[str], is_error: bool = False, labels: int = 1) -> Prediction:
    value = float(row[5])
    correct, error = (math.nan, value) if is_error else (value, math.nan)
    label, prediction, path = map(unescape_cell, (row[3], row[4], row[1]))
    return Prediction(int(row[0]), label, prediction, correct, path, row[2], error, labels)


def figures_of(part: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what an evaluation of a part has logged on its first data loader, by name without the part.

    Args:
        part: One of :data:`PARTS`.
        metrics: Logged metrics, numbers or tensors: ``test/accuracy``. If none has the part's name, as of a module of
            another project, all count, such as ``test_acc``, which is ``acc`` then.

    >>> figures_of("test", {"test/accuracy": 0.5, "val/accuracy": 0.1})
    {'accuracy': 0.5}
    >>> figures_of("test", {"test_acc/dataloader_idx_0": 0.5, "test_acc/dataloader_idx_1": 0.1})
    {'acc': 0.5}
    """
    first = {name: value for name, value in metrics.items() if not _OTHER_LOADER.search(name)}
    own = {name: value for name, value in first.items() if name.startswith(f"{part}/")} or first
    return {
        name.removeprefix(f"{part}/").removeprefix(f"{part}_").removesuffix("/dataloader_idx_0"): float(value)
        for name, value in own.items()
    }


def write_result(result: Result, predictions: Iterable[Prediction]) -> None:
    """Write ``<part>.json`` and, compressed, ``<part>_predictions.csv.gz`` to the run's folder.

    Regressed samples have ``error`` in place of ``correct``. They, and dense samples, have a last column ``labels``.
    """
    predictions = [*predictions]
    is_error = any(not math.isnan(p.error) for p in predictions)
    counts = is_error or any(p.labels != 1 for p in predictions)
    table = _path(result.folder, result.part, "_predictions.csv.gz")
    table.parent.mkdir(parents=True, exist_ok=True)
    path = _path(result.folder, result.part, ".json")
    path.unlink(missing_ok=True)  # so that no older figures stand beside new predictions
    with gzip.open(table, "wt", newline="", encoding="utf-8") as file:
        writer = SafeWriter(file)
        writer.writerow([*_NAMES, "error" if is_error else "correct", *["labels"] * counts])
        digits = ".9g" if counts else "g"
        for p in predictions:
            value = p.error if is_error else p.correct
            row = [p.index, p.path, p.content, p.label, p.prediction, format(value, digits)]
            writer.writerow([*row, p.labels] if counts else row)
    content = {"part": result.part, "samples": result.samples, "weights": result.weights, "figures": result.figures}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_result(folder: Path, part: str) -> Result | None:
    """Read what :func:`write_result` wrote; None if nothing was."""
    path = _path(folder, part, ".json")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        figures = {str(name): float(value) for name, value in content["figures"].items()}
        return Result(part, int(content["samples"]), figures, content["weights"], folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def clear_results(folder: Path) -> None:
    """Remove the results of a module without a student: its weights change in training, and no hash shows it."""
    for part in PARTS:
        path = _path(folder, part, ".json")
        try:
            stale = json.loads(path.read_text(encoding="utf-8"))["weights"] is None
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if stale:
            path.unlink()
            _path(folder, part, "_predictions.csv.gz").unlink(missing_ok=True)


def _path(folder: Path, part: str, end: str) -> Path:
    return folder / f"{part.replace('/', '_')}{end}"


def labeled(predictions: Sequence[Prediction]) -> dict[int, Prediction]:
    """Return {index: prediction} of the samples with a label."""
    return {p.index: p for p in predictions if not math.isnan(p.value)}
