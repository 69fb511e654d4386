"""The data loader that fills batches, and that a run resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.batch import Batch
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset, _in_one_line, collate
from kd_lightning.data.views.samplers import ViewSampler
from kd_lightning.data.views.table import ViewTable


class ViewLoader(DataLoader[Batch]):
    """DataLoader of Batches that a run can resume in mid-epoch, and that fills labels in by index.

    Labels are looked up here, in the main process, since workers hold old copies of a dataset.

    Args:
        dataset: A :class:`ViewDataset`.
        labels: The label of each index.
        trainer: Tells how batches make up optimiser steps; None: each is one.
        view_table: The table in which teachers may keep their outputs.
        kwargs: As of DataLoader.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        labels: LabelTable,
        trainer: Trainer | None = None,
        view_table: ViewTable | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("collate_fn", collate)
        super().__init__(dataset, **kwargs)  # type: ignore[arg-type]  # its type is that of a batch
        self.labels = labels
        self.trainer = trainer
        self.view_table = view_table
        self._done = (0, 0)
        self._resume = (-1, 0)

    def state_dict(self) -> dict[str, int]:
        """Where in which epoch the loader is."""
        return {"epoch": self._done[0], "batches": self._done[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on there; a later epoch starts at its beginning."""
        self._resume = (state["epoch"], state["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: nothing starts before the first batch is asked for, when Lightning has set the epoch.
        sampler = self.sampler
        if not isinstance(sampler, ViewSampler):
            yield from map(self._fill, self._batches())
            return
        epoch = sampler.epoch
        start = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (-1, 0)
        assert self.batch_size is not None
        sampler.skip = start * self.batch_size
        order = self.dataset.indices[sampler.keys()[:, 0]]  # type: ignore[attr-defined]
        for number, batch in enumerate(self._batches(), start):
            self._fill(batch)
            batch.mean_labels, batch.mean_pseudo, batch.mean_coarse, batch.mean_rows = self._means(order, number)
            self._done = (epoch, number + 1)
            yield batch

    def _fill(self, batch: Batch) -> Batch:
        if self.view_table is not None and self.view_table.kept:
            batch.rows = self.view_table.rows(batch)
        return self.labels.fill(batch)

    def _batches(self) -> Iterator[Batch]:
        if self.view_table is not None:
            self.view_table.check_transform()
        return _in_one_line(super().__iter__())

    def _means(self, order: Tensor, number: int) -> tuple[float, float, float, float]:
        """Labels, pseudo-labels, coarse ones and rows of a batch: means over those of its step on all ranks."""
        assert isinstance(self.sampler, ViewSampler)
        window, last = 1, len(self)
        if self.trainer is not None:
            window = self.trainer.accumulate_grad_batches
            last = int(min(last, self.trainer.num_training_batches))
        ranks = self.sampler.num_replicas
        rows = (self.batch_size or 1) * ranks
        first = number // window * window
        end = max(min(first + window, last), number + 1)
        index = order[first * rows : end * rows]
        batches = ranks * (end - first)
        labels, pseudo, coarse = (count / batches for count in self.labels.count(index))
        return labels, pseudo, coarse, len(index) / batches
