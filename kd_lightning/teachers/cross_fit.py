"""The file of a cross-fitting: which run has not seen the labels of which samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task

CROSS_FIT = "crossfit.json"
"""Name of the file."""
_FORMAT = 1


@dataclass(frozen=True)
class Fold:
    """A run, and the samples whose labels it has not seen.

    Attributes:
        run: The run's folder, relative to that of the file, with ``/`` between its parts.
        weights: SHA-256 of its deployed weights.
        paths: Path of each sample, as the data name it; empty for a sample without a file.
        contents: Hash of each sample's content. Samples of equal content have equal hashes.
    """

    run: str
    weights: str
    paths: list[str]
    contents: list[str]


@dataclass(frozen=True)
class CrossFit:
    """The runs of a cross-fitting, by fold. Equal contents are in one fold.

    Attributes:
        task: Task of the networks.
        folds: The folds, at least two.
        right: Number of held-out labels that the run of their fold predicts; None if that was not measured.
        class_names: Names of the classes in the order of the networks' outputs; None if they are not known.
    """

    task: Task
    folds: list[Fold]
    right: int | None = None
    class_names: list[str] | None = None

    @property
    def fold_of(self) -> dict[str, int]:
        """The number of the fold of each content."""
        return {content: number for number, fold in enumerate(self.folds) for content in fold.contents}

    @property
    def samples(self) -> int:
        """Number of held-out samples."""
        return sum(len(fold.contents) for fold in self.folds)

    @property
    def hash(self) -> str:
        """SHA-256 of what decides which network teaches a sample: the contents of each fold, in the order of folds."""
        contents = [sorted({*fold.contents}) for fold in self.folds]
        return _hash([self.task, contents])

    def save(self, path: Path) -> None:
        """Write the file at once, so that another process reads the one before or this one.

        Raises:
            InputError: If a content is in two folds, or empty.
        """
        if problem := self._problem():
            raise InputError(f"{path.name}: {problem}")
        content = {"format": _FORMAT} | asdict(self)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}.part")
        part.write_text(json.dumps(content | {"hash": _hash(content)}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> CrossFit:
        """Read the file.

        Raises:
            InputError: If it is missing or damaged, or was changed.
        """
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(
                f"path must be the file {CROSS_FIT} that kd-lightning crossfit TEACHER_CONFIG writes, {path} {what}"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            written, version = fields.pop("hash"), fields.pop("format")
            if version != _FORMAT:
                raise ValueError(f"its format must be {_FORMAT}, got {version!r:.20}")
            if _hash({"format": version} | fields) != written:
                raise ValueError("it was changed after it was written (its hash differs)")
            found = cls(**fields | {"folds": [Fold(**fold) for fold in fields["folds"]]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"path: {path} is no {CROSS_FIT}: {error}") from error
        if problem := found._problem():
            raise InputError(f"path: {path}: {problem}")
        return found

    def _problem(self) -> str:
        """Return what is wrong, empty if nothing is."""
        if self.task not in get_args(Task):
            return f"task must be one of {get_args(Task)}, got {self.task!r}"
        if len(self.folds) < 2:
            return f"it must have at least 2 folds, got {len(self.folds)}"
        known: dict[str, int] = {}
        for number, fold in enumerate(self.folds):
            if not fold.contents or len(fold.contents) != len(fold.paths):
                return f"fold {number} must have samples, and one path for each content"
            for path, content in zip(fold.paths, fold.contents, strict=True):
                if not content or "#" in content:
                    return f"fold {number} must have the content of each sample, got {content!r} for {path!r}"
                if known.setdefault(content, number) != number:
                    return f"folds {known[content]} and {number} have samples of one content ({path or content})"
        return ""


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
