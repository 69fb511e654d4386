"""A source of your own map-style datasets."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from kd_lightning.data.sources._parts import class_names_of, dataset_part
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms import to_float


class DatasetSource(Source):
    """Your own map-style datasets, whose items are ``(image, label)`` or, for unlabeled, ``image``.

    Args:
        train: The training part. Labels are read from its ``targets``, ``labels`` or ``tensors``, else from its items.
        test: The test part. Default: None, which means none.
        unlabeled: Images without labels. Default: None, which means none.
        class_names: Names of the classes, by index. Default: None, which means the ``classes`` of ``train``, if any.
    """

    def __init__(
        self,
        train: Dataset[Any],
        test: Dataset[Any] | None = None,
        unlabeled: Dataset[Any] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.train = train
        self.test = test
        self.unlabeled = unlabeled
        self.class_names = class_names
        first = train[0] if len(train) else None  # type: ignore[arg-type]
        first = first[0] if isinstance(first, tuple | list) else first
        if not isinstance(first, Tensor):
            self.train_transform = self.eval_transform = to_float()

    def load(self) -> Parts:
        """Read the labels."""
        return Parts(
            dataset_part(self.train),
            None if self.test is None else dataset_part(self.test),
            self.unlabeled,  # type: ignore[arg-type]
            self.class_names or class_names_of(self.train),
        )
