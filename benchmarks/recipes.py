"""Augmentation in pairs: that of this package, and the same of torchvision's v2 for one image at a time.

The second one is what this package had before its transforms took whole batches, and what users of other libraries
write. Images are tensors.
"""

import torch
from torchvision.transforms import v2

from kd_lightning import Digits
from kd_lightning.data.transforms import (
    photo_transforms,
    small_image_transforms,
    strong_digits,
    strong_photos,
    strong_small,
)

BILINEAR = v2.InterpolationMode.BILINEAR
MEAN, STD = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]  # CIFAR-100
PHOTO_MEAN, PHOTO_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def to_float_and_normalise(mean, std):
    """The last steps of most recipes."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def _cutout(share):
    return v2.RandomErasing(p=1.0, scale=(share**2, share**2), ratio=(1.0, 1.0), value=0)


def _strong(crops, mean, std):
    """FixMatch's strong view: two operations of RandAugment, and a square of half the side is erased."""
    fill = [255 * value for value in mean]
    bytes_ = [v2.ToImage(), v2.ToDtype(torch.uint8, scale=True)]
    operations = v2.RandAugment(num_ops=2, magnitude=10, fill=fill)
    return v2.Compose([*bytes_, *crops, operations, *to_float_and_normalise(mean, std), _cutout(1 / 2)])


def photo_per_image(size):
    """Crop of random size and flip of a PIL image, as users of torchvision.datasets.ImageFolder write it."""
    crop = v2.RandomResizedCrop(size, antialias=True)
    return v2.Compose(
        [crop, v2.RandomHorizontalFlip(), v2.ToImage(), v2.RGB(), *to_float_and_normalise(PHOTO_MEAN, PHOTO_STD)]
    )


DIGITS = (
    Digits().train_transform,
    v2.RandomAffine(degrees=10, translate=(0.0625, 0.0625), scale=(0.9, 1.1), interpolation=BILINEAR),
)
SMALL_PAIR = small_image_transforms(MEAN, STD, 32, flip=True)  # for training and evaluation
SMALL = (
    SMALL_PAIR[0],
    v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *to_float_and_normalise(MEAN, STD)]),
)
STRONG_DIGITS = (
    strong_digits(),
    v2.Compose(
        [
            v2.RandomAffine(degrees=25, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10, interpolation=BILINEAR),
            v2.ColorJitter(brightness=0.3, contrast=0.3),
            _cutout(1 / 4),
        ]
    ),
)
STRONG_SMALL = (
    strong_small(MEAN, STD),
    _strong([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()], MEAN, STD),
)
PHOTOS = (photo_transforms(224)[0], photo_per_image(224))
STRONG_PHOTOS = (
    strong_photos(224),
    _strong([v2.RGB(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()], PHOTO_MEAN, PHOTO_STD),
)


def digits_images(count):
    """Training images of the digits and their labels: the first ``count``; more than there are begin anew."""
    train = Digits().load().train
    places = torch.arange(count) % len(train.images)
    return train.images.tensors[0][places], train.targets[places]
