"""Whole-batch crop, flips and affine maps, in torchvision v2's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode

from kd_lightning.data.transforms.base import BatchTransform
from kd_lightning.data.transforms.buffers import empty_like
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.errors import InputError

Fill = float | Sequence[float]
"""Value of new pixels in the range of the images, one for all channels or one for each."""

PaddingMode = Literal["constant", "edge", "reflect", "symmetric"]

_IN_CACHE = 2**20  # bytes
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class RandomCrop(BatchTransform):
    """Crop each image at a random place.

    Args:
        size: Height and width of the crop in pixels, or one number for a square; at least 1.
        padding: Pixels that are added before the crop: one number for all sides, (left and right, top and bottom), or
            (left, top, right, bottom). Default: None, which means none.
        fill: Value of the pixels that are added in the mode ``constant``.
        padding_mode: ``constant`` adds pixels of the value ``fill``, ``edge`` repeats the outermost pixel, ``reflect``
            mirrors the image without its outermost pixel, ``symmetric`` with it.

    Raises:
        InputError: If a value is out of range, or an image with its padding is smaller than the crop.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        *,
        fill: Fill = 0,
        padding_mode: PaddingMode = "constant",
    ) -> None:
        super().__init__()
        self.size = read_size("size", size)
        sides = [0] if padding is None else [*padding] if isinstance(padding, Sequence) else [padding]
        if len(sides) not in (1, 2, 4) or not all(isinstance(side, Integral) and side >= 0 for side in sides):
            raise InputError(f"padding must be at least 0, got {padding}: one whole number, two, or four")
        self.padding = (sides * 4)[:4]  # left, top, right, bottom
        if padding_mode not in get_args(PaddingMode):
            raise InputError(f"padding_mode must be one of {', '.join(get_args(PaddingMode))}, got {padding_mode}")
        self.fill = fill
        self.padding_mode = padding_mode

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, *size)."""
        padded = pad(images, self.padding, self.fill, self.padding_mode)
        height, width = self.size
        lowest, rightmost = padded.shape[2] - height, padded.shape[3] - width
        if min(lowest, rightmost) < 0:
            got = f"{[height, width]} of {[*images.shape[2:]]} with padding {self.padding}"
            raise InputError(f"size must be at most that of the image with its padding, got {got}")
        top, left = draws.integers(0, lowest), draws.integers(0, rightmost)
        rows = torch.arange(len(images), device=images.device)
        return padded.unfold(2, height, 1).unfold(3, width, 1)[rows, :, top, left]


class RandomHorizontalFlip(BatchTransform):
    """Mirror images left to right at random.

    Args:
        p: Probability, 0 to 1.
    """

    _dim = 3

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"p must be 0 to 1, got {p}")
        self.p = p

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W)."""
        bits = images.view(_INTEGERS[images.element_size()])
        chosen = draws.coin(self.p).to(bits.dtype).neg_().view(-1, 1, 1, 1)  # all bits, or none
        if images.device.type != "cpu" or images.nbytes <= 2 * _IN_CACHE:
            return self._mirror(bits, chosen).view(images.dtype)
        mirrored = empty_like(bits)
        few = max(1, _IN_CACHE * len(images) // images.nbytes)
        for rows, mask, result in zip(*(torch.split(part, few) for part in (bits, chosen, mirrored)), strict=True):
            result.copy_(self._mirror(rows, mask))
        return mirrored.view(images.dtype)

    def _mirror(self, bits: Tensor, chosen: Tensor) -> Tensor:
        # image ^ ((image ^ mirror image) & chosen) takes a fifth of the time of torch.where
        return bits.flip(self._dim).bitwise_xor_(bits).bitwise_and_(chosen).bitwise_xor_(bits)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirror images top to bottom at random.

    Args:
        p: Probability, 0 to 1.
    """

    _dim = 2


class RandomAffine(BatchTransform):
    """Rotate, shift, scale and shear images at random around their centre, in one sampling step.

    Args:
        degrees: Lowest and highest angle in degrees, or one number for plus and minus that angle.
        translate: Highest shift as a share of width and height, each 0 to 1. Shifts are rounded to whole pixels.
            Default: None, which means none.
        scale: Lowest and highest scale, above 0. Default: None, which means 1.
        shear: Lowest and highest shear along x in degrees, or one number for plus and minus that shear, or four numbers
            for x and y. Default: None, which means none.
        interpolation: ``NEAREST`` or ``BILINEAR``.
        fill: Value of new pixels. Default: 0; ``BILINEAR`` then blends the image's border with new pixels twice, as
            torchvision does. None: new pixels are 0, and the border is blended once.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        interpolation: InterpolationMode = InterpolationMode.NEAREST,
        fill: Fill | None = 0,
    ) -> None:
        super().__init__()
        self.degrees = _read_range("degrees", degrees, (2,))
        self.translate = None if translate is None else [*translate]
        if self.translate is not None and (len(self.translate) != 2 or not all(0 <= t <= 1 for t in self.translate)):
            raise InputError(f"translate must be two numbers from 0 to 1, got {translate}")
        self.scale = None if scale is None else [*scale]
        if self.scale is not None and (len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf):
            raise InputError(f"scale must be lowest and highest scale, above 0, got {scale}")
        self.shear = None if shear is None else _read_range("shear", shear, (2, 4))
        self.interpolation = read_interpolation(interpolation)
        self.fill = fill

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (B, C, H, W)."""
        return affine(images, *self.parameters_of(images, draws), self.interpolation, self.fill)

    def parameters_of(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return angle (B,), translate (B, 2), scale (B,) and shear (B, 2) of :func:`affine`."""
        across, down = self.translate or (0, 0)
        bounds = [images.shape[3] * across, images.shape[2] * down]
        shear = [*(self.shear or ()), 0, 0, 0, 0][:4]
        ranges = [self.degrees, *((-most, most) for most in bounds), self.scale or (1, 1), shear[:2], shear[2:]]
        low, high = torch.tensor(ranges, dtype=torch.float64).T.to(draws.device)
        values = low + (high - low) * draws.uniform(shape=(6,))
        return values[:, 0], values[:, 1:3].round(), values[:, 3], values[:, 4:]


