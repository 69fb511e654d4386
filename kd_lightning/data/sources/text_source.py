"""A source of texts, in memory or in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from kd_lightning.data.sources._parts import dataset_parts
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.errors import InputError

Texts = str | Path | Sequence[Any]
"""Path of a CSV or JSONL file, or pairs (text, label), or texts alone."""


class TextSource(Source):
    """Texts with one label, or one row of labels, each.

    A tokenizer turns each text into ``input_ids``, ``attention_mask``, and what else it returns. A batch is padded to
    its longest text, by the tokenizer's ``pad_token_id``, or 0 if it has none.

    Args:
        train: The training part: the path of a CSV file with a header, or of a JSONL file (``.jsonl``, ``.json``: one
            mapping in each line), or a list of pairs ``(text, label)``.
        test: The test part likewise. Default: None, which means none.
        unlabeled: Texts without labels likewise, or a list of texts. Default: None, which means none.
        tokenizer: Called as ``tokenizer(text, truncation=True, max_length=...)``, such as those of ``transformers``. It
            returns a mapping. A text is the folder of a tokenizer of ``transformers``; nothing is downloaded.
        max_length: Largest number of tokens of a text, at least 1. Longer ones are cut.
        text: Name of the text's column.
        label: Name of the label's column. An empty cell means no label.
        class_names: Names of the classes, by number. Default: None, which means the labels, sorted, if they are names.
        val: Your own validation part, as ``test``. Default: None, which means that the datamodule takes ``val_size`` of
            the training part.

    Raises:
        InputError: If ``max_length`` is out of range, or the tokenizer's folder cannot be read.
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
        self.columns = (text, label)
        self.class_names = class_names

    def load(self) -> Parts:
        """Read the texts and labels.

        Raises:
            InputError: If a file cannot be read or lacks a column. The message names the file and the row.
        """
        names = ("train", "test", "unlabeled", "val")
        train, test, unlabeled, val = (
            None if (rows := getattr(self, name)) is None else self._open(name, rows) for name in names
        )
        parts = dataset_parts(train, test, unlabeled, self.class_names, val=val)
        pad_token = getattr(self.tokenizer, "pad_token_id", None)
        return parts._replace(pad_token=0 if pad_token is None else int(pad_token))

    def _open(self, name: str, rows: Texts) -> TokenizedTexts:
        if isinstance(rows, str | Path):
            pairs = _read_file(name, Path(rows).expanduser(), *self.columns, labeled=name != "unlabeled")
        else:
            pairs = [_pair(name, number, row) for number, row in enumerate(rows)]
        texts, labels = zip(*pairs, strict=True) if pairs else ((), ())
        return TokenizedTexts([*texts], [*labels], self.tokenizer, self.max_length)


class TokenizedTexts(Dataset[Any]):
    """Texts, each of which is turned into tokens when it is read; items are ``(inputs, label)``.

    Args:
        texts: The texts.
        targets: Their labels; None for none.
        tokenizer: As in :class:`TextSource`.
        max_length: Largest number of tokens of a text.
    """

    has_several_inputs = True  # read by the function of this name

    def __init__(self, texts: list[str], targets: list[Any], tokenizer: Callable[..., Any], max_length: int) -> None:
        self.texts = texts
        self.targets = targets
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> Any:
        found = self.tokenizer(self.texts[index], truncation=True, max_length=self.max_length)
        if not isinstance(found, Mapping) or "input_ids" not in found:
            got = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise InputError(f"tokenizer must return a mapping with input_ids, got {got}")
        inputs = {name: torch.as_tensor(values) for name, values in found.items()}
        inputs.setdefault("attention_mask", torch.ones(len(inputs["input_ids"]), dtype=torch.long))
        return inputs, self.targets[index]


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


def _pair(name: str, number: int, row: Any) -> tuple[str, Any]:
    pair = isinstance(row, tuple | list) and len(row) == 2
    text, label = row if pair else (row, None)
    if not isinstance(text, str):
        raise InputError(f"{name}: a row must be (text, label), or a text alone, but row {number} is {row!r:.60}")
    return text, label


def _read_file(name: str, path: Path, text: str, label: str, *, labeled: bool) -> list[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_json = path.suffix.lower() in (".jsonl", ".json")
            rows = [json.loads(line) for line in file if line.strip()] if is_json else [*csv.DictReader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{name}: {path} cannot be read: {error}") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get(text), str) or (labeled and label not in row):
            got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            wanted = f"{text} and {label}" if labeled else text
            raise InputError(f"{name}: {path} must have {wanted} in each row, but row {number} has {got}")
        pairs.append((row[text], _number(row.get(label)) if labeled and not is_json else row.get(label)))
    return pairs


def _number(cell: str | None) -> Any:
    """Return the label of a cell: an int if it is one, None if it is empty, else the text."""
    cell = (cell or "").strip()
    if cell.isascii() and cell.removeprefix("-").isdecimal():
        return int(cell)
    return cell or None
