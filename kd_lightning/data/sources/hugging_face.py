"""A source of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources.class_names import number_names
from kd_lightning.data.sources.items import LABEL_KEYS
from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.data.sources.targets import normalize, to_tensor
from kd_lightning.data.transforms.recipes import photo_side, photo_transforms
from kd_lightning.errors import InputError

_INPUTS = ("image", "img", "x", "pixel_values", "input")
_SPLITS = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",), "unlabeled": ()}


class HuggingFaceSource(Source):
    """The splits of a ``datasets.DatasetDict``, such as a folder that ``save_to_disk`` has written.

    Columns and splits are found by their usual names, or named here. Inputs are images. Names of classes are those of a
    ``ClassLabel``, or labels that are texts, sorted; a list of ``ClassLabel`` means several labels. A label of -1 or
    None is missing. Labels are read as a column, without decoding images. Formats such as ``set_format("torch")`` do
    not matter.

    Args:
        data: Folder of a saved ``DatasetDict``, or in Python the ``DatasetDict`` itself, or a mapping of datasets.
        train: Name of the training split.
        val: Name of your own validation split. Default: None, which means ``validation``, ``valid``, ``val`` or
            ``dev``, if there is one, else a part of the training split.
        test: Name of the test split. Default: None, which means ``test``, if there is one.
        unlabeled: Name of a split whose labels are not read. Default: None, which means none.
        input: Name of the column of inputs. Default: None, which means ``image``, ``img``, ``x``, ``pixel_values`` or
            ``input``.
        label: Name of the column of labels. Default: None, which means the usual names, such as ``label``.
        group: Name of the column of groups: none, such as a patient, stands in two of training, validation and test. A
            value of None means a group of its own. Default: None, which means no groups.
        image_size: Height and width in pixels that the default transforms crop, or one number for a square; at least 1.

    Raises:
        InputError: If ``image_size`` is out of range.
    """

    def __init__(
        self,
        data: str | Any,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        unlabeled: str | None = None,
        input: str | None = None,
        label: str | None = None,
        group: str | None = None,
        image_size: int | tuple[int, int] = 224,
    ) -> None:
        self.data = data
        self.splits = {"train": train, "val": val, "test": test, "unlabeled": unlabeled}
        self.input = input
        self.label = label
        self.group = group
        self.train_transform, self.eval_transform = photo_transforms(image_size)
        self.stored_side = photo_side(image_size)

    def load(self) -> Parts:
        """Open the splits, and read the labels.

        Raises:
            InputError: If the folder cannot be read, a split or column is missing, splits have other classes, or a
                dataset is a stream or has a transform of its own.
        """
        splits = _open(self.data)
        parts = {part: self._split(splits, part, name) for part, name in self.splits.items()}
        train = parts["train"]
        assert train is not None
        used = {part: self._name_of(splits, part, name) for part, name in self.splits.items()}
        for (one, name), (other, same) in combinations(used.items(), 2):
            if name is not None and name == same:
                raise InputError(f"{other} and {one} must be different splits, got {name!r} for both")
        inputs = self._column("input", self.input, _INPUTS, train)
        label = self._column("label", self.label, LABEL_KEYS, train)
        given = _class_names(train, label)
        targets, names = _targets(train, "train", label, given)

        def like_training(part: str) -> Part | None:
            if (dataset := parts[part]) is None:
                return None
            if _class_names(dataset, label) != given:
                raise InputError(f"{part}: its classes in the column {label} must be those of train")
            numbers, groups = _targets(dataset, part, label, names)[0], self._groups(dataset, part)
            return Part(Column(dataset, inputs, part), numbers, groups=groups)

        unlabeled = parts["unlabeled"]
        pool = None if unlabeled is None else Column(unlabeled, inputs, "unlabeled")
        first = Part(Column(train, inputs, "train"), targets, groups=self._groups(train, "train"))
        of_pool = None if unlabeled is None else self._groups(unlabeled, "unlabeled")
        return Parts(first, like_training("test"), pool, names, val=like_training("val"), pool_groups=of_pool)

    def _groups(self, dataset: Any, part: str) -> list[str] | None:
        """Return the group of each sample of a split; None without groups."""
        if self.group is None:
            return None
        if self.group not in dataset.features:
            raise InputError(
                f"group: the columns of {part} must have {self.group!r}, got {', '.join(dataset.features)}"
            )
        values = ["" if value is None or value != value else value for value in dataset[self.group]]
        # whole numbers are floats in a split that lacks some
        return [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values]

    def _split(self, splits: Mapping[str, Any], part: str, name: str | None) -> Any:
        """Return the dataset of a split; None if it is not there and was not named."""
        usual = self._name_of(splits, part, name)
        if usual is None:
            return None
        if usual not in splits:
            raise InputError(f"{part}: there is no split {usual!r}; there are {', '.join(map(str, splits))}")
        dataset = splits[usual]
        if not hasattr(dataset, "features") or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{part}: a dataset of length and index is needed for splits, labels and caches, got a stream, "
                f"{type(dataset).__name__}, which StreamDataModule reads"
            )
        if dataset.format["type"] == "custom":
            raise InputError(f"{part}: a transform (set_transform) cannot be replayed; use data.train_transform")
        return dataset.with_format(None)

    @staticmethod
    def _name_of(splits: Mapping[str, Any], part: str, name: str | None) -> str | None:
        """Return the name of a split, or the usual one that is there; None if there is none."""
        return next((one for one in _SPLITS[part] if one in splits), None) if name is None else name

    @staticmethod
    def _column(what: str, name: str | None, usual: tuple[str, ...], dataset: Any) -> str:
        found = next((one for one in usual if one in dataset.features), None) if name is None else name
        if found is None or found not in dataset.features:
            wanted = " or ".join(usual) if name is None else repr(name)
            raise InputError(f"{what}: the columns must have {wanted}, got {', '.join(dataset.features)}")
        return found


class Column(Dataset[Any]):
    """The images of a Hugging Face dataset; items are those of one column.

    Args:
        dataset: The dataset.
        name: Name of the column.
        part: Name of the part, for messages.

    Raises:
        InputError: If there is no such column, or it holds no images.
    """

    def __init__(self, dataset: Any, name: str, part: str) -> None:
        if name not in dataset.features:
            raise InputError(f"{part}: the columns must have {name!r}, got {', '.join(dataset.features)}")
        if (kind := type(dataset.features[name]).__name__) != "Image":
            raise InputError(
                f"{part}: the column {name} must hold images, got {kind}; DatasetSource takes other inputs"
            )
        if not dataset.features[name].decode:
            dataset = dataset.cast_column(name, replace(dataset.features[name], decode=True))
        self.dataset = dataset.select_columns([name])
        self.name = name

    def __getitem__(self, index: int, /) -> Any:
        return self.dataset[index][self.name]

    def __len__(self) -> int:
        return len(self.dataset)


def _open(data: Any) -> Mapping[str, Any]:
    try:
        from datasets import Dataset as OneSplit
        from datasets import load_from_disk
    except ImportError as error:
        raise InputError("HuggingFaceSource needs datasets: pip install 'kd-lightning[hf]'") from error
    if isinstance(data, str):
        try:
            data = load_from_disk(str(Path(data).expanduser()))
        except Exception as error:  # of many classes
            text = " ".join(str(error).split())
            raise InputError(f"data: {data} is no folder of a saved dataset: {text:.200}") from error
    if isinstance(data, OneSplit):
        return {"train": data}
    if not isinstance(data, Mapping):
        raise InputError(f"data must be a DatasetDict, or the folder of a saved one, got {type(data).__name__}")
    return data


def _class_names(dataset: Any, label: str) -> list[str] | None:
    if label not in dataset.features:
        raise InputError(f"label: the columns must have {label!r}, got {', '.join(dataset.features)}")
    feature = dataset.features[label]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else [*map(str, names)]


def _targets(dataset: Any, place: str, label: str, names: list[str] | None) -> tuple[Tensor, list[str] | None]:
    """Return the labels of a split, and the names of the classes."""
    values = [*dataset[label]]
    if names is not None and hasattr(dataset.features[label], "feature"):  # a list of ClassLabel
        rows = torch.zeros(len(values), len(names))
        for number, row in enumerate(values):
            missing = row is None or min(row, default=0) < 0
            rows[number, slice(None) if missing else row] = torch.nan if missing else 1
        return rows, names
    if any(isinstance(value, str) for value in values):
        values, names = number_names(values, names, place)
    return normalize(to_tensor(values, place), place), names
