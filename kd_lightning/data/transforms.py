"""Transforms: the sources' defaults, and strong augmentations for the second view of FixMatch (Sohn et al. 2020).

All use torch's global generator alone, which ``ViewDataset`` seeds for each view.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import float32, nn, uint8
from torchvision.transforms import v2

from kd_lightning.errors import InputError


def to_float() -> nn.Module:
    """From a PIL image or a uint8 tensor to a float tensor in [0, 1]."""
    transform: nn.Module = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return transform


def photo_transforms(image_size: int | Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Training and evaluation transforms for photographs, normalised as torchvision's pretrained networks expect.

    Training crops a random area, 3/4 to 4/3 as wide as the output has it. Evaluation shrinks or enlarges the picture
    until it covers 8/7 of the output, and crops its centre. Neither changes the proportions otherwise.

    Args:
        image_size: Height and width of the output in pixels, or one number for a square; at least 1.

    Raises:
        InputError: If ``image_size`` is out of range.
    """
    size, ratio = _read_size("image_size", image_size, least=1)
    tail = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
    tail.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (
        v2.Compose([v2.RandomResizedCrop(size, ratio=ratio, antialias=True), v2.RandomHorizontalFlip(), *tail]),
        v2.Compose([_resize_to_cover(size), v2.CenterCrop(size), *tail]),
    )


def small_image_transforms(
    mean: Sequence[float], std: Sequence[float], size: int, *, flip: bool, padding: int = 4
) -> tuple[nn.Module, nn.Module]:
    """Training and evaluation transforms for small images, normalised by the mean and std of each channel.

    Training crops a square of ``size`` pixels after ``padding`` pixels of zeros, and mirrors at random if ``flip``.
    """
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    crop = [v2.RandomCrop(size, padding=padding), *([v2.RandomHorizontalFlip()] if flip else [])]
    return v2.Compose([*crop, *tail]), v2.Compose(tail)


def strong_digits() -> nn.Module:
    """Strong view of ``Digits``, from and to float tensors (1, 8, 8) in [0, 1].

    Random rotation, shift by one pixel, scale, shear, brightness and contrast; 2x2 pixels are erased. With stronger
    values people mistake one digit for another.
    """
    return _compose(
        v2.RandomAffine(
            # shifts are rounded to whole pixels: this is a shift by one pixel in 3 of 8 cases
            degrees=25,
            translate=(0.1, 0.1),
            scale=(0.8, 1.2),
            shear=10,
            interpolation=v2.InterpolationMode.BILINEAR,
        ),
        v2.ColorJitter(brightness=0.3, contrast=0.3),
        _cutout(1 / 4),
    )


def strong_small(mean: list[float], std: list[float], size: int = 32, padding: int = 4, flip: bool = True) -> nn.Module:
    """FixMatch's strong view of small images such as those of CIFAR-10.

    Crop and flip as in the weak view, then two operations of RandAugment, which are FixMatch's 14, then Cutout of a
    square of half the side. New pixels have the mean colour. FixMatch samples the strength of each operation and skips
    half of them; torchvision's RandAugment applies all, at a third of the range.

    Args:
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel of images in [0, 1], above 0.
        size: Side of the output in pixels, at least 2.
        padding: Pixels around the image that a crop may include, at least 0.
        flip: Whether to mirror images at random. Set it to false if a mirror image is of another class, as for digits.

    Returns:
        A transform from a PIL image or a tensor (C, H, W), uint8 or float in [0, 1], to a normalised tensor
        (C, size, size).

    Raises:
        InputError: For values out of range.
    """
    if not mean or len(mean) != len(std):
        raise InputError(f"mean and std must have a number for each channel, got {mean} and {std}")
    if min(std) <= 0:
        raise InputError(f"std must be above 0, got {std}")
    _read_size("size", size, least=2)
    if padding < 0:
        raise InputError(f"padding must be at least 0, got {padding}")
    return _compose(
        *_to_bytes(),
        v2.RandomCrop(size, padding=padding),
        *([v2.RandomHorizontalFlip()] if flip else []),
        v2.RandAugment(num_ops=2, magnitude=10, fill=[255 * value for value in mean]),
        v2.ToDtype(float32, scale=True),
        v2.Normalize(mean, std),
        _cutout(1 / 2),
    )


def strong_photos(size: int | tuple[int, int] = 224) -> nn.Module:
    """Strong view of photographs, normalised as torchvision's pretrained networks expect.

    Crop of random size and flip as in ``ImageFolder``'s default, then RandAugment and Cutout as in
    :func:`strong_small`.

    Args:
        size: Height and width of the output in pixels, or one number for a square; at least 2.

    Returns:
        A transform from a PIL image or a tensor (C, H, W), uint8 or float in [0, 1], grey or colour, to a normalised
        tensor (3, height, width).

    Raises:
        InputError: For a size below 2.
    """
    side, ratio = _read_size("size", size, least=2)
    mean = [0.485, 0.456, 0.406]
    return _compose(
        *_to_bytes(),
        v2.RGB(),
        v2.RandomResizedCrop(side, ratio=ratio, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=10, fill=[255 * value for value in mean]),
        v2.ToDtype(float32, scale=True),
        v2.Normalize(mean, [0.229, 0.224, 0.225]),
        _cutout(1 / 2),
    )


def _compose(*steps: nn.Module) -> nn.Module:
    transform: nn.Module = v2.Compose(list(steps))
    return transform


def _to_bytes() -> list[nn.Module]:
    """Convert to a uint8 tensor, the range of RandAugment's fill colour."""
    return [v2.ToImage(), v2.ToDtype(uint8, scale=True)]


def _cutout(share: float) -> nn.Module:
    """Set a square, whose side is this share of the image's, to 0: the mean colour of normalised images."""
    square: nn.Module = v2.RandomErasing(p=1.0, scale=(share**2, share**2), ratio=(1.0, 1.0), value=0)
    return square


class _ResizeToCover(nn.Module):
    """Resize an image to the smallest size that covers a height and a width, with its proportions."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height = height
        self.width = width

    def forward(self, image: Any) -> Any:
        """From and to a PIL image or a tensor (C, H, W)."""
        height, width = v2.functional.get_size(image)
        scale = max(self.height / height, self.width / width)
        size = [max(self.height, round(height * scale)), max(self.width, round(width * scale))]
        return v2.functional.resize(image, size, antialias=True)

    def extra_repr(self) -> str:
        return f"height={self.height}, width={self.width}"


def _resize_to_cover(size: int | list[int]) -> nn.Module:
    """Resize an image so that it covers 8/7 of a size."""
    if isinstance(size, list):
        return _ResizeToCover(*(side * 8 // 7 for side in size))
    resize: nn.Module = v2.Resize(size * 8 // 7, antialias=True)
    return resize


def _read_size(name: str, size: int | Sequence[int], *, least: int) -> tuple[int | list[int], tuple[float, float]]:
    """Check a size.

    Returns:
        The side of a square, else height and width; lowest and highest width over height of a crop that is resized to
        it.

    Raises:
        InputError: If it is no whole number from ``least``, and no two of them.
    """
    sides = [*size] if isinstance(size, Sequence) and not isinstance(size, str) else [size, size]
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < least:
        raise InputError(f"{name} must be at least {least}, got {size}: one whole number, or height and width")
    height, width = map(int, sides)
    shape = width / height
    ratio = (3 / 4 * shape, 4 / 3 * shape)
    return (height if height == width else [height, width]), ratio
