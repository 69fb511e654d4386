"""Query strategies of active learning: score an unlabeled pool and select the samples to label next."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.active import several_labels
from kd_lightning.errors import InputError

_LARGEST = 2**31  # largest number of elements in BADGE's gradients: 8 GB
_OF_LIBRARY = {"least-confidence", "margin", "entropy", "bald"}
"""Strategies that need scikit-activeml, except for several labels a sample."""


@dataclass(frozen=True)
class PoolOutputs:
    """Network outputs for the N samples of an unlabeled pool. A strategy needs only some of them.

    Attributes:
        probabilities: The student's probabilities, (N, C) float64.
        features: The student's features, the input of its last layer, (N, D).
        member_probabilities: The probabilities of K networks, or of K passes with dropout, (K, N, C) float64.
        teacher_probabilities: The teacher's probabilities, (N, C) float64.
        labeled_features: The features of the M labeled samples, (M, D).
        seed: Seed of a strategy's random numbers, from 0 to 2**32 - 1.
        multilabel: Whether a sample has several labels. Probabilities are then those that each of L labels is 1, and L
            stands in the place of C. Default: False.
    """

    probabilities: Tensor
    features: Tensor | None = None
    member_probabilities: Tensor | None = None
    teacher_probabilities: Tensor | None = None
    labeled_features: Tensor | None = None
    seed: int = 0
    multilabel: bool = False


class SelectedSamples(NamedTuple):
    """The selected rows of the pool, (n,), in the order of their selection, and their scores, (n,) float64."""

    rows: Tensor
    scores: Tensor


Strategy = Callable[[PoolOutputs, int], SelectedSamples]


def select_samples(strategy: str, pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples to label next.

    Args:
        strategy: A name of ``STRATEGIES``.
        pool: The outputs for the pool.
        n: Number of samples, from 1 to the size of the pool. No sample is selected twice.

    Raises:
        InputError: If the strategy is unknown, ``n`` or the seed is out of range, there are fewer than 2 classes, or a
            package is missing.

    >>> pool = PoolOutputs(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]).double())
    >>> select_samples("least-confidence", pool, 2)
    SelectedSamples(rows=tensor([1, 2]), scores=tensor([0.4000, 0.2000], dtype=torch.float64))
    """
    check_strategy(strategy, pool.seed)
    size = len(pool.probabilities)
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    if n > size:
        raise InputError(f"n must be at most {size}, the number of samples without a label, got {n}")
    if pool.probabilities.shape[1] < 2 and not pool.multilabel:
        raise InputError(f"probabilities must have at least 2 classes, got shape {[*pool.probabilities.shape]}")
    return STRATEGIES[strategy](pool, n)


def check_strategy(strategy: str, seed: int) -> None:
    """Raise InputError if the strategy is unknown or the seed is out of range."""
    if strategy not in STRATEGIES:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0 ... {2**32 - 1}, got {seed}")


def check_installed(strategy: str, *, multilabel: bool = False) -> None:
    """Raise InputError if the strategy needs a package that is not installed. Call it before what takes long."""
    if strategy == "k-centre" or (strategy in _OF_LIBRARY and not multilabel):
        _library()


