import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_lightning.errors import InputError
from kd_lightning.losses import VIDLoss


def built(student, teacher, seed=0, dtype=torch.float64, **arguments):
    torch.manual_seed(seed)
    loss = VIDLoss(**arguments)
    loss.build(student[1:], teacher[1:], samples=None)
    return loss.to(dtype)


def reference(loss, student, teacher):
    """The formula by numpy, for features of the same positions."""
    first, second, third = (p.detach().numpy()[:, :, 0] for p in loss.mean.parameters())
    variance = np.log1p(np.exp(loss.alpha.detach().numpy())) + 1e-5
    total, count = 0.0, 0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        for position in np.ndindex(t.shape[1:]):
            column, target = s[(slice(None), *position)], t[(slice(None), *position)]
            mean = third @ np.maximum(second @ np.maximum(first @ column, 0), 0)
            total += np.sum(0.5 * ((target - mean) ** 2 / variance + np.log(variance)))
            count += len(target)
    return total / count


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5, 4), (5, 6)), ((3, 4, 7), (3, 2, 7)), ((2, 3, 4, 5), (2, 6, 4, 5)), ((2, 3, 2, 3, 2), (2, 4, 2, 3, 2))],
)
def test_value(randn, student, teacher):
    loss = built(student, teacher)
    torch.nn.init.uniform_(loss.alpha, -3, 8)
    student, teacher = randn(*student), 3 * randn(*teacher, seed=1)
    assert loss(student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-11)


@pytest.mark.parametrize("variance", [1e-4, 0.5, 5.0, 1000.0])
def test_initial_variance_and_the_loss_where_the_mean_is_right(variance):
    loss = built((1, 2), (1, 3), initial_variance=variance)
    assert (F.softplus(loss.alpha) + 1e-5).tolist() == pytest.approx([variance] * 3, rel=2e-4)
    zeros = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    assert loss(*zeros).item() == pytest.approx(math.log(variance) / 2, rel=1e-4)


def test_the_variance_becomes_the_mean_squared_error(randn):
    loss, teacher = built((64, 2), (64, 1)), 2 * randn(64, 1)
    optimizer = torch.optim.Adam([loss.alpha], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.zeros(64, 2, dtype=torch.float64), teacher).backward()
        optimizer.step()
    assert F.softplus(loss.alpha).item() == pytest.approx(teacher.square().mean().item(), rel=1e-2)


def test_the_networks_train_and_the_student_learns(randn):
    loss = built((4, 3, 4, 4), (4, 5, 4, 4))
    student = randn(4, 3, 4, 4).requires_grad_()
    loss(student, randn(4, 5, 4, 4, seed=1)).backward()
    assert len([*loss.parameters()]) == 4
    assert all(parameter.grad.abs().max() > 0 for parameter in [*loss.parameters(), student])


@pytest.mark.parametrize(("of_student", "of_teacher"), [((8, 6), (4, 3)), ((4, 3), (8, 6)), ((7, 3), (3, 4))])
def test_the_larger_feature_is_averaged_to_the_smaller(randn, of_student, of_teacher):
    student, teacher = randn(2, 3, *of_student), randn(2, 4, *of_teacher, seed=1)
    size = [*map(min, of_student, of_teacher)]
    loss = built(student.shape, teacher.shape)
    pooled = [F.adaptive_avg_pool2d(feature, size) for feature in (student, teacher)]
    assert loss(student, teacher).item() == pytest.approx(reference(loss, *pooled), rel=1e-11)


def test_weights_follow_the_seed():
    one, same, other = (built((2, 3), (2, 4), seed=seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert (one.mean[0].weight != other.mean[0].weight).any()


def test_all_in_bfloat16(randn):
    """Parameters of half precision, as "bf16-true" has them."""
    loss, student, teacher = built((4, 3, 5), (4, 6, 5)), randn(4, 3, 5), randn(4, 6, 5, seed=1)
    exact = loss(student, teacher)
    value = loss.bfloat16()(student.bfloat16(), teacher.bfloat16())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=2e-2)


def test_refused():
    for variance in (0, 1e-5, -1, math.inf, math.nan):
        with pytest.raises(InputError, match=f"^initial_variance must be finite and above 1e-05, got {variance}$"):
            VIDLoss(variance)
    with pytest.raises(InputError, match=r"^VIDLoss has no parameters before build\("):
        VIDLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
    loss = built((2, 3, 4, 4), (2, 5, 4, 4), dtype=torch.float32)
    with pytest.raises(InputError, match="^VIDLoss is built for 3 and 5 channels, got 4 and 5$"):
        loss(torch.zeros(2, 4, 4, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(InputError, match="as many sides"):
        loss(torch.zeros(2, 3, 16), torch.zeros(2, 5, 4, 4))
