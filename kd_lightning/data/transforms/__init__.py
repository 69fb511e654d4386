"""Whole-batch transforms in torchvision v2's names, the sources' default transforms, and strong views.

Strong views of texts and tables are :class:`TokenDropout`, :class:`CorruptFeatures` and :class:`GaussianNoise`.
"""

from kd_lightning.data.transforms.auto_augment import RandAugment, TrivialAugmentWide
from kd_lightning.data.transforms.base import BatchTransform, Compose
from kd_lightning.data.transforms.channels import RGB
from kd_lightning.data.transforms.color import ColorJitter, GaussianBlur, RandomGrayscale
from kd_lightning.data.transforms.corrupt_features import CorruptFeatures
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.erasing import RandomErasing
from kd_lightning.data.transforms.gaussian_noise import GaussianNoise
from kd_lightning.data.transforms.geometry import RandomAffine, RandomCrop, RandomHorizontalFlip, RandomVerticalFlip
from kd_lightning.data.transforms.mix import CutMix, MixUp, OneOf
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.transforms.recipes import (
    photo_transforms,
    segmentation_transforms,
    small_image_transforms,
    strong_colors,
    strong_digits,
    strong_photos,
    strong_small,
    to_float,
)
from kd_lightning.data.transforms.resize import CenterCrop, RandomResizedCrop, Resize, ResizeToCover
from kd_lightning.data.transforms.token_dropout import TokenDropout

__all__ = [
    "RGB",
    "BatchTransform",
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "CorruptFeatures",
    "CutMix",
    "Draws",
    "GaussianBlur",
    "GaussianNoise",
    "MixUp",
    "Normalize",
    "OneOf",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomVerticalFlip",
    "Resize",
    "ResizeToCover",
    "TokenDropout",
    "TrivialAugmentWide",
    "photo_transforms",
    "segmentation_transforms",
    "small_image_transforms",
    "strong_colors",
    "strong_digits",
    "strong_photos",
    "strong_small",
    "to_float",
]
