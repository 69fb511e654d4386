"""The samples of a source by index: the training part, then the other images of the unlabeled pool."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from kd_lightning.batch import IGNORE_INDEX
from kd_lightning.data.file_hashes import hash_files
from kd_lightning.data.identity import Identities, identify, number_copies
from kd_lightning.data.sources.dense_labels import LabelRules, dense_part
from kd_lightning.data.sources.images import Images, path_of, read_image
from kd_lightning.data.sources.items import picture_of
from kd_lightning.data.sources.mask_files import MaskFiles
from kd_lightning.data.sources.source import Part, Parts
from kd_lightning.data.splits import Split, hash_targets
from kd_lightning.errors import InputError


@dataclass(frozen=True)
class Samples:
    """The images of a source, by an index that counts through its training part, and then through its other images.

    Attributes:
        parts: The parts of the source.
        unlabeled: Name of the unlabeled pool: ``"rest"``, ``"none"``, ``"source"`` or ``"test"``.
        source: Name of the source, for messages.
    """

    parts: Parts
    unlabeled: str
    source: str

    @property
    def training(self) -> int:
        """Number of images of the training part."""
        return len(self.parts.train.images)

    @cached_property
    def pool_images(self) -> list[Images]:
        """The images of the pool that are not in the training part.

        Raises:
            InputError: If the source lacks the part that ``unlabeled`` names.
        """
        if self.unlabeled not in ("source", "test"):
            return []
        test = None if self.parts.test is None else self.parts.test.images
        part = self.parts.unlabeled if self.unlabeled == "source" else test
        if part is None:
            name = "unlabeled" if self.unlabeled == "source" else "test"
            raise InputError(f"unlabeled: {self.unlabeled}, but {self.source} has no {name} part")
        return [part]

    @cached_property
    def images(self) -> list[Images]:
        """Images by index: the training part, then those of the pool or of the source's unlabeled part, if any."""
        other = self.pool_images or ([] if self.parts.unlabeled is None else [self.parts.unlabeled])
        return [self.parts.train.images, *other]

    def __len__(self) -> int:
        return sum(map(len, self.images))

    def unlabeled_indices(self, split: Split) -> list[int]:
        """Indices of the unlabeled images to train on, ascending."""
        if self.unlabeled == "rest":
            size = self.training
            return sorted({*(index for index in split.unlabeled if index < size), *split.held_out})
        pool = {*range(self.training, self.training + sum(map(len, self.pool_images)))}
        if self.unlabeled == "source":  # indices of the split that count on are those of the source's unlabeled part
            pool -= {*split.labeled, *split.left_out}
        return sorted(pool | {*split.held_out})

    @property
    def dense(self) -> bool:
        """Whether labels are dense: one for each position."""
        return self.parts.train.dense

    @cached_property
    def label_contents(self) -> list[str] | None:
        """Hashes of the dense labels of the training part; None if labels are not dense."""
        return self._label_contents(self.parts.train)

    def _label_contents(self, part: Part) -> list[str] | None:
        if not part.dense or part.label_contents is not None:
            return part.label_contents
        if isinstance(part.images, ConcatDataset):
            parts = [self._label_contents(part._replace(images=one)) for one in part.images.datasets]  # type: ignore[arg-type]
            return [content for contents in parts for content in contents or ()]
        if not isinstance(part.images, MaskFiles):  # of a source that has not hashed them
            return dense_part(part.images, LabelRules(void=self.parts.void)).label_contents
        paths = part.images.mask_paths
        hashes = iter(hash_files(path for path in paths if path is not None))
        return ["" if path is None else next(hashes) for path in paths]

    def absent_classes(self) -> set[int]:
        """Numbers of the classes that have a name, but no training image; none where labels are dense."""
        if self.dense:
            return set()
        trained = self.parts.train.targets[: self.parts.val_indices.start]
        return {*range(len(self.parts.class_names or ()))} - {*trained.flatten().tolist()}

    def hidden_truth(self, index: Tensor) -> Tensor:
        """True labels of images (N,), for metrics alone; -100 (NaN for many labels each) where they are unknown.

        Raises:
            InputError: If labels are dense.
        """
        self.check_one_label()
        known = [self.parts.train.targets]
        if self.unlabeled == "test" and self.parts.test is not None:
            known.append(self.parts.test.targets)
        if known[0].ndim > 1:  # one of many labels may be missing
            known = [targets.float() for targets in known]
        missing = float("nan") if known[0].is_floating_point() else IGNORE_INDEX
        known.append(known[0].new_full((len(self), *known[0].shape[1:]), missing))
        return torch.cat(known)[index]

    def check_one_label(self) -> None:
        """Raise InputError if labels are dense, since these are not in memory."""
        if self.dense:
            raise InputError(
                f"{self.source}: its labels are dense, one for each position, but labels of whole samples are needed "
                "here (pseudo-labels of a table, active learning, cleaning of labels)"
            )

    def image(self, index: int) -> Any:
        """An image before any transform; of several inputs all, if none of them is named as an image."""
        return picture_of(read_image(self.images, index))

    def path(self, index: int) -> str | None:
        """The path of an image's file; None if it has none."""
        return path_of(self.images, index)

    def label_file_parts(self) -> tuple[list[Images], list[Identities]]:
        """Images and identities of the parts that a label file may name; the test part is none of them.

        The own validation part stands by itself, so that its paths are relative to its own folder, too.
        """
        joined: Any = self.images[0]
        images = [*joined.datasets] if self.parts.own_val else [joined]
        if self.unlabeled == "test":
            return images, self._training_identities
        return [*images, *self.images[1:]], [*self._training_identities, *self.identities[1:]]

    # Names, which stay the same when other images come and go.

    @cached_property
    def identities(self) -> list[Identities]:
        """Paths and contents of each part of ``images``. Every image is read once.

        Paths of the own validation part begin with ``val: ``: a training image may have the same file name.
        """
        train, *own_val = self._training_identities
        for part in own_val:
            train += Identities([path and f"val: {path}" for path in part.paths], part.contents)
        return [train, *map(identify, self.images[1:])]

    @cached_property
    def _training_identities(self) -> list[Identities]:
        """Those of the training part, and of the own validation part if there is one; paths below its own folder."""
        images: Any = self.parts.train.images
        parts = [identify(part) for part in (images.datasets if self.parts.own_val else [images])]
        contents = iter(number_copies([content for part in parts for content in part.contents]))
        return [Identities(part.paths, [*islice(contents, len(part))]) for part in parts]

    @cached_property
    def test_identities(self) -> Identities:
        """Paths and contents of the test part."""
        if self.parts.test is None:
            raise InputError(f"{self.source} has no test part")
        return identify(self.parts.test.images)

    @cached_property
    def all_identities(self) -> Identities:
        """Paths and contents of all ``images``, by index."""
        return sum(self.identities[1:], self.identities[0])

    @property
    def pool_identities(self) -> Identities | None:
        """Paths and contents of the source's unlabeled part; None if there is none."""
        if self.parts.unlabeled is None:
            return None
        return identify(self.parts.unlabeled) if self.unlabeled == "test" else self.identities[1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the training part's paths, contents and labels, and of the unlabeled part's paths and contents."""
        pool = self.pool_identities
        train = self.parts.train.targets
        return _join_hashes(
            self.identities[0].hash, hash_targets(train, self.label_contents), "" if pool is None else pool.hash
        )

    @cached_property
    def test_hash(self) -> str:
        """SHA-256 of the test part's paths, contents and labels; empty without a test part."""
        test = self.parts.test
        if test is None:
            return ""
        return _join_hashes(self.test_identities.hash, hash_targets(test.targets, self._label_contents(test)))

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes by name of the samples that a fit may use: ``samples``, and ``test`` if the pool is the test part."""
        return {"samples": self.hash} | ({"test": self.test_hash} if self.unlabeled == "test" else {})

    @cached_property
    def images_hash(self) -> str:
        """SHA-256 of path and content of all ``images``, in order, and of which part the unlabeled pool is."""
        return _join_hashes(*(one.hash for one in self.identities), self.unlabeled)

    def name_samples(self, split: Split, class_names: list[str] | None) -> Split:
        """Return the split with paths and contents of its samples, and names of its classes."""
        names = self.identities[0]
        if not all(map(max, names.paths, names.contents)):  # a dataset returns other items each time
            return replace(split, samples=None, pool=None, class_names=class_names)
        named = replace(split, samples=names, class_names=class_names)
        return replace(named, pool=self.pool_identities) if named.beyond else replace(named, pool=None)


def check_pool_name(unlabeled: str) -> None:
    """Raise InputError for an unknown name of the unlabeled pool."""
    if unlabeled not in ("rest", "none", "source", "test"):
        raise InputError(f"unlabeled must be one of rest, none, source, test, got {unlabeled!r}")


def _join_hashes(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
