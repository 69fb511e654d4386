"""The ledger of pseudo-labels in a run's folder: a CSV file for each round."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PseudoLabels
from kd_lightning.runs.spreadsheet import SafeWriter, unescape_cell

FOLDER = "pseudo_labels"
"""Folder of the ledger within a run's folder."""
COLUMNS = ("round", "epoch", "index", "path", "content", "label", "confidence", "accepted", "changed")
_OLD_COLUMNS = tuple(name for name in COLUMNS if name != "content")
_TYPES = {2: torch.long, 6: torch.float64, 7: torch.bool, 8: torch.bool}  # dtypes of the columns of numbers


@dataclass
class Round:
    """One round of the ledger: index, file, content, class, confidence (float64) and two marks (booleans) of N rows.

    A row is a sample; if samples have several labels, it is one of them, and its class is a label, or ``not`` a label.
    Content and file say which sample is meant. The index may belong to another one since the data changed.
    """

    number: int
    epoch: int
    index: Tensor
    path: list[str]
    content: list[str]
    label: list[str]
    confidence: Tensor
    accepted: Tensor
    changed: Tensor

    @property
    def samples(self) -> int:
        """Number of samples, each of which has one row, or one for each of its labels."""
        return len({*self.index.tolist()})

    doubtful: ClassVar[str] = "the least confident labels"
    """What comes first by ``doubt``."""

    @property
    def doubt(self) -> Tensor:
        """Number by which labels are sorted, the most doubtful one first, (N,)."""
        return -self.confidence

    def caption(self, row: int) -> str:
        """Return the label of a row, and its confidence, for a picture."""
        return f"looks like {self.label[row]}\nconfidence {self.confidence[row].item():.1%}"

    def by_class(self) -> dict[str, list[float]]:
        """Return the confidences of the accepted labels of each class."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in self.accepted.nonzero().flatten().tolist():
            found[self.label[row]].append(float(self.confidence[row]))
        return found


def write_round(
    folder: Path,
    labels: PseudoLabels,
    class_names: Sequence[str] | None,
    path_of: Callable[[int], str | None],
    content_of: Callable[[int], str] = lambda index: "",
) -> Path:
    """Write a round to the ledger in a run's folder; replace this round and delete later ones, if there.

    Args:
        folder: The run's folder.
        labels: The round.
        class_names: Names of the classes, or of the labels of a sample; None for numbers. A label that is 0 is written
            as ``not`` and its name.
        path_of: Function from an index to the path of the sample's file, None or empty without one.
        content_of: Function from an index to the hash of the sample's content, empty without one.
    """
    names = _names(labels, class_names)
    columns = (labels.index, labels.confidence, labels.accepted, labels.changed)
    rows: list[tuple[Any, ...]] = []
    for name, *cells in zip(names, *(column.tolist() for column in columns), strict=True):
        index, confidence, accepted, changed = cells
        place = (labels.round, labels.epoch, index, path_of(index) or "", content_of(index))
        rows.append((*place, name, f"{confidence:.6f}", int(accepted), int(changed)))
    return replace_round(folder, labels.round, COLUMNS, rows)


def replace_round(folder: Path, number: int, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write the file of a round, and delete those of later rounds.

    Args:
        folder: The run's folder.
        number: Number of the round.
        columns: Names of the columns.
        rows: The cells of each row.
    """
    path = folder / FOLDER / f"round_{number:04d}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        table = SafeWriter(file)
        table.writerow(columns)
        for row in rows:
            table.writerow(row)
    part.replace(path)
    for later, file_of in find_rounds(folder).items():  # of a run that was resumed from an earlier round
        if later > number:
            file_of.unlink()
    return path


def _names(labels: PseudoLabels, class_names: Sequence[str] | None) -> list[str]:
    """Return the name of each row's label."""
    known = dict(enumerate(() if class_names is None else class_names))  # a project's names may be an array
    values = labels.label.long().tolist()
    if labels.output is None:
        return [known.get(value, str(value)) for value in values]
    names = (known.get(number, str(number)) for number in labels.output.tolist())
    return [name if value else f"not {name}" for name, value in zip(names, values, strict=True)]


def find_rounds(folder: Path) -> dict[int, Path]:
    """Return {round: file} of a run's folder, in the order of rounds; empty without a ledger."""
    paths = sorted((folder / FOLDER).glob("round_*.csv"), key=lambda path: (len(path.name), path.name))
    return {int(number): path for path in paths if (number := path.stem.removeprefix("round_")).isdigit()}


def read_round(path: Path) -> Round:
    """Read a round of the ledger; an InputError names the file and the line where it is damaged.

    In files of earlier versions, which lack the column ``content``, all contents are empty.
    """
    rows: list[tuple[int, int, int, str, str, str, float, bool, bool]] = []
    line = 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            columns = tuple(next(table, ()))
            if columns not in (COLUMNS, _OLD_COLUMNS):
                raise ValueError(f"its columns must be {', '.join(COLUMNS)}")
            for line, cells in enumerate(table, 2):  # noqa: B007  (for the message)
                if len(cells) != len(columns):
                    raise ValueError(f"{len(cells)} cells instead of {len(columns)}")
                if columns == _OLD_COLUMNS:
                    cells.insert(4, "")
                number, epoch, sample, name, content, label, share, *marks = cells
                place = (int(sample), unescape_cell(name), content)
                accepted, changed = (mark == "1" for mark in marks)
                row = (int(number), int(epoch), *place, unescape_cell(label), float(share), accepted, changed)
                if row[2] < 0 or not 0 <= row[6] <= 1 or {*marks} - {"0", "1"} or row[:2] != (rows or [row])[0][:2]:
                    text = "index must be at least 0, confidence lie in [0, 1], accepted and changed be 0 or 1"
                    raise ValueError(f"round and epoch must be those of the other rows, {text}")
                rows.append(row)
            if not rows:
                raise ValueError("it has no rows")
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {line}: the ledger is damaged: {error}") from error
    lists: list[Any] = [[*column] for column in zip(*rows, strict=True)]
    index, shares, *both = (torch.tensor(lists[n], dtype=t) for n, t in _TYPES.items())
    return Round(*rows[0][:2], index, lists[3], lists[4], lists[5], shares, *both)
