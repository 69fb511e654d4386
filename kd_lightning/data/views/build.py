"""Build the dataset of views that fits the labels of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.sources.dense_labels import LabelRules
from kd_lightning.data.sources.images import Images
from kd_lightning.data.sources.source import Parts
from kd_lightning.data.transforms.mix import Mix
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.dense_dataset import DenseViewDataset
from kd_lightning.data.views.partners import Partners
from kd_lightning.errors import InputError


def build_views(
    parts: Parts,
    images: Sequence[Images],
    indices: Tensor,
    labels: LabelTable,
    transforms: tuple[Any, Any],
    seed: int,
    device: torch.device | None,
    mix: Mix | None = None,
    partners: Partners | None = None,
    reads_strong: bool = False,
) -> ViewDataset:
    """Return a dataset of views, with dense labels if those of the source are dense.

    Args:
        parts: The parts of the source.
        images: The images, by index.
        indices: Index of the sample at each position, (N,).
        labels: Which dense labels may be seen.
        transforms: The transform of the view, and that of the strong view or None.
        seed: Seed of the augmentation.
        device: Device of whole-batch transforms; None for where images are read.
        mix: Mixes each view with that of another sample. Default: None, which means that views are not mixed.
        partners: What each view is mixed with. Needed with ``mix``.
        reads_strong: Whether strong views that samples have themselves are in the batches. Default: False.

    Raises:
        InputError: For ``mix`` if labels are dense.
    """
    transform, strong = transforms
    options = (transform, seed, strong, device, parts.pad_token)
    if not labels.dense:
        return ViewDataset(images, indices, *options, mix, partners, reads_strong)
    if mix is not None:
        raise InputError("mix needs one label, or one row of labels, for a sample; these are dense")
    rules = LabelRules(len(parts.class_names) if parts.class_names else None, parts.void)
    return DenseViewDataset(images, indices, *options, visible=is_labeled(labels.visible), rules=rules)
