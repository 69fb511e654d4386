"""A source of texts, in memory or in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.sources._parts import dataset_parts
from kd_lightning.data.sources.items import STRONG_INPUTS
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.sources.targets import is_missing
from kd_lightning.errors import InputError

Row = tuple[str, Any, str | None]
"""Text, label and strong text."""
Texts = str | Path | Sequence[Any]
"""Path of a CSV or JSONL file, or rows (text, label) or (text, label, strong text), or texts alone."""


class TextSource(Source):
    """Texts with one label, or one row of labels, each.

    A tokenizer turns each text into ``input_ids``, ``attention_mask``, and what else it returns. A batch is padded to
    its longest text, by the tokenizer's ``pad_token_id``, or 0 if it has none.

    A text may have a second one, such as a paraphrase or a back-translation: the strong view of pseudo-labels
    (``x_strong`` in training batches). It is in the column ``strong_text`` of files, or the third entry of rows. Where
    training texts have some, those with a label may lack it, and their strong view is the text itself.

    Args:
        train: The training part: the path of a CSV file with a header, or of a JSONL file (``.jsonl``, ``.json``: one
            mapping in each line), or a list of rows ``(text, label)`` or ``(text, label, strong_text)``.
        test: The test part likewise. Default: None, which means none.
        unlabeled: Texts without labels likewise, or a list of texts. Default: None, which means none.
        tokenizer: Called as ``tokenizer(text, truncation=True, max_length=...)``, such as those of ``transformers``. It
            returns a mapping. A text is the folder of a tokenizer of ``transformers``; nothing is downloaded.
        max_length: Largest number of tokens of a text, at least 1. Longer ones are cut.
        text: Name of the text's column.
        label: Name of the label's column. An empty cell means no label.
        strong_text: Name of the second text's column, in ``train`` and ``unlabeled``. Default: None, which means that
            files have none.
        class_names: Names of the classes, by number. Default: None, which means the labels, sorted, if they are names.
        val: Your own validation part, as ``test``. Default: None, which means that the datamodule takes ``val_size`` of
            the training part.

    Raises:
        InputError: If ``max_length`` is out of range, or the tokenizer's folder cannot be read. In :meth:`load`: if a
            file cannot be read, or lacks a column; if a text without a label has no strong text, where others have one.
    """

    def __init__(
        self,
        train: Texts,
        test: Texts | None = None,
        unlabeled: Texts | None = None,
        *,
        tokenizer: Callable[..., Any] | str,
        max_length: int = 128,
        text: str = "text",
        label: str = "label",
        strong_text: str | None = None,
        class_names: list[str] | None = None,
        val: Texts | None = None,
    ) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise InputError(f"max_length must be a whole number of at least 1, got {max_length!r}")
        self.train = train
        self.test = test
        self.val = val
        self.unlabeled = unlabeled
        self.tokenizer = _open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.max_length = max_length
        self.columns = (text, label, strong_text)
        self.class_names = class_names

    def load(self) -> Parts:
        """Read the texts and labels.

        Raises:
            InputError: As described above. The message names the file and the row.
        """
        names = ("train", "test", "unlabeled", "val")
        found = {name: self._read(name, rows) for name in names if (rows := getattr(self, name)) is not None}
        training = {name: found[name] for name in ("train", "unlabeled") if name in found}
        if any(strong is not None for rows in training.values() for _, _, strong in rows):
            found |= {name: _with_strong(name, rows) for name, rows in training.items()}
        elif (column := self.columns[2]) is not None:
            raise InputError(f"strong_text: no row of {' and '.join(training)} has a text in the column {column!r}")
        datasets = {name: TokenizedTexts(rows, self.tokenizer, self.max_length) for name, rows in found.items()}
        train, test, unlabeled, val = map(datasets.get, names)
        parts = dataset_parts(train, test, unlabeled, self.class_names, val=val)
        pad_token = getattr(self.tokenizer, "pad_token_id", None)
        return parts._replace(pad_token=0 if pad_token is None else int(pad_token))

    def _read(self, name: str, rows: Texts) -> list[Row]:
        if isinstance(rows, str | Path):
            found = _read_file(name, Path(rows).expanduser(), *self.columns, labeled=name != "unlabeled")
        else:
            found = [_row(name, number, row) for number, row in enumerate(rows)]
        return found if name in ("train", "unlabeled") else [(text, label, None) for text, label, _ in found]


class TokenizedTexts(Dataset[Any]):
    """Texts, each of which is turned into tokens when it is read; items are ``(inputs, label)``.

    Args:
        rows: Text, label, and strong text of each sample; None for no label, or no strong text.
        tokenizer: As in :class:`TextSource`.
        max_length: Largest number of tokens of a text.
    """

    has_several_inputs = True  # read by the function of this name

    def __init__(self, rows: Sequence[Row], tokenizer: Callable[..., Any], max_length: int) -> None:
        self.texts = [text for text, _, _ in rows]
        self.targets = [label for _, label, _ in rows]
        self.strong = [strong for _, _, strong in rows]
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> Any:
        inputs, strong = self._tokens(self.texts[index]), self.strong[index]
        if strong is not None:
            inputs[STRONG_INPUTS] = self._tokens(strong)
        return inputs, self.targets[index]

    def _tokens(self, text: str) -> dict[str, Any]:
        found = self.tokenizer(text, truncation=True, max_length=self.max_length)
        if not isinstance(found, Mapping) or "input_ids" not in found:
            got = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise InputError(f"tokenizer must return a mapping with input_ids, got {got}")
        inputs = {name: torch.as_tensor(values) for name, values in found.items()}
        inputs.setdefault("attention_mask", torch.ones(len(inputs["input_ids"]), dtype=torch.long))
        return inputs


def _open_tokenizer(folder: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(f"tokenizer: {folder} needs transformers: pip install transformers") from error
    try:
        return AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True)
    except Exception as error:  # of many classes
        text = " ".join(str(error).split())
        raise InputError(f"tokenizer: {folder} is no folder of a tokenizer of transformers: {text:.200}") from error


def _with_strong(name: str, rows: Sequence[Row]) -> list[Row]:
    """Give labeled texts without a strong text themselves as one."""
    without = [number for number, (_, _, strong) in enumerate(rows) if strong is None]
    for number in without:
        label = rows[number][1]
        if is_missing(label) or (isinstance(label, Real) and label in (-1, IGNORE_INDEX)):
            raise InputError(f"{name}: a text without a label must have a strong text, but row {number} has none")
    if without:
        count = f"{len(without)} of {len(rows)} texts"
        rank_zero_info(f"TextSource: {name}: {count}, which have labels, are their own strong view")
    return [(text, label, text if strong is None else strong) for text, label, strong in rows]


def _row(name: str, number: int, row: Any) -> Row:
    parts = [*row] if isinstance(row, tuple | list) and len(row) in (2, 3) else [row, None]
    text, label, strong = (*parts, None)[:3]
    if not isinstance(text, str) or not isinstance(strong, str | None):
        raise InputError(
            f"{name}: a row must be (text, label), (text, label, strong text), or a text alone, but row {number} is "
            f"{row!r:.60}"
        )
    return text, label, strong or None


def _read_file(name: str, path: Path, text: str, label: str, strong_text: str | None, *, labeled: bool) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_json = path.suffix.lower() in (".jsonl", ".json")
            rows = [json.loads(line) for line in file if line.strip()] if is_json else [*csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{name}: {path} cannot be read: {error}") from error
    found: list[Row] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get(text), str) or (labeled and label not in row):
            got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            wanted = f"{text} and {label}" if labeled else text
            raise InputError(f"{name}: {path} must have {wanted} in each row, but row {number} has {got}")
        strong = None if strong_text is None else row.get(strong_text) or None
        if not isinstance(strong, str | None):
            raise InputError(f"{name}: {strong_text} of row {number} of {path} must be a text, got {strong!r:.60}")
        value = _number(row.get(label)) if labeled and not is_json else row.get(label)
        found.append((row[text], value, strong))
    return found


def _number(cell: str | None) -> Any:
    """Return the label of a cell: an int if it is one, None if it is empty, else the text."""
    cell = (cell or "").strip()
    if cell.isascii() and cell.removeprefix("-").isdecimal():
        return int(cell)
    return cell or None
