"""Active learning: which samples of a pool without labels to label next."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lightning.errors import InputError

_LARGEST = 2**31  # numbers that BADGE may hold: 8 GB


@dataclass(frozen=True)
class Pool:
    """What is known of N samples without a label; what a strategy does not look at may be missing.

    Attributes:
        probabilities: What the student says, (N, C) float64.
        features: The student's features, what goes into its last layer, (N, D).
        answers: The probabilities of K networks, or of K passes with dropout, (K, N, C) float64.
        teacher: What the teacher says, (N, C) float64.
        labeled_features: The features of the M samples that have a label, (M, D).
        seed: Of what a strategy draws, from 0 to 2**32 - 1.
    """

    probabilities: Tensor
    features: Tensor | None = None
    answers: Tensor | None = None
    teacher: Tensor | None = None
    labeled_features: Tensor | None = None
    seed: int = 0


class Picks(NamedTuple):
    """The rows to label, (n,), in the order of picking, and the score that each was picked for, (n,) float64."""

    rows: Tensor
    scores: Tensor


Strategy = Callable[[Pool, int], Picks]


def pick(strategy: str, pool: Pool, n: int) -> Picks:
    """Choose what to label next.

    Args:
        strategy: A name of ``STRATEGIES``.
        pool: What is known of the samples.
        n: How many; none is picked twice.

    Raises:
        InputError: For an unknown strategy, less than one query, more than there are samples, a seed out of range,
            and a missing package.

    >>> pool = Pool(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]).double())
    >>> pick("least-confidence", pool, 2)
    Picks(rows=tensor([1, 2]), scores=tensor([0.4000, 0.2000], dtype=torch.float64))
    """
    check_strategy(strategy, pool.seed)
    size = len(pool.probabilities)
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    if n > size:
        raise InputError(f"n: {n} samples to label asked for, but only {size} without a label are left")
    if pool.probabilities.shape[1] < 2:
        raise InputError(f"probabilities must be of at least 2 classes, got {[*pool.probabilities.shape]}")
    return STRATEGIES[strategy](pool, n)


def check_strategy(strategy: str, seed: int) -> None:
    """Raise InputError unless it is the name of one, and the seed in range."""
    if strategy not in STRATEGIES:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0 ... {2**32 - 1}, got {seed}")


def least_confidence(pool: Pool, n: int) -> Picks:
    """Those whose class is least certain: 1 - max p."""
    return _uncertain(pool, n, "least_confident")


def margin(pool: Pool, n: int) -> Picks:
    """Those whose two most probable classes are nearest to each other: 1 - (p_1 - p_2)."""
    return _uncertain(pool, n, "margin_sampling")


def entropy(pool: Pool, n: int) -> Picks:
    """Those whose probabilities have the highest entropy, in nats."""
    return _uncertain(pool, n, "entropy")


def bald(pool: Pool, n: int) -> Picks:
    """Those of which the answers tell most about the network (Houlsby et al. 2011).

    That is the entropy of the mean answer less the mean entropy of the answers, in nats: 0 where all agree. Each
    sample is scored for itself, without BatchBALD's look at what was picked before.
    """
    assert pool.answers is not None
    answers = pool.answers.numpy().copy()  # the library changes what it is given
    scores = _library().batch_bald(answers, batch_size=1, eps=np.finfo(np.float64).tiny, random_state=0)[0]
    return _highest(torch.from_numpy(scores).clamp(min=0), n)  # rounding


def k_centre(pool: Pool, n: int) -> Picks:
    """Each the farthest from its nearest neighbor among labeled and earlier picked ones (Sener and Savarese 2018).

    The score is this Euclidean distance of features. Of equally far ones, and for the first of all where nothing is
    labeled, the seed decides.
    """
    assert pool.features is not None
    size, labeled = len(pool.features), pool.labeled_features
    points = pool.features if labeled is None else torch.cat([pool.features, labeled])
    y = np.zeros(len(points))
    y[:size] = np.nan  # how the library knows what has no label
    candidates = np.arange(size)
    rows, distances = _library().k_greedy_center(
        points.double().numpy(), y, batch_size=n, random_state=pool.seed, mapping=candidates
    )
    scores = distances[np.arange(n), rows]
    # they never rise, but the library takes distances for unknown once all are 0; without labels the first has none
    first = int(labeled is None)
    scores[first:] = np.minimum.accumulate(scores[first:])
    return Picks(torch.from_numpy(rows), torch.from_numpy(scores))


def badge(pool: Pool, n: int) -> Picks:
    """A diverse batch of uncertain ones, by the gradients that their likeliest labels would give (Ash et al. 2020).

    The gradient of the cross-entropy at the last layer's weights is (p - onehot(argmax p)) times the features. Picked
    are the seeds of k-means++ among them, by scikit-learn, which tries a few candidates for each. The score is the
    gradient's length. Where k-means++ comes back to a sample, for want of other gradients, the longest one follows.
    """
    assert pool.features is not None
    p, features = pool.probabilities, pool.features
    if (size := p.numel() * features.shape[1]) > _LARGEST:
        shape = f"{len(p)} samples, {p.shape[1]} classes and {features.shape[1]} features"
        raise InputError(f"badge holds samples x classes x features, at most {_LARGEST} numbers, got {size}: {shape}")
    at_logits = p - F.one_hot(p.argmax(dim=1), p.shape[1])
    gradients = (at_logits.float().unsqueeze(2) * features.float().unsqueeze(1)).flatten(1)
    from sklearn.cluster import kmeans_plusplus  # here, since it takes half a second

    _, seeds = kmeans_plusplus(gradients.numpy(), n, random_state=pool.seed)
    lengths = at_logits.norm(dim=1) * features.double().norm(dim=1)
    rows = torch.tensor([*dict.fromkeys([*seeds.tolist(), *_highest(lengths, len(p)).rows.tolist()])][:n])
    return Picks(rows, lengths[rows])


def disagreement(pool: Pool, n: int) -> Picks:
    """Those on which the student is farthest from the teacher: KL(teacher || student), in nats."""
    assert pool.teacher is not None
    from scipy.special import rel_entr

    divergence = rel_entr(pool.teacher.numpy(), pool.probabilities.numpy()).sum(axis=1)
    return _highest(torch.from_numpy(divergence), n)


def random(pool: Pool, n: int) -> Picks:
    """Any; the score is the number drawn. A pool of another size has another draw, so that rounds are independent."""
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
"""By name."""


def _uncertain(pool: Pool, n: int, method: str) -> Picks:
    scores = _library().uncertainty_scores(pool.probabilities.numpy(), method=method)
    return _highest(torch.from_numpy(scores), n)


def _highest(scores: Tensor, n: int) -> Picks:
    """The rows of the highest scores, of equal ones the first."""
    rows = scores.argsort(descending=True, stable=True)[:n]
    return Picks(rows, scores[rows])


def _library() -> Any:
    try:
        return importlib.import_module("skactiveml.pool")  # takes seconds
    except ImportError as error:
        raise InputError(f"this strategy needs scikit-activeml: pip install 'kd-lightning[weak]' ({error})") from error
