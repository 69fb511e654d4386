"""One round of labels for the unlabeled pool."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import InputError


@dataclass
class PseudoLabels:
    """One round of labels for the pool, ordered by index.

    Attributes:
        index: Indices of the samples, (N,) integers, ascending.
        label: Most probable class of each sample, (N,) integers.
        confidence: Probability of that class, (N,) float32.
        accepted: Whether training may use the label, (N,) booleans.
        changed: Whether the label differs from that of the previous round, (N,) booleans.
        round: Number of the round, from 0.
        epoch: Epoch at whose start the round was made; ``max_epochs`` for the round after training.
        soft: Probabilities to train on instead of the label, (N, C). None for hard labels.
    """

    index: Tensor
    label: Tensor
    confidence: Tensor
    accepted: Tensor
    changed: Tensor
    round: int
    epoch: int
    soft: Tensor | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of all fields, to compare the rounds of two processes."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            digest.update(field.name.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """All fields by name, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PseudoLabelStore(Protocol):
    """The methods of a datamodule that :class:`~kd_lightning.PseudoLabelRefresh` needs."""

    def pool_dataloader(self) -> Any:
        """Loader of this process's share of labeled and unlabeled training images, under evaluation transforms.

        Its ``Batch`` objects have ``index`` and ``y``. Unlabeled images have y = -100; these get pseudo-labels. The
        shares of all processes cover every image; an image that comes twice counts once.
        """

    def set_pseudo_labels(self, labels: PseudoLabels) -> None:
        """Replace all pseudo-labels; later training batches hold the accepted ones."""


def make_pseudo_labels(
    probabilities: Tensor,
    index: Tensor,
    *,
    threshold: float | None = None,
    top_k_per_class: int | None = None,
    soft: bool = False,
    sharpen: float = 1.0,
    previous: PseudoLabels | None = None,
    epoch: int = 0,
) -> PseudoLabels:
    """Make one round of pseudo-labels from probabilities.

    Uniform probabilities are never accepted: they belong to no class.

    Args:
        probabilities: Class probabilities of the pool, (N, C).
        index: Indices of the samples, (N,).
        threshold: Accept labels of at least this probability, in (0, 1]. Default: None, which means all.
        top_k_per_class: Of these, accept the k most probable of each class, k at least 1. Default: None, which means
            all.
        soft: Whether the round has probabilities, too.
        sharpen: Temperature T of these, above 0: p^(1/T), scaled to sum 1 (MixMatch, Berthelot et al. 2019).
        previous: The previous round of the same samples. Default: None, which means that this is the first.
        epoch: Epoch at whose start the round is made.

    Returns:
        The round, ordered by index.

    >>> table = make_pseudo_labels(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([7, 3]), threshold=0.8)
    >>> table.index.tolist(), table.label.tolist(), table.accepted.tolist()
    ([3, 7], [1, 0], [False, True])
    """
    index, order = index.sort()
    probabilities = probabilities[order].float()
    confidence, label = probabilities.max(dim=1)
    accepted = confidence > 1 / probabilities.shape[1] + 1e-6  # above uniform
    if threshold is not None:
        accepted &= confidence >= threshold
    if top_k_per_class is not None:
        for number in range(probabilities.shape[1]):
            members = (accepted & (label == number)).nonzero().flatten()
            # stable: of equally probable ones the first by index are accepted, on every machine
            ranked = confidence[members].argsort(descending=True, stable=True)
            accepted[members[ranked[top_k_per_class:]]] = False
    changed = torch.zeros_like(accepted) if previous is None else label != previous.label
    sharpened = None
    if soft:
        # in log space: high powers of small probabilities underflow to 0
        sharpened = (probabilities.clamp_min(1e-30).log() / sharpen).softmax(dim=1)
    number = 0 if previous is None else previous.round + 1
    return PseudoLabels(index, label, confidence, accepted, changed, number, epoch, sharpened)


def check_threshold(threshold: float | None, name: str = "threshold") -> None:
    """Raise InputError unless ``threshold`` lies in (0, 1] or is None; ``name`` is that of the argument."""
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise InputError(f"{name} must lie in (0, 1], or be null for none, got {threshold}")


def check_classes(y: Tensor, classes: int, data: Any, owner: str) -> None:
    """Check that each class has a label. A class without any training image, as an empty folder, gives a warning.

    Args:
        y: Visible labels, (N,).
        classes: Number of classes.
        data: The datamodule. Its ``class_names``, if it has them, name the classes of the message. Its
            ``absent_classes()`` are those of which no training image is known.
        owner: Name of the caller, for the message.

    Raises:
        InputError: If a class has training images, but no label.
    """
    counts = torch.bincount(y[(y >= 0) & (y < classes)].long().cpu(), minlength=classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if not missing:
        return
    absent = data.absent_classes() if hasattr(data, "absent_classes") else set()
    unlabeled = [number for number in missing if number not in absent]
    names = getattr(data, "class_names", None)
    named = [names[c] if names is not None and len(names) == classes else str(c) for c in unlabeled or missing]
    shown = ", ".join(map(repr, named[:5])) + (", ..." if len(named) > 5 else "")
    text = f"{owner}: no labeled sample of class {shown}, so no pseudo-label can be learned for it"
    if unlabeled:
        raise InputError(f"{text}; label some, remove the class, or let a teacher label the pool (source: teacher)")
    rank_zero_warn(f"{text}; no training image of it is known")
