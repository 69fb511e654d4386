"""Data: sources, splits, replayable views, and the datamodule that serves them."""

from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.sources import DatasetSource, Digits, FakeData, ImageFolder, Source, TorchvisionDataset

__all__ = [
    "SemiSupervisedDataModule",
    "Source",
    "Digits",
    "TorchvisionDataset",
    "ImageFolder",
    "FakeData",
    "DatasetSource",
]
