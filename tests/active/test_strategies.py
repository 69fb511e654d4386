"""Strategies: each against its formula, and limit cases."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import kd_lightning.active.strategies as acquisition
from kd_lightning.active.strategies import STRATEGIES, PoolOutputs, select_samples
from kd_lightning.errors import InputError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def pool():
    """12 samples of 4 classes, 3 features, 5 members, and 2 labeled samples."""
    return PoolOutputs(
        probabilities=randn(12, 4).mul(2).softmax(dim=1),
        features=randn(12, 3, seed=1),
        member_probabilities=randn(5, 12, 4, seed=2).softmax(dim=2),
        teacher_probabilities=randn(12, 4, seed=3).softmax(dim=1),
        labeled_features=randn(2, 3, seed=4),
        seed=5,
    )


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def mutual_information(pool, row):
    """Mean KL of the members to their mean."""
    members = pool.member_probabilities[:, row].tolist()
    mean = [sum(column) / len(members) for column in zip(*members, strict=True)]
    return sum(sum(x * math.log(x / m) for x, m in zip(p, mean, strict=True)) for p in members) / len(members)


FORMULAS = {
    "least-confidence": lambda pool, row: 1 - max(pool.probabilities[row].tolist()),
    "margin": lambda pool, row: 1 - float(-pool.probabilities[row].sort(descending=True).values[:2].diff()),
    "entropy": lambda pool, row: entropy(pool.probabilities[row].tolist()),
    "bald": mutual_information,
    "disagreement": lambda pool, row: sum(
        t * math.log(t / s)
        for t, s in zip(pool.teacher_probabilities[row].tolist(), pool.probabilities[row].tolist(), strict=True)
    ),
}


@pytest.mark.parametrize("strategy", FORMULAS)
def test_formula(pool, strategy):
    scores = [FORMULAS[strategy](pool, row) for row in range(12)]
    best = sorted(range(12), key=lambda row: -scores[row])[:5]
    before = replace(
        pool, member_probabilities=pool.member_probabilities.clone(), probabilities=pool.probabilities.clone()
    )
    rows, found = select_samples(strategy, pool, 5)
    assert rows.tolist() == best
    assert found.tolist() == pytest.approx([scores[row] for row in best], abs=1e-12)
    assert found.dtype == torch.float64
    # nothing is changed in place
    assert torch.equal(pool.member_probabilities, before.member_probabilities) and torch.equal(
        pool.probabilities, before.probabilities
    )


def test_bald_is_zero_where_the_networks_agree(pool):
    members = pool.member_probabilities.clone()
    members[:, 3] = torch.tensor([1.0, 0, 0, 0])
    members[:, 7] = members[0, 7]
    members[:, 8] = torch.tensor([1.0, 0, 0, 0])
    members[2, 8] = torch.tensor([0, 0, 0, 1.0])  # one of five is certain of another class
    rows, scores = select_samples("bald", replace(pool, member_probabilities=members), 12)
    assert rows[0] == 8 and scores[0] == pytest.approx(entropy([0.8, 0.2]))
    assert {*rows[-2:].tolist()} == {3, 7}
    assert scores[-2:].tolist() == pytest.approx([0, 0], abs=1e-14)
    assert (scores >= 0).all() and scores[-3] > 0.01


def test_classes_with_probability_zero(pool):
    """With a coarse label, some classes have probability 0 for student and teacher."""
    p, q = torch.tensor([[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]]), torch.tensor([[0.5, 0.5, 0, 0], [0.0, 1, 0, 0]])
    few = PoolOutputs(p.double(), teacher_probabilities=q.double(), member_probabilities=torch.stack([p, p]).double())
    before = few.member_probabilities.clone()
    assert select_samples("entropy", few, 1).scores.item() == pytest.approx(math.log(2))
    assert select_samples("bald", few, 2).scores.tolist() == pytest.approx([0, 0], abs=1e-14)
    assert torch.equal(few.member_probabilities, before)  # the library would clip it in place
    rows, scores = select_samples("disagreement", few, 2)
    assert rows.tolist() == [1, 0] and scores.tolist() == pytest.approx([math.log(10), 0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("same", [False, True])
def test_no_query_twice(pool, strategy, same):
    """Also if all samples are equal, and equal to the labeled ones."""
    if same:
        pool = PoolOutputs(
            *(part[:1].expand(12, -1) for part in (pool.probabilities, pool.features)),
            member_probabilities=pool.member_probabilities[:, :1].expand(-1, 12, -1),
            teacher_probabilities=pool.teacher_probabilities[:1].expand(12, -1),
            labeled_features=pool.features[:1],
        )
    rows, scores = select_samples(strategy, pool, 12)
    assert sorted(rows.tolist()) == list(range(12))
    assert scores.shape == (12,) and scores.isfinite().all()
    if same and strategy not in ("k-centre", "badge", "random"):  # of equal ones the first
        assert rows.tolist() == list(range(12))
    again = select_samples(strategy, pool, 12)
    assert torch.equal(again.rows, rows) and torch.equal(again.scores, scores)


class TestKCentre:
    def test_the_farthest(self):
        features = torch.tensor([[1.0], [5.0], [10.0], [9.2]])
        pool = PoolOutputs(torch.full((4, 2), 0.5).double(), features=features, labeled_features=torch.zeros(1, 1))
        rows, scores = select_samples("k-centre", pool, 4)
        assert rows.tolist() == [2, 1, 0, 3]
        assert scores.tolist() == pytest.approx([10, 5, 1, 0.8])

    def test_greedy(self, pool):
        centres, expected = pool.labeled_features.tolist(), []
        for _ in range(6):
            distances = [min(math.dist(x, c) for c in centres) for x in pool.features.tolist()]
            row = max(range(12), key=distances.__getitem__)
            expected.append((row, pytest.approx(distances[row])))
            centres.append(pool.features[row].tolist())
        rows, scores = select_samples("k-centre", pool, 6)
        assert list(zip(rows.tolist(), scores.tolist(), strict=True)) == expected

    @pytest.mark.parametrize("labeled", [None, [[0.0]], [[0.0], [1.0], [5.0]]])
    def test_no_other_place_is_left(self, labeled):
        features = torch.tensor([[0.0], [0.0], [1.0], [1.0], [5.0]])
        labeled = None if labeled is None else torch.tensor(labeled)
        pool = PoolOutputs(torch.full((5, 2), 0.5).double(), features=features, labeled_features=labeled)
        rows, scores = select_samples("k-centre", pool, 5)
        assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
        centres = [] if labeled is None else labeled.flatten().tolist()
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            x = features[row].item()
            assert score == min([abs(x - centre) for centre in centres], default=0.0)
            centres.append(x)

    def test_nothing_is_labeled(self, pool):
        """The seed selects the first sample, the distances the next."""
        firsts = set()
        for seed in range(20):
            rows, scores = select_samples("k-centre", replace(pool, labeled_features=None, seed=seed), 2)
            distances = torch.cdist(pool.features, pool.features[rows[:1]]).flatten()
            assert rows[1] == distances.argmax() and scores[1] == pytest.approx(distances.max().item())
            assert scores[0] == 0
            firsts.add(int(rows[0]))
        assert len(firsts) > 3


class TestBadge:
    def test_score_is_the_length_of_the_gradient(self, pool):
        """That of the cross-entropy with the likeliest label, at the last layer's weights."""
        last = nn.Linear(3, 4).double()
        logits = last(pool.features)
        rows, scores = select_samples("badge", replace(pool, probabilities=logits.softmax(dim=1).detach()), 12)
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            loss = nn.functional.cross_entropy(logits[row], logits[row].argmax())
            (gradient,) = torch.autograd.grad(loss, last.weight, retain_graph=True)
            assert score == pytest.approx(gradient.norm().item())

    @pytest.mark.parametrize("seed", range(8))
    def test_spread_over_duplicates(self, seed):
        """Of 5 gradients, each of many samples, one each before any other."""
        kinds = torch.arange(100) % 5
        pool = PoolOutputs(randn(5, 3).mul(2).softmax(dim=1)[kinds], features=randn(5, 4, seed=1)[kinds] + 1, seed=seed)
        rows, _ = select_samples("badge", pool, 8)
        assert sorted(kinds[rows[:5]].tolist()) == [0, 1, 2, 3, 4]
        assert len({*rows.tolist()}) == 8

    def test_opposite_gradients_are_different(self):
        """Features and uncertainty alone do not separate these."""
        p = torch.tensor([[0.6, 0.4]] * 20 + [[0.4, 0.6]] * 20).double()
        for seed in range(5):
            rows, _ = select_samples("badge", PoolOutputs(p, features=torch.ones(40, 3), seed=seed), 2)
            assert sorted((rows >= 20).tolist()) == [False, True]

    def test_sure_samples_come_last(self):
        p = torch.tensor([[1.0, 0.0]] * 30 + [[0.6, 0.4], [0.3, 0.7]]).double()
        rows, _ = select_samples("badge", PoolOutputs(p, features=randn(32, 3)), 3)
        assert {30, 31} <= {*rows.tolist()}

    def test_too_large(self, pool, monkeypatch):
        monkeypatch.setattr(acquisition, "_LARGEST", 143)
        with pytest.raises(InputError, match="must be at most 143, got 144: 12 samples, 4 classes and 3 features"):
            select_samples("badge", pool, 2)


