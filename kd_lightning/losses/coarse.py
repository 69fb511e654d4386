"""Learning fine classes from coarse labels (partial-label learning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, at_least_float32, check_reduction, check_target, reduce_rows


def coarse_rows(logits: Tensor, candidates: Tensor) -> Tensor:
    r"""Return the negative log-probability of each row's candidates, in nats: :math:`-\log \sum_{c \in S} p_c`.

    Args:
        logits: (B, C).
        candidates: S, (B, C) booleans; at least one is True in each row.

    Returns:
        (B,), in at least float32.
    """
    logits = at_least_float32(logits)
    logits = logits - logits.detach().amax(dim=1, keepdim=True)  # so that no difference of large numbers is rounded
    return logits.logsumexp(dim=1) - logits.masked_fill(~candidates, -torch.inf).logsumexp(dim=1)


def mask_candidates(logits: Tensor, candidates: Tensor | None) -> Tensor:
    """Set logits (B, C) to -inf outside a row's candidates (B, C); rows without candidates stay unchanged."""
    if candidates is None:
        return logits
    return logits.masked_fill(~candidates & candidates.any(dim=1, keepdim=True), -torch.inf)


def group_members(groups: list[list[int]], classes: int) -> Tensor:
    """Return booleans (G, C): which of the C classes each of the G groups holds.

    Raises:
        InputError: If a class is not in exactly one group; the message has the class.
    """
    members = torch.zeros(len(groups), classes, dtype=torch.bool)
    seen: set[int] = set()
    for number, group in enumerate(groups):
        for entry in group:
            if not 0 <= entry < classes:
                raise InputError(f"groups: group {number} holds class {entry}, but the classes are 0 ... {classes - 1}")
            if entry in seen:
                raise InputError(f"groups: class {entry} is in more than one place, or twice in group {number}")
            seen.add(entry)
        members[number, group] = True
        if not group:
            raise InputError(f"groups: group {number} is empty")
    if left_out := (~members.any(dim=0)).nonzero().flatten().tolist():
        raise InputError(f"groups: class {left_out[0]} is in no group")
    return members


class CoarseLoss(nn.Module):
    r"""Negative log-probability of the group of classes that a coarse label stands for.

    .. math:: -\log \sum_{c \in S} p_c = \log \sum_c e^{z_c} - \log \sum_{c \in S} e^{z_c}

    in nats. For a group of one class it is cross-entropy, for the group of all classes it is 0. The loss does not
    separate the classes within a group; samples with fine labels must do so.

    Source: Jin, Ghahramani, "Learning with Multiple Labels" (2002), which minimises the same quantity by
    expectation-maximisation.

    Args:
        groups: The classes of each group. Each class is in exactly one group.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) integers, the position of the label's group in ``groups``.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If a class is in no group or in several, or if shapes or targets do not fit.

    >>> loss = CoarseLoss([[0, 1], [2]])
    >>> loss(torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([0])).exp()
    tensor(2.)
    """

    def __init__(self, groups: list[list[int]], reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.groups = [list(group) for group in groups]
        members = group_members(self.groups, max((entry for group in groups for entry in group), default=0) + 1)
        self.register_buffer("members", members, persistent=False)
        self.members: Tensor
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_target(logits, target, len(self.members))
        if logits.shape[1] != self.members.shape[1]:
            raise InputError(f"groups must have {logits.shape[1]} classes, as the logits, got {self.members.shape[1]}")
        candidates = self.members.index_select(0, target.long())
        return reduce_rows(coarse_rows(logits, candidates), self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"groups={self.groups}, reduction={self.reduction!r}"
