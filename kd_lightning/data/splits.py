"""Which training samples are labeled, unlabeled, or kept for validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError


@dataclass(frozen=True)
class Split:
    """Indices into the training part of a source.

    Attributes:
        labeled: Samples whose label training may see.
        unlabeled: The rest.
        val: Samples kept for validation, with their labels.
        seed: What drew it.
        data: Hash of the source's labels: which data it belongs to.
        held_out: Samples whose label is hidden though it is known; they join the pool wherever that comes from.
        answers: What label files said, ``[index, label, kind, weight]`` each (the label of kind coarse by name); the
            last word on these samples.
        pool: Hash of the source's unlabeled part, if there are answers for images in there.
    """

    labeled: list[int]
    unlabeled: list[int]
    val: list[int]
    seed: int
    data: str
    held_out: list[int] = field(default_factory=list)
    answers: list[list[Any]] = field(default_factory=list)
    pool: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of everything in it."""
        later = ("held_out", "answers", "pool")  # splits that were saved before there were such have no trace of them
        content = {name: value for name, value in asdict(self).items() if name not in later or value}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as JSON, its hash included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self) | {"hash": self.hash}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, targets: Tensor) -> Split:
        """Read one that was saved, and check that it belongs to this data.

        Raises:
            InputError: If the file is missing, damaged, or belongs to other data.
        """
        if not path.is_file():
            raise InputError(f"labeled: no split file at {path}; allowed: such a path, a count per class, a fraction")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            written = fields.pop("hash")
            split = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"labeled: {path} is no split file: {error}") from error
        if split.hash != written:
            raise InputError(f"labeled: {path} was changed after it was written (its hash does not fit)")
        if split.data != hash_targets(targets):
            raise InputError(f"labeled: {path} belongs to other data: the labels of this source are not those it split")
        return split

    def with_answers(self, answers: Sequence[Sequence[Any]]) -> Split:
        """The split of a grown set of labels: answered samples are labeled, those said to be missing or coarse are not.

        Raises:
            InputError: For an answer to a sample kept for validation, whose label is not for training.
        """
        if kept := {*self.val} & {int(answer[0]) for answer in answers}:
            raise InputError(f"label_file: sample {min(kept)} is kept for validation, and cannot be trained on")
        known = {int(row[0]): [*row] for row in [*self.answers, *answers]}
        labels = {index for index, row in known.items() if row[2] in ("clean", "noisy")} - {*self.held_out}
        labeled = ({*self.labeled} - known.keys()) | labels
        everyone = {*self.labeled, *self.unlabeled}
        return replace(
            self,
            labeled=sorted(labeled),
            unlabeled=sorted(everyone - labeled - {*self.held_out}),
            answers=[known[index] for index in sorted(known)],
        )


def hash_targets(targets: Tensor) -> str:
    """SHA-256 of labels: which data a split belongs to."""
    return hashlib.sha256(f"{targets.dtype} {[*targets.shape]}".encode() + targets.numpy().tobytes()).hexdigest()


def make_split(
    targets: Tensor, labeled: float | None, val_size: float, seed: int, class_names: Sequence[str] | None = None
) -> Split:
    """Draw a split, stratified by class.

    The validation part is drawn first, so it is the same whatever is labeled; and of one seed, fewer labels are a
    subset of more.

    Args:
        targets: The training labels: (N,) class indices, or (N, L) zeros and ones, which are drawn by fraction and
            without strata.
        labeled: An int per class (0 for none), a fraction of each class (at least one sample), or None for all.
        val_size: Likewise; 0 for no validation part.
        seed: Of the draw.
        class_names: For messages.

    Raises:
        InputError: For a number out of range, or more samples than a class has; the message names the class.
    """
    single = targets.ndim == 1 and not targets.is_floating_point()
    groups = [(targets == c).nonzero().flatten() for c in range(int(targets.max()) + 1)] if single else []
    if not single:
        groups = [torch.arange(len(targets))]
        if any(isinstance(n, int) and n > 0 for n in (labeled, val_size)):
            raise InputError(
                "labeled and val_size must be fractions where a sample has many labels, got a count per class"
            )
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[int]] = {"labeled": [], "unlabeled": [], "val": []}
    for number, members in enumerate(groups):
        name = class_names[number] if single and class_names else str(number)
        order = members[torch.randperm(len(members), generator=generator)].tolist()
        if not order:  # a class index that no training sample has
            if isinstance(labeled, int) and labeled:
                raise InputError(f"labeled: {labeled} per class asked, but class {name!r} has no training sample")
            continue
        kept = _count("val_size", val_size, len(order), name) if val_size else 0
        rest = len(order) - kept
        if rest < 1:
            raise InputError(f"val_size: {val_size} leaves class {name!r} no training sample of its {len(order)}")
        known = rest if labeled is None else _count("labeled", labeled, rest, name)
        parts["val"] += order[:kept]
        parts["labeled"] += order[kept : kept + known]
        parts["unlabeled"] += order[kept + known :]
    drawn: Any = {name: sorted(indices) for name, indices in parts.items()}
    return Split(**drawn, seed=seed, data=hash_targets(targets))


def _count(what: str, asked: float, available: int, name: str) -> int:
    if isinstance(asked, int):
        if not (0 if what == "labeled" else 1) <= asked <= available:
            raise InputError(f"{what}: {asked} per class asked, but class {name!r} has {available} to give")
        return asked
    if not 0.0 < asked <= 1.0:
        raise InputError(f"{what}: a fraction must lie in (0, 1], an int is a count per class, got {asked}")
    return max(1, round(asked * available))
