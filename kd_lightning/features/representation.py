"""How good the features of a backbone are: figures that need few labels, or none."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 20
TEMPERATURE = 0.07
_EPSILON = 1e-7
_PENALTIES = tuple(10.0**power for power in range(-4, 3))


def knn_accuracy(features: Tensor, y: Tensor, k: int = NEIGHBORS, temperature: float = TEMPERATURE) -> float:
    r"""Return the accuracy of a weighted vote of the k nearest neighbours, each sample by all others.

    Each neighbour votes for its class with the weight :math:`\exp(s / \tau)` of its cosine similarity :math:`s`.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018),
    https://arxiv.org/abs/1805.01978, section 3.4 (with 200 neighbours); with 20 in Caron et al., "Emerging Properties
    in Self-Supervised Vision Transformers" (2021), https://arxiv.org/abs/2104.14294.

    Args:
        features: (N, D), N at least 2.
        y: Classes (N,).
        k: Number of neighbours; at most N - 1 count.
        temperature: The temperature, above 0.
    """
    votes = features.new_zeros(len(y), int(y.max()) + 1, dtype=torch.double)
    similarity, nearest = _nearest(features, k)
    weights = (similarity / temperature).exp()
    votes.scatter_add_(1, y[nearest], weights)
    return float((votes.argmax(dim=1) == y).double().mean())


def probe_accuracy(features: Tensor, y: Tensor) -> float:
    r"""Return the accuracy of a linear probe, each sample by a probe that is trained on all others.

    The probe is a ridge regression on standardised features, with an intercept, to one column of zeros and ones for
    each class. Leaving one sample out has a closed form: the residual is divided by :math:`1 - h_{ii}` with the hat
    matrix :math:`H`. The penalty, of 1e-4 to 100 times N, is that of the smallest squared error of these residuals.
    Features that are equal in all samples do not count.

    Source: Alain, Bengio, "Understanding intermediate layers using linear classifier probes" (2016),
    https://arxiv.org/abs/1610.01644; the closed form is Allen's PRESS statistic (1974).

    Args:
        features: (N, D), N at least 3.
        y: Classes (N,), at least two of them.
    """
    x = features.double()
    deviation = x.std(dim=0, correction=0)
    is_constant = deviation <= 1e-10 * x.abs().amax(dim=0)
    x = ((x - x.mean(dim=0)) / deviation)[:, ~is_constant]
    classes, labels = torch.unique(y, return_inverse=True)
    targets = F.one_hot(labels, len(classes)).double()
    centred, n = targets - targets.mean(dim=0), len(x)
    # X X' = U diag(s) U'; of fewer features than samples by the smaller matrix X' X
    if x.shape[1] < n:
        values, vectors = torch.linalg.eigh(x.T @ x)
        is_used = values > values.amax().clamp_min(1e-300) * 1e-12 if len(values) else values > 0
        values = values[is_used]
        u = x @ vectors[:, is_used] / values.sqrt()
    else:
        values, u = torch.linalg.eigh(x @ x.T)
        values = values.clamp_min(0)
    projected, best = u.T @ centred, (math.inf, 0.0)
    for penalty in _PENALTIES:
        shrunk = values / (values + penalty * n)
        leverage = (u.square() @ shrunk + 1 / n).clamp_max(1 - 1e-9)
        residuals = (centred - u @ (shrunk.unsqueeze(1) * projected)) / (1 - leverage).unsqueeze(1)
        right = (targets - residuals).argmax(dim=1) == labels
        best = min(best, (float(residuals.square().mean()), float(right.double().mean())), key=lambda found: found[0])
    return best[1]


def rankme(features: Tensor) -> float:
    r"""Return the effective rank of features: of how many dimensions they make use, from 1 to min(N, D).

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \frac{\sigma_k}{\lVert\sigma\rVert_1} + 10^{-7}

    for the singular values :math:`\sigma` of the features. A collapsed backbone has an effective rank near 1.

    Source: Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations
    by their rank" (2023), https://arxiv.org/abs/2210.02885, equation 1.

    Args:
        features: (N, D).
    """
    x = features.double()
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-300) + _EPSILON
    return float((-(shares * shares.log()).sum()).exp())


def neighbor_agreement(features: Tensor, teacher: Tensor, k: int = NEIGHBORS) -> float:
    """Return which share of a sample's k nearest neighbours, by cosine similarity, are the teacher's, too; the mean.

    Args:
        features: The student's features (N, D), N at least 2.
        teacher: The teacher's (N, E).
        k: Number of neighbours; at most N - 1 count. Of random neighbours, the share is k / (N - 1).
    """
    (_, own), (_, other) = _nearest(features, k), _nearest(teacher, k)
    is_neighbor = torch.zeros(len(own), len(own), dtype=torch.bool).scatter_(1, other, True)
    return float(is_neighbor.gather(1, own).double().mean())


def _nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarity and number of each sample's k nearest others, (N, k)."""
    x = F.normalize(features.double(), dim=1)
    similarity = x @ x.T
    similarity.fill_diagonal_(-math.inf)
    found, order = similarity.topk(min(k, len(x) - 1), dim=1)
    return found, order
