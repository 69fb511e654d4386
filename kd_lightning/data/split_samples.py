"""Bring a saved split up to date with data that have changed since: samples are renamed, gone, new, or reordered."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.data.identity import Identities, Match, base_content, match
from kd_lightning.data.sources.targets import has_label
from kd_lightning.data.splits import Split, hash_targets
from kd_lightning.errors import InputError


def follow_samples(
    split: Split,
    path: Path,
    targets: Tensor,
    samples: Identities,
    pool: Callable[[], Identities | None],
    class_names: Sequence[str] | None,
    label_contents: Sequence[str] | None = None,
    own_val: range = range(0),
) -> Split:
    """Move the indices and class numbers of a saved split to the samples and classes that it meant.

    A sample that is gone is in no part any more. One that has lost its label becomes unlabeled. A new sample becomes
    unlabeled: its label, if it has one, was not among those of the split. A sample of the unlabeled part that was moved
    to the training part has its label row there. A label row of a file whose content has changed is followed by path;
    if files were renamed as well, a path says too little, and the row is passed over. What has changed is said in one
    line.

    If the source has its own validation part, this is the validation part, also those of its samples that are new.

    Args:
        split: A split as it was saved. One that does not name its samples is returned unchanged.
        path: Its file, for messages.
        targets: Training labels now, (N,) or (N, L).
        samples: Paths and contents of the training part now.
        pool: Returns those of the source's unlabeled part now; None if there is none.
        class_names: Names of the classes now. Default: None, which means their numbers.
        label_contents: Hashes of dense labels now, see :func:`~kd_lightning.data.splits.hash_targets`.
        own_val: Samples of the source's own validation part now; empty if it has none.

    Raises:
        InputError: If less than half of the split's samples are found, if a class that a label row names is gone, if
            nothing of the validation part is here, or if it is not the source's own.
    """
    if split.samples is None:
        return split
    training = match(split.samples, samples)
    _check_same_data(training, len(split.samples), path)
    places = dict(enumerate(training.places))
    size = len(split.samples)
    by_path = _found_by_path(training, samples.paths)
    unsure = by_path if training.renamed else set()
    own = {*own_val}
    _report(replace(training, added=[n for n in training.added if n not in own]), "training", path)
    now_pool = pool() if split.beyond else None
    if split.beyond:
        before = split.pool or Identities([], [])
        extra = match(before, now_pool or Identities([], []))
        moved = _moved_to_training(split, extra, training.added, samples)
        gone = [row[0] for row in split.label_rows if row[0] >= size and row[0] not in moved]
        if gone and (split.pool is None or now_pool is None):
            raise InputError(
                f"labeled: {path} has labels for the source's unlabeled part (sample {gone[0]}), which is gone"
            )
        if now_pool is not None:
            _check_same_data(extra, len(before), path, len(moved))
            _report(replace(extra, added=[]), "unlabeled", path, len(moved))
            more = {len(samples) + n for n in _found_by_path(extra, now_pool.paths)}
            by_path, unsure = by_path | more, unsure | (more if extra.renamed else set())
        places |= dict.fromkeys(split.beyond)
        places |= {size + n: None if place is None else len(samples) + place for n, place in enumerate(extra.places)}
        places |= moved

    def now(indices: Sequence[int]) -> list[int]:
        return sorted(place for index in indices if (place := places[index]) is not None)

    if own and by_path.issuperset(now(split.val)):  # of other content, all of them: the part is another one
        places |= dict.fromkeys(split.val)
    val = now(split.val)
    if own:
        rowed_before = now([row[0] for row in split.label_rows])
        trained = {*now([*split.labeled, *split.unlabeled, *split.held_out]), *rowed_before} - {*val}
        check_own_val(path, trained, {*val}, own, samples.paths)
        new = own - {*val, *now(split.left_out)}
        _report_own_val(path, len(split.val), len(val), len(new))
        val = sorted({*val, *new})
    elif split.val and not val:
        raise InputError(
            f"labeled: {path} has {len(split.val)} validation samples, and none of them is here; name them by val of "
            "the source, or make the split anew"
        )
    labels = _class_numbers(split, path, class_names)
    rows: list[list[Any]] = []
    for index, label, kind, weight in split.label_rows:
        if (place := places[index]) is not None:
            rows.append([place, labels(label) if kind in ("clean", "noisy") else label, kind, weight])
    names = [*samples.paths, *([] if now_pool is None else now_pool.paths)]
    changed = sorted(row[0] for row in rows if row[0] in by_path)
    passed = unsure.intersection(changed)
    if changed:
        what = "are followed by path, though the content of their files has changed"
        if passed:
            what = "are passed over, since the content of their files has changed, and other files were renamed"
        count = f"{len(passed or changed)} of {len(split.label_rows)}"
        rank_zero_warn(f"labeled: {path}: {count} label rows {what} ({names[min(passed or changed)]})")
    rows = [row for row in rows if row[0] not in passed]
    rowed = {row[0] for row in rows}
    known = has_label(targets)
    lost = {n for n in val if not known[n] and n not in rowed and n not in own}
    lost |= {n for n in now(split.labeled) if n in passed or (n < len(known) and not known[n] and n not in rowed)}
    labeled = {*now(split.labeled)} - lost
    left_out = now(split.left_out)
    unlabeled = {*now(split.unlabeled), *training.added, *lost} - {*labeled, *left_out, *own}
    return replace(
        split,
        labeled=sorted(labeled),
        unlabeled=sorted(n for n in unlabeled if n < len(samples) or n not in passed),
        val=[n for n in val if n not in lost],
        held_out=now(split.held_out),
        left_out=left_out,
        label_rows=sorted(rows, key=lambda row: int(row[0])),
        data=hash_targets(targets, label_contents),
        samples=samples,
        pool=now_pool,
        class_names=None if class_names is None else [*class_names],
    )


def check_own_val(path: Path, trained: Set[int], val: Set[int], own: Set[int], names: Sequence[str]) -> None:
    """Compare a split with the source's own validation part.

    Args:
        path: File of the split, for messages.
        trained: Samples that the split trains on.
        val: Samples that it validates on.
        own: Samples of the own validation part.
        names: Path of each sample, empty without one.

    Raises:
        InputError: If the split trains on a sample of this part, or validates on another sample.
    """
    for verb, wrong, where in (("trains", trained & own, "in"), ("validates", val - own, "not in")):
        if wrong:
            first = min(wrong)
            name = names[first] or f"sample {first}"
            raise InputError(
                f"labeled: {path} {verb} on {len(wrong)} samples ({name}) that are {where} the source's own validation "
                "part; make the split anew"
            )


def _report_own_val(path: Path, size: int, here: int, new: int) -> None:
    """Log in one line what has changed in the own validation part, if anything has."""
    if new and not size:
        rank_zero_info(f"labeled: {path} has no validation part; the {new} samples of the source's own one validate")
    elif new or here < size:
        rank_zero_warn(
            f"labeled: {path}: the validation part has changed since: {here} of its {size} samples are here, {new} are "
            "new"
        )


def _found_by_path(found: Match, paths: Sequence[str]) -> set[int]:
    """Return the samples now whose file has another content than before."""
    changed = {*found.changed}
    return {place for place in found.places if place is not None and paths[place] in changed} if changed else set()


def _moved_to_training(split: Split, extra: Match, added: Sequence[int], samples: Identities) -> dict[int, int]:
    """Return {index before: index now} of samples of the unlabeled part that are new training samples, by content."""
    size = 0 if split.samples is None else len(split.samples)
    if split.pool is None:
        return {}
    new = {base_content(samples.contents[n]): n for n in reversed(added)}
    new.pop("", None)
    gone = [index for index in split.beyond if extra.places[index - size] is None]
    names = {index: base_content(split.pool.contents[index - size]) for index in gone}
    return {index: new.pop(name) for index, name in names.items() if name in new}


def _check_same_data(found: Match, size: int, path: Path, moved: int = 0) -> None:
    count = size - len(found.gone) + moved
    if size and count < size / 2:
        raise InputError(f"labeled: {path} belongs to other data: only {count} of its {size} samples are here")


def _report(found: Match, part: str, path: Path, moved: int = 0) -> None:
    """Log in one line what has changed in a part, if anything has. Other contents are worth a warning."""
    if what := found.describe():
        what += f" ({moved} of these moved to the training part)" if moved else ""
        new = "; new samples are unlabeled" if found.added else ""
        text = f"labeled: {path}: the {part} samples have changed since: {what}; the others are as they were{new}"
        (rank_zero_warn if found.changed else rank_zero_info)(text)


def _class_numbers(split: Split, path: Path, names: Sequence[str] | None) -> Callable[[Any], Any]:
    """Return a function from a class number of the split to the number of the same class now.

    Of several labels of a sample, it returns those of the same classes; new classes have none.
    """
    before = split.class_names
    if before and names and before != [*names]:
        new, gone = ([name for name in a if name not in b] for a, b in ((names, before), (before, names)))
        what = "; ".join(f"{key}: {', '.join(found[:20])}" for key, found in (("new", new), ("gone", gone)) if found)
        rank_zero_warn(
            f"labeled: {path}: the classes, and their numbers, have changed since ({what or 'another order'})"
        )

    def number(label: Any) -> Any:
        if isinstance(label, list):
            if before is None or names is None or before == [*names] or len(label) != len(before):
                return label
            for name, value in zip(before, label, strict=True):
                if value is not None:
                    number(before.index(name))  # is there
            known = dict(zip(before, label, strict=True))
            return [known.get(name) for name in names]
        if before is None or names is None or before == [*names] or not 0 <= int(label) < len(before):
            return int(label)
        if before[int(label)] not in names:
            raise InputError(
                f"labeled: {path} has labels of class {before[int(label)]!r}, which is gone; there are "
                f"{', '.join(names[:20])}"
            )
        return [*names].index(before[int(label)])

    return number
