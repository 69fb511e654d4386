"""The base of the datamodule: its samples by index, and how it loads views in each process."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kd_lightning.data.decoded import DecodedPictures
from kd_lightning.data.identity import Identities
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.transforms.mix import Mix
from kd_lightning.data.views.build import build_views
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.partners import Partners
from kd_lightning.data.views.samplers import ShareSampler
from kd_lightning.data.views.table import ViewTable


class ViewDataModule(LightningDataModule):
    """Samples by index, and loaders of views, each process with its share. A datamodule sets these attributes.

    Attributes:
        source: Where the images come from.
        unlabeled: Name of the unlabeled pool.
        batch_size: Images per batch on each process.
        num_workers: Worker processes of each loader.
        seed: Seed of the augmentation.
        train_transform: Transform of training.
        eval_transform: Transform of evaluation.
        decoded: Where decoded pictures are stored; None if they are not.
    """

    source: Source
    unlabeled: str
    batch_size: int
    num_workers: int
    seed: int
    train_transform: Any
    eval_transform: Any
    decoded: DecodedPictures | None
    _samples: Samples | None

    @abstractmethod
    def _load_parts(self) -> Parts:
        """Load the source, once."""

    def absent_classes(self) -> set[int]:
        """Numbers of the classes of which no training image is known, as of an empty folder."""
        return self.samples.absent_classes()

    def hidden_truth(self, index: Tensor) -> Tensor:
        """True labels of training images (N,), for metrics alone; -100 where they are unknown. None dense."""
        return self.samples.hidden_truth(index)

    def image(self, index: int) -> Any:
        """A training image of the source, before any transform."""
        return self.samples.image(index)

    def path(self, index: int) -> str | None:
        """The path of a training image's file; None if it has none."""
        return self.samples.path(index)

    def content(self, index: int) -> str:
        """Hash of a training image's content, which names it where it has no file."""
        return self.identities("train").contents[index]

    def identities(self, part: Literal["train", "test"]) -> Identities:
        """Paths and contents of the images by index: of the training images (validation included), or of the test."""
        return self.samples.all_identities if part == "train" else self.samples.test_identities

    @property
    def samples(self) -> Samples:
        """The source's images by index."""
        parts = self._load_parts()
        if self._samples is None or self._samples.unlabeled != self.unlabeled:
            self._samples = Samples(parts, self.unlabeled, type(self.source).__name__)
        return self._samples

    def _eval_loader(
        self,
        images: list[Any],
        indices: Tensor,
        labels: LabelTable,
        view_table: ViewTable | None = None,
        num_views: int | None = None,
    ) -> ViewLoader:
        """Return a loader under the evaluation transform; with ``num_views`` of so many views of training each."""
        world, rank = self._world_size_and_rank()
        dataset = self._views(
            images, indices, labels, self.eval_transform if num_views is None else self.train_transform
        )
        sampler = ShareSampler(len(indices), num_replicas=world, rank=rank, num_views=num_views)
        size = self.batch_size if num_views is None else max(1, self.batch_size // num_views) * num_views
        return self._loader(dataset, labels, batch_size=size, sampler=sampler, view_table=view_table)

    def _views(
        self,
        images: list[Any],
        indices: Tensor,
        labels: LabelTable,
        *transforms: Any,
        mix: Mix | None = None,
        partners: Partners | None = None,
    ) -> ViewDataset:
        """Return a dataset of views. With a second transform, or None in its place, batches have strong views."""
        device = None if self.trainer is None else self.trainer.strategy.root_device
        device = device if device is not None and device.type == "cuda" else None
        if self.decoded is not None:
            images = self.decoded.open(images, self.trainer, threads=max(1, self.num_workers))
        options = (images, indices, labels, (*transforms, None)[:2], self.seed, device, mix, partners)
        return build_views(self._load_parts(), *options, reads_strong=len(transforms) > 1)

    def _loader(self, dataset: ViewDataset, labels: LabelTable, **kwargs: Any) -> ViewLoader:
        return ViewLoader(
            dataset,
            labels,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **{"batch_size": self.batch_size} | kwargs,
        )

    def _world_size_and_rank(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
