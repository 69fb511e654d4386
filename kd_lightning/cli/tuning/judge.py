"""Which samples decide about settings: the validation part, or folds of the labels where it is small."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kd_lightning.cli.cross_fitting import stratified_folds, whole_groups
from kd_lightning.cli.parse import Config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.labels.build import val_labels
from kd_lightning.data.sources.targets import has_label
from kd_lightning.errors import InputError

LEAST_SAMPLES = 100
"""Validation samples that decide alone. With fewer, the 95 % interval of an accuracy is up to 20 points wide."""
_MOST_FOLDS = 5
_OPTION = "--tune"
_JOINED = "kd_lightning.cli.tuning.joined_source.JoinedSource"


@dataclass(frozen=True)
class Judge:
    """The samples that decide.

    Attributes:
        samples: Number of samples with a label that each setting is validated on, over all folds.
        text: What decides, and why.
        splits: Split file of each fold; empty if the validation part decides.
        sizes: Number of validation samples of each fold; one number without folds.
        has_validation: Whether the config itself has a validation part.
        joins_val: Whether folds have samples of the source's own validation part.
    """

    samples: int
    text: str
    splits: list[Path] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    has_validation: bool = True
    joins_val: bool = False


def find_judge(data: SemiSupervisedDataModule, folder: Path, limit: int | float | None = None) -> Judge:
    """Return the samples that decide about the settings of a config.

    From 100 validation samples on, these decide. If there are fewer, labeled and validation samples of the training
    part are split into folds, stratified by class and in whole groups, so that each of them validates once. The own
    validation part of a source is among them.

    Args:
        data: The datamodule of the config.
        folder: Where split files are written.
        limit: ``trainer.limit_val_batches``, which folds do not have. Default: None, which means all batches.

    Raises:
        InputError: If there is no validation part and labels are too few for folds.
    """
    data.prepare_data()
    data.setup("")
    split, parts = data.split, data.samples.parts
    assert split is not None
    known = has_label(val_labels(parts.train, split).visible)
    val = [index for index in split.val if known[index]]
    count = _validated(len(val), data.batch_size, limit)
    if count >= LEAST_SAMPLES:
        return Judge(count, f"the {count} validation samples decide", [], [count])
    labels = _labels(data, val)
    few = min([*labels.values()].count(name) for name in {*labels.values()}) if labels else 0
    if few < 2:
        found = f"{count} validation samples are too few to decide (fewer than {LEAST_SAMPLES})"
        reason = "no training sample has a label"
        if labels:
            single = sorted(name for name in {*labels.values()} if [*labels.values()].count(name) == 1)
            reason = f"folds of the labels need 2 of each class, got 1 of {', '.join(single)}"
        raise InputError(f"{_OPTION}: {found}, and {reason}; set a larger data.init_args.val_size")
    groups = whole_groups(data, [*labels])
    number = min(_MOST_FOLDS, few)
    if groups is not None:
        number = max(2, min(number, len({groups[index] for index in labels})))
    folds = stratified_folds(labels, number, data.seed, f"folds of {_OPTION}", groups)
    samples = replace(data.samples, parts=parts._replace(own_val=0))  # as JoinedSource has them
    named = samples.name_samples(split, data.class_names)
    digest = hashlib.sha256(json.dumps([named.hash, data.samples.hash, folds]).encode()).hexdigest()[:12]
    splits = []
    for number, fold in enumerate(folds):
        # of this content, and never written anew: fits of other processes read it
        path = (folder / f"splits-{digest}" / f"split_{number}.json").resolve()
        splits.append(path)
        if path.is_file():
            continue
        trained = sorted({*split.labeled, *val} - {*fold})
        # validation samples without a label validate nothing, and are in no part
        left_out = sorted({*split.left_out, *split.val} - {*val})
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        replace(named, labeled=trained, val=fold, left_out=left_out).save(part)
        part.replace(path)
    text = f"{count} validation samples are fewer than {LEAST_SAMPLES}, so {len(folds)} folds of all "
    text += f"{len(labels)} labeled and validation samples decide: each sample validates once"
    return Judge(len(labels), text, splits, [*map(len, folds)], count > 0, parts.own_val > 0)


def _validated(samples: int, batch_size: int, limit: int | float | None) -> int:
    """Return how many samples a validation with ``limit_val_batches`` reads; the integer 1 means one batch."""
    batches = math.ceil(samples / batch_size)
    most = batches if limit is None else min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return min(samples, most * batch_size)


def _labels(data: SemiSupervisedDataModule, val: list[int]) -> dict[int, str]:
    """Return {index: name of the class} of labeled and validation samples of the training part.

    Samples without a single class each, such as dense ones, all have the same name.
    """
    split, train = data.split, data.samples.parts.train
    assert split is not None
    indices = [index for index in split.labeled if index < len(train.targets)]
    indices = sorted({*indices, *val})
    if data.samples.dense or train.targets.ndim > 1 or train.targets.is_floating_point():
        return dict.fromkeys(indices, "samples with a label")
    visible, size = data.visible_labels(), len(train.targets)  # those of validation samples are hidden
    known = torch.where(visible[:size] >= 0, visible[:size], data.validation_labels())
    names = data.class_names or []
    return {
        index: names[int(known[index])] if int(known[index]) < len(names) else str(int(known[index]))
        for index in indices
        if known[index] >= 0
    }


def of_fold(config: Config, split: Path, *, joins_val: bool = False) -> Config:
    """Return the config with the split of a fold, which has the labels of a label file, too; all of it validates."""
    arguments = {**(config["data"].get("init_args") or {}), "labeled": str(split)}
    if "label_file" in arguments:
        arguments["label_file"] = None
    if joins_val:
        arguments["source"] = {"class_path": _JOINED, "init_args": {"source": arguments["source"]}}
    trainer = config["trainer"] | {"limit_val_batches": None}
    return config | {"data": config["data"] | {"init_args": arguments}, "trainer": trainer}