def affine(
    images: Tensor,
    angle: Tensor,
    translate: Tensor,
    scale: Tensor,
    shear: Tensor,
    interpolation: InterpolationMode = InterpolationMode.NEAREST,
    fill: Fill | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """Apply an affine map to each image, as ``torchvision.transforms.v2.functional.affine`` does to one.

    Each output pixel is a sample of the input. Integer images are sampled as float32 and rounded.

    Args:
        images: (B, C, H, W), uint8 or float.
        angle: (B,), clockwise rotation in degrees.
        translate: (B, 2), shift to the right and down in pixels.
        scale: (B,), above 0.
        shear: (B, 2), shear along x and along y in degrees.
        interpolation: ``NEAREST`` or ``BILINEAR``.
        fill: Value of new pixels in the range of the images. None: 0. With a number, ``BILINEAR`` multiplies the part
            of a border pixel that lies in the image by that part once more, as torchvision does.
        center: (B, 2) or (2,), the point (x, y) in pixels from the upper left corner that rotation, scale and shear
            leave where it is. Default: None, which means the image's centre.

    Returns:
        (B, C, H, W), of the type of the images.
    """
    mode = read_interpolation(interpolation).value
    height, width = images.shape[2:]
    if center is not None:
        half = torch.tensor([width, height], dtype=torch.float64, device=images.device) / 2
        center = center.to(images.device, torch.float64) - half
    matrix = _inverse_matrix(angle.double(), translate.double(), scale.double(), shear.double(), center)
    matrix = matrix.to(images.device)
    if mode == "nearest":
        return _nearest(images, matrix, 0 if fill is None else fill)
    values = images if images.dtype in (torch.float32, torch.float64) else images.float()
    grid = _grid(matrix, height, width, values.dtype)
    new = nn.functional.grid_sample(values, grid, mode, "zeros", align_corners=False)
    if fill is not None:
        ones = values.new_ones(1, 1, height, width).expand(len(images), -1, -1, -1)
        inside = nn.functional.grid_sample(ones, grid, mode, "zeros", align_corners=False)
        outside = _color(fill, images, values.dtype)
        new = new.sub_(outside).mul_(inside).add_(outside)
    return (new if images.is_floating_point() else new.round_()).to(images.dtype)


def _nearest(images: Tensor, matrix: Tensor, fill: Fill) -> Tensor:
    """Return the nearest pixel of the input for each pixel of the output: 3 times as fast as ``grid_sample``.

    Args:
        images: (B, C, H, W).
        matrix: (B, 2, 3), from output to input, see :func:`_inverse_matrix`.
        fill: Value of pixels outside of the input.
    """
    batch, channels, height, width = images.shape
    (x, y, _), dtype = _axes(height, width, matrix.device), images.dtype
    along_x, along_y, shift = matrix[:, None].unbind(3)  # (B, 1, 2) each
    columns, rows = along_x * x + shift, along_y * y  # (B, W, 2), (B, H, 2)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    right, down = (
        ((columns[..., n] + (side - 1) / 2).to(exact)[:, None] + rows[..., n].to(exact)[:, :, None])
        .round_()
        .clamp_(-1, side)
        .int()
        for n, side in enumerate((width, height))
    )
    place = down.add_(1).mul_(width + 2).add_(right.add_(1)).long()  # in an image with one new pixel on each side
    color = _color(fill, images, torch.float64)
    padded = images.new_empty(batch, channels, height + 2, width + 2)
    padded[:] = (color if images.is_floating_point() else color.round()).to(dtype)
    padded[:, :, 1:-1, 1:-1] = images
    return padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)


