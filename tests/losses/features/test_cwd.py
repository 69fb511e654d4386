import math

import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses import ChannelWiseLoss


def channel(student, teacher, temperature):
    """KL of one channel's positions, by numpy."""
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (teacher, student))
    return float((p * np.log(p / q)).sum())


def reference(student, teacher, temperature):
    student, teacher = (f.double().numpy().reshape(*f.shape[:2], -1) for f in (student, teacher))
    rows, channels = student.shape[:2]
    values = [channel(student[i, c], teacher[i, c], temperature) for i in range(rows) for c in range(channels)]
    return temperature**2 * sum(values) / (rows * channels)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 3, 5), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value(randn, shape, temperature):
    student, teacher = 3 * randn(*shape), randn(*shape, seed=1)
    value = ChannelWiseLoss(temperature)(student, teacher)
    assert value.item() == pytest.approx(reference(student, teacher, temperature), rel=1e-11)


def test_ignores_a_constant_of_each_channel_and_the_order_of_positions(randn):
    student, teacher = randn(2, 4, 9), randn(2, 4, 9, seed=1)
    loss = ChannelWiseLoss()
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student + randn(2, 4, 1), teacher - 5), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(loss(student.flip(2), teacher.flip(2)), value, rtol=1e-11, atol=0)
    assert loss(teacher, teacher) == 0 < value


def test_large_temperatures_compare_centred_features(randn):
    """The limit is half the mean squared distance of features whose channels have mean 0."""
    student, teacher = randn(2, 4, 9), randn(2, 4, 9, seed=1)
    centred = (student - student.mean(2, keepdim=True)) - (teacher - teacher.mean(2, keepdim=True))
    value = ChannelWiseLoss(1e4)(student, teacher)
    assert value.item() == pytest.approx(centred.square().mean().item() / 2, rel=1e-3)


def test_the_temperature_is_read_at_every_call(randn):
    student, teacher, loss = randn(2, 4, 9), randn(2, 4, 9, seed=1), ChannelWiseLoss()
    loss.temperature = 2.0
    assert loss(student, teacher) == ChannelWiseLoss(2.0)(student, teacher)
    loss.temperature = 0
    with pytest.raises(InputError, match="^temperature must be finite and above 0, got 0$"):
        loss(student, teacher)


def test_positions_that_do_not_count_have_no_probability(randn):
    student, teacher = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    value = ChannelWiseLoss()(student, teacher, Batch(student, mask=mask))
    positions = [0, 1, 4]
    of_first = reference(student[:1, :, positions], teacher[:1, :, positions], 4.0)
    assert value.item() == pytest.approx(of_first / 2, rel=1e-11)  # a sample without positions contributes 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharp_distributions_in_half_precision(dtype):
    student = torch.tensor([[[3e4, -3e4, 0.0]]], dtype=dtype, requires_grad=True)
    value = ChannelWiseLoss(1.0)(student, torch.tensor([[[-3e4, 3e4, 0.0]]], dtype=dtype))
    value.backward()
    assert value.item() == pytest.approx(6e4, rel=1e-2) and student.grad.isfinite().all()


def test_refused():
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match=f"^temperature must be finite and above 0, got {temperature}$"):
            ChannelWiseLoss(temperature)
    for shape in ((2, 3), (2, 3, 1, 1)):
        with pytest.raises(InputError, match="^channel-wise distributions need 2 positions or more, got"):
            ChannelWiseLoss()(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(InputError, match="must have one shape"):
        ChannelWiseLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


def test_repr():
    assert repr(ChannelWiseLoss()) == "ChannelWiseLoss(temperature=4.0)"
