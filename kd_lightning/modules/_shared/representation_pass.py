"""The features of one pass over validation samples, and the figures of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.features.representation import (
    NEIGHBORS,
    knn_accuracy,
    neighbor_agreement,
    probe_accuracy,
    rankme,
)
from kd_lightning.ranks import gather

MOST = 4096
"""Number of samples of the figures: pairs of samples are compared, so that memory and time grow with its square."""
LEAST = 5 * NEIGHBORS
"""Number of samples below which the figures without labels are left out: most samples would be neighbours."""
_STUDENT, _KEY, _LABEL = "", "key", "label"  # a teacher's features have its name
_SPREAD = -7046029254386353131  # 2**64 over the golden ratio: multiples of it, modulo 2**64, spread evenly


class RepresentationPass:
    """Gathers features of samples, each once and from all processes, and computes figures of them.

    Of more than 4096 samples, it takes that many, spread evenly over their numbers (``Batch.index``): always the same,
    whatever the number of processes. Batches without an index are numbered as they come.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._count = 0

    @torch.no_grad()
    def add(self, batch: Batch, student: Tensor, teachers: Mapping[str, Tensor], rank: int = 0, world: int = 1) -> None:
        """Add the features of a batch.

        Args:
            batch: The batch. Rows that are no samples (padding) are left out.
            student: The student's features, (B, D).
            teachers: Features (B, E) of each teacher, by name.
            rank: Number of this process.
            world: Number of processes.
        """
        index = batch.index
        if index is None:
            index = rank + world * (self._count + torch.arange(len(batch)))
        index = index.cpu()
        self._count += int((index >= 0).sum())
        y = _classes(batch.y, len(batch))
        part = {_KEY: index * _SPREAD, _LABEL: y, _STUDENT: student.float().cpu()}
        part |= {name: features.float().cpu() for name, features in teachers.items()}
        self._parts.append({name: value[index >= 0] for name, value in part.items()})
        if sum(len(rows[_KEY]) for rows in self._parts) > 2 * MOST:
            self._parts = [_smallest(self._joined())]

    def compute(self, stage: str, trainer: Trainer | None = None, *, announce: bool = True) -> dict[str, float]:
        """Return the figures by name, computed on the first process, and begin anew. All processes must call this.

        - ``knn_accuracy``, ``probe_accuracy``: of labeled samples, at least 21 of at least two classes.
        - ``rankme``: of at least 100 samples.
        - ``neighbor_agreement``, or ``<teacher>_neighbor_agreement`` of several: likewise, with a teacher.
        - ``teacher_knn_accuracy``, or ``<teacher>_knn_accuracy`` of several: with labels and a teacher.

        Args:
            stage: ``"val"`` or ``"test"``, for messages.
            trainer: The trainer of several processes.
            announce: Whether to print how many samples there are, and what is left out.
        """
        rows, total = self._gathered(trainer)
        if trainer is not None and not trainer.is_global_zero:
            return {}
        figures, notes = _figures(rows)
        if announce and notes:
            some = f" ({MOST} of them are used)" if total > MOST else ""
            rank_zero_info(f"{stage}: features of {total:,} samples{some}: {'; '.join(notes)}")
        return figures

    def _gathered(self, trainer: Trainer | None) -> tuple[dict[str, Tensor], int]:
        """Return the rows of all processes, and the number of samples; remove those of this process."""
        own = _smallest(self._joined()) if self._parts else {}
        keys = own.get(_KEY, torch.zeros(0, dtype=torch.long))
        self._parts, count, self._count = [], self._count, 0
        all_keys = torch.unique(torch.cat(gather(trainer, keys)))[:MOST]
        limit = int(all_keys[-1]) if len(all_keys) else 0
        parts = gather(trainer, {name: value[keys <= limit] for name, value in own.items()})
        names = {name for part in parts for name in part}
        rows = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
        total = sum(gather(trainer, count))
        return (_smallest(rows) if rows else {}), total

    def _joined(self) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}


def _smallest(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of the smallest keys, at most 4096, sorted, each key once."""
    keys, order = rows[_KEY].sort(stable=True)
    is_first = torch.ones(len(keys), dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    chosen = order[is_first][:MOST]
    return {name: value[chosen] for name, value in rows.items()}


def _classes(y: Tensor | None, count: int) -> Tensor:
    """Return the class of each sample, (B,) integers; -100 where it is missing, or labels are no classes."""
    if y is None or y.ndim != 1 or y.is_floating_point():
        return torch.full((count,), -100)
    return y.cpu().long()


def _figures(rows: dict[str, Tensor]) -> tuple[dict[str, float], list[str]]:
    """Return the figures, and notes on how many samples they are of."""
    if not rows:
        return {}, []
    student = rows[_STUDENT]
    teachers = {name: rows[name] for name in sorted(rows.keys() - {_STUDENT, _KEY, _LABEL})}
    if not all(part.isfinite().all() for part in (student, *teachers.values())):
        return {}, ["they are not finite, so that there are no figures of them"]
    found: dict[str, float] = {}
    y, n = rows[_LABEL], len(student)
    known = is_labeled(y)
    labeled, classes = int(known.sum()), len(torch.unique(y[known]))
    of_labels = "knn_accuracy and probe_accuracy"
    if labeled > NEIGHBORS and classes > 1:
        y = torch.unique(y[known], return_inverse=True)[1]
        found |= {"knn_accuracy": knn_accuracy(student[known], y), "probe_accuracy": probe_accuracy(student[known], y)}
        found |= {f"{name}_knn_accuracy": knn_accuracy(part[known], y) for name, part in teachers.items()}
        notes = [f"{of_labels} are of {labeled:,} labeled ones of {classes} classes"]
    else:
        least = f"at least {NEIGHBORS + 1} labeled ones of 2 classes"
        notes = [f"{of_labels} are left out: they need {least}, got {labeled} of {classes}"]
    if n < LEAST:
        return found, [*notes, f"rankme and neighbor_agreement are left out: they need at least {LEAST}, got {n}"]
    found["rankme"] = rankme(student)
    for name, part in teachers.items():
        single = len(teachers) == 1
        found["neighbor_agreement" if single else f"{name}_neighbor_agreement"] = neighbor_agreement(student, part)
    return found, notes
