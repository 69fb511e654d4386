"""Masks: dense labels of images, which move as their images do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, InterpolationMode, Pad, Resize, functional

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.transforms.padding import pad
from kd_lightning.errors import InputError

Masks = Tensor | list[Tensor]
"""Dense labels of a batch of images (B, H, W), int64, or a list of B masks (H, W) of any sizes. -100 is no label."""


def check_type(masks: Masks, origin: str = "masks") -> None:
    """Check the shape and the type of masks.

    Args:
        masks: (B, H, W), or a list of masks (H, W).
        origin: What they are, for the message.

    Raises:
        InputError: If they have another number of dimensions, or are not int64. Other types have no room for -100.
    """
    parts = masks if isinstance(masks, list) else [masks]
    ndim = 2 if isinstance(masks, list) else 3
    for part in parts:
        if part.ndim != ndim or part.dtype != torch.int64:
            allowed = "a list of (H, W)" if ndim == 2 else "(B, H, W)"
            raise InputError(f"{origin} must be {allowed} of torch.int64, got {[*part.shape]} of {part.dtype}")


def check_sizes(images: Tensor | list[Tensor], masks: Masks, origin: str = "masks") -> None:
    """Check that each mask has the height and width of its image.

    Args:
        images: (B, C, H, W), or a list of images (C, H, W).
        masks: (B, H, W), or a list of masks (H, W).
        origin: What the masks are, for the message.

    Raises:
        InputError: If one has another size, or their numbers differ.
    """
    if len(images) != len(masks):
        raise InputError(f"{origin} must be one for each image, got {len(masks)} for {len(images)} images")
    if isinstance(images, Tensor) and isinstance(masks, Tensor):
        images, masks = [*images[:1]], [*masks[:1]]
    for image, mask in zip(images, masks, strict=True):
        if image.shape[-2:] != mask.shape[-2:]:
            got = f"{[*mask.shape[-2:]]} for an image of {[*image.shape[-2:]]}"
            raise InputError(f"{origin} must have the height and width of their images, got {got}")


def resize_masks(
    masks: Tensor,
    size: Sequence[int] | None,
    interpolation: InterpolationMode | str | int = InterpolationMode.BILINEAR,
    max_size: int | None = None,
) -> Tensor:
    """Resize masks to the nearest position, so that class numbers never mix.

    Args:
        masks: (B, H, W) or (H, W), int64.
        size: Height and width, or the length of the shorter side alone. None: ``max_size`` is that of the longer one.
        interpolation: That of the images. torch's ``NEAREST`` reads up to half a pixel to the upper left of the other
            modes, and masks follow it. Beside any other mode, masks are resized by ``NEAREST_EXACT``.
        max_size: Greatest length of the longer side. Default: None, which means any.
    """
    follows = interpolation in (InterpolationMode.NEAREST, InterpolationMode.NEAREST.value, 0)  # 0 is Pillow's number
    mode = InterpolationMode.NEAREST if follows else InterpolationMode.NEAREST_EXACT
    sides = masks.shape[-2:]
    if size is None or len(size) == 1:
        size = functional.resize(torch.empty(1, *sides, device="meta"), size, max_size=max_size).shape[-2:]
    # numbers of lines and columns are resized, as float32, since large labels have no exact float32
    lines, columns = (
        functional.resize(torch.arange(n, dtype=torch.float32).view(1, n, 1), [new, 1], interpolation=mode).flatten()
        for n, new in zip(sides, size, strict=True)
    )
    lines, columns = lines.long().to(masks.device), columns.long().to(masks.device)
    return masks.index_select(-2, lines).index_select(-1, columns)


def center_crop_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Crop the centre of masks. Sides that are too short get positions of -100.

    Args:
        masks: (B, H, W) or (H, W), int64.
        size: Height and width of the crop.
    """
    # torchvision adds zeros, and chooses the side of an odd pixel
    cropped: Tensor = functional.center_crop(masks.unsqueeze(-3) - IGNORE_INDEX, [*size])
    return cropped.squeeze(-3) + IGNORE_INDEX


def masks_by_torchvision(part: nn.Module, masks: Tensor) -> Tensor:
    """Transform masks as a transform of torchvision v2 without randomness does their images.

    Args:
        part: ``Resize``, ``CenterCrop``, ``Pad``, or a transform that moves no pixels.
        masks: (B, H, W), int64.

    Returns:
        (B, H', W'). Positions that ``Pad`` or ``CenterCrop`` adds are -100; those that ``Pad`` repeats or mirrors have
        the label of the pixel that they show.
    """
    if isinstance(part, Resize):
        return resize_masks(masks, part.size, part.interpolation, part.max_size)
    if isinstance(part, CenterCrop):
        return center_crop_masks(masks, part.size)
    if isinstance(part, Pad):
        if part.padding_mode == "constant":
            padded: Tensor = functional.pad(masks, part.padding, IGNORE_INDEX)
            return padded
        sides = [part.padding] if isinstance(part.padding, int) else [*part.padding]
        # torchvision mirrors whole numbers as float32, which has no exact large labels
        return pad(masks.unsqueeze(1), (sides * 4)[:4], padding_mode=part.padding_mode).squeeze(1)
    return masks
