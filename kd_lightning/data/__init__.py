"""Data: sources, splits, replayable views, and the datamodule that serves them."""

from kd_lightning.data.class_subset import ClassSubset
from kd_lightning.data.coarse_labels import CoarseLabels
from kd_lightning.data.datamodule import SemiSupervisedDataModule
from kd_lightning.data.label_noise import LabelNoise, PairNoise, SymmetricNoise, TransitionNoise
from kd_lightning.data.rotated_classes import RotatedClasses
from kd_lightning.data.sources import DatasetSource, Digits, FakeData, ImageFolder, Source, TorchvisionDataset

__all__ = [
    "SemiSupervisedDataModule",
    "Source",
    "Digits",
    "TorchvisionDataset",
    "ImageFolder",
    "FakeData",
    "DatasetSource",
    "ClassSubset",
    "RotatedClasses",
    "LabelNoise",
    "SymmetricNoise",
    "PairNoise",
    "TransitionNoise",
    "CoarseLabels",
]
