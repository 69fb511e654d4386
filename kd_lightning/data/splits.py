"""Splits: which training samples are labeled, unlabeled, or for validation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.group_sampling import choose_groups
from kd_lightning.data.identity import Identities
from kd_lightning.data.sources.targets import count_classes, has_label, has_one_class
from kd_lightning.errors import InputError


@dataclass(frozen=True)
class Split:
    """Indices of the training part of a source, and the rows of label files.

    ``labeled``, ``unlabeled``, ``val``, ``held_out`` and ``left_out`` have no sample in common, and hold every sample.

    Attributes:
        labeled: Samples whose label training may see.
        unlabeled: The other training samples.
        val: Samples of the validation part.
        seed: Seed that the split was sampled with.
        data: Hash of the source's labels, which identifies the data where ``samples`` is None.
        held_out: Samples whose known label is hidden from training. They are always in the unlabeled pool.
        label_rows: Rows of label files, ``[index, label, kind, weight]`` each. The label of kind coarse is a name. For
            these samples the rows replace the source's labels, also for those of ``val``.
        left_out: Samples that are in no part.
        samples: Paths and contents of the training part, which decide which sample an index means. None if they are
            unknown.
        pool: Paths and contents of the source's unlabeled part, if ``label_rows`` or ``left_out`` has samples of it;
            their indices count on from the training part.
        class_names: Names of the classes, by number, which decide what a label of ``label_rows`` means.
    """

    labeled: list[int]
    unlabeled: list[int]
    val: list[int]
    seed: int
    data: str
    held_out: list[int] = field(default_factory=list)
    label_rows: list[list[Any]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    samples: Identities | None = field(default=None, compare=False, repr=False)
    pool: Identities | None = field(default=None, compare=False, repr=False)
    class_names: list[str] | None = field(default=None, compare=False)

    @property
    def hash(self) -> str:
        """SHA-256 of the indices, label rows and labels, without the names of the samples."""
        content = {name: getattr(self, name) for name in (*_PARTS, "label_rows", "seed", "data")}
        return _hash({name: value for name, value in content.items() if name not in _LATER or value})

    @property
    def beyond(self) -> list[int]:
        """Indices of samples of the source's unlabeled part, in a split whose ``samples`` are known."""
        size = 0 if self.samples is None else len(self.samples)
        return sorted(index for index in {*self.left_out, *(row[0] for row in self.label_rows)} if index >= size)

    def save(self, path: Path) -> None:
        """Write the split and a hash of it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"format": _FORMAT} | asdict(self)
        content = {name: value for name, value in content.items() if value is not None or name in _PARTS}
        path.write_text(json.dumps(content | {"hash": _hash(content)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, targets: Tensor, label_contents: Sequence[str] | None = None) -> Split:
        """Read a saved split.

        If the file names its samples, its indices are those of the time when it was written, and
        :func:`~kd_lightning.data.split_samples.follow_samples` brings them up to date. If it does not, it must belong
        to data with these training labels.

        Args:
            path: The file.
            targets: Training labels.
            label_contents: Hashes of dense labels, see :func:`hash_targets`.

        Raises:
            InputError: If the file is missing, damaged, or belongs to other data, and if the split is no partition of
                its samples: a part holds what is no sample, or a sample is in two parts or in none.
        """
        if not path.is_file():
            raise InputError(f"labeled: no split file at {path}; allowed: a split file, a count per class, a fraction")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            written = fields.pop("hash")
            if (version := fields.pop("format", 1)) not in (1, _FORMAT):
                raise ValueError(f"its format must be 1 or {_FORMAT}, got {version!r:.20}")
            new = version == _FORMAT
            hashed = {"format": _FORMAT, **fields} if new else {k: v for k, v in fields.items() if k not in _LATER or v}
            if not new and fields.pop("pool", ""):
                raise ValueError("it has labels for the unlabeled part, but does not name the samples; make it anew")
            names = {key: Identities(**fields[key]) for key in ("samples", "pool") if isinstance(fields.get(key), dict)}
            split = cls(**fields | names)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"labeled: {path} is not a split file: {error}") from error
        if problem := _wrong_field(split):
            raise InputError(f"labeled: {path}: {problem}")
        if _hash(hashed) != written:
            raise InputError(f"labeled: {path} was changed after it was written (its hash differs)")
        if split.samples is None and split.data != hash_targets(targets, label_contents):
            raise InputError(f"labeled: {path} belongs to other data (the hash of the source's labels differs)")
        size = len(targets) if split.samples is None else len(split.samples)
        if not new:  # these have no left_out
            parts = {index for name in _PARTS for index in getattr(split, name)}
            split = replace(split, left_out=sorted({*range(size)} - parts))
        if problem := wrong_sample(split, size):
            raise InputError(f"labeled: {path}: {problem}")
        if split.samples is None:
            rank_zero_warn(f"labeled: {path} does not name its samples; whether they are the same cannot be checked")
        return split

    def with_label_rows(self, rows: Sequence[Sequence[Any]]) -> Split:
        """Add rows of a label file; a later row of a sample replaces an earlier one.

        Samples of kind clean or noisy become labeled, those of kind missing or coarse unlabeled. Those of the
        validation part stay there: metrics compare with the labels of their rows.

        Args:
            rows: ``(index, label, kind, weight)`` each.
        """
        known = {int(row[0]): [*row] for row in [*self.label_rows, *rows]}
        labels = {index for index, row in known.items() if row[2] in ("clean", "noisy")}
        labels -= {*self.held_out, *self.left_out, *self.val}
        labeled = ({*self.labeled} - known.keys()) | labels
        samples = {*self.labeled, *self.unlabeled}
        return replace(
            self,
            labeled=sorted(labeled),
            unlabeled=sorted(samples - labeled - {*self.held_out}),
            label_rows=[known[index] for index in sorted(known)],
        )


_FORMAT = 2
_ANY = "samples with a label"
"""Name of the only stratum of dense labels."""
_PARTS = ("labeled", "unlabeled", "val", "held_out", "left_out")
_LATER = ("held_out", "label_rows", "left_out", "pool")  # empty ones are not hashed, since older splits lack them


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _wrong_field(split: Split) -> str:
    """Return what is wrong with the types of the fields, empty if nothing is."""
    if not isinstance(split.data, str):
        return f"data must be a text, got {split.data!r:.80}"
    for name in ("samples", "pool"):
        names: Any = getattr(split, name)
        if names is not None:
            if not isinstance(names, Identities):
                return f"{name} must hold paths and contents, got {names!r:.80}"
            columns: list[Any] = [names.paths, names.contents]
            if not all(isinstance(column, list) and {*map(type, column)} <= {str} for column in columns):
                return f"{name} must hold lists of texts, paths and contents"
            if len(names.paths) != len(names.contents):
                return f"{name} must hold one path for each content"
    if split.class_names is not None and not isinstance(split.class_names, list):
        return f"class_names must be a list, got {split.class_names!r:.80}"
    if type(split.seed) is not int:
        return f"seed must be an integer, got {split.seed!r:.80}"
    for name in (*_PARTS, "label_rows"):
        if not isinstance(getattr(split, name), list):
            return f"{name} must be a list, got {getattr(split, name)!r:.80}"
    for row in split.label_rows:
        if not isinstance(row, list) or len(row) != 4:
            return f"label_rows must hold [index, label, kind, weight] each, got {row!r:.80}"
    for name, indices in _indices(split):
        if {*map(type, indices)} - {int}:  # the type of True is not int
            wrong = next(index for index in indices if type(index) is not int)
            return f"{name} must hold the numbers of samples, got {wrong!r:.80}"
    return ""


def wrong_sample(split: Split, size: int) -> str:
    """Return why a split is no partition of the training part; empty if it is one.

    A part holds what is no sample, a sample comes twice, or a sample is in no part. A number from ``size`` on is a
    sample of the source's unlabeled part, which has a label row or is left out.
    """
    place: dict[int, str] = {}
    lost: set[int] = set()
    beyond = {index for _, indices in _indices(split) for index in indices if index >= size}
    beyond &= {*split.left_out, *(row[0] for row in split.label_rows)}
    if split.pool is not None:
        beyond &= {*range(size + len(split.pool))}
    for name, indices in _indices(split):
        samples = {*indices}
        allowed = range(size) if name == "val" else beyond
        if wrong := [index for index in samples if index < 0 or (index >= size and index not in allowed)]:
            return f"{name} must hold samples 0 ... {size - 1}, got {min(wrong)}"
        if len(samples) < len(indices):
            twice = next(index for index, count in Counter(indices).items() if count > 1)
            return f"{name} holds sample {twice} twice"
        if name == "label_rows":
            lost = {*range(size)} - place.keys()
            continue
        if both := samples & place.keys():
            return f"sample {min(both)} is in {place[min(both)]} and in {name}"
        place |= dict.fromkeys(samples, name)
    return f"sample {min(lost)} is in no part; left_out names samples that nothing uses" if lost else ""


def _indices(split: Split) -> Iterator[tuple[str, list[Any]]]:
    yield from ((name, getattr(split, name)) for name in _PARTS)
    yield "label_rows", [row[0] for row in split.label_rows]


def hash_targets(targets: Tensor, label_contents: Sequence[str] | None = None) -> str:
    """SHA-256 of labels; identifies the data of a split.

    Args:
        targets: Labels.
        label_contents: Hashes of dense labels, of which ``targets`` has only which samples have some. Default: None,
            which means that labels are not dense.
    """
    content = f"{targets.dtype} {[*targets.shape]}".encode() + targets.numpy().tobytes()
    return hashlib.sha256(content + "\n".join(label_contents or ()).encode()).hexdigest()


def make_split(
    targets: Tensor,
    labeled: float | None,
    val_size: float,
    seed: int,
    class_names: Sequence[str] | None = None,
    *,
    at_most: bool = False,
    label_contents: Sequence[str] | None = None,
    own_val: int = 0,
    groups: Sequence[str] | None = None,
    left_out: Collection[int] = (),
) -> Split:
    """Sample a split at random, stratified by class. Samples without a label are unlabeled.

    The validation part is sampled first and does not depend on ``labeled``. With the same seed, a smaller labeled set
    is a subset of a larger one.

    Args:
        targets: Training labels: (N,) class indices, or (N, L) zeros and ones; -100 or NaN where they are missing.
            Floats, and rows of several labels, are split by fraction and without strata.
        labeled: An int per class (0 for none), a fraction of each class in (0, 1] (at least one sample), or None for
            all that have a label.
        val_size: An int per class, or a fraction of each class in (0, 1] (at least one sample); 0 for no validation
            part.
        seed: Seed of the random order.
        class_names: Names of all classes. Default: None, which means their numbers.
        at_most: Whether a class with fewer samples than an int ``labeled`` is labeled whole. A fraction ``val_size``
            below 1 then leaves each class at least one training sample.
        label_contents: Hashes of dense labels, see :func:`hash_targets`. Samples are then split without strata, and an
            int is a number of samples. Default: None, which means that labels are not dense.
        own_val: Number of samples at the end that are the source's own validation part: all of it, and nothing else,
            is the validation part then. Default: 0, which means that it is sampled.
        groups: Group of each sample. The validation part then has whole groups, which hold about as many samples of
            each class as ``val_size`` asks for. Default: None, which means no groups.
        left_out: Samples that are in no part.

    Raises:
        InputError: For a number out of range, or more samples than a class has. The message names the class.
    """
    dense, single = label_contents is not None, has_one_class(targets)
    class_names = [_ANY] if dense else class_names
    known = has_label(targets)
    size = len(targets) - own_val
    known[size:] = False
    unlabeled = {*(~known[:size]).nonzero().flatten().tolist()} - {*left_out}
    known[[*left_out]] = False
    if not single and any(isinstance(n, int) and n > 0 for n in (labeled, val_size)):
        what = "many labels" if targets.ndim > 1 else "a float as label"
        raise InputError(
            f"labeled and val_size must be fractions where a sample has {what}, got a count per class; a class must be "
            "an integer"
        )
    if labeled and not at_most and not known.any():
        raise InputError(f"labeled: {labeled}, but no training sample has a label; allowed: 0 or null")
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[int]] = {"labeled": [], "unlabeled": [*unlabeled], "left_out": [*left_out]}
    parts["val"] = [*range(size, len(targets))]
    in_val: set[int] = set()
    if groups is not None and val_size:
        in_val = _sample_groups(groups, targets if single else None, known, val_size, seed, class_names)
        parts["val"] += in_val
    for name, members in _classes(targets[:size], class_names) if single else [("0", known.nonzero().flatten())]:
        order = members[torch.randperm(len(members), generator=generator)].tolist()
        order = [index for index in order if known[index]]
        if not order:  # no training sample has the class
            if isinstance(labeled, int) and labeled and not at_most:
                raise InputError(
                    f"labeled: {labeled} per class, but class {name!r} has no training sample; allowed: a fraction, or "
                    "labeled_at_most: true"
                )
            continue
        order = [index for index in order if index not in in_val]
        val = _count("val_size", val_size, len(order), name) if val_size and groups is None else 0
        if at_most and not isinstance(val_size, int) and val_size < 1:
            val = min(val, len(order) - 1)
        rest = len(order) - val
        if rest < 1:
            hint = "" if isinstance(val_size, int) or val_size >= 1 else "; labeled_at_most: true leaves it one"
            raise InputError(f"val_size: {val_size} leaves class {name!r} no training sample of its {len(order)}{hint}")
        count = rest if labeled is None else _count("labeled", labeled, rest, name, at_most)
        parts["val"] += order[:val]
        parts["labeled"] += order[val : val + count]
        parts["unlabeled"] += order[val + count :]
    indices: Any = {name: sorted(part) for name, part in parts.items()}
    split = Split(**indices, seed=seed, data=hash_targets(targets, label_contents))
    if problem := wrong_sample(split, len(targets)):
        raise InputError(f"split: {problem}")
    return split


def _sample_groups(
    groups: Sequence[str],
    targets: Tensor | None,
    known: Tensor,
    val_size: float,
    seed: int,
    class_names: Sequence[str] | None,
) -> set[int]:
    """Return the labeled samples of the groups of the validation part."""
    members = known.nonzero().flatten()
    if not len(members):
        return set()
    of_members = torch.zeros_like(members) if targets is None else targets[members]
    numbers, classes, counts = torch.unique(of_members, return_inverse=True, return_counts=True)
    names = [class_names[number] if class_names else str(number) for number in numbers.tolist()]
    sizes = zip(counts.tolist(), names, strict=True)
    wanted = torch.tensor([_count("val_size", val_size, count, name) for count, name in sizes])
    chosen = choose_groups([groups[n] for n in members.tolist()], classes, wanted, seed)
    if not chosen:
        raise InputError(f"val_size: {val_size}: no group can be for validation; each one holds too many samples")
    return {n for n in members.tolist() if groups[n] in chosen}


def _classes(targets: Tensor, names: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each class, ascending, and its samples, ascending.

    Of classes without a sample only the first is yielded: there may be very many.
    """
    highest = int(targets.max()) if len(targets) else -1
    if names and highest >= len(names):
        raise InputError(f"class_names must name all classes, 0 ... {highest}, got {len(names)} names")
    order = targets.argsort(stable=True)
    numbers, counts = torch.unique_consecutive(targets[order], return_counts=True)
    members = dict(zip(numbers.tolist(), torch.split(order, counts.tolist()), strict=True))
    members.pop(IGNORE_INDEX, None)
    empty = next((number for number in range(count_classes(targets, names)) if number not in members), None)
    if empty is not None:
        members[empty] = order[:0]
    for number in sorted(members):
        yield names[number] if names else str(number), members[number]


def _count(key: str, size: float, available: int, name: str, at_most: bool = False) -> int:
    if isinstance(size, int):
        least = 0 if key == "labeled" else 1
        if at_most and size >= least:
            return min(size, available)
        if not least <= size <= available:
            more = ", or labeled_at_most: true" if key == "labeled" else ""
            what = f" per class, but class {name!r} has {available} samples for it"
            what = f", but {available} samples have a label for it" if name == _ANY else what
            raise InputError(f"{key}: {size}{what}; allowed: {least} ... {available}{more}")
        return size
    if not 0.0 < size <= 1.0:
        raise InputError(f"{key}: a fraction must lie in (0, 1], an int is a count per class, got {size}")
    return max(1, round(size * available))
