"""Resized crops, resizes and centre crops of pictures of any sizes, in torchvision v2's names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from kd_lightning.data.transforms.base import BatchTransform, Images, stack
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.geometry import read_size
from kd_lightning.data.transforms.masks import Masks, center_crop_masks, resize_masks
from kd_lightning.errors import InputError

_TRIES = 10


class RandomResizedCrop(BatchTransform):
    """Crop a random area of each image and resize it.

    Args:
        size: Height and width of the output in pixels, or one number for a square; at least 1.
        scale: Lowest and highest area of the crop as a share of the image's, above 0 and at most 1.
        ratio: Lowest and highest width over height of the crop, above 0.
        interpolation: How pixels are computed.
        antialias: Whether a resize that shrinks averages over pixels.

    Raises:
        InputError: If a value is out of range, or images have different numbers of channels.
    """

    takes_lists = True

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: InterpolationMode = InterpolationMode.BILINEAR,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.size = read_size("size", size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"scale must be lowest and highest share, above 0 and at most 1, got {scale}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise InputError(f"ratio must be lowest and highest width over height, above 0, got {ratio}")
        self.scale = (scale[0], scale[1])
        self.ratio = (ratio[0], ratio[1])
        self.interpolation = interpolation
        self.antialias = antialias

    def transform(self, images: Images, draws: Draws) -> Tensor:
        """Return images ``(B, C, *size)``."""
        places = self.places([image.shape[1:] for image in images], draws).tolist()
        crops = (_crop(image, *place) for image, place in zip(images, places, strict=True))
        return _stack([_resize(crop, [*self.size], self.interpolation, self.antialias) for crop in crops])

    def transform_masks(self, masks: Masks, draws: Draws) -> Tensor:
        """Return masks ``(B, *size)``."""
        places = self.places([mask.shape for mask in masks], draws).tolist()
        crops = (
            mask[top : top + height, left : left + width]
            for mask, (top, left, height, width) in zip(masks, places, strict=True)
        )
        return torch.stack([resize_masks(crop, self.size, self.interpolation) for crop in crops])

    def places(self, shapes: Sequence[Sequence[int]], draws: Draws) -> Tensor:
        """Draw a crop for each image, as torchvision's class does: the first of 10 tries that fits, else the centre.

        Args:
            shapes: Height and width of each image.
            draws: Random numbers of the images.

        Returns:
            (B, 4), int64: top, left, height, width.
        """
        height, width = torch.tensor(shapes, dtype=torch.float64).view(-1, 2).T.to(draws.device)
        unit = draws.uniform(shape=(2 * _TRIES + 2,))
        area = (height * width)[:, None] * (self.scale[0] + (self.scale[1] - self.scale[0]) * unit[:, :_TRIES])
        low, high = map(math.log, self.ratio)
        ratio = (low + (high - low) * unit[:, _TRIES:-2]).exp()
        tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (tall >= 1) & (tall <= height[:, None]) & (wide >= 1) & (wide <= width[:, None])
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        tall, wide, found = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0], fits.any(1)
        # without a fit: the largest crop whose ratio is in the range
        tall = torch.where(found, tall, torch.minimum(height, (width / self.ratio[0]).round()).clamp(min=1))
        wide = torch.where(found, wide, torch.minimum(width, (height * self.ratio[1]).round()).clamp(min=1))
        room = torch.stack([height - tall, width - wide], 1)
        corner = torch.where(found[:, None], unit[:, -2:] * (room + 1), room / 2).floor()
        return torch.cat([corner, tall[:, None], wide[:, None]], 1).long()


class Resize(BatchTransform):
    """Resize images, with an average over pixels where they shrink.

    Args:
        size: Length of the shorter side in pixels, or height and width; at least 1. The longer side is rounded down.

    Raises:
        InputError: If ``size`` is out of range.
    """

    takes_lists = True
    is_random = False

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        height, width = read_size("size", size)
        self.size = [height] if isinstance(size, int) else [height, width]

    def transform(self, images: Images, draws: Draws) -> Images:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(images, Tensor):
            return _resize(images, self.size)
        return [_resize(image, self.size) for image in images]

    def transform_masks(self, masks: Masks, draws: Draws) -> Masks:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(masks, Tensor):
            return resize_masks(masks, self.size)
        return [resize_masks(mask, self.size) for mask in masks]


class ResizeToCover(BatchTransform):
    """Resize images to the smallest size that covers a height and a width. Proportions stay as they are.

    Args:
        size: Height and width in pixels, or one number for a square; at least 1.

    Raises:
        InputError: If ``size`` is out of range.
    """

    takes_lists = True
    is_random = False

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = read_size("size", size)

    def transform(self, images: Images, draws: Draws) -> Images:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(images, Tensor):
            return self._cover(images)
        return [self._cover(image) for image in images]

    def transform_masks(self, masks: Masks, draws: Draws) -> Masks:
        """Return a tensor for a tensor, and a list for a list."""
        if isinstance(masks, Tensor):
            return resize_masks(masks, self._size_of(masks))
        return [resize_masks(mask, self._size_of(mask)) for mask in masks]

    def _cover(self, image: Tensor) -> Tensor:
        return _resize(image, self._size_of(image))

    def _size_of(self, image: Tensor) -> list[int]:
        sides = image.shape[-2:]
        scale = max(wanted / side for wanted, side in zip(self.size, sides, strict=True))
        return [max(wanted, round(side * scale)) for wanted, side in zip(self.size, sides, strict=True)]


class CenterCrop(BatchTransform):
    """Crop the centre of each image. Sides that are too short get pixels of 0.

    Args:
        size: Height and width of the crop in pixels, or one number for a square; at least 1.

    Raises:
        InputError: If ``size`` is out of range, or images have different numbers of channels.
    """

    takes_lists = True
    is_random = False

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = read_size("size", size)

    def transform(self, images: Images, draws: Draws) -> Tensor:
        """Return images ``(B, C, *size)``."""
        if isinstance(images, Tensor):
            return self._center(images)
        return _stack([self._center(image) for image in images])

    def transform_masks(self, masks: Masks, draws: Draws) -> Tensor:
        """Return masks ``(B, *size)``. Added positions are -100."""
        if isinstance(masks, Tensor):
            return center_crop_masks(masks, self.size)
        return torch.stack([center_crop_masks(mask, self.size) for mask in masks])

    def _center(self, images: Tensor) -> Tensor:
        cropped: Tensor = functional.center_crop(images, [*self.size])
        return cropped


def _crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Return a part of an image (C, H, W)."""
    crop = image[:, top : top + height, left : left + width]
    if image.dtype == torch.uint8 and image.stride(0) == 1:
        # decoders lay out pixels as (H, W, C); torch's uint8 resize is fastest if those of the crop are contiguous
        return crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return crop


def _resize(
    images: Tensor,
    size: list[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool = True,
) -> Tensor:
    resized: Tensor = functional.resize(images, size, interpolation, antialias=antialias)
    return resized


def _stack(images: list[Tensor]) -> Tensor:
    """Stack images of one size.

    Raises:
        InputError: If they have different numbers of channels, or types.
    """
    channels = sorted({len(image) for image in images})
    if len(channels) > 1:
        raise InputError(f"images of a batch must have one number of channels, got {channels}; RGB makes it 3")
    return stack(images)
