"""Checks of a student beside its teacher."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import nn

from kd_lightning.losses import KDLoss
from kd_lightning.teachers.decisions import decisions_of
from kd_lightning.teachers.findings import match_labels
from kd_lightning.teachers.student_checks import capacity, following, helps, student_alone


def decisions(right, n):
    z = F.one_hot(torch.where(torch.arange(n) < right, 0, 1), 2).float()
    return decisions_of(match_labels(z, torch.zeros(n, dtype=torch.long), "multiclass"), "multiclass")


def test_capacity():
    found = capacity(nn.Linear(4, 2), [nn.Linear(4, 200), nn.Linear(4, 200)], (8, 1600))
    assert found.text == "the student has 10 parameters, the teacher 2 k (200 times); 8 and 1.6 k MACs (200 times)"
    assert found.hint is None and "MACs" not in capacity(nn.Linear(4, 2), [nn.Linear(4, 2)], None).text


class TestFollowing:
    def found(self, same, n, **options):
        teacher = F.one_hot(torch.zeros(n, dtype=torch.long), 3).double()
        student = F.one_hot(torch.where(torch.arange(n) < same, 0, 1), 3).double()
        sample = options.pop("sample", None)
        return following(student, teacher, "multiclass", KDLoss(**options), sample, "runs/a"), student, teacher

    def test_the_upper_end_counts(self):
        assert self.found(140, 200)[0].reason == "gap"  # upper end 76 %
        assert self.found(150, 200)[0].hint is None  # 81 %
        assert "too few to judge" in self.found(0, 9)[0].text

    def test_divergence(self):
        for standardize in (False, True):
            found, student, teacher = self.found(70, 100, temperature=2.0, standardize=standardize)
            rows = []
            for z in (teacher, student):
                z = z.numpy()
                z = (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) if standardize else z
                rows.append(log_softmax(z / 2, axis=1))
            expected = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(axis=1).mean()
            assert f"KL divergence {expected:.3g} nats at temperature 2" in found.text
            assert "70.0% of 100 training samples" in found.text and "runs/a" in found.text

    def test_views_count_as_one(self):
        assert "of 25 training samples" in self.found(50, 100, sample=torch.arange(25).repeat(4))[0].text

    def test_beside_the_student_alone(self):
        """If it is nearer to the teacher without it, the student is not too small."""
        teacher = F.one_hot(torch.zeros(200, dtype=torch.long), 3).double()
        student, near, far = (
            F.one_hot(torch.where(torch.arange(200) < same, 0, 1), 3).double() for same in (100, 140, 60)
        )
        for alone, is_small, share in ((near, False, "70.0%"), (student, False, "50.0%"), (far, True, "30.0%")):
            found = following(student, teacher, "multiclass", KDLoss(), None, "runs/a", alone)
            assert found.reason == "gap" and f"without the teacher it decides alike on {share}" in found.text
            assert ("assistant" in found.hint) is is_small and ("not too small" in found.hint) is not is_small

    def test_a_student_that_followed_better_without_it(self):
        """Though it follows in most samples: 190 of 200, and 199 without the teacher. One sample is no evidence."""
        teacher = F.one_hot(torch.zeros(200, dtype=torch.long), 3).double()
        student, alone, level = (
            F.one_hot(torch.where(torch.arange(200) < same, 0, 1), 3).double() for same in (190, 199, 191)
        )
        found = following(student, teacher, "multiclass", KDLoss(), None, "runs/a", alone)
        assert found.reason == "gap" and "alike on 99.5%" in found.text and "higher learning rate" in found.hint
        assert following(student, teacher, "multiclass", KDLoss(), None, "runs/a", level).reason is None
        assert following(alone, teacher, "multiclass", KDLoss(), None, "runs/a", student).reason is None

    def test_binary(self):
        z = torch.ones(40, 1).double()
        found = following(z, z, "binary", KDLoss(task="binary"), None, "runs/a")
        assert "100.0% of 40" in found.text and "KL divergence 0 nats" in found.text


class TestAlone:
    def test_a_better_teacher(self):
        found = student_alone(decisions(90, 100), decisions(80, 100), decisions(50, 50), decisions(85, 100), "runs/b")
        assert found.hint is None and "runs/b is right on 80.0% of 100 validation samples" in found.text
        assert "100.0% of 50 labeled training samples" in found.text
        assert "the teacher: +10.0 points" in found.text and "with the teacher: +5.0 points" in found.text

    @pytest.mark.parametrize("right", [80, 70])
    def test_no_better(self, right):
        found = student_alone(decisions(right, 100), decisions(80, 100), None, None, "runs/b")
        assert found.reason == "no better" and "use a better teacher, or none" in found.hint

    @pytest.mark.parametrize(
        ("teacher", "taught", "reason"), [(80, 60, "level"), (80, 79, "no better"), (60, 50, "no better")]
    )
    def test_a_level_teacher_does_not_explain_harm(self, teacher, taught, reason):
        found = student_alone(decisions(teacher, 100), decisions(80, 100), None, decisions(taught, 100), "runs/b")
        assert found.reason == reason and "no better than the student alone" in found.hint

    def test_too_few(self):
        assert "too few to judge" in student_alone(decisions(0, 3), decisions(3, 3), None, None, "runs/b").text

    @pytest.mark.parametrize(("right", "expected"), [(95, True), (81, None), (60, False)])
    def test_helps(self, right, expected):
        assert helps(decisions(right, 100), decisions(80, 100)) is expected
        assert helps(None, decisions(80, 100)) is None and helps(decisions(9, 9), decisions(0, 9)) is None
