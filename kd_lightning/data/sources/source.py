"""The base of all sources, and the parts that they load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.sources.images import Images
from kd_lightning.data.sources.targets import has_label, has_one_class, normalize, to_tensor
from kd_lightning.errors import InputError


class Part(NamedTuple):
    """Images and their true labels: (N,) class indices, or (N, L) zeros and ones; -100 or NaN where they are missing.

    A source may return labels of any type of number, with -1 for missing ones; :func:`check_parts` brings them to one
    form.

    Attributes:
        images: The images, or other samples.
        targets: Their labels. Of dense labels, 0 for a sample that has some, -100 for one without.
        dense: Whether labels are dense: one for each position. They are read with the sample.
        weights: Factor of the hard loss of each sample, (N,), at least 0. Default: None, which means 1.
        groups: Group of each sample; no group stands on two sides of a split. Empty for a sample without one. Default:
            None, which means no groups.
        label_contents: Hashes of the dense labels of each sample; empty ones if the dataset returns others each time.
            Default: None, which means that labels are hashed when that is needed.
    """

    images: Images
    targets: Tensor
    dense: bool = False
    label_contents: list[str] | None = None
    weights: Tensor | None = None
    groups: list[str] | None = None


class Parts(NamedTuple):
    """The parts of a source; None for those that it lacks.

    Attributes:
        train: The training part.
        test: The test part.
        unlabeled: Samples without labels.
        class_names: Names of the classes, by number.
        void: Class number of dense labels that means no label, beside -1 and -100.
        pad_token: Number by which ``input_ids`` of different lengths are padded.
        val: The source's own validation part. :func:`join_val` puts it behind the training part.
        pool_groups: Group of each sample of ``unlabeled``. Default: None, which means none.
        own_val: Number of samples at the end of ``train`` that are the source's own validation part.
    """

    train: Part
    test: Part | None = None
    unlabeled: Images | None = None
    class_names: list[str] | None = None
    void: int | None = None
    pad_token: int = 0
    val: Part | None = None
    own_val: int = 0
    pool_groups: list[str] | None = None

    @property
    def val_indices(self) -> range:
        """Indices of the source's own validation part, which counts on from the training part."""
        size = len(self.train.images)
        return range(size - self.own_val, size)

    @property
    def images(self) -> list[Images]:
        """The images of all parts."""
        labeled = [part.images for part in (self.train, self.val, self.test) if part is not None]
        return labeled if self.unlabeled is None else [*labeled, self.unlabeled]


class Source(ABC):
    """Images, labels, and default transforms for them.

    Attributes:
        train_transform: Default augmentation, from an image to a tensor. None if images are tensors and stay as they
            are.
        eval_transform: Default transform for evaluation, without randomness. None likewise.
        stored_side: Short side in pixels that pictures need for the default transforms. None means their full size.
    """

    train_transform: nn.Module | None = None
    eval_transform: nn.Module | None = None
    stored_side: int | None = None

    def prepare(self) -> None:  # noqa: B027  (most sources have nothing to download)
        """Download missing files. Called once, on one process."""

    @abstractmethod
    def load(self) -> Parts:
        """Open the images and read the labels. Called on every process."""


def check_parts(parts: Parts, source: str) -> Parts:
    """Check that labels fit their images, the class names and each other, and bring them to one form.

    Args:
        parts: The parts of a source.
        source: Name of the source, for messages.

    Returns:
        The parts, with labels as of :func:`~kd_lightning.data.sources.targets.normalize`, and class names in Unicode
        NFC. The test and validation parts have class indices if the training part has, and floats likewise.

    Raises:
        InputError: If there is not one label for each image, if a class has no name, or if the test or validation part
            has labels of another kind. The message names an item.
    """
    train = _check_part(parts.train, f"the training part of {source}")
    test, val = (
        None if part is None else _check_like(part, train, f"the {name} part of {source}")
        for part, name in ((parts.test, "test"), (parts.val, "validation"))
    )
    for part, place in ((train, "train"), (test, "test"), (val, "val")):
        if part is not None and parts.class_names and not part.dense:  # dense labels are checked when they are read
            _check_names(part.targets, len(parts.class_names), place)
    names = None if parts.class_names is None else [normal_name(str(name)) for name in parts.class_names]
    return parts._replace(train=train, test=test, val=val, class_names=names)


