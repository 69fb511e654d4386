"""The table of all views of a set of samples, by which teacher outputs are cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kd_lightning.batch import Batch, Rows
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.sources.images import contents
from kd_lightning.data.views.dataset import ViewDataset, collate, shorten_worker_errors
from kd_lightning.errors import InputError


class ViewTable:
    """Every view of some samples as a row of a table: row = rank of the sample by index * num_views + view.

    Args:
        dataset: The samples.
        num_views: Views of each sample; evaluation transforms have one.
        num_workers: Worker processes of :meth:`read`.
    """

    def __init__(self, dataset: ViewDataset, num_views: int, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.num_views = num_views
        self.num_workers = num_workers
        self._cached_transform: str | None = None  # fingerprint of the transform whose outputs are cached
        self._indices, self._positions = (part.numpy() for part in dataset.indices.sort())

    def __len__(self) -> int:
        return len(self.dataset) * self.num_views

    def rows(self, batch: Batch) -> Rows:
        """The rows of the table that a batch consists of."""
        assert batch.index is not None
        assert batch.view is not None
        index = batch.index.numpy()
        places = np.searchsorted(self._indices, index).clip(max=len(self._indices) - 1)
        if (self._indices[places] != index).any():
            raise InputError("cache: a batch has samples whose teacher outputs are not cached; start a new fit")
        return Rows(self, places * self.num_views + batch.view.numpy())

    def read(self, batches: Iterable[Iterable[int]], seed: int = 0) -> Iterator[Batch]:
        """Load batches of these rows. The state of torch's global generator stays; ``seed`` seeds the workers."""
        keys: Any = (
            [(int(self._positions[row // self.num_views]), int(row % self.num_views)) for row in b] for b in batches
        )
        generator = torch.Generator().manual_seed(seed)  # else the loader uses torch's global one
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": self.num_workers, "generator": generator}
        return shorten_worker_errors(DataLoader(self.dataset, batch_sampler=keys, **options))

    @property
    def rows_enabled(self) -> bool:
        """Whether training batches hold their rows, since teacher outputs of them are cached."""
        return self._cached_transform is not None

    def enable_rows(self, transform: str) -> None:
        """Let training batches hold their rows. ``transform`` is the fingerprint of the transform that was cached."""
        self._cached_transform = transform
        self.check_transform()

    def check_transform(self) -> None:
        """Refuse a transform that has changed since teacher outputs were cached."""
        if self.rows_enabled and self._cached_transform != fingerprint(self.dataset.transform):
            raise InputError(
                "cache: train_transform has changed since the teacher's outputs were cached: the transform itself or a "
                "callback changes it during the fit; remove cache, or that change"
            )

    def parts(self) -> dict[str, str]:
        """Hashes of all that the views depend on, by name."""
        return {
            "images": fingerprint([*map(contents, self.dataset.images)]),
            "samples": hashlib.sha256(self._indices.tobytes()).hexdigest(),
            "transform": fingerprint(self.dataset.transform),
            "seed": str(self.dataset.seed),
            "views": str(self.num_views),
        }
