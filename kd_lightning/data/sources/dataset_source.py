"""A source of your own map-style datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources._parts import check_map_style, dataset_parts
from kd_lightning.data.sources.images import inputs_of, read_item
from kd_lightning.data.sources.items import left_out
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms import to_float
from kd_lightning.inputs import describe

_WIDE = (np.int32, np.uint32, np.int64, np.uint64)


class DatasetSource(Source):
    """Your own map-style datasets.

    Items are ``(image, label)``, possibly with more behind, or mappings with the key ``image``, ``img``, ``x``,
    ``pixel_values``, ``input`` or ``inputs`` and the key ``label``, ``labels``, ``target``, ``targets``, ``y`` or
    ``fine_label``. Items of ``unlabeled`` may also be the image alone.

    A sample may have several inputs: ``((a, b), label)``, ``({"input_ids": ..., "attention_mask": ...}, label)``, or a
    mapping such as ``{"input_ids": ..., "attention_mask": ..., "labels": ...}``. Networks are then called as
    ``network(a, b)`` or ``network(**inputs)``, and teachers with the entry ``teacher_inputs``, if there is one. Arrays
    and lists of numbers become tensors; paths, texts and single numbers are left out. A transform of one sample gets
    all of them. Without one, all samples must have tensors of one shape: pad texts in the dataset.

    A label is a class number, a class name, a number 0 or 1 as float, or a row of zeros and ones for several labels. It
    is None, NaN, -1 or -100 where it is missing; in a row, single entries may be missing. Training samples without a
    label are in the unlabeled pool, and metrics leave out test samples without one.

    Args:
        train: The training part. Labels are read from its ``targets``, ``labels`` or ``tensors`` if these are the
            labels of the items, else from the items. The same holds for the dataset of a ``Subset``, and for the parts
            of a ``ConcatDataset``.
        test: The test part. If both parts have ``classes``, these are matched by name. Default: None, which means none.
        unlabeled: Images without labels. Default: None, which means none.
        class_names: Names of the classes, by index. Default: None, which means the ``classes`` of ``train``, if any,
            or the sorted labels if they are names.

    Raises:
        InputError: For a dataset without length or index, such as an ``IterableDataset``.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse refuses init_args of Dataset[Any]
        test: Dataset | None = None,  # type: ignore[type-arg]
        unlabeled: Dataset | None = None,  # type: ignore[type-arg]
        class_names: list[str] | None = None,
    ) -> None:
        for name, dataset in {"train": train, "test": test, "unlabeled": unlabeled}.items():
            if dataset is not None:
                check_map_style(name, dataset)
        self.train = train
        self.test = test
        self.unlabeled = unlabeled
        self.class_names = class_names
        images: Any = train
        item = read_item(images, 0) if len(images) else None
        first = inputs_of(item, images, 0) if len(images) else None
        if isinstance(first, Mapping | tuple | list):
            rank_zero_info(f"DatasetSource: the inputs of a sample are {describe(first)}")
        elif not isinstance(first, Tensor):
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
        return dataset_parts(self.train, self.test, self.unlabeled, self.class_names)
