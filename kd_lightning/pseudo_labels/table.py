"""Labels for the unlabeled pool: which are accepted, what changed, and the ledger that a person can open."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_lightning.errors import InputError

FOLDER = "pseudo_labels"
"""Where in a run's folder the ledger lies: a CSV file a round."""
COLUMNS = ("round", "epoch", "index", "path", "label", "confidence", "accepted", "changed")


@dataclass
class PseudoLabels:
    """One round of labels for the pool, in the order of the samples' indices.

    Attributes:
        index: Which samples, (N,) integers, ascending.
        label: Their most probable class, (N,) integers.
        confidence: Its probability, (N,) float32.
        accepted: Whether training may use it, (N,) booleans.
        changed: Whether the label differs from that of the round before, (N,) booleans.
        round: Number of the round, from 0 on.
        epoch: Before which epoch it was made; ``max_epochs`` for the last one.
        soft: Probabilities to train on instead of the label, (N, C), if any.
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
        """SHA-256 of all of it: whether two processes have the same."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            digest.update(field.name.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PseudoLabelStore(Protocol):
    """What a datamodule must have for :class:`~kd_lightning.PseudoLabelRefresh`."""

    def pool_dataloader(self) -> Any:
        """This process's share of the labeled and unlabeled training images, under evaluation transforms.

        Gives ``Batch``es with ``index`` and ``y``; the y of unlabeled images, which get labeled, is -100. Several
        processes together give every image; one that comes twice counts once.
        """

    def set_pseudo_labels(self, labels: PseudoLabels) -> None:
        """Fill the accepted labels into training batches from now on, in place of all earlier ones."""


def choose(
    probabilities: Tensor,
    index: Tensor,
    *,
    threshold: float | None = None,
    top_k_per_class: int | None = None,
    soft: bool = False,
    sharpen: float = 1.0,
    before: PseudoLabels | None = None,
    epoch: int = 0,
) -> PseudoLabels:
    """Label a pool by its probabilities.

    Args:
        probabilities: (N, C).
        index: Which samples, (N,).
        threshold: Accept labels of at least this probability; None: all.
        top_k_per_class: Of these, accept the k most probable of each class; None: all.
        soft: Give the probabilities, too.
        sharpen: Temperature T of the soft labels, p^(1/T) scaled to sum 1 (MixMatch, Berthelot et al. 2019).
        before: The round before.
        epoch: In which this is made.

    Returns:
        The table, sorted by index.

    >>> table = choose(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([7, 3]), threshold=0.8)
    >>> table.index.tolist(), table.label.tolist(), table.accepted.tolist()
    ([3, 7], [1, 0], [False, True])
    """
    index, order = index.sort()
    probabilities = probabilities[order].float()
    confidence, label = probabilities.max(dim=1)
    accepted = confidence > 1 / probabilities.shape[1] + 1e-6  # else it is as good as any: of no class
    if threshold is not None:
        accepted &= confidence >= threshold
    if top_k_per_class is not None:
        for number in range(probabilities.shape[1]):
            members = (accepted & (label == number)).nonzero().flatten()
            # stable, so that of equal ones the first by index are taken, everywhere
            ranked = confidence[members].argsort(descending=True, stable=True)
            accepted[members[ranked[top_k_per_class:]]] = False
    changed = torch.zeros_like(accepted) if before is None else label != before.label
    sharpened = None
    if soft:
        # in log-space: small probabilities to a high power would all be 0
        sharpened = (probabilities.clamp_min(1e-30).log() / sharpen).softmax(dim=1)
    number = 0 if before is None else before.round + 1
    return PseudoLabels(index, label, confidence, accepted, changed, number, epoch, sharpened)


def check_threshold(threshold: float | None, name: str = "threshold") -> None:
    """Raise InputError unless it lies in (0, 1], or is None."""
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise InputError(f"{name} must lie in (0, 1], or be null for none, got {threshold}")


def check_classes(y: Tensor, classes: int, names: Sequence[str] | None, owner: str) -> None:
    """Raise InputError, naming the classes, if some of 0 ... C - 1 have no label among ``y``, (N,)."""
    counts = torch.bincount(y[(y >= 0) & (y < classes)].long().cpu(), minlength=classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        named = [names[c] if names is not None and len(names) == classes else str(c) for c in missing]
        shown = ", ".join(map(repr, named[:5])) + (", ..." if len(named) > 5 else "")
        raise InputError(
            f"{owner}: no labeled sample of class {shown}, so no pseudo-label can be learned for it; label some, "
            f"leave the class out, or let a teacher label the pool (source: teacher)"
        )


def write_round(
    folder: Path, labels: PseudoLabels, class_names: Sequence[str] | None, path_of: Callable[[int], str | None]
) -> Path:
    """Write a round to the ledger of a run's folder, in place of what is there of this round and of later ones."""
    path = folder / FOLDER / f"round_{labels.round:04d}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    columns = (labels.index, labels.label, labels.confidence, labels.accepted, labels.changed)
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for index, label, confidence, accepted, changed in zip(*(c.tolist() for c in columns), strict=True):
            name = class_names[label] if class_names is not None and label < len(class_names) else label
            row = (labels.round, labels.epoch, index, path_of(index) or "", name, f"{confidence:.6f}")
            table.writerow((*row, int(accepted), int(changed)))
    part.replace(path)
    for later in path.parent.glob("round_*.csv"):  # of a run that was resumed from before them
        if later.stem > path.stem:
            later.unlink()
    return path
