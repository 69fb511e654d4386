"""Stored outputs of teachers, which the loader fills into batches where it makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from kd_lightning.batch import Batch
from kd_lightning.cache.outputs import PackedOutputs, StoredOutputs
from kd_lightning.cache.tensors import hash_rows, token_mask
from kd_lightning.data.views.worker_limits import share

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class ViewOutputs:
    """Stored teacher outputs of every view of some samples. Row = rank of the sample by index * num_views + view.

    Args:
        indices: (N,) indices of the samples, ascending.
        num_views: Views of each sample.
    """

    def __init__(self, indices: Numbers, num_views: int) -> None:
        self.indices = indices
        self.num_views = num_views
        self._stored: dict[str, StoredOutputs] = {}
        self._warned = False

    def set(self, stored: Mapping[str, StoredOutputs]) -> None:
        """Replace the stored outputs, by the teacher's name. Batches that are loaded from now on hold them."""
        self._stored = {**stored}
        self._warned = False

    @property
    def tensors(self) -> int:
        """Number of tensors that a batch has in addition."""
        return len(self._stored) + 1 if self._stored else 0

    def rows(self, batch: Batch) -> Numbers:
        """Return the number of each row of a batch in the table; -1 if the table has no such view."""
        assert batch.index is not None
        assert batch.view is not None
        index, view = batch.index.numpy(), batch.view.numpy()
        places = np.searchsorted(self.indices, index).clip(max=len(self.indices) - 1)
        known = (self.indices[places] == index) & (view >= 0) & (view < self.num_views)
        return np.where(known, places * self.num_views + view, -1)

    def fill(self, batch: Batch) -> Batch:
        """Put the outputs into a batch on the CPU. A teacher's outputs are left out if they are of other images."""
        if not self._stored or batch.index is None or batch.view is None:
            return batch
        numbers, views = self.rows(batch), hash_rows(batch.teacher_x)
        mask = token_mask(batch.teacher_x)
        length = None if mask is None else mask.shape[1]
        found, inputs, changed = {}, None, 0
        for name, stored in self._stored.items():
            rows = stored.read_packed(numbers.clip(min=0), length)
            others = int(((rows.views != views) | (numbers < 0)).sum())
            changed = max(changed, others)
            if not others and (inputs is None or np.array_equal(inputs, rows.inputs)):
                found[name], inputs = share(torch.from_numpy(rows.packed)), rows.inputs
        sources = {name: str(self._stored[name].folder) for name in found}
        hashes = None if inputs is None else share(torch.from_numpy(inputs.view(np.int64)))
        of_images = inputs is not None and np.array_equal(inputs, views)
        formats = {name: self._stored[name].format for name in found}
        about: dict[str, Any] = {"sources": sources, "inputs": hashes, "changed": changed, "of_images": of_images}
        batch.teacher = PackedOutputs(found, formats, **about)
        return batch

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches. Warn once if their images have changed."""
        for batch in batches:
            if not self._stored:  # a worker process may still have some
                batch.teacher = None
            if batch.teacher is not None and batch.teacher.of_images:
                batch.teacher.note_inputs(batch.teacher_x)  # here, since tensors of worker processes are copies
            changed = 0 if batch.teacher is None else batch.teacher.changed
            if changed and not self._warned:
                self._warned = True
                folders = ", ".join(str(stored.folder) for stored in self._stored.values())
                warnings.warn(
                    f"cache: {changed} of {len(batch)} images of a batch are not those whose outputs are stored (a "
                    "file, the dataset or a transform has changed since). The teacher computes such batches. Delete "
                    f"{folders}, and the next fit stores the outputs of all images again",
                    stacklevel=2,
                )
            yield batch


class FillingCollate:
    """Make a batch of samples, and fill in stored outputs. It runs where the batch is made, as in a worker process.

    Args:
        collate: Makes a batch of a list of samples.
        outputs: The stored outputs.
    """

    def __init__(self, collate: Callable[[Any], Batch], outputs: ViewOutputs) -> None:
        self.collate = collate
        self.outputs = outputs

    def __call__(self, samples: Any) -> Batch:
        """Return the batch with its outputs."""
        return self.outputs.fill(self.collate(samples))
