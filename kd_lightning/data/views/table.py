"""A table of all views of a set of samples."""

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
from kd_lightning.data.views.dataset import ViewDataset, _in_one_line, collate
from kd_lightning.errors import InputError


class ViewTable:
    """Every view of some samples, by index, as the rows of a table: row = place of the sample * num_views + view.

    Args:
        dataset: The samples.
        num_views: How many of each; evaluation transforms have one.
        num_workers: Processes that :meth:`loader` reads with.
    """

    def __init__(self, dataset: ViewDataset, num_views: int, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.num_views = num_views
        self.num_workers = num_workers
        self._kept: str | None = None  # the transform's fingerprint when teachers kept their outputs
        self._indices, self._positions = (part.numpy() for part in dataset.indices.sort())

    def __len__(self) -> int:
        return len(self.dataset) * self.num_views

    def rows(self, batch: Batch) -> Rows:
        """Where a batch's rows stand."""
        assert batch.index is not None
        assert batch.view is not None
        index = batch.index.numpy()
        places = np.searchsorted(self._indices, index).clip(max=len(self._indices) - 1)
        if (self._indices[places] != index).any():
            raise InputError(
                "cache: a batch holds samples that the teachers' outputs were not kept of; start a new fit"
            )
        return Rows(self, places * self.num_views + batch.view.numpy())

    def read(self, batches: Iterable[Iterable[int]], seed: int = 0) -> Iterator[Batch]:
        """Batches of these rows; torch's own generator is left alone. The seed is that of workers."""
        keys: Any = (
            [(int(self._positions[row // self.num_views]), int(row % self.num_views)) for row in b] for b in batches
        )
        generator = torch.Generator().manual_seed(seed)  # or the loader would draw from torch's own
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": self.num_workers, "generator": generator}
        return _in_one_line(DataLoader(self.dataset, batch_sampler=keys, **options))

    @property
    def kept(self) -> bool:
        """Whether a teacher keeps its outputs, so that batches shall tell their rows."""
        return self._kept is not None

    def keep(self, transform: str) -> None:
        """Have batches tell their rows, as long as the transform has this fingerprint."""
        self._kept = transform
        self.check_transform()

    def check_transform(self) -> None:
        """Refuse a transform that is no longer what it was when teachers kept their outputs."""
        if self.kept and self._kept != fingerprint(self.dataset.transform):
            raise InputError(
                "cache: train_transform is no longer what it was when the teacher's outputs were kept: it, or a "
                "callback, changes it as a fit goes on. Do without a cache, or without that change"
            )

    def parts(self) -> dict[str, str]:
        """All that the views depend on, by name."""
        return {
            "images": fingerprint([*map(contents, self.dataset.images)]),
            "samples": hashlib.sha256(self._indices.tobytes()).hexdigest(),
            "transform": fingerprint(self.dataset.transform),
            "seed": str(self.dataset.seed),
            "views": str(self.num_views),
        }
