"""Checks of the views that a teacher teaches from: each limit from both sides."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from kd_lightning.losses import KDLoss
from kd_lightning.teachers.decisions import decisions_of
from kd_lightning.teachers.findings import match_labels
from kd_lightning.teachers.taught_samples import memory, soft_targets_of_views, view_strength, wrong_decisions


def matched(right, n, sample=None):
    """Logits of three classes for n labels of class 0, of which the last ones are taken for class 2."""
    predicted = torch.where(torch.arange(n) < right, 0, 2)
    return match_labels(3.0 * F.one_hot(predicted, 3), torch.zeros(n, dtype=torch.long), "multiclass", sample)


def decisions(right, n):
    return decisions_of(matched(right, n), "multiclass")


CONFIDENCE = math.exp(3) / (math.exp(3) + 2)


class TestMemory:
    def test_memorised(self):
        found = memory(decisions(200, 200), decisions(60, 100), same_views=True)
        assert found.reason == "memory" and "kd-lightning crossfit TEACHER_CONFIG" in found.hint
        assert "100.0% of 200 labeled training samples" in found.text
        assert "60.0% of 100 validation samples" in found.text
        assert found.text.count(f"mean confidence {CONFIDENCE:.1%}") == 2 and "+40.0 points" in found.text
        assert "under the same views" in found.text

    def test_a_small_difference(self):
        assert memory(decisions(1000, 1000), decisions(910, 1000), same_views=False).hint is None  # 9 points
        assert memory(decisions(1000, 1000), decisions(890, 1000), same_views=False).reason == "memory"

    def test_few_samples(self):
        assert memory(decisions(18, 20), decisions(14, 20), same_views=True).hint is None  # 20 points, not significant
        assert "too few to judge" in memory(decisions(100, 100), decisions(0, 9), same_views=True).text

    def test_worse_on_its_own_samples(self):
        assert memory(decisions(100, 200), decisions(200, 200), same_views=True).hint is None


class TestWrongDecisions:
    def test_wrong(self):
        found = wrong_decisions(matched(160, 200), "multiclass", ["cat", "dog", "owl"], labeled=1.0)
        exact = stats.binomtest(40, 200).proportion_ci(method="exact")
        assert found.reason == "wrong" and "ConditionalLoss" in found.hint
        about = f"(95% interval {exact.low:.1%} to {exact.high:.1%})"
        assert f"20.0% of the 200 labeled samples under training views wrong {about}" in found.text
        assert f"mean confidence {CONFIDENCE:.1%} when wrong; most often cat taken for owl (20.0%)" in found.text

    def test_the_lower_end_counts(self):
        def low(wrong):
            return stats.binomtest(wrong, 200).proportion_ci(method="exact").low

        first = next(k for k in range(200) if low(k) >= 0.1)
        assert wrong_decisions(matched(200 - first, 200), "multiclass").reason == "wrong"
        assert wrong_decisions(matched(201 - first, 200), "multiclass").hint is None

    def test_views_of_a_sample_count_as_one(self):
        sample = torch.arange(60).repeat_interleave(4)
        found = wrong_decisions(matched(204, 240, sample), "multiclass")  # 15 % of 60 samples, not of 240
        exact = stats.binomtest(9, 60).proportion_ci(method="exact")
        assert f"95% interval {exact.low:.1%} to {exact.high:.1%}" in found.text and found.hint is None
        assert wrong_decisions(matched(204, 240), "multiclass").hint is not None

    def test_few_labels_overrule_nothing(self):
        found = wrong_decisions(matched(100, 200), "multiclass", labeled=0.1)
        assert found.hint is None and "10.0% of the training samples are labeled" in found.text

    def test_labels_that_may_be_wrong(self):
        found = wrong_decisions(matched(100, 200), "multiclass", labeled=1.0, noisy=True)
        assert found.hint is None and "labels may be wrong, too" in found.text

    def test_multilabel(self):
        y = torch.zeros(100, 2)
        found = wrong_decisions(match_labels(torch.ones(100, 2), y, "multilabel"), "multilabel", labeled=1.0)
        assert found.reason == "wrong" and "ConditionalLoss" not in found.hint and "taken for" not in found.text

    def test_too_few(self):
        assert "too few to judge" in wrong_decisions(matched(0, 9), "multiclass").text

    def test_never_wrong(self):
        found = wrong_decisions(matched(50, 50), "multiclass")
        assert found.hint is None and "when wrong" not in found.text


class TestViewStrength:
    def test_too_strong(self):
        found = view_strength(decisions(95, 100), decisions(60, 100), "validation samples")
        assert found.reason == "views" and "-35.0 points" in found.text
        assert "60.0% of 100 validation samples" in found.text and "95.0% under evaluation transforms" in found.text

    def test_mild(self):
        assert view_strength(decisions(95, 100), decisions(86, 100), "samples").hint is None
        assert view_strength(decisions(95, 100), decisions(84, 100), "samples").reason == "views"
        assert view_strength(decisions(60, 100), decisions(95, 100), "samples").hint is None
        found = view_strength(decisions(70, 100), decisions(50, 100), "samples")  # 20 of 50 wrong decisions
        assert found.hint is not None and found.reason is None
        assert view_strength(decisions(80, 100), decisions(60, 100), "samples").reason == "views"  # 20 of 40
        assert "too few to judge" in view_strength(decisions(9, 9), decisions(0, 9), "samples").text


@pytest.mark.parametrize(("scale", "reason"), [(1000.0, "one-hot"), (1.0, None), (1e-4, "uniform")])
def test_soft_targets(scale, reason):
    z = scale * 3.0 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    found = soft_targets_of_views(z, KDLoss(temperature=2.0), "multiclass", None)
    assert found.name == "soft targets of views" and found.reason == reason
    assert ("standardize" in (found.hint or "")) == (reason == "one-hot")
