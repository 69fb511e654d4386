"""CoarseLoss: cross-entropy of the groups, its two limits, precision; invalid groups."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax

from kd_lightning.errors import InputError
from kd_lightning.losses import CoarseLoss
from kd_lightning.losses.coarse import coarse_rows, group_members, mask_candidates

GROUPS = [[0, 3], [1], [2, 4]]
TARGET = torch.tensor([0, 2, 1, 2, 0, 1])


def randn(dtype=torch.float64):
    return (torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula_and_gradient(dtype):
    logits = randn(dtype).requires_grad_()
    p = softmax(logits.detach().double().numpy(), axis=1)
    sums = np.array([row[GROUPS[label]].sum() for row, label in zip(p, TARGET, strict=True)])
    inside = np.array([[c in GROUPS[label] for c in range(5)] for label in TARGET])
    found = CoarseLoss(GROUPS, "none")(logits, TARGET)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.dtype == dtype
    tolerance = {"rel": 1e-5, "abs": 1e-6} if dtype == torch.float32 else {"rel": 1e-12}
    assert found.detach().double().numpy() == pytest.approx(-np.log(sums), **tolerance)
    assert gradient.double().numpy() == pytest.approx(p - inside * p / sums[:, None], rel=1e-4, abs=1e-6)


def test_groups_of_one_are_cross_entropy():
    logits = randn().requires_grad_()
    values = CoarseLoss([[c] for c in range(5)])(logits, TARGET), F.cross_entropy(logits, TARGET)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_group_of_all_is_exactly_zero(scale):
    logits = (randn(torch.float32) * scale).requires_grad_()
    found = CoarseLoss([[4, 0, 2, 1, 3]], "none")(logits, torch.zeros(6, dtype=torch.long))
    found.sum().backward()
    assert found.tolist() == [0.0] * 6
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_large_logits_lose_no_precision():
    """Their log-sums are large, and their difference small."""
    logits = torch.tensor([[1e4, 1e4 - 3, 1e4 - 1]])
    expected = logsumexp([0.0, -3.0, -1.0]) - logsumexp([0.0, -3.0])
    assert CoarseLoss([[0, 1], [2]])(logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-5)


def test_order_of_groups_and_of_classes_in_them():
    other = CoarseLoss([[1], [4, 2], [3, 0]])
    moved = torch.tensor([2, 0, 1])[TARGET]
    torch.testing.assert_close(other(randn(), moved), CoarseLoss(GROUPS)(randn(), TARGET))


def test_moves_with_the_module():
    loss = CoarseLoss(GROUPS)
    assert not loss.state_dict()  # an argument
    assert repr(loss) == "CoarseLoss(groups=[[0, 3], [1], [2, 4]], reduction='mean')"
    assert loss.to("meta").members.device.type == "meta"


def test_rows_of_several_sets():
    candidates = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    candidates[:, 0] = True
    p = softmax(randn().numpy(), axis=1)
    expected = [-np.log(row[mask].sum()) for row, mask in zip(p, candidates.numpy(), strict=True)]
    assert coarse_rows(randn(), candidates).tolist() == pytest.approx(expected)
    assert coarse_rows(randn().half(), candidates).dtype == torch.float32
    assert coarse_rows(randn()[:0], candidates[:0]).shape == (0,)


def test_mask_candidates():
    logits = randn()
    assert mask_candidates(logits, None) is logits
    candidates = torch.zeros(6, 5, dtype=torch.bool)
    candidates[0, [1, 3]] = True
    found = mask_candidates(logits, candidates)
    assert found[0].isfinite().tolist() == [False, True, False, True, False]
    assert torch.equal(found[0, [1, 3]], logits[0, [1, 3]])
    assert torch.equal(found[1:], logits[1:])


def test_group_members():
    assert group_members(GROUPS, 5).int().tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1], [3]], "groups: class 2 is in no group"),
        ([[2], [1]], "groups: class 0 is in no group"),
        ([[0, 1], [1, 2]], "groups: class 1 is in more than one place, or twice in group 1"),
        ([[0, 0], [1]], "groups: class 0 is in more than one place, or twice in group 0"),
        ([[0, 1], []], "groups: group 1 is empty"),
        ([[0, -1], [1]], "groups: group 0 holds class -1, but the classes are 0 ... 1"),
        ([], "groups: class 0 is in no group"),
    ],
)
def test_invalid_groups(groups, message):
    with pytest.raises(InputError, match=message):
        CoarseLoss(groups)


def test_groups_of_a_given_number_of_classes():
    with pytest.raises(InputError, match="groups: group 1 holds class 2, but the classes are 0 ... 1"):
        group_members([[0, 1], [2]], 2)
    with pytest.raises(InputError, match="groups: class 2 is in no group"):
        group_members([[0], [1]], 3)
    with pytest.raises(InputError, match="groups must have 4 classes, as the logits, got 5"):
        CoarseLoss(GROUPS)(torch.zeros(1, 4), torch.tensor([0]))
    with pytest.raises(InputError, match="target must be 0 ... 2, got 3"):
        CoarseLoss(GROUPS)(randn(), TARGET + 1)
