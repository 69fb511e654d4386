"""Find the split that a datamodule's arguments name: sampled or from a file, with the rows of a label file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from kd_lightning.data.duplicates import DuplicatePolicy, handle_duplicates
from kd_lightning.data.groups import GroupOf, groups_of, keep_apart, of_other_parts
from kd_lightning.data.identity import base_content
from kd_lightning.data.labels.build import check_label_rows, corrected_labels, val_labels
from kd_lightning.data.labels.label_file import read_label_file
from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.targets import count_classes
from kd_lightning.data.split_samples import check_own_val, follow_samples
from kd_lightning.data.splits import Split, make_split
from kd_lightning.errors import InputError

DEFAULT_VAL_SIZE = 0.1
"""Share of the training part that is for validation, unless the source has a validation part of its own."""


def find_split(
    samples: Samples,
    *,
    labeled: int | float | str | Path | None,
    labeled_at_most: bool,
    val_size: int | float | None,
    seed: int,
    duplicates: DuplicatePolicy,
    label_file: str | Path | None,
    correct_val: bool,
    group: GroupOf | None,
    group_names: Sequence[str],
) -> Split:
    """Find the split that the arguments name; those are the arguments of the datamodule.

    Args:
        samples: The source's images by index.
        labeled: See the datamodule.
        labeled_at_most: Likewise.
        val_size: Likewise.
        seed: Likewise.
        duplicates: Likewise; only ``"together"`` changes the split.
        label_file: Likewise.
        correct_val: Likewise.
        group: Likewise.
        group_names: Names of the superclasses.

    Raises:
        InputError: For a split or label file that does not fit the data.
    """
    parts = samples.parts
    targets, names = parts.train.targets, parts.class_names
    if parts.own_val and val_size is not None:
        raise InputError(f"val_size: {val_size}, but {samples.source} has its own validation part; leave val_size out")
    groups = groups_of(samples, group)
    if isinstance(labeled, str | Path):
        split = Split.load(Path(labeled), targets, samples.label_contents)
        if split.samples is not None:
            now, contents, own = samples.identities[0], samples.label_contents, parts.val_indices
            pool = lambda: samples.pool_identities  # noqa: E731
            split = follow_samples(split, Path(labeled), targets, now, pool, names, contents, own)
        elif parts.own_val:
            trained = {*split.labeled, *split.unlabeled, *split.held_out}
            check_own_val(Path(labeled), trained, {*split.val}, {*parts.val_indices}, samples.identities[0].paths)
    else:
        options: dict[str, Any] = {
            "at_most": labeled_at_most,
            "label_contents": samples.label_contents,
            "own_val": parts.own_val,
        }
        size = 0 if parts.own_val else DEFAULT_VAL_SIZE if val_size is None else val_size
        if groups is not None:
            options |= {"groups": groups[: samples.training], "left_out": of_other_parts(groups, samples)}
        split = make_split(targets, labeled, size, seed, names, **options)
    if duplicates == "together":
        split = check_duplicates(duplicates, samples, split, grouped=groups is not None)
    elif parts.own_val:
        _check_no_file_twice(samples)
    if label_file is not None:
        images, identities = samples.label_file_parts()
        several = targets.ndim == 2  # labels of a sample
        rows = read_label_file(
            Path(label_file),
            images,
            identities=identities,
            targets=val_labels(parts.train, split).visible,
            class_names=names or [str(c) for c in range(targets.shape[1] if several else count_classes(targets, None))],
            group_names=group_names,
            val_indices=split.val,
            correct_val=correct_val,
        )
        split = split.with_label_rows(rows)
    if groups is not None:
        split = keep_apart(split, groups, samples)
    check_label_rows(split, parts, unlabeled_part=samples.unlabeled != "test")
    return split


def _check_no_file_twice(samples: Samples) -> None:
    """Raise InputError if an item is in the training part and in the source's own validation part, by path and content.

    Items of one file, such as tiles of a picture, are different ones.
    """
    own = samples.parts.val_indices
    files = map(samples.path, range(own.stop))
    paths = [os.path.abspath(path) if path else "" for path in files]  # noqa: PTH100  (resolve() follows links)
    shared = ({*paths[: own.start]} & {*paths[own.start :]}) - {""}
    if not shared:
        return
    contents = [*map(base_content, samples.identities[0].contents)]
    val = {(paths[n], contents[n]) for n in own}
    if both := [n for n in range(own.start) if paths[n] in shared and (paths[n], contents[n]) in val]:
        raise InputError(
            f"val: {len(both)} samples of {samples.source} are in the training part, too ({paths[both[0]]}); name a "
            "part of others, or leave them out of training by duplicates: together"
        )


def check_same_on_ranks(trainer: Trainer, hashes: Sequence[str]) -> None:
    """Compare hashes of samples and split with those of rank 0. All ranks must call this.

    Raises:
        InputError: On a rank that has others.
    """
    mine = [*hashes]
    if trainer.strategy.broadcast(mine) != mine:
        raise InputError(
            f"rank {trainer.global_rank} has other samples or another split than rank 0; all ranks must read the same "
            "data"
        )


def check_duplicates(duplicates: DuplicatePolicy, samples: Samples, split: Split, grouped: bool = False) -> Split:
    """Count, refuse or separate exact duplicates between training, validation and test.

    Args:
        duplicates: The policy.
        samples: The source's images by index.
        split: The split.
        grouped: Whether the validation part has whole groups. It then stays as it is, as the source's own does.

    Raises:
        InputError: For duplicates under ``"refuse"``.
    """
    names = {"train": samples.identities[0]}
    targets = {"train": samples.parts.train.targets}
    if split.label_rows and duplicates != "together":  # which keeps classes as the split has drawn them
        targets["train"] = corrected_labels(targets["train"], split.label_rows)
    if samples.unlabeled != "test" and samples.parts.unlabeled is not None:
        names["unlabeled"] = samples.identities[1]
    if samples.parts.test is not None:
        names["test"] = samples.test_identities
        targets["test"] = samples.parts.test.targets
    options = {"whole_pool": samples.unlabeled == "source", "own_val": grouped or samples.parts.own_val > 0}
    return handle_duplicates(duplicates, split, names, targets, **options)
