import re

import numpy as np
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.losses import HintLoss

SHAPES = [(4, 3, 5, 2), (3, 7, 4), (5, 6), (1, 1)]  # maps, tokens, vectors, one number


def randn(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3).to(dtype))


def reference(projected, hint):
    difference = projected.detach().double().numpy() - hint.detach().double().numpy()
    return torch.tensor(np.array([0.5 * np.sum(row**2) for row in difference])), torch.tensor(difference)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_by_hand_and_reductions(shape):
    projected, hint = randn(shape)
    projected.requires_grad_()
    rows, difference = reference(projected, hint)
    none, mean = HintLoss("none")(projected, hint), HintLoss()(projected, hint)
    assert none.shape == shape[:1] and mean.shape == () and none.dtype == mean.dtype == torch.float64
    torch.testing.assert_close(none, rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, rows.mean(), rtol=1e-12, atol=0)
    weights = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    of_rows = torch.autograd.grad(none @ weights, projected)[0]
    torch.testing.assert_close(of_rows, difference * weights.reshape(-1, *[1] * (len(shape) - 1)), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(mean, projected)[0], difference / len(difference), rtol=1e-12, atol=0
    )
    assert torch.autograd.gradcheck(lambda r: HintLoss()(r, hint), [projected])


def test_sums_over_entries_and_averages_over_the_batch():
    hint = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert HintLoss("none")(torch.zeros(2, 2), hint).tolist() == [12.5, 2.0]
    assert HintLoss()(torch.zeros(2, 2), hint) == 7.25
    assert HintLoss()(torch.zeros(2, 2, 3, 3), torch.ones(2, 2, 3, 3)) == 9.0


@pytest.mark.parametrize("other", [torch.float32, torch.float64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_computed_in_float32(shape, dtype, other):
    projected, hint = randn(shape, 1, dtype)[0].requires_grad_(), randn(shape, 1, other or dtype)[1]
    rows, difference = reference(projected, hint)
    value = HintLoss("none")(projected, hint)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), rows, rtol=1e-5, atol=0)
    HintLoss()(projected, hint).backward()
    assert projected.grad.dtype == dtype
    torch.testing.assert_close(projected.grad, (difference / len(difference)).to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_neither_overflow_nor_stall(dtype):
    large = torch.full((2, 16, 32, 32), 300.0, dtype=dtype)  # its square is beyond float16
    assert HintLoss()(large, torch.zeros_like(large)) == 16 * 32 * 32 * 300.0**2 / 2
    ones = torch.ones(1, 1, 64, 64, dtype=dtype)  # sums of ones stop at 256 in bfloat16, at 2048 in float16
    assert HintLoss()(ones, torch.zeros_like(ones)) == 2048
    with torch.autocast("cpu", dtype):
        value = HintLoss()(ones, torch.zeros_like(ones))
    assert value == 2048 and value.dtype == torch.float32


def test_float64_stays_and_keeps_its_digits():
    hint = torch.full((1, 1), 1 + 1e-12, dtype=torch.float64)
    value = HintLoss()(torch.ones(1, 1, dtype=torch.float64), hint)
    assert value.dtype == torch.float64 and value.item() == pytest.approx(0.5e-24, rel=1e-3)
    assert HintLoss()(hint, hint.float()).item() == pytest.approx(0.5e-24, rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_into_the_hint(reduction):
    projected, hint = (z.requires_grad_() for z in randn((3, 4)))
    HintLoss(reduction)(projected, hint).sum().backward()
    assert hint.grad is None and projected.grad.abs().min() > 0
    assert not HintLoss(reduction)(projected.detach(), hint).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_with_zero_gradient_at_equality(dtype):
    _, hint = randn((3, 2, 4, 4), 2, dtype)
    projected = hint.clone().requires_grad_()
    value = HintLoss()(projected, hint)
    value.backward()
    assert value == 0 and projected.grad.abs().max() == 0


@pytest.mark.parametrize("shape", [(0, 3, 5, 2), (0, 7, 4), (0, 6)])
def test_empty_batch_gives_zero_in_the_graph(shape):
    projected, hint = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    value = HintLoss()(projected, hint)
    assert value == 0 and value.requires_grad
    value.backward()
    assert projected.grad.shape == shape
    assert HintLoss("none")(projected, hint).shape == (0,)


@pytest.mark.parametrize(
    ("projected", "hint"),
    [
        ((2, 3, 4, 4), (2, 3, 4, 5)),
        ((2, 3, 1, 1), (2, 3, 4, 4)),  # would broadcast
        ((1, 3), (2, 3)),
        ((2, 16, 4), (2, 4, 4, 4)),
        ((2, 3), (2, 3, 1, 1)),
    ],
)
def test_other_shapes_are_refused(projected, hint):
    both = re.escape(f"must have one shape, got {[*projected]} and {[*hint]}")
    with pytest.raises(InputError, match=both):
        HintLoss()(torch.zeros(projected), torch.zeros(hint))


def test_unknown_reduction():
    with pytest.raises(InputError, match=r"reduction must be one of \('mean', 'none'\), got 'sum'"):
        HintLoss("sum")
