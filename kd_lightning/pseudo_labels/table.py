"""One round of labels for the unlabeled pool."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.selection.fixed_threshold import FixedThreshold


class PoolLabels:
    """One round of labels for the pool, ordered by index: what all tasks have.

    Attributes:
        index: Indices of the samples, (N,) integers, ascending.
        label: Pseudo-label of each row, (N,), in the type of the given labels.
        weight: How much the label counts, (N,) float32 from 0 to 1. Training does not use those of weight 0.
        round: Number of the round, from 0.
        epoch: Epoch at whose start the round was made; ``max_epochs`` for the round after training.
        soft: Probabilities to train on instead of the label, (N, C). None for hard labels.
        output: Which label of the sample a row is, (N,) integers. None for one label a sample.
    """

    index: Tensor
    label: Tensor
    weight: Tensor
    round: int
    epoch: int
    soft: Tensor | None = None
    output: Tensor | None = None

    @property
    def accepted(self) -> Tensor:
        """Whether training may use the label, (N,) booleans."""
        return self.weight > 0

    @property
    def hash(self) -> str:
        """SHA-256 of all fields, to compare the rounds of two processes."""
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """All fields by name, for a checkpoint."""
        own: Any = self
        return {field.name: getattr(self, field.name) for field in fields(own)}


@dataclass
class PseudoLabels(PoolLabels):
    """One round of classes, or of labels 0 and 1, for the pool, ordered by index.

    A row is a sample; of the multilabel task it is one label of a sample.

    Attributes:
        index: Indices of the samples, (N,) integers, ascending.
        label: Pseudo-label of each row, (N,), in the type of the given labels: the most probable class, or 0 or 1.
        confidence: Probability of that label, (N,) float32.
        weight: How much the label counts, (N,) float32 from 0 to 1. Training does not use those of weight 0.
        changed: Whether the label differs from that of the previous round, (N,) booleans.
        round: Number of the round, from 0.
        epoch: Epoch at whose start the round was made; ``max_epochs`` for the round after training.
        soft: Probabilities to train on instead of the label, (N, C). None for hard labels.
        output: Which label of the sample a row is, (N,) integers. None for one label a sample.
    """

    index: Tensor
    label: Tensor
    confidence: Tensor
    weight: Tensor
    changed: Tensor
    round: int
    epoch: int
    soft: Tensor | None = None
    output: Tensor | None = None


@dataclass
class PseudoValues(PoolLabels):
    """One round of values for the pool (the regression task), ordered by index.

    A row is a sample; if samples have several values, it is one value of a sample.

    Attributes:
        index: Indices of the samples, (N,) integers, ascending.
        label: Pseudo-label of each row, (N,), in the type and unit of the given labels: the mean over views.
        spread: Standard deviation of the predictions over views, (N,) float32, in standard deviations of the given
            labels of this output.
        weight: How much the value counts, (N,) float32, 0 or 1. Training does not use those of weight 0.
        change: Distance to the value of the previous round, (N,) float32, in the same unit; 0 in the first round.
        round: Number of the round, from 0.
        epoch: Epoch at whose start the round was made; ``max_epochs`` for the round after training.
        output: Which value of the sample a row is, (N,) integers. None for one value a sample.
    """

    index: Tensor
    label: Tensor
    spread: Tensor
    weight: Tensor
    change: Tensor
    round: int
    epoch: int
    output: Tensor | None = None


def restore(state: dict[str, Any]) -> PoolLabels:
    """Return the round of a checkpoint: of values, if it has their spread, else of labels."""
    return PseudoValues(**state) if "spread" in state else PseudoLabels(**state)


class PseudoLabelStore(Protocol):
    """The methods of a datamodule that :class:`~kd_lightning.PseudoLabelRefresh` needs."""

    def pool_dataloader(self, num_views: int | None = None) -> Any:
        """Loader of this process's share of labeled and unlabeled training images, under evaluation transforms.

        Its ``Batch`` objects have ``index`` and ``y``. Unlabeled images have y = -100; these get pseudo-labels. The
        shares of all processes cover every image; an image that comes twice counts once.

        Args:
            num_views: For the regression task alone, which others need not have: each image comes in so many views
                under the training transform, one behind another in the same batch. Default: None, as above.
        """

    def set_pseudo_labels(self, labels: PoolLabels) -> None:
        """Replace all pseudo-labels; later training batches hold the accepted ones."""


def make_pseudo_labels(
    probabilities: Tensor,
    index: Tensor,
    select: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    labeled_probabilities: Tensor | None = None,
    *,
    previous: PseudoLabels | None = None,
    epoch: int = 0,
) -> PseudoLabels:
    """Make one round of pseudo-labels from probabilities.

    Uniform probabilities are never accepted: they belong to no class.

    Args:
        probabilities: Class probabilities of the pool, (N, C).
        index: Indices of the samples, (N,).
        select: A :class:`~kd_lightning.pseudo_labels.Selection`, or a function that is called as one. Default: None,
            which means that all are accepted.
        labeled_probabilities: Class probabilities of the labeled samples, (L, C). Default: None, which means none.
        previous: The previous round of the same samples. Default: None, which means that this is the first.
        epoch: Epoch at whose start the round is made.

    Returns:
        The round, ordered by index. It has probabilities if a target of the selection is more than one class.

    >>> from kd_lightning.pseudo_labels import FixedThreshold
    >>> table = make_pseudo_labels(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([7, 3]), FixedThreshold(0.8))
    >>> table.index.tolist(), table.label.tolist(), table.accepted.tolist()
    ([3, 7], [1, 0], [False, True])
    """
    index, order = index.sort()
    probabilities = probabilities[order].float()
    labeled = probabilities[:0] if labeled_probabilities is None else labeled_probabilities.float()
    target, weight = (FixedThreshold(0.0) if select is None else select)(probabilities, labeled, index)
    label = target.argmax(dim=1)
    confidence = probabilities.gather(1, label.unsqueeze(1)).squeeze(1)
    weight = torch.where(probabilities.amax(dim=1) > 1 / probabilities.shape[1] + 1e-6, weight, 0.0)  # above uniform
    is_soft = bool(((target > 0) & (target < 1)).any())
    changed = torch.zeros_like(label, dtype=torch.bool) if previous is None else label != previous.label
    number = 0 if previous is None else previous.round + 1
    return PseudoLabels(index, label, confidence, weight, changed, number, epoch, target if is_soft else None)


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
