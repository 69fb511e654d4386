"""AdaptiveThresholds: FlexMatch's formula by hand, with its warm-up, and which predictions count."""

import pytest
import torch

from kd_lightning.pseudo_labels.selection.flexmatch import AdaptiveThresholds


def by_hand(last_classes, classes, threshold, pool):
    """tau * M(beta_c), M(beta) = beta / (2 - beta), beta_c = sigma_c / max(max sigma, N - sum sigma)."""
    sigma = [last_classes.count(c) for c in range(classes)]
    most = max(*sigma, pool - sum(sigma))
    return [threshold * (s / most) / (2 - s / most) for s in sigma]


@pytest.mark.parametrize("seed", range(5))
def test_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)
    thresholds, last_class = AdaptiveThresholds(0.95, pool=30, samples=40), {}
    for _ in range(8):
        index = 10 + torch.randperm(30, generator=generator)[:7]
        label = torch.randint(-1, 5, (7,), generator=generator)
        thresholds.update(index, label)
        last_class |= {int(i): int(c) for i, c in zip(index, label, strict=True) if c >= 0}
        expected = by_hand(list(last_class.values()), 5, 0.95, 30)
        assert thresholds(5).tolist() == pytest.approx(expected, rel=1e-6)


def test_none_at_first():
    assert AdaptiveThresholds(0.9, pool=3, samples=3)(4).tolist() == [0.0] * 4


def test_best_learned_class_has_the_whole_threshold():
    thresholds = AdaptiveThresholds(0.9, pool=4, samples=4)
    thresholds.update(torch.arange(4), torch.tensor([2, 2, 0, 1]))
    assert thresholds(4).tolist() == pytest.approx([0.9 * 0.5 / 1.5, 0.9 * 0.5 / 1.5, 0.9, 0.0])


def test_last_confident_class_counts():
    thresholds = AdaptiveThresholds(0.9, pool=2, samples=5)
    for label in ([0, 1], [1, -1]):
        thresholds.update(torch.tensor([3, 4]), torch.tensor(label))
    assert thresholds.last_class.tolist() == [-1, -1, -1, 1, 1]


def test_is_in_no_state_dict():
    """The module saves it apart, so that a checkpoint loads without it."""
    assert not AdaptiveThresholds(0.9, pool=2, samples=5).state_dict()