def _inverse_matrix(angle: Tensor, translate: Tensor, scale: Tensor, shear: Tensor, center: Tensor | None) -> Tensor:
    """Return the map from output to input, in pixels from the centre of the image.

    The map from input to output is shift · rotation · scale · shear along y · shear along x, see
    ``_get_inverse_affine_matrix`` of ``torchvision.transforms.functional``.

    Args:
        angle: (B,), degrees.
        translate: (B, 2), pixels.
        scale: (B,).
        shear: (B, 2), degrees.
        center: (B, 2) or (2,), pixels from the centre of the image.

    Returns:
        (B, 2, 3), float64: x = m[0] · (x', y', 1), y = m[1] · (x', y', 1).
    """
    turn, shear = angle.deg2rad(), shear.deg2rad()
    shear_x, shear_y = shear[:, 0].tan(), shear[:, 1]
    a = (turn - shear_y).cos() / shear_y.cos()
    b = -(a * shear_x + turn.sin())
    c = (turn - shear_y).sin() / shear_y.cos()
    d = turn.cos() - c * shear_x
    inverse = torch.stack([d, -b, -c, a], 1).div_(scale[:, None]).view(-1, 2, 2)
    moved = translate if center is None else translate + center
    offset = -(inverse[:, :, 0] * moved[:, :1] + inverse[:, :, 1] * moved[:, 1:])
    return torch.cat([inverse, (offset if center is None else offset + center)[:, :, None]], 2)


def _grid(matrix: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the places in the input (B, H, W, 2), x before y, -1 to 1, of the output's pixels.

    Each number is the sum of a number of its column and one of its row: no matrix product, whose rounding could depend
    on the batch.
    """
    x, y, unit = _axes(height, width, matrix.device)
    along_x, along_y, shift = (matrix * unit)[:, None].unbind(3)  # (B, 1, 2) each
    columns, rows = along_x * x + shift, along_y * y  # (B, W, 2), (B, H, 2)
    return columns.to(dtype)[:, None] + rows.to(dtype)[:, :, None]


@lru_cache(maxsize=16)
def _axes(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (W, 1) and y (H, 1) of the pixels in pixels from the centre; one pixel in units of the grid, (2, 1)."""
    with torch.inference_mode(False):
        x, y = (torch.arange(n, dtype=torch.float64, device=device)[:, None] - (n - 1) / 2 for n in (width, height))
        return x, y, 2 / torch.tensor([[width], [height]], dtype=torch.float64, device=device)


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
        padded[:] = _color(fill, images, images.dtype)
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


def _color(fill: Fill, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of new pixels, (1, C or 1, 1, 1)."""
    values = [*fill] if isinstance(fill, Sequence) else [fill]
    if len(values) not in (1, images.shape[1]):
        raise InputError(f"fill must be one number, or one for each of {images.shape[1]} channels, got {fill}")
    if images.dtype == torch.uint8 and not all(0 <= value <= 255 for value in values):
        raise InputError(f"fill of images of type uint8 must be 0 to 255, got {fill}")
    return torch.tensor(values, dtype=dtype, device=images.device).view(1, -1, 1, 1)


def read_size(name: str, size: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """Return height and width.

    Args:
        name: Name of the argument, for the message.
        size: Height and width, or one number for a square.
        least: Smallest number that is allowed.

    Raises:
        InputError: If it is no whole number from ``least``, and no two of them.
    """
    sides = [*size] if isinstance(size, Sequence) and not isinstance(size, str) else [size, size]
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < least:
        raise InputError(f"{name} must be at least {least}, got {size}: one whole number, or height and width")
    return int(sides[0]), int(sides[1])


def _read_range(name: str, value: float | Sequence[float], counts: tuple[int, ...]) -> list[float]:
    values = [*value] if isinstance(value, Sequence) else [-value, value]
    if len(values) not in counts or not all(map(math.isfinite, values)):
        raise InputError(f"{name} must be a number, or {' or '.join(map(str, counts))} numbers, got {value}")
    if any(low > high for low, high in zip(values[::2], values[1::2], strict=True)):
        raise InputError(f"{name} must be at least 0, or lowest and highest, got {value}")
    return values


def read_interpolation(interpolation: InterpolationMode) -> InterpolationMode:
    """Return the interpolation.

    Raises:
        InputError: If it is neither ``NEAREST`` nor ``BILINEAR``.
    """
    if interpolation not in (InterpolationMode.NEAREST, InterpolationMode.BILINEAR):
        raise InputError(f"interpolation must be NEAREST or BILINEAR, got {interpolation}")
    return InterpolationMode(interpolation)
