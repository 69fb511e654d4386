"""Whole-batch changes of colour, sharpness and blur, in torchvision v2's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.functional import pad

from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.buffers import empty_like
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114  # share of each channel in grey, as torchvision has them
_TINY = torch.finfo(torch.float32).tiny
_PART = 2**18  # numbers of a part of a batch that fits in the cache of a core

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

    def __init__(self, brightness: Range = 0, contrast: Range = 0, saturation: Range = 0, hue: Range = 0) -> None:
        super().__init__()
        self.brightness = _read_range("brightness", brightness, 1, 0, math.inf)
        self.contrast = _read_range("contrast", contrast, 1, 0, math.inf)
        self.saturation = _read_range("saturation", saturation, 1, 0, math.inf)
        self.hue = _read_range("hue", hue, 0, -0.5, 0.5)

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W) of the same type, C = 1 or 3, uint8 or float in [0, 1]."""
        _check(images)
        draws = draws.on_cpu()
        adjustments = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
        ranges = [self.brightness, self.contrast, self.saturation, self.hue]
        steps = [(adjust, draws.uniform(*limits)) for adjust, limits in zip(adjustments, ranges, strict=True) if limits]
        if not steps:
            return images
        order, factors = draws.permutation(len(steps)), torch.stack([factor for _, factor in steps], dim=1)
        return _adjust_in_turn(images, order, factors, adjustments=[adjust for adjust, _ in steps])


class RandomGrayscale(BatchTransform):
    """Make images grey at random. The number of channels stays.

    Args:
        p: Probability, 0 to 1.

    Raises:
        InputError: If ``p`` is out of range. In a call: for images of another type, or without 1 or 3 channels.
    """

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p must be 0 to 1, got {p}")
        self.p = p

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W) of the same type, C = 1 or 3."""
        _check(images)
        rows = draws.on_cpu().coin(self.p).nonzero()[:, 0].to(images.device)
        if images.shape[1] == 1:
            return images
        part = images.index_select(0, rows)
        gray = _gray(_to_float(part), part).to(images.dtype)
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


def _in_parts(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Apply a function of images and numbers for each to parts of a batch that fit in the cache of a CPU's core.

    A large batch is then 3 to 6 times as fast.
    """

    @wraps(function)
    def apply(images: Tensor, *numbers: Tensor, **options: object) -> Tensor:
        if images.numel() == 0:
            return images
        rows = max(1, _PART // images.shape[1:].numel())
        if images.device.type != "cpu" or len(images) <= rows:
            return function(images, *numbers, **options)
        result = empty_like(images)
        for new, *part in zip(*(torch.split(rest, rows) for rest in (result, images, *numbers)), strict=True):
            new.copy_(function(*part, **options))
        return result

    return apply


@_in_parts
def _adjust_in_turn(
    images: Tensor, order: Tensor, factors: Tensor, *, adjustments: Sequence[Callable[..., Tensor]]
) -> Tensor:
    """Adjust each image by all adjustments in the order of its row.

    Args:
        images: (B, C, H, W).
        order: (B, N) numbers of the adjustments, on the CPU.
        factors: (B, N) factors of the adjustments, on the CPU.
        adjustments: N functions of images and a factor for each.
    """
    for turn in order.unbind(1):
        groups = [(turn == number).nonzero()[:, 0] for number in range(len(adjustments))]
        parts = [
            adjust(images.index_select(0, rows.to(images.device)), factors[rows, number].to(images.device))
            for number, (adjust, rows) in enumerate(zip(adjustments, groups, strict=True))
            if len(rows)
        ]
        back = torch.cat(groups).argsort()
        images = torch.cat(parts).index_select(0, back.to(images.device))
    return images


@_in_parts
def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the pixels of each image.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1].
        factor: (B,) at least 0; 0 is black, 1 changes nothing.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type.
    """
    pixels = _to_float(images)
    return _from_float(pixels * _column(factor, pixels), images)


@_in_parts
def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move the pixels of each image away from, or towards, its mean brightness.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1].
        factor: (B,) at least 0; 0 is plain grey, 1 changes nothing.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type.
    """
    pixels = _to_float(images)
    gray = pixels if images.shape[1] == 1 else _gray(pixels, images)
    # a mean at each pixel: with it addcmul is 4 times as fast
    mean = _exact_mean(gray, images).expand_as(gray).contiguous()
    return _from_float(_blend(pixels, mean, factor), images)


