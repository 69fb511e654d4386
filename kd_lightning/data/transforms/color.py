"""Whole-batch changes of colour, sharpness and blur, in torchvision v2's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.functional import pad

from kd_lightning.data.transforms.adjustments import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_in_turn,
    adjust_saturation,
    check_images,
    in_parts,
    to_float,
    to_gray,
)
from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.buffers import empty_like
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

Range = float | Sequence[float]
"""Lowest and highest value, or one number: how far values lie from the one that changes nothing."""


class ColorJitter(BatchTransform):
    """Change brightness, contrast, saturation and hue of each image by random factors, in random order.

    Args:
        brightness: Lowest and highest factor, at least 0, or one number x for 1 - x (at least 0) to 1 + x. Default: 0,
            which means no change.
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: Lowest and highest share of the circle of colours, -0.5 to 0.5, or one number x for -x to x.

    Raises:
        InputError: If a value is out of range. In a call: for images of another type, or without 1 or 3 channels.
    """

    moves_pixels = False

    def __init__(self, brightness: Range = 0, contrast: Range = 0, saturation: Range = 0, hue: Range = 0) -> None:
        super().__init__()
        self.brightness = _read_range("brightness", brightness, 1, 0, math.inf)
        self.contrast = _read_range("contrast", contrast, 1, 0, math.inf)
        self.saturation = _read_range("saturation", saturation, 1, 0, math.inf)
        self.hue = _read_range("hue", hue, 0, -0.5, 0.5)

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W) of the same type, C = 1 or 3, uint8 or float in [0, 1]."""
        check_images(images)
        draws = draws.on_cpu()
        adjustments = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
        ranges = [self.brightness, self.contrast, self.saturation, self.hue]
        steps = [(adjust, draws.uniform(*limits)) for adjust, limits in zip(adjustments, ranges, strict=True) if limits]
        if not steps:
            return images
        order, factors = draws.permutation(len(steps)), torch.stack([factor for _, factor in steps], dim=1)
        return adjust_in_turn(images, order, factors, adjustments=[adjust for adjust, _ in steps])


class RandomGrayscale(BatchTransform):
    """Make images grey at random. The number of channels stays.

    Args:
        p: Probability, 0 to 1.

    Raises:
        InputError: If ``p`` is out of range. In a call: for images of another type, or without 1 or 3 channels.
    """

    moves_pixels = False

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p must be 0 to 1, got {p}")
        self.p = p

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W) of the same type, C = 1 or 3."""
        check_images(images)
        rows = draws.on_cpu().coin(self.p).nonzero()[:, 0].to(images.device)
        if images.shape[1] == 1:
            return images
        part = images.index_select(0, rows)
        gray = to_gray(to_float(part), part).to(images.dtype)
        result = empty_like(images).copy_(images)
        result[rows] = gray.expand_as(part)
        return result


class GaussianBlur(BatchTransform):
    """Blur each image by a Gaussian of random width. Beyond its border the image is mirrored.

    Args:
        kernel_size: Width and height of the kernel in pixels, odd, or one number for both.
        sigma: Lowest and highest standard deviation in pixels, above 0, or one number for both.

    Raises:
        InputError: If a value is out of range. In a call: if half of the kernel is as large as the images.
    """

    moves_pixels = False

    def __init__(self, kernel_size: int | Sequence[int], sigma: Range = (0.1, 2.0)) -> None:
        super().__init__()
        sides = [*kernel_size] if isinstance(kernel_size, Sequence) else [kernel_size] * 2
        if len(sides) != 2 or not all(isinstance(side, Integral) and side > 0 and side % 2 for side in sides):
            raise InputError(f"kernel_size must be an odd number above 0, or two, got {kernel_size}")
        low, high = (sigma if len(sigma) == 2 else (0, 0)) if isinstance(sigma, Sequence) else (sigma, sigma)
        if not 0 < low <= high < math.inf:
            raise InputError(f"sigma must be a number above 0, or lowest and highest such number, got {sigma}")
        self.kernel_size = (sides[0], sides[1])
        self.sigma = (float(low), float(high))

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W) of the same type."""
        return gaussian_blur(images, draws.uniform(*self.sigma), kernel_size=self.kernel_size)


@in_parts
def gaussian_blur(images: Tensor, sigma: Tensor, *, kernel_size: Sequence[int]) -> Tensor:
    """Blur each image by a Gaussian. Beyond its border the image is mirrored without its outermost pixels.

    Args:
        images: (B, C, H, W), whole numbers or floats.
        sigma: (B,) standard deviations in pixels, above 0.
        kernel_size: Width and height of the kernel in pixels, odd.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: If half of the kernel is as large as the images.
    """
    height, width = images.shape[2:]
    across, down = (size // 2 for size in kernel_size)
    if across >= width or down >= height:
        most = f"{[2 * width - 1, 2 * height - 1]}"
        raise InputError(f"kernel_size must be at most {most} for images of {[height, width]}, got {kernel_size}")
    pixels = images if images.dtype == torch.float64 else images.float()
    pixels = pad(pixels, [across, across, down, down], mode="reflect")
    for dim, size in ((3, kernel_size[0]), (2, kernel_size[1])):
        weights = _gaussian(size, sigma).to(pixels.dtype)
        middle, length = size // 2, pixels.shape[dim] - size + 1
        total = pixels.narrow(dim, middle, length) * weights[:, middle].view(-1, 1, 1, 1)
        for offset in range(1, middle + 1):
            pair = pixels.narrow(dim, middle - offset, length) + pixels.narrow(dim, middle + offset, length)
            total.addcmul_(pair, weights[:, middle + offset].view(-1, 1, 1, 1))
        pixels = total
    return (pixels if images.is_floating_point() else pixels.round_()).to(images.dtype)


def _gaussian(size: int, sigma: Tensor) -> Tensor:
    """Return weights of the pixels of a kernel, (B, size), float64, the sum of which is 1."""
    places = torch.arange(size, dtype=torch.float64, device=sigma.device) - size // 2
    return (places / sigma.double().view(-1, 1)).square_().mul_(-0.5).softmax(dim=1)


def _read_range(name: str, value: Range, neutral: float, least: float, most: float) -> tuple[float, float] | None:
    """Return lowest and highest value of an argument, or None if both are ``neutral``, which changes nothing.

    Raises:
        InputError: If one is below ``least`` or above ``most``.
    """
    if isinstance(value, Sequence):
        low, high = value if len(value) == 2 else (math.nan, math.nan)
    else:
        low, high = max(neutral - value, least), neutral + value
    if not (least <= low <= high <= most and high < math.inf):
        one, two = (f"from {start:g}" if math.isinf(most) else f"from {start:g} to {most:g}" for start in (0, least))
        raise InputError(f"{name} must be a number {one}, or the lowest and the highest {two}, got {value}")
    return None if low == high == neutral else (float(low), float(high))