def join_val(parts: Parts) -> Parts:
    """Put the validation part behind the training part, if there is one: one range of indices names both.

    Args:
        parts: Parts of :func:`check_parts`.
    """
    train, val = parts.train, parts.val
    if val is None:
        return parts
    images: Any = ConcatDataset([train.images, val.images])  # type: ignore[list-item]
    known = train.label_contents is not None and val.label_contents is not None
    contents = [*train.label_contents, *val.label_contents] if known else None  # type: ignore[misc]
    weights = None if train.weights is None else torch.cat([train.weights, torch.ones(len(val.targets))])
    groups = None if train.groups is None else [*train.groups, *(val.groups or [""] * len(val.targets))]
    joined = Part(images, torch.cat([train.targets, val.targets]), train.dense, contents, weights, groups)
    return parts._replace(train=joined, val=None, own_val=len(val.images))


def _check_like(part: Part, train: Part, place: str) -> Part:
    """Check a part, and bring its labels to the form of the training part's."""
    part = _check_part(part, place)
    if part.dense != train.dense:
        got = ["dense" if one.dense else "one of each sample" for one in (part, train)]
        raise InputError(f"{place}: its labels must be of the training part's kind, got {' and '.join(got)}")
    return part._replace(targets=_as_in_training(part.targets, train.targets, place))


def _check_part(part: Part, place: str) -> Part:
    if len(part.targets) != len(part.images):
        raise InputError(f"{place} must have one label for each image, got {len(part.targets)} for {len(part.images)}")
    return part._replace(targets=normalize(to_tensor(part.targets, place), place))


def _as_in_training(targets: Tensor, train: Tensor, place: str) -> Tensor:
    """Return labels of a part as class indices, or as floats, as those of the training part are."""
    if targets.shape[1:] != train.shape[1:] and len(targets):
        raise InputError(
            f"{place}: its labels must have the shape of the training part's, {['N', *train.shape[1:]]}, got "
            f"{['N', *targets.shape[1:]]}"
        )
    if targets.is_floating_point() == train.is_floating_point() or train.ndim > 1:
        return targets
    known = has_label(targets)
    if has_one_class(targets):
        return torch.where(known, targets.to(train.dtype), float("nan"))
    if wrong := ((targets != targets.round()) & known).nonzero().flatten().tolist():
        raise InputError(f"{place}: labels must be class indices, but item {wrong[0]} has {targets[wrong[0]]:g}")
    return normalize(torch.where(known, targets, -100.0).long(), place)


def _check_names(targets: Tensor, count: int, place: str) -> None:
    """Raise InputError for a class, or one of several labels, without a name."""
    if has_one_class(targets) and len(targets) and int(targets.max()) >= count:
        item = int((targets >= count).nonzero()[0])
        raise InputError(
            f"class_names must name all classes, but there are {count} names, and item {item} of {place} has class "
            f"{int(targets[item])} (classes count from 0)"
        )
    if targets.ndim == 2 and targets.shape[1] not in (1, count):
        raise InputError(f"class_names must name all {targets.shape[1]} labels of a sample, got {count} names")


def passed_over(images: Any) -> int:
    """Number of files and folders that a dataset has passed over since they are no samples; 0 where it is unknown."""
    if isinstance(images, Subset):
        return passed_over(images.dataset)
    if isinstance(images, ConcatDataset):
        return sum(map(passed_over, images.datasets))
    count = getattr(images, "passed_over", 0)
    return count if isinstance(count, int) else 0


def check_not_empty(parts: Parts, source: str) -> None:
    """Raise InputError for a part without images; ``source`` is the name of the source for the message."""
    images = {"train": parts.train.images, "unlabeled": parts.unlabeled}
    images |= {name: None if part is None else part.images for name, part in (("test", parts.test), ("val", parts.val))}
    for name, part in images.items():
        if part is not None and len(part) == 0:
            raise InputError(f"{name}: the {name} part of {source} is empty; it must have at least one image")
