"""Sources: where samples and their labels come from."""

from kd_lightning.data.sources.class_subset import ClassSubset
from kd_lightning.data.sources.dataset_source import DatasetSource
from kd_lightning.data.sources.digit_angles import DigitAngles
from kd_lightning.data.sources.digit_properties import DigitProperties
from kd_lightning.data.sources.digits import Digits
from kd_lightning.data.sources.fake_data import FakeData
from kd_lightning.data.sources.hugging_face import HuggingFaceSource
from kd_lightning.data.sources.image_folder import ImageFolder
from kd_lightning.data.sources.image_mask_folder import ImageMaskFolder
from kd_lightning.data.sources.image_table import ImageTable
from kd_lightning.data.sources.rotated_classes import RotatedClasses
from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.data.sources.text_source import TextSource
from kd_lightning.data.sources.torchvision_dataset import TorchvisionDataset

__all__ = [
    "Part",
    "Parts",
    "Source",
    "Digits",
    "DigitProperties",
    "DigitAngles",
    "TorchvisionDataset",
    "HuggingFaceSource",
    "ImageFolder",
    "ImageMaskFolder",
    "ImageTable",
    "FakeData",
    "DatasetSource",
    "ClassSubset",
    "RotatedClasses",
    "TextSource",
]
