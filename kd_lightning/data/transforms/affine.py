"""Affine maps of a batch of images."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode

from kd_lightning.data.transforms.padding import Fill, fill_color
from kd_lightning.errors import InputError


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
        outside = fill_color(fill, images, values.dtype)
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
    color = fill_color(fill, images, torch.float64)
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


def read_interpolation(interpolation: InterpolationMode) -> InterpolationMode:
    """Return the interpolation.

    Raises:
        InputError: If it is neither ``NEAREST`` nor ``BILINEAR``.
    """
    if interpolation not in (InterpolationMode.NEAREST, InterpolationMode.BILINEAR):
        raise InputError(f"interpolation must be NEAREST or BILINEAR, got {interpolation}")
    return InterpolationMode(interpolation)
