"""Cells of CSV files that a spreadsheet would run as a formula."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import Any, Protocol

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|nan)"
_NUMBERS = re.compile(f"{_NUMBER}(;{_NUMBER})*", re.ASCII)  # as of several regressed values


class _Text(Protocol):
    def write(self, text: str, /) -> Any: ...


def escape_cell(text: str) -> str:
    """Return a text for a cell: one that a spreadsheet would run gets an apostrophe before it. Numbers stay.

    A formula begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return (OWASP, "CSV Injection").
    :func:`unescape_cell` returns the text. So a text that begins with apostrophes and one of these gets one more.

    >>> escape_cell("=A1"), escape_cell("-1.5"), escape_cell("'tis"), escape_cell("'=A1")
    ("'=A1", '-1.5', "'tis", "''=A1")
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBERS.fullmatch(text) else text


def unescape_cell(cell: str) -> str:
    """Return the text of a cell that :func:`escape_cell` has written.

    >>> unescape_cell("'=A1"), unescape_cell("''=A1"), unescape_cell("'tis"), unescape_cell("=A1")
    ('=A1', "'=A1", "'tis", '=A1')
    """
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


class SafeWriter:
    """Write rows as ``csv.writer`` does, with texts that a spreadsheet would run escaped by :func:`escape_cell`.

    Args:
        file: The open file, with ``newline=""``.
        end: End of a line.
    """

    def __init__(self, file: _Text, end: str = "\r\n") -> None:
        self._writer = csv.writer(file, lineterminator=end)

    def writerow(self, row: Iterable[Any]) -> None:
        """Write a row. Cells that are no texts are written as they are."""
        self._writer.writerow([escape_cell(cell) if isinstance(cell, str) else cell for cell in row])

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Write several rows."""
        for row in rows:
            self.writerow(row)
