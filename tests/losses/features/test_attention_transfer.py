import numpy as np
import pytest
import torch

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses import AttentionTransferLoss


def attention(feature, mask=None):
    """The normalised attention maps (B, P), by numpy."""
    maps = (feature.double().numpy() ** 2).mean(1).reshape(len(feature), -1)
    maps = maps if mask is None else maps * mask.reshape(len(feature), -1).numpy()
    return maps / np.sqrt((maps**2).sum(1, keepdims=True))


@pytest.mark.parametrize(("channels", "size"), [((4, 7), (9,)), ((3, 3), (4, 6)), ((5, 2), (2, 3, 2))])
def test_value(randn, channels, size):
    student, teacher = randn(5, channels[0], *size), randn(5, channels[1], *size, seed=1)
    expected = ((attention(student) - attention(teacher)) ** 2).mean()
    assert AttentionTransferLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_ignores_scale_signs_and_the_order_of_channels(randn):
    student, teacher = randn(3, 4, 5, 5), randn(3, 6, 5, 5, seed=1)
    loss = AttentionTransferLoss()
    value = loss(student, teacher)
    assert loss(teacher, teacher) == 0
    torch.testing.assert_close(loss(-7 * student.flip(1), teacher / 3), value, rtol=1e-12, atol=0)
    # the scale of each sample
    torch.testing.assert_close(loss(student * torch.arange(1, 4).view(-1, 1, 1, 1), teacher), value, rtol=1e-12, atol=0)


def test_between_0_and_2_over_the_positions():
    one, other = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)
    one[:, :, 0], other[:, :, 3] = 5, 2
    assert AttentionTransferLoss()(one, other).item() == pytest.approx(2 / 4)


def blocks(maps, size):
    """Means of equal areas, by numpy, of sides that are multiples."""
    height, width = maps.shape[1] // size[0], maps.shape[2] // size[1]
    result = np.zeros((len(maps), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            result[:, i, j] = maps[:, i * height : (i + 1) * height, j * width : (j + 1) * width].mean((1, 2))
    return result


@pytest.mark.parametrize(
    ("of_student", "of_teacher", "size"), [((8, 6), (4, 2), (4, 2)), ((2, 4), (8, 4), (2, 4)), ((8, 2), (4, 6), (4, 2))]
)
def test_the_larger_map_is_averaged_to_the_smaller(randn, of_student, of_teacher, size):
    student, teacher = randn(3, 4, *of_student), randn(3, 5, *of_teacher, seed=1)
    maps = [blocks((f.numpy() ** 2).mean(1), size).reshape(3, -1) for f in (student, teacher)]
    units = [m / np.sqrt((m**2).sum(1, keepdims=True)) for m in maps]
    value = AttentionTransferLoss()(student, teacher)
    assert value.item() == pytest.approx(((units[0] - units[1]) ** 2).mean(), rel=1e-12)
    enlarged = teacher.repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert AttentionTransferLoss()(enlarged, teacher).item() == pytest.approx(0, abs=1e-30)


def test_sides_that_are_no_multiples(randn):
    student, teacher = randn(2, 3, 7, 5).requires_grad_(), randn(2, 3, 3, 4, seed=1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(student.detach().square().mean(1, keepdim=True), (3, 4)).sqrt()
    torch.testing.assert_close(AttentionTransferLoss()(student, teacher), AttentionTransferLoss()(pooled, teacher))
    assert torch.autograd.gradcheck(AttentionTransferLoss(), [student, teacher])


@pytest.mark.parametrize("size", [(4, 6), (3, 4)])
def test_empty_batches_and_channels_last_are_averaged_too(randn, size):
    student, teacher = randn(2, 3, 8, 6), randn(2, 5, *size, seed=1)
    value = AttentionTransferLoss()(student, teacher)
    last = AttentionTransferLoss()(*(f.to(memory_format=torch.channels_last) for f in (student, teacher)))
    torch.testing.assert_close(last, value, rtol=1e-12, atol=0)
    empty = student[:0].requires_grad_()
    mask = torch.ones(0, 8, 6, dtype=torch.bool)
    for batch in (None, Batch(empty, mask=mask)):
        value = AttentionTransferLoss()(empty, teacher[:0], batch)
        assert value == 0 and value.requires_grad


def test_positions_that_do_not_count(randn):
    student, teacher = randn(3, 4, 6), randn(3, 5, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows = (attention(student, mask) - attention(teacher, mask)) ** 2
    expected = (rows.sum(1) / mask.sum(1).numpy()).mean()
    value = AttentionTransferLoss()(student, teacher, Batch(student, mask=mask))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    # as if the positions were not there
    short = AttentionTransferLoss()(student[:1, :, :3], teacher[:1, :, :3])
    torch.testing.assert_close(
        AttentionTransferLoss()(student[:1], teacher[:1], Batch(student[:1], mask=mask[:1])), short
    )


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_averages_are_over_the_positions_that_count(randn, larger):
    large, small = randn(1, 4, 6), randn(1, 5, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    maps = large.square().mean(1)[0]
    large_map = torch.stack([(maps[0] + maps[1]) / 2, maps[2]])
    small_map = small.square().mean(1)[0, :2]
    units = [m / m.norm() for m in (large_map, small_map)]
    pair = (large, small) if larger == "student" else (small, large)
    value = AttentionTransferLoss()(*pair, Batch(large, mask=mask))
    torch.testing.assert_close(value, (units[0] - units[1]).square().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3), (2, 4), "attention maps need 2 positions or more, got features [2, 3] and [2, 4]"),
        (
            (2, 3, 1, 1),
            (2, 4, 8, 8),
            "attention maps need 2 positions or more, got features [2, 3, 1, 1] and [2, 4, 8, 8]",
        ),
        ((2, 3, 4, 4), (2, 3, 16), "as many sides, got [4, 4] and [16] after the channels"),
        ((2, 3, 4, 4), (1, 3, 4, 4), "of the same samples, got [2, 3, 4, 4] and [1, 3, 4, 4]"),
    ],
)
def test_shapes_that_do_not_fit(student, teacher, message):
    with pytest.raises(InputError) as error:
        AttentionTransferLoss()(torch.zeros(student), torch.zeros(teacher))
    assert message in str(error.value)
