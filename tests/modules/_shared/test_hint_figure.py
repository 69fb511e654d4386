"""Figures of hints: maps, tokens, vectors and volumes, entry by entry."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from kd_lightning.modules._shared.hint_figure import hint_figure


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("batch", "samples", "rows", "channels", "most", "columns"),
    [(5, 2, 2, 9, 6, 6), (1, 2, 1, 4, 6, 4), (5, 3, 3, 9, 1, 1), (5, 2, 2, 1, 6, 1)],
)
def test_maps(batch, samples, rows, channels, most, columns):
    hint, projected = random_tensor(batch, channels, 4, 3), random_tensor(batch, channels, 4, 3, seed=1)
    hint = hint * torch.randperm(channels, generator=torch.Generator().manual_seed(2)).add(1).reshape(-1, 1, 1)
    figure = hint_figure(hint, projected.requires_grad_(), "a -> b", samples, most)
    shown = hint[:rows].numpy()
    largest = np.argsort(-shown.transpose(1, 0, 2, 3).reshape(channels, -1).var(1))[:columns]
    axes = figure.get_axes()
    assert len(axes) == 2 * rows * columns and all(len(axis.get_images()) == 1 for axis in axes)
    assert figure.get_suptitle() == "a -> b"
    for place, axis in enumerate(axes):
        row, column = divmod(place, columns)
        image, channel = axis.get_images()[0], largest[column]
        source = (hint, projected.detach())[row % 2][row // 2, channel]
        np.testing.assert_allclose(image.get_array(), source.numpy(), rtol=1e-6)
        of_hint = hint[row // 2, channel]
        assert image.get_clim() == pytest.approx((of_hint.min().item(), of_hint.max().item()))
        assert axis.get_ylabel() == ("" if column else ("hint", "projected")[row % 2])
        assert axis.get_title() == (f"channel {channel}" if row == 0 and channels > 1 else "")


@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 9, 4), (1, 10, 4), (3, 6), (1, 1)])
def test_tokens_and_vectors_are_one_matrix(shape):
    hint, projected = random_tensor(*shape), random_tensor(*shape, seed=1)
    figure = hint_figure(hint, projected, "tokens")
    axes = figure.get_axes()
    assert len(axes) == 2 * min(shape[0], 2)
    for row, axis in enumerate(axes):
        source = (hint, projected)[row % 2][row // 2]
        (image,) = axis.get_images()
        np.testing.assert_allclose(image.get_array(), source.reshape(-1, shape[-1]).numpy(), rtol=1e-6)
        assert axis.get_ylabel() == ("hint", "projected")[row % 2] and axis.get_title() == ""


def test_defaults_half_precision_and_constant_maps():
    figure = hint_figure(*(fill((3, 7, 2, 2), dtype=torch.bfloat16) for fill in (torch.zeros, torch.ones)), "")
    figure.canvas.draw()
    assert len(figure.get_axes()) == 2 * 2 * 6


@pytest.mark.parametrize(
    ("shape", "middle"), [((3, 7, 5, 4, 6), (2,)), ((1, 2, 1, 1, 1), (0,)), ((2, 3, 2, 5, 4, 6), (1, 2))]
)
def test_middle_slice_of_volumes(shape, middle):
    volumes = random_tensor(*shape), random_tensor(*shape, seed=1)
    slices = (volume[(slice(None), slice(None), *middle)] for volume in volumes)
    pixels = [
        [axis.get_images()[0].get_array().tolist() for axis in hint_figure(*pair, "").get_axes()]
        for pair in (volumes, slices)
    ]
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 2, 2), (2, 5), (2,), (2, 3, 1, 1)])
def test_values_that_are_not_finite_or_constant(shape, value):
    hint = torch.full(shape, value)
    hint_figure(hint, torch.zeros(shape), "odd").canvas.draw()
    hint[0] = 1.0
    hint_figure(hint, hint, "odd").canvas.draw()