@_in_parts
def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move the pixels of each image away from, or towards, their grey. Images of one channel stay as they are.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1].
        factor: (B,) at least 0; 0 is grey, 1 changes nothing.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type.
    """
    pixels = _to_float(images)
    if images.shape[1] == 1:
        return images
    return _from_float(_blend(pixels, _gray(pixels, images), factor), images)


@_in_parts
def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Shift the hue of each image round the circle of colours. Images of one channel stay as they are.

    The formulas are those of torchvision's ``adjust_hue``, which are those of Pillow.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1].
        factor: (B,) from -0.5 to 0.5 of the circle; 0 changes no hue.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type.
    """
    pixels = _to_float(images).float()
    if images.shape[1] == 1:
        return images
    if images.dtype == torch.uint8:
        pixels = pixels.mul_(1 / 255)
    red, green, blue = pixels.unbind(1)
    high = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    spread = high - low
    saturation = spread / high.clamp(min=_TINY)
    spread.clamp_(min=_TINY)
    from_red, from_green, from_blue = ((high - channel).div_(spread) for channel in (red, green, blue))
    hue = torch.lerp((from_green + 4).sub_(from_red), (from_red + 2).sub_(from_blue), _mask(torch.eq, high, green))
    hue = torch.lerp(hue, from_blue - from_green, _mask(torch.eq, high, red))
    hue = hue.mul_(1 / 6).add_(1).frac_().add_(_column(factor, pixels)[:, 0])
    hue = hue.sub_(hue.floor()).mul_(6)  # 0 to 6: red, yellow, green, cyan, blue, magenta, red
    sector = hue.floor()
    change = (hue - sector).mul_(saturation)
    rest = 1 - saturation
    is_falling = sector.mul_(0.5).frac_().mul_(2)
    middle = torch.lerp(change + rest, 1 - change, is_falling).mul_(high).clamp_(0, 1)
    low = rest.mul_(high).clamp_(0, 1)
    result = torch.empty_like(pixels)
    for channel, color in zip(result.unbind(1), (0, 2, 4), strict=True):
        far = (hue - color).abs_() if color else torch.minimum(hue, 6 - hue)
        torch.lerp(middle, high, _mask(torch.le, far, 1), out=channel)
        channel.lerp_(low, _mask(torch.ge, far, 2))
    return result.mul_(256 - 1e-3).to(torch.uint8) if images.dtype == torch.uint8 else result.to(images.dtype)


@_in_parts
def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Move the inner pixels of each image away from, or towards, their mean with their neighbours.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1]. Images of 2 pixels or less stay as they are.
        factor: (B,) at least 0; 0 is smooth, 1 changes nothing.

    Returns:
        Images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type.
    """
    pixels = _to_float(images)
    if min(images.shape[2:]) <= 2:
        return images
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    mean = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    result = pixels.clone()
    inner = result[..., 1:-1, 1:-1]
    mean.add_(inner, alpha=4).mul_(1 / 13)
    if images.dtype == torch.uint8:
        mean.round_()
    inner.addcmul_(mean.sub_(inner), _column(1 - factor, pixels))
    return _from_float(result, images)


@_in_parts
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


def _to_float(images: Tensor) -> Tensor:
    """Return images as float32, or as float64 if they are."""
    _check(images)
    return images if images.dtype == torch.float64 else images.float()


def _check(images: Tensor) -> None:
    """Raise an InputError for images of another type or number of channels."""
    if images.shape[1] not in (1, 3) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = f"{images.shape[1]} channels of {images.dtype}"
        raise InputError(f"images must have 1 or 3 channels of torch.uint8, or of floats in [0, 1], got {got}")


def _from_float(pixels: Tensor, images: Tensor) -> Tensor:
    """Limit new pixels to the range of the old images, and return them in their type. It changes ``pixels``."""
    return pixels.clamp_(0, 255 if images.dtype == torch.uint8 else 1).to(images.dtype)


def _column(factor: Tensor, pixels: Tensor) -> Tensor:
    """Return factors (B,) as (B, 1, 1, 1)."""
    return factor.to(pixels.dtype).view(-1, 1, 1, 1)


def _gray(pixels: Tensor, images: Tensor) -> Tensor:
    """Return the grey (B, 1, H, W) of float pixels (B, 3, H, W), whole numbers for uint8 images."""
    red, green, blue = pixels.unbind(1)
    gray = red.mul(_RED).add_(green, alpha=_GREEN).add_(blue, alpha=_BLUE).unsqueeze(1)
    return gray.floor_() if images.dtype == torch.uint8 else gray


def _exact_mean(gray: Tensor, images: Tensor) -> Tensor:
    """Return the mean of each row, (B, 1, 1, 1), which does not depend on the order of the sum.

    Sums of whole numbers are exact: of 65,000 bytes in float32, of 8 million fractions of 30 bits in float64.
    """
    scale = 1 if images.dtype == torch.uint8 else 2**30
    whole = gray if scale == 1 else (gray.double() * scale).round_()
    total = whole.sum(dim=3, keepdim=True).double().sum(dim=(1, 2), keepdim=True)
    return total.div_(scale).to(gray.dtype) / gray.shape[1:].numel()


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor * pixels + (1 - factor) * other``."""
    # addcmul rounds as torchvision's add(alpha=...) does, to the bit
    return (pixels * _column(factor, pixels)).addcmul_(other, _column(1 - factor, pixels))


def _mask(compare: Callable[..., Tensor], first: Tensor, second: Tensor | float) -> Tensor:
    """Return 1 where a comparison is true, else 0: as floats, since ``lerp`` is 10 times as fast as ``where``."""
    return compare(first, second, out=torch.empty_like(first))


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
