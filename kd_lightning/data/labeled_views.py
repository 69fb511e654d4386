"""Labeled samples as a teacher sees them: under training views, and under evaluation transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from kd_lightning.batch import Batch, LabelKind
from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.evaluation_batches import batches_of, count_labels
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader

MOST = 1024
"""Largest number of samples of each part; of more a random choice, always the same."""
VIEWS, FEW = 4, 256
"""Views of each sample, if there are at most so many samples; else one."""

Read = Callable[[bool], Any]


class LabeledViews(NamedTuple):
    """Batches of labeled samples. A list is empty where there are no such samples, or they cannot be found.

    Attributes:
        training: Labeled training samples under training views.
        training_plain: The same samples under the evaluation transform.
        held_out: Validation samples under training views.
        held_out_plain: The same samples under the evaluation transform.
        counts: Number of labeled and of unlabeled training samples, and of those that are left out; None if they are
            not known.
        noisy: Whether labels of training samples may be wrong.
    """

    training: list[Batch]
    training_plain: list[Batch]
    held_out: list[Batch]
    held_out_plain: list[Batch]
    counts: tuple[int, int, int] | None = None
    noisy: bool = False

    @property
    def labeled_share(self) -> float | None:
        """Share of the training samples that are labeled; None if it is not known."""
        if self.counts is None:
            return None
        labeled, unlabeled, _ = self.counts
        return labeled / max(labeled + unlabeled, 1)


def labeled_views(data: Any, read: Read, device: torch.device) -> LabeledViews:
    """Load labeled samples. Views are those of training, without mixup. No hidden label and no test sample is used.

    A datamodule of the user has no samples by index: its first training batches are the training views, and its
    validation batches are under its own evaluation transform.

    Args:
        data: A datamodule, set up for a fit, or a module with its own loaders.
        read: Returns the object whose hooks and ``unpack`` turn loaded batches into those of a training step (argument
            True) or of a validation step (False).
        device: Device of the batches.
    """
    if not isinstance(data, SemiSupervisedDataModule):
        training = _first(data.train_dataloader(), read(True), device, training=True)
        has_validation = is_overridden("val_dataloader", data)
        return LabeledViews(
            training, [], [], _first(data.val_dataloader(), read(False), device) if has_validation else []
        )
    assert data.split is not None
    loader = data.train_dataloader()
    labels = loader.labels
    indices = _some(data.split.labeled)
    visible = LabelTable(labels.visible, dense=labels.dense)
    views, plain = _both(data, loader.dataset, visible, indices, read, device)
    unseen: list[Batch] = []
    unseen_plain: list[Batch] = []
    validation = data.val_dataloader()
    if isinstance(validation, ViewLoader):
        held_out = _some(data.split.val)
        unseen, unseen_plain = _both(data, validation.dataset, validation.labels, held_out, read, device)
    count, pool = len(data.split.labeled), len(data.unlabeled_indices())
    hidden = len(data.split.unlabeled) if data.unlabeled == "none" else 0
    noisy = labels.kind is not None and bool((labels.kind[indices] == LabelKind.NOISY).any())
    return LabeledViews(views, plain, unseen, unseen_plain, (count, pool, hidden), noisy)


def _some(indices: Sequence[int]) -> Tensor:
    found = torch.tensor(indices, dtype=torch.long)
    drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:MOST]
    return found[drawn.sort().values]


def _both(
    data: SemiSupervisedDataModule, dataset: Any, labels: LabelTable, indices: Tensor, read: Read, device: torch.device
) -> Iterator[list[Batch]]:
    """Yield the batches of samples under training views, and under the evaluation transform."""
    assert isinstance(dataset, ViewDataset)
    alike = data.train_transform is data.eval_transform
    number = 1 if alike or len(indices) > FEW else min(VIEWS, data.num_views or VIEWS)
    for trains, transform, views in ((True, data.train_transform, number), (False, data.eval_transform, 1)):
        keys: Any = [(position, view) for view in range(views) for position in range(len(indices))]
        images = dataset.of(indices, transform)
        options: dict[str, Any] = {"batch_size": data.batch_size, "num_workers": data.num_workers, "sampler": keys}
        loader = ViewLoader(images, labels, **options)
        found = batches_of(loader, read(trains), device, training=trains) if keys else ()
        yield [batch for batch in found if count_labels(batch)]


def _first(loader: Any, data: Any, device: torch.device, *, training: bool = False) -> list[Batch]:
    taken, count = [], 0
    for batch in batches_of(loader, data, device, training=training):
        if count_labels(batch):
            taken.append(batch)
        count += len(batch)
        if count >= MOST:
            break
    return taken