def test_random(pool):
    many = PoolOutputs(torch.full((1000, 2), 0.5).double())
    selected = [select_samples("random", replace(many, seed=seed), 100).rows for seed in range(50)]
    assert len({tuple(rows.tolist()) for rows in selected}) == 50
    counts = torch.cat(selected).div(100, rounding_mode="floor").bincount(minlength=10)
    assert counts.sum() == 5000 and (counts - 500).abs().max() < 5 * math.sqrt(450)
    # the next round of the same seed selects other samples
    smaller = select_samples("random", PoolOutputs(many.probabilities[:-1]), 100).rows
    assert len({*smaller.tolist()} & {*selected[0].tolist()}) < 30


@pytest.mark.parametrize(
    ("strategy", "n", "seed", "message"),
    [
        ("margins", 1, 0, "strategy must be one of least-confidence, margin, .*, got 'margins'"),
        ("margin", 0, 0, "n must be at least 1, got 0"),
        ("margin", 13, 0, "n must be at most 12, the number of samples without a label, got 13"),
        ("random", 1, -1, "seed must lie in 0 ... 4294967295, got -1"),
        ("badge", 1, 2**32, "seed must lie in 0 ... 4294967295, got 4294967296"),
    ],
)
def test_bad_input(pool, strategy, n, seed, message):
    with pytest.raises(InputError, match=message):
        select_samples(strategy, replace(pool, seed=seed), n)


def test_missing_package(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "skactiveml.pool", None)
    for strategy in ("least-confidence", "margin", "entropy", "bald", "k-centre"):
        with pytest.raises(InputError, match=r"needs scikit-activeml: pip install 'kd-lightning\[weak\]'"):
            select_samples(strategy, pool, 2)
    for strategy in ("badge", "disagreement", "random"):
        select_samples(strategy, pool, 2)


def test_one_class():
    with pytest.raises(InputError, match=r"probabilities must have at least 2 classes, got shape \[3, 1\]"):
        select_samples("margin", PoolOutputs(torch.ones(3, 1).double()), 1)
