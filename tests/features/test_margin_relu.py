import copy

import numpy as np
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.features import MarginReLU


def fitted(rows):
    relu = MarginReLU()
    relu.fit(rows)
    return relu


@pytest.fixture
def rows():
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([-1.0, 0.0, 1.0])


def test_margins_are_the_means_below_0(rows):
    expected = [column[column < 0].mean() for column in rows.double().numpy().T]
    assert fitted(rows).margin.tolist() == pytest.approx(expected, rel=1e-6)


def test_margins_are_near_those_of_a_normal_distribution():
    """The authors compute them from mean b and deviation |g| of a batch norm."""
    b, g = 0.5, 1.5
    rows = b + g * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    z = torch.distributions.Normal(0.0, 1.0)
    expected = b - g * z.log_prob(torch.tensor(b / g)).exp() / z.cdf(torch.tensor(-b / g))
    assert fitted(rows).margin.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("size", [(), (5,), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_limits_each_channel_from_below(rows, size, dtype):
    relu = fitted(rows)
    feature = 3 * torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = relu(feature)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    margin = relu.margin.double().numpy().reshape(1, 3, *[1] * len(size))
    np.testing.assert_allclose(result.double().numpy(), np.maximum(feature.double().numpy(), margin), rtol=1e-6)


def test_a_channel_without_values_below_0_has_margin_0():
    relu = fitted(torch.tensor([[-2.0, 1.0], [4.0, 3.0]]))
    assert relu.margin.tolist() == [-2, 0] and relu(torch.tensor([[-5.0, -5.0]])).tolist() == [[-2, 0]]


def test_copies_and_checkpoints(rows):
    relu, twin = fitted(rows), MarginReLU()
    twin.load_state_dict(relu.state_dict())
    assert twin.is_fitted and (twin.margin == relu.margin).all()
    assert (copy.deepcopy(relu).margin == relu.margin).all() and not copy.deepcopy(MarginReLU()).is_fitted


def test_refused(rows):
    with pytest.raises(InputError, match=r"^MarginReLU is not fitted; call fit\(features\) first"):
        MarginReLU()(rows)
    with pytest.raises(InputError, match="^MarginReLU is fitted already, to 3 channels$"):
        fitted(rows).fit(rows)
    with pytest.raises(
        InputError, match=r"^MarginReLU is fitted to 3 channels, so features must be \(B, 3, ...\), got \[2, 4\]$"
    ):
        fitted(rows)(torch.zeros(2, 4))
    for features in (torch.zeros(0, 3), torch.zeros(2, 3, 4)):
        with pytest.raises(InputError, match=r"^MarginReLU is fitted to features \(M, C\) of at least one row, got"):
            fitted(features)
    with pytest.raises(InputError, match="^MarginReLU: features must be finite"):
        fitted(torch.tensor([[torch.nan]]))
    with pytest.raises(
        InputError, match="^MarginReLU: no feature of the teacher is below 0; set the layer before the ReLU$"
    ):
        fitted(rows.relu())
