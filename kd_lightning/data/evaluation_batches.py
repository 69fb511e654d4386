"""Labeled samples on which a network is evaluated without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from kd_lightning.batch import Batch, is_labeled, unpack
from kd_lightning.data.batch_transfer import transfer
from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader

SAMPLES = 4096
"""About the largest number of samples; enough for a thousand classes."""


def evaluation_batches(data: Any, device: torch.device, labeled: bool = True) -> tuple[list[Batch], str] | None:
    """Return labeled validation samples and their name. Without any, labeled training samples. Never the test part.

    Args:
        data: A datamodule, set up for a fit, or a module with its own loaders.
        device: Device of the batches.
        labeled: Whether each batch must have a label. Default: True.
    """
    if is_overridden("val_dataloader", data):
        batches = _first(data.val_dataloader(), data, device, labeled)
        if batches:
            return batches, "validation labels"
    if isinstance(data, SemiSupervisedDataModule):
        assert data.split is not None
        training = data.train_dataloader()
        dataset, labels = training.dataset, LabelTable(training.labels.visible, dense=training.labels.dense)
        assert isinstance(dataset, ViewDataset)
        indices = torch.tensor(data.split.labeled if labeled else data.split.labeled + data.split.unlabeled)
        images = dataset.of(indices, data.eval_transform)
        loader = ViewLoader(images, labels, batch_size=data.batch_size, num_workers=data.num_workers)
        batches = _first(loader, data, device, labeled)
    else:
        batches = _first(data.train_dataloader(), data, device, labeled)
    return (batches, "labels of training images (there are no validation labels)") if batches else None


def calibration_batches(data: Any, device: torch.device, count: int) -> list[Batch]:
    """Return training samples under the evaluation transform, as ranges of activations are measured on.

    Args:
        data: A datamodule, set up for a fit, or a module with its own loaders.
        device: Device of the batches.
        count: Number of samples, at least 1; always the same ones, drawn from all. Of a datamodule of the user, the
            batches of its training loader that hold the first of them.
    """
    if not isinstance(data, SemiSupervisedDataModule):
        batches: list[Batch] = []
        for batch in batches_of(data.train_dataloader(), data, device):
            batches.append(batch)
            if sum(map(len, batches)) >= count:
                break
        return batches
    assert data.split is not None
    training = data.train_dataloader()
    dataset, labels = training.dataset, LabelTable(training.labels.visible, dense=training.labels.dense)
    assert isinstance(dataset, ViewDataset)
    indices = torch.tensor(data.split.labeled + data.split.unlabeled)
    drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:count].sort().values
    images = dataset.of(indices[drawn], data.eval_transform)
    loader = ViewLoader(images, labels, batch_size=data.batch_size, num_workers=data.num_workers)
    return [*batches_of(loader, data, device)]


def _first(loader: Any, data: Any, device: torch.device, labeled: bool) -> list[Batch]:
    taken, count = [], 0
    for batch in batches_of(loader, data, device):
        if not labeled or count_labels(batch):
            taken.append(batch)
        count += len(batch)
        if count >= SAMPLES:
            break
    return taken


def batches_of(loader: Any, data: Any, device: torch.device, *, training: bool = False) -> Iterator[Batch]:
    """Yield the batches of a loader, or of the first of several loaders, as a step gets them.

    Args:
        loader: A data loader, or a list or dict of them.
        data: The datamodule, or the module, whose transfer hooks change the batches, see
            :func:`~kd_lightning.data.batch_transfer.read_by`.
        device: Device of the batches.
        training: Whether they are those of a training step, for hooks that ask their trainer. Default: False, which
            means those of a validation step.

    Raises:
        InputError: If a hook fails.
    """
    while isinstance(loader, list | tuple | dict):
        parts = list(loader.values() if isinstance(loader, dict) else loader)
        if not parts:
            return
        loader = parts[0]
    for batch in loader:
        yield unpack(data, transfer(data, batch, device, training=training))


def count_labels(batch: Batch) -> int:
    """Return the number of known labels of a batch."""
    return 0 if batch.y is None else int(is_labeled(batch.y).sum())
