"""Affine maps of batches, against torchvision's function on the same parameters."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kd_lightning.data.transforms.affine import affine

NEAREST, BILINEAR = v2.InterpolationMode.NEAREST, v2.InterpolationMode.BILINEAR


def noise(*shape, dtype=torch.uint8):
    made = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


def parameters(count, seed=2):
    """Angle, translate, scale and shear of :func:`affine`."""
    random = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, 6, generator=random, dtype=torch.float64) * 2 - 1
    return 180 * unit[:, 0], (9 * unit[:, 1:3]).round(), 1.3 ** unit[:, 3], 25 * unit[:, 4:]


def one_by_one(images, angle, translate, scale, shear, interpolation, fill, center=None):
    """torchvision's affine map of each image."""
    rows = zip(images, angle.tolist(), translate.tolist(), scale.tolist(), shear.tolist(), strict=True)
    return torch.stack([v2.functional.affine(*row, interpolation, fill=fill, center=center) for row in rows])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 30), (2, 1, 5), (1, 6, 1)])
@pytest.mark.parametrize("interpolation", [NEAREST, BILINEAR])
@pytest.mark.parametrize("fill", [None, 0, 0.7, "colors"])
@pytest.mark.parametrize("center", [None, [0.0, 0.0], [3.0, 20.5]])
def test_as_torchvision(shape, interpolation, fill, center):
    given = [0.1, 0.9, 0.4][: shape[0]] if fill == "colors" else fill
    images, values = noise(60, *shape, dtype=torch.float32), parameters(60)
    made = affine(images, *values, interpolation, given, None if center is None else torch.tensor(center))
    expected = one_by_one(images, *values, interpolation, given, center)
    assert made.dtype == torch.float32
    difference = (made - expected).abs()
    if interpolation == BILINEAR:
        assert difference.max() < 2e-5
    else:  # a place between two pixels may be rounded to either
        assert (difference > 1e-6).float().mean() < 1e-3
    assert (expected - images).abs().mean() > 0.05


@pytest.mark.parametrize("interpolation", [NEAREST, BILINEAR])
@pytest.mark.parametrize("fill", [None, 0, 127.4, [1.0, 99.5, 250.0]])
def test_bytes_as_torchvision(interpolation, fill):
    images, values = noise(100, 3, 32, 32), parameters(100)
    made = affine(images, *values, interpolation, fill)
    difference = (made.int() - one_by_one(images, *values, interpolation, fill).int()).abs()
    assert made.dtype == torch.uint8
    assert (difference > 0).float().mean() < 1e-3
    assert interpolation == NEAREST or difference.max() <= 1


def test_against_the_formula_in_double_precision():
    """Each pixel by its own loop, from the matrices of rotation, scale, shear and shift."""
    images = noise(5, 1, 6, 7, dtype=torch.float64)
    angle, translate, scale, shear = parameters(5)
    made = affine(images, angle, translate, scale, shear, BILINEAR, None)
    for row in range(5):
        turn, sx, sy = math.radians(angle[row]), *map(math.radians, shear[row])
        forward = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) * float(scale[row])
        forward = forward @ np.array([[1, 0], [-math.tan(sy), 1]]) @ np.array([[1, -math.tan(sx)], [0, 1]])
        for y, x in np.ndindex(6, 7):
            place = np.array([x - 3, y - 2.5]) - translate[row].numpy()
            column, line = np.linalg.solve(forward, place) + np.array([3, 2.5])
            left, top = math.floor(column), math.floor(line)
            value = sum(
                float(images[row, 0, v, u]) * (1 - abs(column - u)) * (1 - abs(line - v))
                for u in (left, left + 1)
                for v in (top, top + 1)
                if 0 <= u < 7 and 0 <= v < 6
            )
            assert made[row, 0, y, x] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("interpolation", [NEAREST, BILINEAR])
def test_identity_and_whole_shifts_are_exact(interpolation):
    images = noise(4, 3, 33, 20)
    zeros, ones = torch.zeros(4, 2), torch.ones(4)
    shifts = torch.tensor([[0, 0], [3, 0], [0, -4], [-2, 5]])
    for fill in (None, 0):
        made = affine(images, zeros[:, 0], shifts, ones, zeros, interpolation, fill)
        assert torch.equal(made[0], images[0])
        assert torch.equal(made[1, :, :, 3:], images[1, :, :, :-3]) and not made[1, :, :, :3].any()
        assert torch.equal(made[2, :, :-4], images[2, :, 4:]) and not made[2, :, -4:].any()
        assert torch.equal(made[3, :, 5:, :-2], images[3, :, :-5, 2:])


def test_half_precision():
    images, values = noise(6, 3, 16, 16, dtype=torch.float16), parameters(6)
    made = affine(images, *values, BILINEAR, 0)
    assert made.dtype == torch.float16
    assert torch.allclose(made.float(), affine(images.float(), *values, BILINEAR, 0), atol=1e-3)


def test_images_stay_as_they_are():
    for dtype in (torch.float32, torch.uint8):
        images = noise(6, 3, 16, 16, dtype=dtype)
        before = images.clone()
        affine(images, *parameters(6), BILINEAR, 0)
        assert torch.equal(images, before)
