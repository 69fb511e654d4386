"""The base of the datamodule: how it loads views, in each process."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kd_lightning.data.decoded import DecodedPictures
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.sources.source import Parts
from kd_lightning.data.transforms.mix import Mix
from kd_lightning.data.views.build import build_views
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.samplers import ShareSampler
from kd_lightning.data.views.table import ViewTable


class ViewDataModule(LightningDataModule):
    """Loaders of views, each process with its share of them. A datamodule sets these attributes.

    Attributes:
        batch_size: Images per batch on each process.
        num_workers: Worker processes of each loader.
        seed: Seed of the augmentation.
        eval_transform: Transform of evaluation.
        decoded: Where decoded pictures are stored; None if they are not.
    """

    batch_size: int
    num_workers: int
    seed: int
    eval_transform: Any
    decoded: DecodedPictures | None

    @abstractmethod
    def _load_parts(self) -> Parts:
        """Load the source, once."""

    def _eval_loader(
        self, images: list[Any], indices: Tensor, labels: LabelTable, view_table: ViewTable | None = None
    ) -> ViewLoader:
        world, rank = self._world_size_and_rank()
        dataset = self._views(images, indices, labels, self.eval_transform)
        sampler = ShareSampler(len(indices), num_replicas=world, rank=rank)
        return self._loader(dataset, labels, sampler=sampler, view_table=view_table)

    def _views(
        self,
        images: list[Any],
        indices: Tensor,
        labels: LabelTable,
        *transforms: Any,
        mix: Mix | None = None,
        labeled: int = 0,
    ) -> ViewDataset:
        device = None if self.trainer is None else self.trainer.strategy.root_device
        device = device if device is not None and device.type == "cuda" else None
        if self.decoded is not None:
            images = self.decoded.open(images, self.trainer, threads=max(1, self.num_workers))
        options = (images, indices, labels, (*transforms, None)[:2], self.seed, device, mix, labeled)
        return build_views(self._load_parts(), *options)

    def _loader(self, dataset: ViewDataset, labels: LabelTable, **kwargs: Any) -> ViewLoader:
        return ViewLoader(
            dataset,
            labels,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def _world_size_and_rank(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
