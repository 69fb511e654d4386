"""A source of your own map-style datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources._parts import check_map_style, dataset_parts, parts_without_labels
from kd_lightning.data.sources.class_names import class_names_of
from kd_lightning.data.sources.dense_labels import LabelRules, dense_part
from kd_lightning.data.sources.images import inputs_of, read_item
from kd_lightning.data.sources.items import left_out, split_strong
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms.recipes import to_float
from kd_lightning.errors import InputError
from kd_lightning.inputs import describe

_WIDE = (np.int32, np.uint32, np.int64, np.uint64)


class DatasetSource(Source):
    """Your own map-style datasets.

    Items are ``(image, label)``, possibly with more behind, or mappings with the key ``image``, ``img``, ``x``,
    ``pixel_values``, ``input`` or ``inputs`` and the key ``label``, ``labels``, ``target``, ``targets``, ``y`` or
    ``fine_label``. Items of ``unlabeled`` may also be the image alone.

    A picture is a PIL image, an array (H, W, C), or a tensor of uint8 (C, H, W) with 1, 3 or 4 channels. The default
    transforms bring pictures to floats in [0, 1]. All other tensors stay as they are: floats, and uint8 of other
    shapes, such as tokens (T,) or class maps (H, W). So do several inputs of a sample, and arrays (D,), such as rows of
    a table or embeddings, which become tensors (float64 becomes float32). The first item of ``train`` decides for all.
    A transform of yours gets each image as the dataset returns it.

    A sample may have several inputs: ``((a, b), label)``, ``({"input_ids": ..., "attention_mask": ...}, label)``, or a
    mapping such as ``{"input_ids": ..., "attention_mask": ..., "labels": ...}``. Networks are then called as
    ``network(a, b)`` or ``network(**inputs)``, and teachers with the entry ``teacher_inputs``, if there is one. Arrays
    and lists of numbers become tensors; paths, texts and single numbers are left out. A transform of one sample gets
    all of them. Without one, all samples must have tensors of one shape, or an ``attention_mask``: texts are then
    padded to the longest of a batch.

    A sample may have its own strong view, such as a paraphrase, in the entry ``x_strong``: ``{"input_ids": ...,
    "attention_mask": ..., "x_strong": {"input_ids": ..., "attention_mask": ...}, "labels": ...}``. It has the names of
    the other inputs, and is ``x_strong`` of training batches. All training samples have one, or none. A
    ``strong_transform`` gets it in place of the inputs; other transforms do not get it.

    A label is a class number, a class name, a number 0 or 1 as float, or a row of zeros and ones for several labels. It
    is None, NaN, -1 or -100 where it is missing; in a row, single entries may be missing. Training samples without a
    label are in the unlabeled pool, and metrics leave out test samples without one.

    With ``dense``, each sample has a label for each position: ``(image, mask)``, ``{"image": ..., "mask": ...}``, or a
    mapping such as ``{"input_ids": ..., "attention_mask": ..., "labels": ...}`` with a label for each token. A mask is
    a tensor or array (H, W), or a picture of class numbers, grey or with a palette. Labels are class numbers, -1 or
    -100 where there is none, or floats, NaN where there is none. They are read with each sample, and do not stay in
    memory. A sample whose labels are None, or all missing, is unlabeled. A transform of one sample gets a mapping of
    ``image`` and ``mask`` (``torchvision.tv_tensors.Image`` and ``Mask``), or the entries of the item with its
    ``labels``, and returns them.

    Args:
        train: The training part. Labels are read from its ``targets``, ``labels`` or ``tensors`` if these are the
            labels of the items, else from the items. The same holds for the dataset of a ``Subset``, and for the parts
            of a ``ConcatDataset``. None: the images of ``unlabeled`` are the training part, which has no label.
        test: The test part. If both parts have ``classes``, these are matched by name. Default: None, which means none.
        unlabeled: Images without labels. Default: None, which means none.
        class_names: Names of the classes, by index. Default: None, which means the ``classes`` of ``train``, if any,
            or the sorted labels if they are names.
        dense: Whether labels are dense. Default: False, which means one label, or one row of labels, for each sample.
        void: With ``dense``, the class number that means no label, such as 255. Default: None, which means none.
        val: Your own validation part, as ``test``. Default: None, which means that the datamodule takes ``val_size`` of
            the training part.

    Raises:
        InputError: For ``void`` without ``dense``, without ``train`` and ``unlabeled``, and for a dataset without
            length or index, such as an ``IterableDataset``.
    """

    dense = False
    void: int | None = None

    def __init__(
        self,
        train: Dataset | None = None,  # type: ignore[type-arg]  # jsonargparse refuses init_args of Dataset[Any]
        test: Dataset | None = None,  # type: ignore[type-arg]
        unlabeled: Dataset | None = None,  # type: ignore[type-arg]
        class_names: list[str] | None = None,
        dense: bool = False,
        void: int | None = None,
        val: Dataset | None = None,  # type: ignore[type-arg]
    ) -> None:
        if void is not None and not dense:
            raise InputError(f"void: {void} needs dense: true; a sample of one class has the label -1 for none")
        if train is None and unlabeled is None:
            raise InputError("train or unlabeled must be a dataset, got neither")
        for name, dataset in {"train": train, "test": test, "unlabeled": unlabeled, "val": val}.items():
            if dataset is not None:
                check_map_style(name, dataset)
        self.train = train
        self.test = test
        self.val = val
        self.unlabeled = unlabeled
        self.class_names = class_names
        self.dense = dense
        self.void = void
        images: Any = unlabeled if train is None else train
        item = read_item(images, 0) if len(images) else None
        first, strong = split_strong(inputs_of(item, images, 0)) if len(images) else (None, None)
        if strong is not None:
            rank_zero_info(f"DatasetSource: samples have a strong view, {describe(strong)}")
        if isinstance(first, Mapping | tuple | list):
            rank_zero_info(f"DatasetSource: the inputs of a sample are {describe(first)}")
        elif not _is_row(first) and (not isinstance(first, Tensor) or _is_picture(first)):
            self.train_transform = self.eval_transform = to_float()
            kind = np.asarray(first).dtype if isinstance(first, Image.Image | np.ndarray) else None
            if kind in _WIDE:
                rank_zero_warn(
                    f"DatasetSource: images are {kind}, so that the default transforms divide them by "
                    f"{np.iinfo(kind).max:,}; convert them to 8 or 16 bits, or set train_transform and eval_transform"
                )
        if others := left_out(item):
            rank_zero_info(
                f"DatasetSource: the image of an item is its input; left out: {', '.join(others)} (to pass them, too, "
                "return ({name: tensor, ...}, label))"
            )

    def load(self) -> Parts:
        """Read the labels."""
        if self.dense:
            return self._load_dense()
        if self.train is None:
            return parts_without_labels(self.unlabeled, self.test, self.class_names, val=self.val)
        return dataset_parts(self.train, self.test, self.unlabeled, self.class_names, val=self.val)

    def _load_dense(self) -> Parts:
        names = [*map(str, self.class_names)] if self.class_names else class_names_of(self.train)
        rules = LabelRules(None if names is None else len(names), self.void)
        unlabeled: Any = self.unlabeled
        if self.train is None:
            raise InputError("dense: a training part is needed, whose labels may all be missing, got none")
        test, val = (None if part is None else dense_part(part, rules) for part in (self.test, self.val))
        return Parts(dense_part(self.train, rules), test, unlabeled, names, void=self.void, val=val)


def _is_row(inputs: Any) -> bool:
    return isinstance(inputs, np.ndarray) and inputs.ndim == 1


def _is_picture(image: Tensor) -> bool:
    """Whether a tensor that stands alone as the input of a sample is a picture of 8 bits."""
    return image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3, 4)
