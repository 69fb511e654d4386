"""Label noise: the rates are as set, and the labels follow from the seed alone."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from kd_lightning import InputError, PairNoise, SymmetricNoise, TransitionNoise
from kd_lightning.data.splits import make_split

SKEWED = [[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
TRUTH = torch.arange(3).repeat(6000)


def independent_matrix(name, rate, classes):
    """Of the definitions, entry by entry."""
    matrix = np.zeros((classes, classes))
    for true in range(classes):
        for seen in range(classes):
            if name == "symmetric":
                matrix[true, seen] = 1 - rate if seen == true else rate / (classes - 1)
            else:
                matrix[true, seen] = (1 - rate) * (seen == true) + rate * (seen == (true + 1) % classes)
    return matrix


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_matrices(classes, rate):
    for name, noise in (("symmetric", SymmetricNoise(rate)), ("pair", PairNoise(rate))):
        matrix = noise.matrix(classes)
        np.testing.assert_allclose(matrix, independent_matrix(name, rate, classes), atol=1e-15)
        assert matrix.dtype == torch.float64
    assert torch.equal(TransitionNoise(SKEWED).matrix(3), torch.tensor(SKEWED, dtype=torch.float64))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("noise", [SymmetricNoise(0.4), PairNoise(0.4), TransitionNoise(SKEWED)])
def test_rates_of_each_class(noise, seed):
    sampled = noise.sample(TRUTH, 3, seed)
    for number, row in enumerate(noise.matrix(3).numpy()):
        counts = np.bincount(sampled[number == TRUTH], minlength=3)
        assert (counts[row == 0] == 0).all()
        if (row > 0).sum() > 1:
            assert chisquare(counts[row > 0], row[row > 0] * counts.sum()).pvalue > 0.001


def test_extreme_rates():
    for noise in (SymmetricNoise, PairNoise):
        assert torch.equal(noise(0.0).sample(TRUTH, 3, 0), TRUTH)
        assert (noise(1.0).sample(TRUTH, 3, 0) != TRUTH).all()
    assert torch.equal(PairNoise(1.0).sample(TRUTH, 3, 0), (TRUTH + 1) % 3)


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 1), (0.5, 2), (1 - 1e-7, 3)])
def test_never_what_has_no_probability(chance, expected, monkeypatch):
    """Though the row falls short of 1 by what is tolerated."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, chance, dtype=torch.float64))
    row = [0.0] + [1 / 3 - 3e-7] * 3 + [0.0]
    sampled = TransitionNoise([row] * 5).sample(torch.tensor([0, 4]), 5, 0)
    assert sampled.tolist() == [expected] * 2


def test_labels_follow_from_seed_and_position():
    noise, other = SymmetricNoise(0.4), TRUTH.clone()
    sampled = noise.sample(TRUTH, 3, 5)
    assert torch.equal(sampled, noise.sample(TRUTH, 3, 5))
    assert torch.equal(sampled[:100], noise.sample(TRUTH[:100], 3, 5))
    assert not torch.equal(sampled, noise.sample(TRUTH, 3, 6))
    other[::2] = 2  # the classes of other samples do not matter
    assert torch.equal(sampled[1::2], noise.sample(other, 3, 5)[1::2])
    state = torch.get_rng_state()
    noise.sample(TRUTH, 3, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_more_noise_includes_less_noise():
    less, more = (PairNoise(rate).sample(TRUTH, 3, 0) for rate in (0.2, 0.6))
    assert (more != TRUTH)[(less != TRUTH) & (TRUTH < 2)].all()


def test_is_independent_of_the_split_of_the_same_seed():
    """A small labeled set has the same noise rate as all labels."""
    truth = torch.arange(10).repeat(12)
    wrong = sum(
        int((SymmetricNoise(0.4).sample(truth, 10, seed) != truth)[make_split(truth, 1, 0.1, seed).labeled].sum())
        for seed in range(300)
    )
    assert binomtest(wrong, 3000, 0.4).pvalue > 0.001


def test_labels_that_the_source_lacks_stay():
    assert SymmetricNoise(1.0).sample(torch.tensor([-100, 1, -1]), 2, 0).tolist() == [-100, 0, -1]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("noise", [SymmetricNoise, PairNoise])
def test_rate_out_of_range(noise, rate):
    with pytest.raises(InputError, match=rf"rate must lie in \[0, 1\], got {rate}"):
        noise(rate)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5], [0.6, 0.5]], "transition: row 1 must sum to 1, got 1.1"),
        ([[1.0, 0.0], [1.0]], "transition must be square, but row 1 of 2 has 1 entries"),
        ([[1.0, 0.0], [1.5, -0.5]], "transition: row 1 must hold probabilities"),
        ([[1.0]], "transition must have at least 2 classes"),
    ],
)
def test_invalid_matrix(matrix, message):
    with pytest.raises(InputError, match=message):
        TransitionNoise(matrix)


def test_matrix_of_other_classes():
    with pytest.raises(InputError, match="transition must have one row per class, 10, got 3"):
        TransitionNoise(SKEWED).sample(TRUTH, 10, 0)
