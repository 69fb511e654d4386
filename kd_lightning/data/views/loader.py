"""The data loader of views, which fills in labels and resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.batch import Batch
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset, collate, shorten_worker_errors
from kd_lightning.data.views.dense_means import with_dense_means
from kd_lightning.data.views.samplers import ShareSampler, TrainingBatches, ViewSampler
from kd_lightning.data.views.table import ViewTable
from kd_lightning.data.views.teacher_outputs import FillingCollate
from kd_lightning.data.views.worker_limits import check_open_files
from kd_lightning.errors import InputError


class ViewLoader(DataLoader[Batch]):
    """DataLoader of ``Batch`` objects that fills in labels by index and resumes in mid-epoch.

    The main process fills in the labels: worker processes have copies of the dataset from the start of an epoch.

    Args:
        dataset: The samples.
        labels: The label of each index.
        trainer: Trainer whose ``accumulate_grad_batches`` groups batches into optimiser steps. Default: None, which
            means that each batch is one step.
        view_table: Table of the dataset's views, whose stored teacher outputs are put into the batches. Default: None,
            which means none.
        kwargs: Other arguments of DataLoader.
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
        if view_table is not None and not isinstance(kwargs["collate_fn"], FillingCollate):
            kwargs["collate_fn"] = FillingCollate(kwargs["collate_fn"], view_table.outputs)
        if dataset.is_dense != labels.dense:
            raise InputError("labels: dense labels need a dataset of dense labels, and others one without")
        super().__init__(dataset, **kwargs)
        self.labels = labels
        self.trainer = trainer
        self.view_table = view_table
        joins = self.batch_sampler is not None and (trainer is not None or isinstance(self.sampler, ViewSampler))
        size = self.batch_size or 1
        together = max(1, dataset.rows_at_once // size) if isinstance(self.sampler, ViewSampler) else 1
        self._training_batches = TrainingBatches(self.sampler, size, together) if joins else None
        self._position = (0, 0)  # epoch, batches
        self._resume_position = (-1, 0)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that the trainer has processed."""
        epoch, batches = self._position
        if self.trainer is not None:  # a batch was loaded but not processed if an exception is the reason to save
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            batches = min(batches, progress.processed)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at that batch if the next epoch is that one; any other epoch starts at its first batch."""
        self._position = self._resume_position = (state["epoch"], state["batches"])

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: it starts with the first batch, after Lightning has set the epoch.
        sampler, finish = self.sampler, self.dataset.finish  # type: ignore[attr-defined]
        if not isinstance(sampler, ViewSampler):
            is_padded = isinstance(sampler, ShareSampler) and sampler.is_padded
            for batch in map(self.labels.fill, self._batches()):
                yield finish(batch.as_padding() if is_padded else batch)
            return
        start = self._resume_position[1] if self._resume_position[0] == sampler.epoch else 0
        self._resume_position = (-1, 0)
        # the first of its optimiser step, since dense labels are counted when they are loaded
        first = start if self.trainer is None else start - start % self.trainer.accumulate_grad_batches
        batches = with_dense_means(self._training(sampler, first), self.trainer, first, len(self))
        yield from islice(batches, start - first, None)

    def _training(self, sampler: ViewSampler, start: int) -> Iterator[Batch]:
        """Yield the batches of training with their labels, from number ``start`` of the epoch on."""
        finish = self.dataset.finish  # type: ignore[attr-defined]
        epoch = sampler.epoch
        assert self._training_batches is not None
        self._training_batches.skip = start
        keys, dataset = sampler.keys(), self.dataset
        order = dataset.indices[keys[:, 0]]  # type: ignore[attr-defined]
        partners = None if dataset.mix is None else dataset.partners(keys)  # type: ignore[attr-defined]
        version, counts, number = -1, [[0]], start
        for group in self._batches():
            filled = self.labels.version
            sizes = self._training_batches.sizes(number)
            for batch in self.labels.fill(group).split(sizes) if len(sizes) > 1 else [self.labels.fill(group)]:
                if filled != self.labels.version:  # pseudo-labels may be replaced at any time
                    self.labels.fill(batch)
                if version != self.labels.version:
                    version, counts = self.labels.version, self._count(order, partners)
                means = self._step_means(counts, number)
                batch.mean_labels, batch.mean_pseudo, batch.mean_coarse, batch.mean_rows = means
                number += 1
                self._position = (epoch, number)
                yield finish(batch)  # last, since labels are looked up on the CPU

    def describe(self) -> str:
        """Return in one line the steps of an epoch, and the rows of each. For the training loader."""
        assert isinstance(self.sampler, ViewSampler)
        steps = len(self)
        text = self.sampler.describe(steps, self.batch_size or 1)
        if self.trainer is None:
            return text
        limit, window = self.trainer.limit_train_batches, self.trainer.accumulate_grad_batches
        run = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        text += f"; limit_train_batches takes {run} of them" if run < steps else ""
        return text + (f"; every {window} are one optimiser step" if window > 1 else "")

    @property
    def _index_sampler(self) -> Any:
        # of DataLoader, which does not let a loader have both a sampler and batches of its own
        return super()._index_sampler if self._training_batches is None else self._training_batches

    def _batches(self) -> Iterator[Batch]:
        if self.num_workers and self._iterator is None:  # else its workers run already
            more = self.dataset.more_tensors  # type: ignore[attr-defined]
            check_open_files(self, more + (0 if self.view_table is None else self.view_table.outputs.tensors))
        batches = shorten_worker_errors(super().__iter__())
        return batches if self.view_table is None else self.view_table.outputs.watch(batches)

    def _count(self, order: Tensor, partners: Tensor | None) -> list[list[int]]:
        """Count labels, pseudo-labels, coarse labels and rows of all ranks before each batch, and in all.

        Args:
            order: Indices of this epoch on all ranks, in order.
            partners: Those that they are mixed with; None if they are not.
        """
        assert isinstance(self.sampler, ViewSampler)
        rows = (self.batch_size or 1) * self.sampler.num_replicas
        places = torch.tensor([*(min(number * rows, len(order)) for number in range(len(self))), len(order)])
        counts: list[list[int]] = torch.cat(
            [self.labels.count_up_to(order, partners)[places], places.unsqueeze(1)], 1
        ).tolist()
        return counts

    def _step_means(self, counts: list[list[int]], number: int) -> list[float]:
        """Labels, pseudo-labels, coarse labels and rows per batch: means over the optimiser step on all ranks.

        Args:
            counts: Numbers of labels and rows before each batch, of :meth:`_count`.
            number: Number of the batch in the epoch.
        """
        assert isinstance(self.sampler, ViewSampler)
        window, last = 1, len(counts) - 1
        if self.trainer is not None:
            window = self.trainer.accumulate_grad_batches
            last = int(min(last, self.trainer.num_training_batches))
        first = number // window * window
        end = max(min(first + window, last), number + 1)
        batches = self.sampler.num_replicas * (end - first)
        return [(stop - start) / batches for start, stop in zip(counts[first], counts[end], strict=True)]
