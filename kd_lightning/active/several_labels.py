"""Scores of query strategies where a sample has several labels, each of which is 0 or 1.

The labels of a sample are independent given a network: the probability of a set of labels is the product of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def least_confidence(p: Tensor) -> Tensor:
    """Return 1 - prod max(p, 1 - p), (N,): the probability that the likeliest set of labels is not the true one.

    Args:
        p: Probability that each label is 1, (N, L) float64.
    """
    return 1 - torch.maximum(p, 1 - p).prod(dim=1)


def margin(p: Tensor) -> Tensor:
    """Return 1 - min abs(2p - 1), (N,): the uncertainty of the least certain label ("binary minimum", Brinker 2006).

    Source: https://doi.org/10.1007/3-540-31314-1_24

    Args:
        p: Probability that each label is 1, (N, L) float64.
    """
    return 1 - (2 * p - 1).abs().amin(dim=1)


def entropy(p: Tensor) -> Tensor:
    """Return the sum of the labels' entropies in nats, (N,): the entropy of the set of labels.

    Args:
        p: Probability that each label is 1, (N, L) float64.
    """
    return _entropies(p).sum(dim=1)


def bald(members: Tensor) -> Tensor:
    """Return the sum over labels of the mutual information of label and network in nats, (N,).

    Each label is scored alone; the sum counts twice what two labels say about the network alike.

    Args:
        members: Probabilities of K networks, (K, N, L) float64.
    """
    information = _entropies(members.mean(dim=0)) - _entropies(members).mean(dim=0)
    return information.clamp(min=0).sum(dim=1)  # rounding may make it negative


def disagreement(p: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of the sets of labels in nats, (N,): the sum of that of each label.

    Probabilities are at least 1.1e-16 away from 0 and 1, which the sigmoid of a large logit is rounded to.

    Args:
        p: The student's probabilities, (N, L) float64.
        teacher: The teacher's probabilities, (N, L) float64.
    """
    from scipy.special import rel_entr

    least = torch.finfo(torch.float64).eps / 2
    p, teacher = p.clamp(least, 1 - least), teacher.clamp(least, 1 - least)
    one, zero = rel_entr(teacher.numpy(), p.numpy()), rel_entr((1 - teacher).numpy(), (1 - p).numpy())
    total: Tensor = torch.from_numpy((one + zero).sum(axis=1))
    return total


def likeliest(p: Tensor) -> Tensor:
    """Return the likelier value of each label, zeros and ones (N, L)."""
    return (p > 0.5).to(p)


def _entropies(p: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropies
