"""Groups of samples that must not stand on two sides of a split, as the pictures of one patient, scene or speaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError

GroupOf = Callable[[str], str]
"""Function from the path of a sample to the name of its group; empty for a sample that is a group by itself."""

_CALLED_AGAIN = 100  # samples


def groups_of(samples: Samples, function: GroupOf | None) -> list[str] | None:
    """Return the group of each sample by index, the test part's behind them; None if there are none.

    Names are compared in Unicode NFC. A sample without a group has one of its own.

    Args:
        samples: The source's images by index.
        function: Function from the path of a sample to its group. Default: None, which means the source's groups.

    Raises:
        InputError: If the function raises, returns no text or not the same each time, if samples have no paths, or if
            the source has groups, too.
    """
    parts = samples.parts
    if function is None:
        if parts.train.groups is None:
            return None
        test = [] if parts.test is None else (parts.test.groups or [""] * len(parts.test.images))
        more = sum(map(len, samples.images[1:]))
        pool = parts.pool_groups if samples.unlabeled != "test" else test
        found = [*parts.train.groups, *(pool or [""] * more), *test]
    else:
        if parts.train.groups is not None:
            raise InputError("group: the source has groups of its own; leave out one of both")
        found = [_call(function, samples.path(number)) for number in range(len(samples))]
        for number, name in enumerate(found[:_CALLED_AGAIN]):
            if (again := _call(function, path := samples.path(number))) != name:
                raise InputError(f"group must return the same text each time, got {name!r} and {again!r} for {path}")
        if parts.test is not None:
            test_samples = Samples(parts._replace(train=parts.test, unlabeled=None), "none", samples.source)
            found += [_call(function, test_samples.path(number)) for number in range(len(parts.test.images))]
    # a space can end no name
    return [normal_name(name) or f"{number} " for number, name in enumerate(found)]


def _call(function: GroupOf, path: str | None) -> str:
    if path is None:
        raise InputError("group: samples have no paths; give groups by the source")
    try:
        name = function(path)
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(f"group: {type(error).__name__} for {path}: {text:.200}") from error
    if not isinstance(name, str):
        raise InputError(f"group must return a text, got {name!r:.80} for {path}")
    return name


def of_other_parts(groups: Sequence[str], samples: Samples) -> set[int]:
    """Return the training samples whose group is in the test part, or in the source's own validation part.

    Args:
        groups: From :func:`groups_of`.
        samples: The source's images by index.

    Raises:
        InputError: If these are all training samples.
    """
    val = samples.parts.val_indices
    test = {*groups[len(samples) :]}
    later = test | {groups[n] for n in val if groups[n] not in test}
    found = {n for n in range(val.start) if groups[n] in later}
    if len(found) == val.start:
        raise _none_left("training")
    return found


def keep_apart(split: Split, groups: Sequence[str], samples: Samples) -> Split:
    """Leave out samples of training whose group is in validation or test, and of validation whose group is in test.

    Args:
        split: The split.
        groups: Group of each sample by index, those of the test part behind them.
        samples: The source's images by index.

    Raises:
        InputError: If no sample is left for training, or none for validation where there were some.
    """
    size = len(samples)
    test = {*groups[size:]}
    val = {n for n in split.val if groups[n] not in test}
    later = test | {groups[n] for n in val}
    pool = range(samples.training, size) if samples.unlabeled == "source" else range(0)
    rows = {row[0] for row in split.label_rows} - {*split.val}  # coarse labels train, whatever the pool is
    used = {*split.labeled, *split.unlabeled, *split.held_out, *pool, *rows} - {*split.left_out}
    out = {n for n in used if groups[n] in later}
    both = out | ({*split.val} - val)
    for name, before, after in (("training", used, used - out), ("validation", {*split.val}, val)):
        if before and not after:
            raise _none_left(name)
    if apart := both | {n for n in split.left_out if groups[n] in later}:
        first = min(apart)
        rank_zero_warn(
            f"group: {len(apart)} samples are left out, since others of their group are in validation or test "
            f"({samples.path(first) or f'sample {first}'}: group {groups[first].strip()})"
        )
    trained = {groups[n] for n in used - out}
    rank_zero_info(f"group: {len(trained)} groups in training, {len(later - test)} in validation, {len(test)} in test")
    if not both:
        return split
    parts: dict[str, Any] = {
        name: sorted({*getattr(split, name)} - both) for name in ("labeled", "unlabeled", "held_out", "val")
    }
    parts["label_rows"] = [row for row in split.label_rows if row[0] not in both]
    return replace(split, **parts, left_out=sorted({*split.left_out} | both))


def _none_left(part: str) -> InputError:
    return InputError(f"group: no {part} sample is left, since all groups are in validation or test, too")
