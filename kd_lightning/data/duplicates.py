"""Exact duplicates between training, validation and test: count them, refuse them, or keep the copies on one side."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.data.identity import Identities, base_content
from kd_lightning.data.sources.targets import has_label, has_one_class
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError

DuplicatePolicy = Literal["count", "refuse", "together"]
SIDES = ("test", "validation", "training")
_NAME_LENGTH = 60  # of a path in a message, in letters


@dataclass(frozen=True)
class Leak:
    """Contents that stand on two sides.

    Attributes:
        contents: Number of different contents.
        first: Number of samples with these contents on the first side.
        second: Number of samples with these contents on the second side.
        conflicts: Number of contents whose samples have different labels.
        example: Names of a sample on the first side and of its copy on the second.
    """

    contents: int
    first: int
    second: int
    conflicts: int
    example: tuple[str, str]


@dataclass(frozen=True)
class Duplicates:
    """Exact duplicates of a split.

    Attributes:
        leaks: Contents that stand on two sides, by names of the sides.
        within: Further copies within one side, by name of the side.
        gaps: Why some samples cannot be compared, one text each.
    """

    leaks: dict[tuple[str, str], Leak]
    within: dict[str, int]
    gaps: list[str]

    def describe(self) -> str:
        """Describe the leaks in one line; empty if there are none."""
        texts = []
        for (a, b), leak in self.leaks.items():
            verb = "is a copy of" if leak.first == 1 else "are copies of"
            text = f"{_samples(leak.first, a)} {verb} {_samples(leak.second, b)} ({' = '.join(leak.example)}"
            text += f"; {leak.conflicts} of {leak.contents} contents with different labels)" if leak.conflicts else ")"
            texts.append(text)
        return ", ".join(texts)

    def describe_within(self) -> str:
        """Describe the copies within one side in one line; empty if there are none."""
        texts = [f"{count} in {side}" for side, count in self.within.items() if count]
        return f"further copies within one side: {', '.join(texts)}" if texts else ""


def handle_duplicates(
    policy: DuplicatePolicy,
    split: Split,
    parts: Mapping[str, Identities],
    targets: Mapping[str, Tensor] | None = None,
    *,
    whole_pool: bool = True,
    own_val: bool = False,
) -> Split:
    """Count, refuse or remove the exact duplicates between training, validation and test. Rank 0 prints one line.

    Args:
        policy: ``"count"``, ``"refuse"`` or ``"together"``, see :func:`keep_together`.
        split: A split of the training part.
        parts: Identities by name of the part, see :func:`find_duplicates`.
        targets: Labels of the parts ``train`` and ``test``. Default: None, which means that labels are not compared.
        whole_pool: See :func:`find_duplicates`.
        own_val: See :func:`keep_together`.

    Returns:
        The split; another one for ``"together"`` if there are duplicates.

    Raises:
        InputError: For duplicates under ``"refuse"``, and for another policy.
    """
    if policy not in get_args(DuplicatePolicy):
        raise InputError(f"duplicates must be one of {', '.join(get_args(DuplicatePolicy))}, got {policy!r}")
    found = find_duplicates(parts, split, targets, whole_pool=whole_pool)
    text = found.describe()
    for gap in found.gaps:
        rank_zero_warn(f"duplicates: {gap}")
    if policy == "refuse" and text:
        raise InputError(f"duplicates: refuse, but {text}; duplicates: together keeps copies on one side")
    if not text and (within := found.describe_within()):
        rank_zero_info(f"duplicates: {within}")
    if policy == "together":
        train, pool, test = (parts[name].contents if name in parts else [] for name in ("train", "unlabeled", "test"))
        after = keep_together(split, train, pool, test, (targets or {}).get("train"), own_val=own_val)
        if after is not split:
            change = f"together: {_describe_change(split, after)}"
            rank_zero_info(f"duplicates: {change}; before, {text}" if text else f"duplicates: {change}")
        return after
    if text:
        more = "; ".join(filter(None, (text, found.describe_within())))
        rank_zero_warn(f"duplicates: {more}; figures may be too good; duplicates: together keeps copies on one side")
    return split


def find_duplicates(
    parts: Mapping[str, Identities],
    split: Split,
    targets: Mapping[str, Tensor] | None = None,
    *,
    whole_pool: bool = True,
) -> Duplicates:
    """Find exact duplicates between training, validation and test, and count those within one of them.

    Files are equal if their bytes are. The same picture in another format, size or quality is found by the command
    ``duplicates``. Training is all that the split does not hold for validation or leave out, labeled or not.

    Args:
        parts: Identities of the source's parts: ``train``; ``unlabeled`` if training may use this part; ``test`` if
            there is one. In the transductive setting the pool is the test part itself, so ``unlabeled`` is not given.
        split: A split of the training part.
        targets: Labels of the parts ``train`` and ``test``, by name. Missing ones are -100 or NaN. Default: None,
            which means that labels are not compared.
        whole_pool: Whether training uses the whole part ``unlabeled``. Otherwise it uses those samples that have a row
            in ``split.label_rows``.
    """
    sides = {side: [*_members(side, parts, split, whole_pool=whole_pool)] for side in SIDES}
    names = {part: [*map(base_content, identities.contents)] for part, identities in parts.items()}
    counts = {side: Counter(names[part][n] for part, n in members) for side, members in sides.items()}
    for counter in counts.values():
        del counter[""]  # samples without a content
    shared = {pair: counts[pair[0]].keys() & counts[pair[1]].keys() for pair in combinations(SIDES, 2)}
    several = set().union(*shared.values())
    first: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
    known: dict[str, Any] = {}
    conflicts: set[str] = set()
    labels = {part: t.tolist() if t.ndim == 1 else t for part, t in (targets or {}).items() if several}
    for side, members in sides.items():
        for part, number in members if several else ():
            content = names[part][number]
            if content in several:
                first[content].setdefault(side, (part, number))
                label = labels[part][number] if part in labels else None
                if _has_label(label) and _differ(label, known.setdefault(content, label)):
                    conflicts.add(content)
    leaks = {}
    for (a, b), contents in shared.items():
        if contents:
            example = first[min(contents & conflicts or contents)]
            leaks[a, b] = Leak(
                len(contents),
                sum(counts[a][content] for content in contents),
                sum(counts[b][content] for content in contents),
                len(contents & conflicts),
                (_name(a, parts, *example[a]), _name(b, parts, *example[b])),
            )
    within = {side: counter.total() - len(counter) for side, counter in counts.items()}
    return Duplicates(leaks, within, _gaps(parts))


def keep_together(
    split: Split,
    train: Sequence[str],
    pool: Sequence[str],
    test: Sequence[str],
    targets: Tensor | None = None,
    *,
    own_val: bool = False,
) -> Split:
    """Bring all copies of a sample to one side: training, validation or test.

    Samples of the training part that are copies of test samples are left out. Copies that stand in training and in
    validation go to training; as many other samples of the class go from training to validation, with all their copies.
    Samples of the pool that are copies of validation or test samples are left out. So the pool does not change the
    validation part, nor does the number of labeled samples, and a smaller labeled set stays a subset of a larger one.
    Unlabeled samples replace labeled ones that a class has lost.

    Args:
        split: A split of the training part.
        train: Contents of the training part.
        pool: Contents of the source's unlabeled part, whose indices follow those of the training part; empty if
            training does not use it.
        test: Contents of the test part, empty without one.
        targets: Labels of the training part, (N,) class indices or (N, L). Default: None, which means that classes do
            not count.
        own_val: Whether the validation part is the source's own, or has whole groups. It stays as it is then, but for
            copies of test samples, and training samples that are copies of it are left out.

    Returns:
        The split itself if nothing stands on two sides. The result does not depend on anything but the arguments.

    Raises:
        InputError: If no sample is left for training, or none for validation where there were some.
    """
    size = len(train)
    names = [base_content(content) or f"#{number}" for number, content in enumerate(train)]
    tested = {*map(base_content, test)} - {""}
    used = {*split.labeled, *split.unlabeled, *split.held_out}
    left_out = {*split.left_out} | {n for n in (*used, *split.val) if n < size and names[n] in tested}
    if own_val:
        own = {names[n] for n in split.val}
        left_out |= {n for n in used if n < size and names[n] in own}
    before = {n for n in used if n < size}, {*split.val}
    training, val = (part - left_out for part in before)
    learned = {names[n] for n in training}
    moved = {n for n in val if names[n] in learned}
    training, val = training | moved, val - moved
    if moved or left_out > {*split.left_out}:
        order = torch.rand(size, generator=torch.Generator().manual_seed(split.seed), dtype=torch.float64).tolist()
        classes = _classes(targets, size)
        fixed = {*split.held_out, *(row[0] for row in split.label_rows)}
        if not own_val:
            training, val = _refill_val(training, val, before, names, classes, order, fixed)
        labeled = _refill_labeled(split, training, classes, order, fixed)
    else:
        labeled = training & {*split.labeled}
    judged = tested | {names[n] for n in val}
    left_out |= {size + n for n, content in enumerate(pool) if base_content(content) in judged}
    if left_out == {*split.left_out} and val == before[1]:
        return split
    labeled |= {n for n in split.labeled if n >= size} - left_out
    held_out = {*split.held_out} - left_out
    unlabeled = (training | {n for n in split.unlabeled if n >= size}) - labeled - held_out - left_out
    for name, samples, had in (("training", labeled | unlabeled | held_out, used), ("validation", val, split.val)):
        if had and not samples:
            raise InputError(f"duplicates: together leaves no {name} sample: all are copies of others; allowed: count")
    return replace(
        split,
        labeled=sorted(labeled),
        unlabeled=sorted(unlabeled),
        val=sorted(val),
        held_out=sorted(held_out),
        left_out=sorted(left_out),
        label_rows=[row for row in split.label_rows if row[0] not in left_out],
    )


def _refill_val(
    training: set[int],
    val: set[int],
    before: tuple[set[int], set[int]],
    names: Sequence[str],
    classes: Sequence[int | None],
    order: Sequence[float],
    fixed: set[int],
) -> tuple[set[int], set[int]]:
    """Move samples of each class from training to validation, copies together, until it is as large as before.

    Training stays as large as before, too. Where the class has lost samples, both have lost the same share. A class
    that is in validation alone goes to training.
    """
    training, val = {*training}, {*val}
    copies: dict[str, list[int]] = defaultdict(list)
    for number in sorted(training | val, key=order.__getitem__):
        copies[names[number]].append(number)
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for group in copies.values():
        known = classes[group[0]]
        if known is not None and not fixed.intersection(group) and {classes[n] for n in group} == {known}:
            groups[known].append(group)
    had = [Counter(classes[n] for n in part) for part in before]
    have = [Counter(classes[n] for n in part) for part in (training, val)]
    for number, candidates in sorted(groups.items()):
        learned, judged = have[0][number], have[1][number]
        if not learned:
            last = candidates.pop()
            training, val, learned, judged = training | {*last}, val - {*last}, len(last), judged - len(last)
        before_both = had[0][number] + had[1][number]
        least = -(-had[0][number] * (learned + judged) // before_both)  # rounded up
        for group in candidates:
            if judged >= had[1][number]:
                break
            rest = learned - len(group)
            enough = rest >= least or (rest >= 1 and not judged)
            if group[0] in training and enough and judged + len(group) <= had[1][number]:
                training.difference_update(group)
                val.update(group)
                learned, judged = rest, judged + len(group)
    if before[1] and not val:  # all groups are larger than the validation part of their class
        sizes = [g for candidates in groups.values() for g in candidates if len(g) < len(training)]
        smallest = {*min(sizes, key=len, default=[])}
        training, val = training - smallest, smallest
    return training, val


def _refill_labeled(
    split: Split, training: set[int], classes: Sequence[int | None], order: Sequence[float], fixed: set[int]
) -> set[int]:
    """Return the labeled samples of the training part: those that are still there, and others of their classes."""
    labeled = training.intersection(split.labeled)
    wanted = Counter(classes[n] for n in split.labeled if n < len(classes))
    hidden = {classes[n] for n in split.unlabeled if n < len(classes) and n not in fixed}
    have = Counter(classes[n] for n in labeled)
    for number in sorted(training - labeled - fixed, key=order.__getitem__):
        known = classes[number]
        if known is not None and wanted[known] and (known not in hidden or have[known] < wanted[known]):
            labeled.add(number)
            have[known] += 1
    return labeled


def _classes(targets: Tensor | None, size: int) -> list[int | None]:
    """Class of each sample, None for a sample without a label; 0 where samples do not have one class each."""
    if targets is None:
        return [0] * size
    classes = targets.tolist() if has_one_class(targets) else [0] * size
    return [one if known else None for one, known in zip(classes, has_label(targets).tolist(), strict=True)]


def _has_label(label: Any) -> bool:
    if isinstance(label, Tensor):
        return bool(is_labeled(label).any())
    return label is not None and (not math.isnan(label) if isinstance(label, float) else label >= 0)


def _differ(a: Any, b: Any) -> bool:
    """Whether two labels differ where both are known."""
    if not isinstance(a, Tensor):
        return bool(a != b)
    return bool((a != b)[is_labeled(a) & is_labeled(b)].any())


def _members(
    side: str, parts: Mapping[str, Identities], split: Split, *, whole_pool: bool
) -> Iterator[tuple[str, int]]:
    """Part and number of each sample of a side."""
    if side == "test":
        yield from (("test", n) for n in range(len(parts["test"]) if "test" in parts else 0))
        return
    if side == "validation":
        yield from (("train", n) for n in split.val)
        return
    size = len(parts["train"])
    used = {*split.labeled, *split.unlabeled, *split.held_out}
    yield from (("train", n) for n in sorted(used) if n < size)
    pool = range(len(parts["unlabeled"]) if "unlabeled" in parts else 0)
    left_out, rows = {*split.left_out}, {row[0] for row in split.label_rows}
    yield from (("unlabeled", n) for n in pool if size + n not in left_out and (whole_pool or size + n in rows))


def _name(side: str, parts: Mapping[str, Identities], part: str, number: int) -> str:
    """Name a sample by its path, else by part and index."""
    path = parts[part].paths[number]
    if path:
        return path if len(path) <= _NAME_LENGTH else f"...{path[-_NAME_LENGTH:]}"
    return f"{'unlabeled' if part == 'unlabeled' else side} sample {number}"


def _samples(count: int, side: str) -> str:
    return f"{count} {side} sample{'' if count == 1 else 's'}"


def _gaps(parts: Mapping[str, Identities]) -> list[str]:
    """Why some samples cannot be compared."""
    gaps = [
        f"the {part} part returns another item each time, so its copies cannot be found; they are not counted"
        for part, identities in parts.items()
        if len(identities) and not any(identities.contents)
    ]
    files: dict[bool, list[str]] = defaultdict(list)
    for part, identities in parts.items():
        if any(identities.contents):
            files[all(identities.paths)].append(part)
    if len(files) > 1:
        gaps.append(
            f"files ({', '.join(files[True])}) and samples in memory ({', '.join(files[False])}) cannot be compared by "
            "content; the command duplicates compares their pictures"
        )
    return gaps


def _describe_change(before: Split, after: Split) -> str:
    """Describe what is different in a split whose copies were brought together."""
    fields = {"labeled": "labeled", "validation": "val", "left out": "left_out"}
    sizes = [f"{name} {len(getattr(after, key))} (was {len(getattr(before, key))})" for name, key in fields.items()]
    to_training = len({*before.val} - {*after.val, *after.left_out})
    to_val = len({*after.val} - {*before.val})
    moves = f"from validation to training: {to_training}, from training to validation: {to_val}"
    return f"{moves}; {', '.join(sizes)}"
