"""Figures of features, against scikit-learn and plain numpy in double precision."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from kd_lightning.features import representation
from kd_lightning.features.representation import knn_accuracy, neighbor_agreement, probe_accuracy, rankme


@pytest.fixture
def blobs():
    """60 points of three classes that overlap, in 8 dimensions; class 3 of four has none."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(3, (60,), generator=generator)
    y[y == 2] = 4
    centres = torch.randn(5, 8, generator=generator)
    return centres[y] + 1.5 * torch.randn(60, 8, generator=generator), y


class TestKNN:
    @pytest.mark.parametrize("k", [1, 20, 500])
    def test_equals_scikit_learn_leaving_each_out(self, blobs, k):
        x, y = blobs
        unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
        weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
        reference = KNeighborsClassifier(min(k, 59), weights=weights, metric="cosine")
        predicted = cross_val_predict(reference, unit, y.numpy(), cv=LeaveOneOut())
        assert knn_accuracy(x, y, k) == pytest.approx((predicted == y.numpy()).mean())

    def test_scale_does_not_matter(self, blobs):
        x, y = blobs
        assert knn_accuracy(x * torch.rand(60, 1).add(0.1), y) == knn_accuracy(x, y)

    def test_right_for_points_far_apart_and_wrong_for_lone_ones(self):
        x = torch.eye(3).repeat_interleave(4, dim=0) + 0.01 * torch.rand(12, 3)
        assert knn_accuracy(x, torch.arange(3).repeat_interleave(4), k=3) == 1
        assert knn_accuracy(x, torch.arange(12)) == 0


class TestProbe:
    @pytest.mark.parametrize("columns", [8, 200])
    def test_equals_scikit_learn_leaving_each_out(self, blobs, columns, monkeypatch):
        """Of fewer and of more features than samples, with the penalty of the smallest error. Each fits 59 samples."""
        x, y = blobs
        generator = torch.Generator().manual_seed(0)
        x = x @ torch.randn(8, columns, generator=generator) + 5 * torch.randn(60, columns, generator=generator)
        standard, targets = StandardScaler().fit_transform(x.double().numpy()), np.eye(5)[y][:, [0, 1, 4]]
        found = {}
        for penalty in (1e-3, 10.0):
            outputs = cross_val_predict(Ridge(alpha=penalty * 60), standard, targets, cv=LeaveOneOut())
            accuracy = (outputs.argmax(axis=1) == targets.argmax(axis=1)).mean()
            found[((outputs - targets) ** 2).mean()] = accuracy
            monkeypatch.setattr(representation, "_PENALTIES", (penalty,))
            assert probe_accuracy(x, y) == pytest.approx(accuracy)
        monkeypatch.setattr(representation, "_PENALTIES", (1e-3, 10.0))
        assert probe_accuracy(x, y) == pytest.approx(found[min(found)])
        assert len({*found.values()}) == 2

    def test_equal_features_do_not_count(self, blobs):
        x, y = blobs
        assert probe_accuracy(torch.cat([x, torch.full((60, 3), 0.1)], dim=1), y) == probe_accuracy(x, y)
        alone = probe_accuracy(torch.ones(60, 4), y)
        assert alone <= y.bincount().max() / 60

    def test_random_labels_are_not_learned(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(300, 100, generator=generator), torch.randint(2, (300,), generator=generator)
        assert probe_accuracy(x, y) == pytest.approx(0.5, abs=0.1)


class TestRankMe:
    @pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
    def test_equals_numpy(self, shape):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[1])
        singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
        shares = singular / singular.sum() + 1e-7
        assert rankme(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)

    def test_limits(self):
        assert rankme(torch.eye(50)) == pytest.approx(50, rel=1e-3)
        collapsed = torch.randn(200, 1) @ torch.randn(1, 64)
        assert rankme(collapsed) == pytest.approx(1, abs=0.01)
        assert math.isfinite(rankme(torch.zeros(100, 8)))


class TestNeighborAgreement:
    def test_equals_scikit_learn(self, blobs):
        x, _ = blobs
        teacher = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + x[:, :5]
        sets = []
        for features in (x, teacher):
            search = NearestNeighbors(n_neighbors=20, metric="cosine").fit(features.double().numpy())
            sets.append([{*row} for row in search.kneighbors(return_distance=False)])
        share = np.mean([len(one & other) / 20 for one, other in zip(*sets, strict=True)])
        assert neighbor_agreement(x, teacher) == pytest.approx(share)

    def test_limits(self, blobs):
        x, _ = blobs
        turn = torch.linalg.qr(torch.randn(8, 8))[0]
        assert neighbor_agreement(x, 3 * x @ turn) > 0.99
        random = neighbor_agreement(x, torch.randn(60, 8, generator=torch.Generator().manual_seed(5)))
        assert random == pytest.approx(20 / 59, abs=0.08)
