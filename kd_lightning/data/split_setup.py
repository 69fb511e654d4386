"""Find the split that a datamodule's arguments name: sampled or from a file, with the rows of a label file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from kd_lightning.data.duplicates import DuplicatePolicy, handle_duplicates
from kd_lightning.data.labels.build import check_label_rows
from kd_lightning.data.labels.label_file import read_label_file
from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.targets import count_classes
from kd_lightning.data.split_samples import follow_samples
from kd_lightning.data.splits import Split, make_split
from kd_lightning.errors import InputError


def find_split(
    samples: Samples,
    *,
    labeled: int | float | str | Path | None,
    labeled_at_most: bool,
    val_size: int | float,
    seed: int,
    duplicates: DuplicatePolicy,
    label_file: str | Path | None,
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
        group_names: Names of the superclasses.

    Raises:
        InputError: For a split or label file that does not fit the data.
    """
    parts = samples.parts
    targets, names = parts.train.targets, parts.class_names
    if isinstance(labeled, str | Path):
        split = Split.load(Path(labeled), targets, samples.label_contents)
        if split.samples is not None:
            now = samples.identities[0]
            contents = samples.label_contents
            split = follow_samples(split, Path(labeled), targets, now, lambda: samples.pool_identities, names, contents)
    else:
        contents = samples.label_contents
        split = make_split(targets, labeled, val_size, seed, names, at_most=labeled_at_most, label_contents=contents)
    if duplicates == "together":
        split = check_duplicates(duplicates, samples, split)
    if label_file is not None:
        images = samples.images[:1] if samples.unlabeled == "test" else samples.images  # no labels for test images
        rows = read_label_file(
            Path(label_file),
            images,
            identities=samples.identities[: len(images)],
            targets=targets,
            class_names=names or [str(c) for c in range(count_classes(targets, None))],
            group_names=group_names,
            val_indices=split.val,
        )
        split = split.with_label_rows(rows)
    check_label_rows(split, parts, unlabeled_part=samples.unlabeled != "test")
    return split


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


def check_duplicates(duplicates: DuplicatePolicy, samples: Samples, split: Split) -> Split:
    """Count, refuse or separate exact duplicates between training, validation and test.

    Raises:
        InputError: For duplicates under ``"refuse"``.
    """
    names = {"train": samples.identities[0]}
    targets = {"train": samples.parts.train.targets}
    if samples.unlabeled != "test" and samples.parts.unlabeled is not None:
        names["unlabeled"] = samples.identities[1]
    if samples.parts.test is not None:
        names["test"] = samples.test_identities
        targets["test"] = samples.parts.test.targets
    return handle_duplicates(duplicates, split, names, targets, whole_pool=samples.unlabeled == "source")