def least_confidence(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples with the lowest largest probability. Score: 1 - max p.

    With several labels, p is the probability of a set of labels, see
    :func:`~kd_lightning.active.several_labels.least_confidence`.
    """
    if pool.multilabel:
        return _highest(several_labels.least_confidence(pool.probabilities), n)
    return _uncertain(pool, n, "least_confident")


def margin(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples with the smallest margin between the two most probable classes. Score: 1 - (p_1 - p_2).

    With several labels, it is that between 0 and 1 of the least certain label, see
    :func:`~kd_lightning.active.several_labels.margin`.
    """
    if pool.multilabel:
        return _highest(several_labels.margin(pool.probabilities), n)
    return _uncertain(pool, n, "margin_sampling")


def entropy(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples with the highest entropy. Score: -sum p log p, in nats. With several labels: their sum."""
    if pool.multilabel:
        return _highest(several_labels.entropy(pool.probabilities), n)
    return _uncertain(pool, n, "entropy")


def bald(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples with the highest mutual information of label and network (Houlsby et al. 2011).

    Score: the entropy of the members' mean probabilities minus the mean of the members' entropies, in nats. It is 0
    if all members agree. Each sample is scored alone, unlike in BatchBALD. With several labels, it is the sum of those
    of each label.

    Source: https://arxiv.org/abs/1112.5745
    """
    assert pool.member_probabilities is not None
    if pool.multilabel:
        return _highest(several_labels.bald(pool.member_probabilities), n)
    members = pool.member_probabilities.numpy().copy()  # the library changes its input
    scores = _library().batch_bald(members, batch_size=1, eps=np.finfo(np.float64).tiny, random_state=0)[0]
    return _highest(torch.from_numpy(scores).clamp(min=0), n)  # rounding may make it negative


def k_centre(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select greedily the sample farthest from all labeled and selected samples (Sener and Savarese 2018).

    Score: the Euclidean distance of the features to the nearest of those samples. The seed decides between equal
    distances, and selects the first sample if nothing is labeled.

    Source: https://arxiv.org/abs/1708.00489
    """
    assert pool.features is not None
    size, labeled = len(pool.features), pool.labeled_features
    points = pool.features if labeled is None else torch.cat([pool.features, labeled])
    y = np.zeros(len(points))
    y[:size] = np.nan  # the library's mark of unlabeled samples
    candidates = np.arange(size)
    rows, distances = _library().k_greedy_center(
        points.double().numpy(), y, batch_size=n, random_state=pool.seed, mapping=candidates
    )
    scores = distances[np.arange(n), rows]
    # distances never rise, but the library treats them as unknown once all are 0; without labels the first has none
    first = int(labeled is None)
    scores[first:] = np.minimum.accumulate(scores[first:])
    return SelectedSamples(torch.from_numpy(rows), torch.from_numpy(scores))


def badge(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select a diverse batch of uncertain samples by their gradients (BADGE, Ash et al. 2020).

    The gradient of a sample is that of the cross-entropy with its most probable class, at the last layer's weights:
    (p - onehot(argmax p)) times the features. With several labels, it is that of the binary cross-entropy with the
    likelier value of each label. The selected samples are the seeds of k-means++ on the gradients
    (scikit-learn's, which tries a few candidates for each seed). Score: the norm of the gradient. If k-means++ selects
    a sample twice, because no other gradients are left, the sample with the largest norm takes its place.

    Source: https://arxiv.org/abs/1906.03671
    """
    assert pool.features is not None
    p, features = pool.probabilities, pool.features
    if (size := p.numel() * features.shape[1]) > _LARGEST:
        shape = f"{len(p)} samples, {p.shape[1]} classes and {features.shape[1]} features"
        raise InputError(f"badge: samples x classes x features must be at most {_LARGEST}, got {size}: {shape}")
    likeliest = several_labels.likeliest(p) if pool.multilabel else F.one_hot(p.argmax(dim=1), p.shape[1])
    at_logits = p - likeliest
    gradients = (at_logits.float().unsqueeze(2) * features.float().unsqueeze(1)).flatten(1)
    from sklearn.cluster import kmeans_plusplus  # imported late, since it takes half a second

    _, seeds = kmeans_plusplus(gradients.numpy(), n, random_state=pool.seed)
    lengths = at_logits.norm(dim=1) * features.double().norm(dim=1)
    rows = torch.tensor([*dict.fromkeys([*seeds.tolist(), *_highest(lengths, len(p)).rows.tolist()])][:n])
    return SelectedSamples(rows, lengths[rows])


def disagreement(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select the samples on which the student differs most from the teacher. Score: KL(teacher || student), in nats.

    With several labels, it is the sum of those of each label.
    """
    assert pool.teacher_probabilities is not None
    if pool.multilabel:
        return _highest(several_labels.disagreement(pool.probabilities, pool.teacher_probabilities), n)
    from scipy.special import rel_entr

    divergence = rel_entr(pool.teacher_probabilities.numpy(), pool.probabilities.numpy()).sum(axis=1)
    return _highest(torch.from_numpy(divergence), n)


def random(pool: PoolOutputs, n: int) -> SelectedSamples:
    """Select random samples. Score: a uniform random number.

    The pool's size is part of the seed, so that rounds are independent.
    """
    size = len(pool.probabilities)
    return _highest(torch.from_numpy(np.random.default_rng([pool.seed, size]).random(size)), n)


STRATEGIES: dict[str, Strategy] = {
    "least-confidence": least_confidence,
    "margin": margin,
    "entropy": entropy,
    "bald": bald,
    "k-centre": k_centre,
    "badge": badge,
    "disagreement": disagreement,
    "random": random,
}
"""The strategies by name."""


def _uncertain(pool: PoolOutputs, n: int, method: str) -> SelectedSamples:
    scores = _library().uncertainty_scores(pool.probabilities.numpy(), method=method)
    return _highest(torch.from_numpy(scores), n)


def _highest(scores: Tensor, n: int) -> SelectedSamples:
    """Return the rows with the highest scores; between equal scores, the first."""
    rows = scores.argsort(descending=True, stable=True)[:n]
    return SelectedSamples(rows, scores[rows])


def _library() -> Any:
    try:
        return importlib.import_module("skactiveml.pool")  # takes seconds
    except ImportError as error:
        raise InputError(f"this strategy needs scikit-activeml: pip install 'kd-lightning[weak]' ({error})") from error
