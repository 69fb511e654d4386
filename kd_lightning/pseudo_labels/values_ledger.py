"""The ledger of pseudo-labels that are values: a CSV file for each round, with spreads in place of confidences."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import replace_round
from kd_lightning.pseudo_labels.table import PseudoValues
from kd_lightning.runs.spreadsheet import unescape_cell

VALUE_COLUMNS = ("round", "epoch", "index", "path", "content", "output", "value", "spread", "accepted", "change")
"""Names of the columns. Value is in the unit of the labels; spread and change are in their standard deviations."""


@dataclass
class ValueRound:
    """One round of the ledger: index, file, content, output, value, spread, change (float64) and a mark of N rows.

    A row is a sample; if samples have several values, it is one of them.
    """

    number: int
    epoch: int
    index: Tensor
    path: list[str]
    content: list[str]
    output: list[str]
    value: Tensor
    spread: Tensor
    accepted: Tensor
    change: Tensor

    @property
    def samples(self) -> int:
        """Number of samples, each of which has one row, or one for each of its values."""
        return len({*self.index.tolist()})

    doubtful: ClassVar[str] = "the values of the widest spread"
    """What comes first by ``doubt``."""

    @property
    def doubt(self) -> Tensor:
        """Number by which values are sorted, the most doubtful one first, (N,)."""
        return self.spread

    def caption(self, row: int) -> str:
        """Return the value of a row, and its spread, for a picture."""
        value, spread = self.value[row].item(), self.spread[row].item()
        name = "" if len({*self.output}) == 1 else f"{self.output[row]} "
        return f"{name}{value:.4g}\nspread {spread:.3f}"


def write_values(
    folder: Path,
    values: PseudoValues,
    names: Sequence[str] | None,
    path_of: Callable[[int], str | None],
    content_of: Callable[[int], str] = lambda index: "",
) -> Path:
    """Write a round to the ledger in a run's folder; replace this round and delete later ones, if there.

    Args:
        folder: The run's folder.
        values: The round.
        names: Names of the outputs; None for numbers.
        path_of: Function from an index to the path of the sample's file, None or empty without one.
        content_of: Function from an index to the hash of the sample's content, empty without one.
    """
    known = dict(enumerate(() if names is None else names))
    numbers = [0] * len(values.index) if values.output is None else values.output.tolist()
    columns = (values.index, values.label, values.spread, values.accepted, values.change)
    rows: list[tuple[Any, ...]] = []
    for number, *cells in zip(numbers, *(column.tolist() for column in columns), strict=True):
        index, value, spread, accepted, change = cells
        place = (values.round, values.epoch, index, path_of(index) or "", content_of(index))
        name = known.get(number, str(number))
        rows.append((*place, name, value, f"{spread:.6g}", int(accepted), f"{change:.6g}"))
    return replace_round(folder, values.round, VALUE_COLUMNS, rows)


def holds_values(path: Path) -> bool:
    """Whether a file of the ledger holds values, by its columns."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return tuple(next(csv.reader(file), ())) == VALUE_COLUMNS


def read_values(path: Path) -> ValueRound:
    """Read a round of the ledger; an InputError names the file and the line where it is damaged."""
    rows: list[tuple[int, int, int, str, str, str, float, float, bool, float]] = []
    line = 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            if tuple(next(table, ())) != VALUE_COLUMNS:
                raise ValueError(f"its columns must be {', '.join(VALUE_COLUMNS)}")
            for line, cells in enumerate(table, 2):  # noqa: B007  (for the message)
                if len(cells) != len(VALUE_COLUMNS):
                    raise ValueError(f"{len(cells)} cells instead of {len(VALUE_COLUMNS)}")
                number, epoch, sample, name, content, output, value, spread, mark, change = cells
                place = (int(number), int(epoch), int(sample), unescape_cell(name), content, unescape_cell(output))
                row = (*place, float(value), float(spread), mark == "1", float(change))
                least = min(row[2], row[7], row[9])
                if not all(map(math.isfinite, (row[6], row[7], row[9]))) or least < 0 or mark not in ("0", "1"):
                    raise ValueError("index, spread and change must be at least 0, value be finite, accepted be 0 or 1")
                if row[:2] != (rows or [row])[0][:2]:
                    raise ValueError("round and epoch must be those of the other rows")
                rows.append(row)
            if not rows:
                raise ValueError("it has no rows")
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}, line {line}: the ledger is damaged: {error}") from error
    columns: list[Any] = [[*column] for column in zip(*rows, strict=True)]
    numbers = {2: torch.long, 6: torch.float64, 7: torch.float64, 8: torch.bool, 9: torch.float64}
    index, values, spreads, accepted, changes = (torch.tensor(columns[n], dtype=kind) for n, kind in numbers.items())
    paths, contents, outputs = columns[3:6]
    return ValueRound(*rows[0][:2], index, paths, contents, outputs, values, spreads, accepted, changes)
