"""Bring a saved split up to date with data that have changed since: samples are renamed, gone, new, or reordered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.data.identity import Identities, Match, match
from kd_lightning.data.splits import Split, hash_targets
from kd_lightning.errors import InputError


def follow_samples(
    split: Split,
    path: Path,
    targets: Tensor,
    samples: Identities,
    pool: Callable[[], Identities | None],
    class_names: Sequence[str] | None,
) -> Split:
    """Move the indices and class numbers of a saved split to the samples and classes that it meant.

    A sample that is gone is in no part any more. One that has lost its label becomes unlabeled. A new sample becomes
    unlabeled: its label, if it has one, was not among those of the split. What has changed is said in one line.

    Args:
        split: A split as it was saved. One that does not name its samples is returned unchanged.
        path: Its file, for messages.
        targets: Training labels now, (N,) or (N, L).
        samples: Paths and contents of the training part now.
        pool: Returns those of the source's unlabeled part now; None if there is none.
        class_names: Names of the classes now. Default: None, which means their numbers.

    Raises:
        InputError: If less than half of the split's samples are found, or if a class that a label row names is gone.
    """
    if split.samples is None:
        return split
    training = match(split.samples, samples)
    _check_same_data(training, len(split.samples), path)
    places = dict(enumerate(training.places))
    size = len(split.samples)
    said = [_describe(training, "training")]
    now_pool = pool() if split.beyond else None
    if split.beyond:
        if split.pool is None or now_pool is None:
            raise InputError(
                f"labeled: {path} has labels for the source's unlabeled part (sample {split.beyond[0]}), which is gone"
            )
        extra = match(split.pool, now_pool)
        _check_same_data(extra, len(split.pool), path)
        shift = len(samples)
        places |= {size + n: None if place is None else shift + place for n, place in enumerate(extra.places)}
        said.append(_describe(replace(extra, added=[]), "unlabeled"))
    for line in filter(None, said):
        rank_zero_info(f"labeled: {path}: {line}")

    def now(indices: Sequence[int]) -> list[int]:
        return sorted(place for index in indices if (place := places[index]) is not None)

    labels = _class_numbers(split, path, class_names)
    rows: list[list[Any]] = []
    for index, label, kind, weight in split.label_rows:
        if (place := places[index]) is not None:
            rows.append([place, labels(label) if kind in ("clean", "noisy") else label, kind, weight])
    rowed = {row[0] for row in rows}
    known = is_labeled(targets).reshape(len(targets), -1).any(dim=1)
    lost = {n for n in [*now(split.labeled), *now(split.val)] if n < len(known) and not known[n] and n not in rowed}
    return replace(
        split,
        labeled=[n for n in now(split.labeled) if n not in lost],
        unlabeled=sorted([*now(split.unlabeled), *training.added, *lost]),
        val=[n for n in now(split.val) if n not in lost],
        held_out=now(split.held_out),
        left_out=now(split.left_out),
        label_rows=sorted(rows, key=lambda row: int(row[0])),
        data=hash_targets(targets),
        samples=samples,
        pool=now_pool,
        class_names=None if class_names is None else [*class_names],
    )


def _check_same_data(found: Match, size: int, path: Path) -> None:
    count = size - len(found.gone)
    if size and count < size / 2:
        raise InputError(f"labeled: {path} belongs to other data: only {count} of its {size} samples are here")


def _describe(found: Match, part: str) -> str:
    """Describe in one line what has changed in a part; empty if nothing has."""
    what = found.describe()
    new = "; new samples are unlabeled" if found.added else ""
    return f"the {part} samples have changed since: {what}; the others are as they were{new}" if what else ""


def _class_numbers(split: Split, path: Path, names: Sequence[str] | None) -> Callable[[Any], int]:
    """Return a function from a class number of the split to the number of the same class now."""
    before = split.class_names

    def number(label: Any) -> int:
        if before is None or names is None or before == [*names] or not 0 <= int(label) < len(before):
            return int(label)
        if before[int(label)] not in names:
            raise InputError(f"labeled: {path} has labels of class {before[int(label)]!r}, which is gone")
        return [*names].index(before[int(label)])

    return number
