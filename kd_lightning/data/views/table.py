"""The table of all views of a set of samples, by which teacher outputs are cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kd_lightning.batch import Batch
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.views.dataset import ViewDataset, collate, shorten_worker_errors
from kd_lightning.data.views.teacher_outputs import ViewOutputs


class ViewTable:
    """Every view of some samples as a row of a table: row = rank of the sample by index * num_views + view.

    Args:
        dataset: The samples.
        num_views: Views of each sample; evaluation transforms have one.
        num_workers: Worker processes of :meth:`read`.

    Attributes:
        outputs: Stored teacher outputs of the views.
    """

    def __init__(self, dataset: ViewDataset, num_views: int, num_workers: int = 0) -> None:
        self.dataset = dataset
        self.num_views = num_views
        self.num_workers = num_workers
        indices, self._positions = (part.numpy() for part in dataset.indices.sort())
        self.outputs = ViewOutputs(indices, num_views)

    def __len__(self) -> int:
        return len(self.dataset) * self.num_views

    def read(self, batches: Iterable[Iterable[int]], seed: int = 0) -> Iterator[Batch]:
        """Load batches of these rows. The state of torch's global generator stays; ``seed`` seeds the workers."""
        rows = (np.fromiter(batch, np.int64) for batch in batches)
        keys: Any = (np.stack([self._positions[b // self.num_views], b % self.num_views], axis=1) for b in rows)
        generator = torch.Generator().manual_seed(seed)  # else the loader uses torch's global one
        options: dict[str, Any] = {"collate_fn": collate, "num_workers": self.num_workers, "generator": generator}
        return shorten_worker_errors(DataLoader(self.dataset, batch_sampler=keys, **options))

    def finish(self, batch: Batch) -> Batch:
        """Run the whole-batch transforms on a batch of :meth:`read`, where they run on another device."""
        return self.dataset.finish(batch)

    def parts(self) -> dict[str, str]:
        """What decides which view a row is, by name. What the views show is compared when they are read."""
        device, partners = self.dataset.device, self.dataset.partners
        mixed = {} if partners is None else {"mix": f"{fingerprint(self.dataset.mix)} {partners.hash}"}
        return mixed | {
            "samples": hashlib.sha256(self.outputs.indices.tobytes()).hexdigest(),
            "seed": str(self.dataset.seed),
            "views": str(self.num_views),
            # what the transforms do on another device is not compared
            "transform": "" if device is None else f"{device.type} {fingerprint(self.dataset.transform)}",
        }
