"""New pixels at the sides of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_lightning.errors import InputError

Fill = float | Sequence[float]
"""Value of new pixels in the range of the images, one for all channels or one for each."""

PaddingMode = Literal["constant", "edge", "reflect", "symmetric"]


def pad(images: Tensor, padding: Sequence[int], fill: Fill = 0, padding_mode: PaddingMode = "constant") -> Tensor:
    """Add pixels at the sides of images, as ``torchvision.transforms.v2.functional.pad`` does.

    Args:
        images: (B, C, H, W).
        padding: Pixels at the left, top, right and bottom.
        fill: Value of new pixels in the mode ``constant``.
        padding_mode: See :class:`RandomCrop`.

    Raises:
        InputError: If a mirror image is smaller than the padding.
    """
    left, top, right, bottom = padding
    if not any(padding):
        return images
    batch, channels, height, width = images.shape
    if padding_mode == "constant":
        padded = images.new_empty(batch, channels, top + height + bottom, left + width + right)
        padded[:] = fill_color(fill, images, images.dtype)
        padded[:, :, top : top + height, left : left + width] = images
        return padded
    for dim, size, before, after in ((2, height, top, bottom), (3, width, left, right)):
        if padding_mode != "edge" and max(before, after) > size - (padding_mode == "reflect"):
            raise InputError(
                f"padding in the mode {padding_mode} must be less than the image, got {[*padding]} of {size}"
            )
        place = torch.arange(-before, size + after, device=images.device)
        if padding_mode == "edge":
            place = place.clamp(0, size - 1)
        elif padding_mode == "reflect":
            place = size - 1 - (size - 1 - place.abs()).abs()
        else:
            place = torch.where(place < 0, -1 - place, place)
            place = torch.where(place < size, place, 2 * size - 1 - place)
        images = images.index_select(dim, place)
    return images


def fill_color(fill: Fill, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of new pixels, (1, C or 1, 1, 1)."""
    values = [*fill] if isinstance(fill, Sequence) else [fill]
    if len(values) not in (1, images.shape[1]):
        raise InputError(f"fill must be one number, or one for each of {images.shape[1]} channels, got {fill}")
    if images.dtype == torch.uint8 and not all(0 <= value <= 255 for value in values):
        raise InputError(f"fill of images of type uint8 must be 0 to 255, got {fill}")
    return torch.tensor(values, dtype=dtype, device=images.device).view(1, -1, 1, 1)
