"""Decisions by sample: views and positions of a sample count as one."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kd_lightning.teachers.decisions import (
    Change,
    Difference,
    between_samples,
    change_by_teacher,
    decisions_of,
    on_same_samples,
)
from kd_lightning.teachers.findings import match_labels


def logits(*rows):
    return torch.tensor(rows, dtype=torch.double)


def test_each_row_is_a_sample():
    z = logits([2, 0, 0], [0, 1, 0], [0, 0, 3], [1, 0, 0])
    found = decisions_of(match_labels(z, torch.tensor([0, 0, 2, -100]), "multiclass"), "multiclass")
    p = np.exp(np.asarray(z)) / np.exp(np.asarray(z)).sum(axis=1, keepdims=True)
    assert found.right.tolist() == [1, 0, 1]
    assert found.confidence.tolist() == pytest.approx(p.max(axis=1)[:3])
    assert found.wrong_confidence == pytest.approx(p[1].max())
    exact = stats.binomtest(2, 3).proportion_ci(method="exact")
    assert found.interval == pytest.approx((exact.low, exact.high))
    assert found.describe("samples") == f"66.7% of 3 samples (95% interval {exact.low:.1%} to {exact.high:.1%})"


def test_views_of_a_sample_count_as_one():
    z = logits([1, 0], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1])
    sample, y = torch.tensor([7, 7, 7, 7, 3, 3]), torch.tensor([0, 0, 0, 0, 1, 1])
    found = decisions_of(match_labels(z, y, "multiclass", sample), "multiclass")
    assert found.sample.tolist() == [3, 7] and found.right.tolist() == [0.5, 0.75]
    assert len(found) == 2 and found.accuracy == 0.625


def test_labels_of_a_sample_count_as_one():
    z, y = logits([3, -3], [3, -3], [3, -3]), torch.tensor([[1, 0], [0, math.nan], [math.nan, math.nan]])
    found = decisions_of(match_labels(z, y, "multilabel"), "multilabel")
    assert found.right.tolist() == [1, 0]
    assert found.confidence.tolist() == pytest.approx([1 / (1 + math.exp(-3))] * 2)
    assert found.wrong_confidence == pytest.approx(1 / (1 + math.exp(-3)))


def test_binary():
    found = decisions_of(match_labels(logits([2], [-1], [1]), torch.tensor([1, 1, 1]), "binary"), "binary")
    assert found.right.tolist() == [1, 0, 1] and math.isclose(found.wrong_confidence, 1 / (1 + math.exp(-1)))


def test_all_right():
    found = decisions_of(match_labels(logits([2, 0]), torch.tensor([0]), "multiclass"), "multiclass")
    assert math.isnan(found.wrong_confidence)


def test_differences():
    y = torch.zeros(40, dtype=torch.long)
    right, wrong = logits([1, 0]), logits([0, 1])
    one = decisions_of(match_labels(torch.cat([right] * 36 + [wrong] * 4), y, "multiclass"), "multiclass")
    other = decisions_of(match_labels(torch.cat([right] * 20 + [wrong] * 20), y, "multiclass"), "multiclass")
    apart, paired = between_samples(one, other), on_same_samples(one, other)
    assert apart.value == pytest.approx(0.4) and paired.value == pytest.approx(0.4)
    changes = np.array([0] * 20 + [1] * 16 + [0] * 4)
    expected = stats.t.interval(0.95, 39, changes.mean(), stats.sem(changes))
    assert (paired.low, paired.high) == pytest.approx(expected)
    assert apart.low < paired.low and str(Difference(0.4, 0.2, 0.6)) == "+40.0 points (95% interval +20.0 to +60.0)"


class TestChangeByTeacher:
    def matched(self, right, sample):
        z = torch.where(torch.as_tensor(right)[:, None], logits([1, 0]), logits([0, 1]))
        return match_labels(z, torch.zeros(len(z), dtype=torch.long), "multiclass", sample)

    def test_reference(self):
        """Both parts are means over samples, with their intervals, and add up to the whole change."""
        random = np.random.default_rng(0)
        teacher, taught, alone = (random.random(120) < share for share in (0.8, 0.5, 0.6))
        sample = random.permutation(np.arange(30).repeat(4))
        found = change_by_teacher(*(self.matched(one, torch.tensor(sample)) for one in (teacher, taught, alone)))
        for part, where in ((found.where_right, teacher), (found.where_wrong, ~teacher)):
            change = (taught.astype(float) - alone) * where
            means = [change[sample == one].mean() for one in range(30)]
            low, high = stats.t.interval(0.95, 29, np.mean(means), stats.sem(means))
            assert tuple(part) == pytest.approx((np.mean(means), low, high))
        assert found.where_right.value + found.where_wrong.value == pytest.approx(taught.mean() - alone.mean())

    def test_labels_of_a_sample_count_as_one(self):
        y = torch.ones(3, 2)
        right, wrong = (match_labels(torch.full((3, 2), sign), y, "multilabel") for sign in (1.0, -1.0))
        wrong = wrong._replace(correct=torch.tensor([False, True, False, True, True, True]))
        found = change_by_teacher(right, wrong, right)
        low, high = stats.t.interval(0.95, 2, -1 / 3, stats.sem([0.5, 0.5, 0]))
        assert tuple(found.where_right) == pytest.approx((-1 / 3, max(low, -1), high)) and found.where_wrong.value == 0

    @pytest.mark.parametrize(
        ("right", "wrong", "harm"),
        [
            ((-0.05, -0.08, -0.01), (-0.01, -0.02, 0.0), False),  # loses where the teacher is right
            ((-0.05, -0.08, -0.01), (-0.10, -0.12, -0.05), True),  # and more where it is wrong
            ((-0.05, -0.11, 0.01), (-0.01, -0.02, 0.0), True),  # perhaps by chance
            ((0.02, 0.01, 0.03), (-0.10, -0.12, -0.05), True),
        ],
    )
    def test_errors_harm(self, right, wrong, harm):
        assert Change(Difference(*right), Difference(*wrong)).errors_harm is harm
