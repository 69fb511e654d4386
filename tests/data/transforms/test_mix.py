"""MixUp and CutMix: shares against scipy, boxes and pixels against torchvision's formulas."""

import numpy as np
import pytest
import torch
from scipy import stats

from kd_lightning import InputError
from kd_lightning.data.transforms import CutMix, Draws, MixUp, OneOf
from kd_lightning.data.transforms.mix import mix_images


def draws(count=4000, view=0):
    return Draws(3, torch.arange(count), torch.full((count,), view))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_their_distribution(alpha):
    own, pixels = MixUp(alpha).plan(draws(), (3, 4, 4))
    assert stats.kstest(own.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert torch.equal(pixels.flatten(), own)
    assert pixels.shape == (4000, 1, 1, 1)


def test_boxes_are_those_of_torchvision():
    """torchvision.transforms.v2.CutMix: half sides are cut to whole pixels, the share follows what is inside."""
    height, width, alpha = 11, 17, 1.0
    own, pixels = CutMix(alpha).plan(draws(500), (3, height, width))
    again = draws(500)
    lam = stats.beta(alpha, alpha).ppf(again.uniform().numpy())
    rows, columns = again.integers(0, height - 1).tolist(), again.integers(0, width - 1).tolist()
    for n in range(500):
        r = 0.5 * np.sqrt(1.0 - lam[n])
        half_w, half_h = int(r * width), int(r * height)
        x1, y1 = max(columns[n] - half_w, 0), max(rows[n] - half_h, 0)
        x2, y2 = min(columns[n] + half_w, width), min(rows[n] + half_h, height)
        expected = torch.ones(height, width, dtype=torch.float64)
        expected[y1:y2, x1:x2] = 0
        assert torch.equal(pixels[n, 0], expected)
        assert own[n].item() == pytest.approx(1.0 - (x2 - x1) * (y2 - y1) / (width * height))


def test_one_of_takes_both():
    mix = OneOf([MixUp(0.4), CutMix()])
    own, pixels = mix.plan(draws(), (1, 4, 6))
    boxes = ((pixels == 0) | (pixels == 1)).all(dim=(1, 2, 3))
    assert 0.45 < boxes.double().mean() < 0.55
    assert torch.allclose(pixels.mean(dim=(1, 2, 3)), own)


def test_rows_do_not_know_one_another():
    mix = OneOf([MixUp(), CutMix()])
    own, pixels = mix.plan(draws(50), (3, 8, 8))
    some = torch.tensor([7, 3, 40])
    alone = mix.plan(Draws(3, some, torch.zeros(3, dtype=torch.long)), (3, 8, 8))
    assert torch.equal(alone[0], own[some])
    assert torch.equal(alone[1], pixels[some])
    assert not torch.equal(mix.plan(draws(50, view=1), (3, 8, 8))[0], own)


def test_pixels():
    a, b = torch.rand(5, 2, 3, 3), torch.rand(5, 2, 3, 3)
    share = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    expected = share * a.double() + (1 - share) * b.double()
    assert torch.allclose(mix_images(a, b, share).double(), expected, atol=1e-6)
    box = (torch.rand(5, 1, 3, 3) > 0.5).double()
    ints = [torch.randint(256, (5, 2, 3, 3), dtype=torch.uint8) for _ in range(2)]
    assert torch.equal(mix_images(*ints, box), torch.where(box.bool(), *ints))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha(alpha):
    for kind in (MixUp, CutMix):
        with pytest.raises(InputError, match="alpha must be finite and above 0"):
            kind(alpha)


def test_what_cannot_be_mixed():
    with pytest.raises(InputError, match="mix needs images of floats, got torch.uint8"):
        OneOf([CutMix(), MixUp()]).check(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"CutMix needs images \(C, H, W\), got \[7\]"):
        CutMix().plan(draws(2), (7,))
    with pytest.raises(InputError, match="mixes must have at least one"):
        OneOf([])
