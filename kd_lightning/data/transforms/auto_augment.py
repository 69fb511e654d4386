"""RandAugment (Cubuk et al. 2019) and TrivialAugment (Müller and Hutter 2021) for a whole batch at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms import v2

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.transforms import adjustments
from kd_lightning.data.transforms.affine import affine, read_interpolation
from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLORS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *MOVES, *COLORS, "Posterize", "Solarize", "AutoContrast", "Equalize")
"""Operations of both classes, in torchvision's order."""

_PIXELS = 2**20  # of a group that is computed at once: intermediate results stay in the processor's cache
_SIGNED = torch.tensor([name in MOVES + COLORS for name in OPERATIONS])


class RandAugment(BatchTransform):
    """A few random operations of one strength on each image, as ``torchvision.transforms.v2.RandAugment`` has them.

    Args:
        num_ops: Operations on each image, one after another, at least 0. Default: 2.
        magnitude: Strength of the operations, from 0 to ``num_magnitude_bins - 1``. Default: 9.
        num_magnitude_bins: Number of strengths, at least 2. Default: 31.
        interpolation: How shears, shifts and rotations read pixels: nearest or bilinear. Default: nearest.
        fill: Pixels that come from outside of the image, in its units: one number, or one for each channel. Default:
            None, which means 0.

    Raises:
        InputError: For values out of range.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.NEAREST,
        fill: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_bins(num_magnitude_bins)
        if num_ops < 0:
            raise InputError(f"num_ops must be at least 0, got {num_ops}")
        if not 0 <= magnitude < num_magnitude_bins:
            allowed = f"from 0 to num_magnitude_bins - 1 = {num_magnitude_bins - 1}"
            raise InputError(f"magnitude must be {allowed}, got {magnitude}")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.num_magnitude_bins = num_magnitude_bins
        self.interpolation = read_interpolation(interpolation)
        self.fill = fill

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1]. The result has the same shape and type."""
        for operation, magnitude in self._steps(images.shape[2], images.shape[3], draws):
            images = apply_operations(images, operation, magnitude, self.interpolation, self.fill)
        return images

    def transform_masks(self, masks: Tensor, draws: Draws) -> Tensor:
        """Return masks (B, H, W). Shears, shifts and rotations move them; new positions are -100."""
        for operation, magnitude in self._steps(masks.shape[1], masks.shape[2], draws):
            masks = move_masks(masks, operation, magnitude)
        return masks

    def _steps(self, height: int, width: int, draws: Draws) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw operation and magnitude of each step, (B,) each."""
        draws = draws.on_cpu()
        shift = 150 / 331
        table = _magnitudes(self.num_magnitude_bins, 0.3, shift * width, shift * height, 30.0, 0.9, 4)
        for _ in range(self.num_ops):
            operation = draws.integers(0, len(OPERATIONS) - 1)
            yield operation, _with_sign(table[operation, self.magnitude], operation, draws)


class TrivialAugmentWide(BatchTransform):
    """One random operation of random strength on each image, as ``torchvision.transforms.v2.TrivialAugmentWide``.

    Args:
        num_magnitude_bins: Number of strengths, at least 2. Default: 31.
        interpolation: How shears, shifts and rotations read pixels: nearest or bilinear. Default: nearest.
        fill: Pixels that come from outside of the image, in its units: one number, or one for each channel. Default:
            None, which means 0.

    Raises:
        InputError: For values out of range.
    """

    def __init__(
        self,
        num_magnitude_bins: int = 31,
        interpolation: v2.InterpolationMode = v2.InterpolationMode.NEAREST,
        fill: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_bins(num_magnitude_bins)
        self.num_magnitude_bins = num_magnitude_bins
        self.interpolation = read_interpolation(interpolation)
        self.fill = fill

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1]. The result has the same shape and type."""
        return apply_operations(images, *self._step(draws), self.interpolation, self.fill)

    def transform_masks(self, masks: Tensor, draws: Draws) -> Tensor:
        """Return masks (B, H, W). Shears, shifts and rotations move them; new positions are -100."""
        return move_masks(masks, *self._step(draws))

    def _step(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw operation and magnitude, (B,) each."""
        draws = draws.on_cpu()
        table = _magnitudes(self.num_magnitude_bins, 0.99, 32.0, 32.0, 135.0, 0.99, 6)
        operation = draws.integers(0, len(OPERATIONS) - 1)
        magnitude = table[operation, draws.integers(0, self.num_magnitude_bins - 1)]
        return operation, _with_sign(magnitude, operation, draws)


def apply_operations(
    images: Tensor,
    operation: Tensor,
    magnitude: Tensor,
    interpolation: v2.InterpolationMode = v2.InterpolationMode.NEAREST,
    fill: float | Sequence[float] | None = None,
) -> Tensor:
    """Apply an operation to each image: all shears, shifts and rotations at once, and each other kind at once.

    Args:
        images: (B, C, H, W), C = 1 or 3, uint8 or float in [0, 1].
        operation: (B,) number of each image's operation in :data:`OPERATIONS`, on the CPU, so that the choice of the
            rows of each operation waits for no accelerator.
        magnitude: (B,) its strength in torchvision's units (slope, pixels, degrees, factor - 1, bits, share of white),
            float64 on the CPU. Operations without a strength ignore it.
        interpolation: Nearest or bilinear.
        fill: Pixels from outside, in the units of the images.

    Returns:
        New images of the same shape and type.

    Raises:
        InputError: For another number of channels or another type, or if ``fill`` does not fit the images.
    """
    if images.shape[1] not in (1, 3) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = f"{images.shape[1]} channels of {images.dtype}"
        raise InputError(f"images must have 1 or 3 channels of torch.uint8, or of floats in [0, 1], got {got}")
    white = 1 if images.is_floating_point() else 255
    fills = [*fill] if isinstance(fill, Sequence) else [fill or 0]
    if len(fills) not in (1, images.shape[1]) or not all(0 <= value <= white for value in fills):
        allowed = f"from 0 to {white}, one number or {images.shape[1]}"
        raise InputError(f"fill must be {allowed} for images of {images.dtype}, got {fill}")
    group = torch.where(_moves(operation), 1, operation)
    most = max(1, _PIXELS // max(1, images.shape[1:].numel()) if images.device.type == "cpu" else len(images))
    order, parts = [], []
    for number in sorted({*group.tolist()}):
        for rows in (group == number).nonzero()[:, 0].split(most):
            part = images.index_select(0, rows.to(images.device))
            strength = magnitude[rows].to(images.device)
            if number == 1:
                part = _move(part, operation[rows].to(images.device), strength, interpolation, fill)
            elif number > 0:
                part = _recolor(part, OPERATIONS[number], strength)
            order.append(rows)
            parts.append(part)
    if not parts:
        return images.clone()
    # index_select copies whole rows; index_copy_ copies single bytes, and takes 10 times as long
    return torch.cat(parts).index_select(0, torch.cat(order).argsort().to(images.device))


def move_masks(masks: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Move masks as :func:`apply_operations` moves images, to the nearest position. Other operations leave them.

    Args:
        masks: (B, H, W), int64.
        operation: (B,) number of each operation, on the CPU.
        magnitude: (B,) its strength, float64 on the CPU.

    Returns:
        (B, H, W). Positions from outside are -100.
    """
    rows = _moves(operation).nonzero()[:, 0]
    there = rows.to(masks.device)
    operation, magnitude = (values[rows].to(masks.device) for values in (operation, magnitude))
    moved = _move(masks[there].unsqueeze(1), operation, magnitude, v2.InterpolationMode.NEAREST, IGNORE_INDEX)
    return masks.index_copy(0, there, moved.squeeze(1))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Reduce the number of levels of each image's channels to two to the power of ``bits``.

    Args:
        images: (B, C, H, W), uint8 or float in [0, 1].
        bits: (B,) whole numbers from 0 to 8.

    Returns:
        Images of the same shape and type.
    """
    bits = bits.reshape(-1, 1, 1, 1)
    if images.is_floating_point():
        levels = (2.0**bits).to(images.dtype)
        return images.mul(levels).floor_().clamp_(min=0).minimum(levels - 1).div_(levels)
    return images & (256 - 2.0 ** (8 - bits)).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels of each image from a threshold on.

    Args:
        images: (B, C, H, W), uint8 or float in [0, 1].
        threshold: (B,) from 0 to 255 for uint8, else from 0 to 1.

    Returns:
        Images of the same shape and type.
    """
    if images.is_floating_point():
        return torch.where(images >= threshold.to(images.dtype).reshape(-1, 1, 1, 1), 1.0 - images, images)
    # torchvision compares float32 numbers
    bright = images >= threshold.float().ceil().to(torch.uint8).reshape(-1, 1, 1, 1)
    return images ^ (bright.view(torch.uint8) * 255)


def _moves(operation: Tensor) -> Tensor:
    """Return which operations move pixels, (B,) booleans."""
    return (operation >= 1) & (operation <= len(MOVES))


def _move(
    images: Tensor,
    operation: Tensor,
    magnitude: Tensor,
    interpolation: v2.InterpolationMode,
    fill: float | Sequence[float] | None,
) -> Tensor:
    """Shear, shift or rotate each image: shears fix its upper left corner, rotations its centre."""
    height, width = images.shape[-2:]
    shear_x, shear_y, right, down, angle = (
        torch.where(operation == number, magnitude, 0.0) for number in range(1, 1 + len(MOVES))
    )
    shear = torch.stack([shear_x, shear_y], dim=1).atan().rad2deg()
    middle = torch.tensor([width / 2, height / 2], device=images.device)
    center = torch.where((shear == 0).all(dim=1, keepdim=True), middle, 0.0)
    translate = torch.stack([right, down], dim=1).trunc()
    scale = torch.ones_like(angle)
    return affine(images, -angle, translate, scale, shear, interpolation, fill, center)


def _recolor(images: Tensor, name: str, magnitude: Tensor) -> Tensor:
    """Apply one operation that moves no pixels to all images, with a strength for each."""
    match name:
        case "Brightness":
            return adjustments.adjust_brightness(images, 1 + magnitude)
        case "Color":
            return adjustments.adjust_saturation(images, 1 + magnitude)
        case "Contrast":
            return adjustments.adjust_contrast(images, 1 + magnitude)
        case "Sharpness":
            return adjustments.adjust_sharpness(images, 1 + magnitude)
        case "Posterize":
            return posterize(images, magnitude)
        case "Solarize":
            return solarize(images, magnitude * (1.0 if images.is_floating_point() else 255.0))
        case "AutoContrast":
            result: Tensor = v2.functional.autocontrast(images)
        case _:
            result = v2.functional.equalize(images)
    return result


@lru_cache(maxsize=64)
def _magnitudes(
    bins: int, shear: float, shift_x: float, shift_y: float, angle: float, color: float, lost_bits: int
) -> Tensor:
    """Strengths of all operations, (operations, bins) float64, from the largest of each kind.

    torchvision computes them in float32, and so does this.
    """
    largest = [0.0, shear, shear, shift_x, shift_y, angle, color, color, color, color]
    rows = [torch.linspace(0.0, most, bins) for most in largest]
    rows += [(8 - torch.arange(bins) / ((bins - 1) / lost_bits)).round(), torch.linspace(1.0, 0.0, bins)]
    rows += [torch.zeros(bins), torch.zeros(bins)]
    return torch.stack(rows).double()


def _with_sign(magnitude: Tensor, operation: Tensor, draws: Draws) -> Tensor:
    """Negate strengths in half of the cases, where the operation has two directions."""
    return torch.where(_SIGNED[operation] & draws.coin(0.5), -magnitude, magnitude)


def _check_bins(bins: int) -> None:
    if bins < 2:
        raise InputError(f"num_magnitude_bins must be at least 2, got {bins}")
