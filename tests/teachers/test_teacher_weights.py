"""weighted_choice: how often each number comes, and independence of neighbouring keys."""

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency

from kd_lightning.teachers.teacher_weights import weighted_choice


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.3, 0.5], [0.7, 0.0, 0.3], [0.0, 1 / 3, 2 / 3, 0.0]])
@pytest.mark.parametrize("key", [lambda i: (7, i), lambda i: (i, 0), lambda i: (7, 3, i), lambda i: (7, i, 3)])
def test_frequencies(weights, key):
    counts = np.bincount([weighted_choice(key(i), weights) for i in range(4000)], minlength=len(weights))
    expected = 4000 * np.array(weights)
    assert (counts[expected == 0] == 0).all()
    gap = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert gap < chi2.ppf(0.999, (expected > 0).sum() - 1)


def test_follows_from_the_key():
    weights = [0.25, 0.25, 0.5]
    sampled = {
        key: weighted_choice(key, weights) for key in [(1, 2), (2, 1), (0, 0), (2**32 - 1, 2**40), (1, 2, 3), (-1, 5)]
    }
    assert sampled == {key: weighted_choice(list(key), weights) for key in reversed(sampled)}
    assert weighted_choice((5,), [1.0]) == 0
    assert {weighted_choice((i,), [1e-12, 1.0]) for i in range(100)} == {1}


@pytest.mark.parametrize(
    "neighbour",
    [
        lambda s, e, i: (s + 1, e, i),
        lambda s, e, i: (s, e + 1, i),
        lambda s, e, i: (s, e, i + 1),
        lambda s, e, i: (s, i),
    ],
    ids=["seed", "epoch", "index", "step"],
)
def test_neighbours_are_independent(neighbour):
    table, weights = np.zeros((3, 3)), [0.2, 0.3, 0.5]
    for i in range(3000):
        table[weighted_choice((1, 0, i), weights), weighted_choice(neighbour(1, 0, i), weights)] += 1
    assert chi2_contingency(table).pvalue > 1e-3
