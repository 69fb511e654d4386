"""Cross-fitting: one fit for each fold of the labels, without the labels of the fold."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from kd_lightning.cli.fit_once import fit_once
from kd_lightning.cli.parse import Config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.evaluation_batches import batches_of
from kd_lightning.data.identity import base_content
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.data.splits import Split
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.errors import InputError
from kd_lightning.modules.seams import Seams
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class, walk_config
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights


def require_one_process(config: Config, command: str, cure: str) -> torch.device:
    """Return the device of a config's trainer; InputError if it trains with several processes."""
    machine: Any = {name: config["trainer"][name] for name in ("accelerator", "devices", "num_nodes")}
    trainer = Trainer(**machine, logger=False)
    if trainer.world_size > 1:
        raise InputError(f"{command} runs on one process, got {trainer.world_size}; set {cure}")
    return trainer.strategy.root_device


def labeled_classes(data: Any) -> dict[int, str] | None:
    """Return {index: class's name, or number} of the labeled samples; None if samples have no single class."""
    labels = data.visible_labels() if hasattr(data, "visible_labels") else torch.zeros(0, 0)
    if labels.ndim > 1 or labels.is_floating_point():
        return None
    names = getattr(data, "class_names", None) or []
    known = {index: int(labels[index]) for index in (labels >= 0).nonzero().flatten().tolist()}
    names = [normal_name(str(name)) for name in names]
    return {index: names[label] if label < len(names) else str(label) for index, label in known.items()}


def build_data(config: Config, command: str) -> SemiSupervisedDataModule:
    """Build the datamodule of a config, and set it up for a fit; InputError if it has no samples by index."""
    data = build(LightningDataModule, config["data"])
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"{command} needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    data.prepare_data()
    data.setup("fit")
    return data


def whole_groups(data: SemiSupervisedDataModule, labeled: Sequence[int]) -> list[str] | None:
    """Return the group of each sample, for :func:`stratified_folds`; None if each labeled sample is alone.

    A group is that of the data, joined with those that have a copy of one of its labeled samples: a copy in another
    fold would be trained on.
    """
    groups = data.sample_groups()
    contents = data.identities("train").contents
    # a dataset that returns another item each time has no contents
    known = {index: base_content(contents[index]) for index in labeled if contents[index]}
    if groups is None and len({*known.values()}) == len(known):
        return None
    groups = [f"{number}" for number in range(len(contents))] if groups is None else groups
    parent: dict[str, str] = {}

    def root_of(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for index, content in known.items():
        parent[root_of(groups[index])] = root_of(first.setdefault(content, groups[index]))
    return [root_of(name) for name in groups]


def stratified_folds(
    labels: dict[int, str], folds: int, seed: int, option: str, groups: Sequence[str] | None = None
) -> list[list[int]]:
    """Split labeled samples into folds, stratified by class; InputError if a class has fewer than two labels.

    With groups, by index, each fold has whole ones.

    >>> [len(fold) for fold in stratified_folds({3: "cat", 5: "cat", 6: "cat", 8: "dog", 9: "dog"}, 2, 0, "--folds")]
    [3, 2]
    """
    if not 2 <= folds <= len(labels):
        raise InputError(f"{option} must lie in 2 ... {len(labels)}, the number of labels, got {folds}")
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in sorted(labels.items()):
        members[name].append(index)
    if single := sorted(name for name, found in members.items() if len(found) == 1):
        raise InputError(f"{option} needs 2 labels of each class, got 1 of {', '.join(single)}")
    if groups is not None:
        return _grouped_folds(labels, folds, seed, option, groups)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.tensor(found)[torch.randperm(len(found), generator=generator)] for found in members.values()]
    order = torch.cat(shuffled).tolist()  # all classes in one row, so that folds have equal sizes
    return [sorted(order[number::folds]) for number in range(folds)]


def _grouped_folds(
    labels: dict[int, str], folds: int, seed: int, option: str, groups: Sequence[str]
) -> list[list[int]]:
    from sklearn.model_selection import StratifiedGroupKFold

    indices = sorted(labels)
    own = [groups[index] for index in indices]
    if len({*own}) < folds:
        raise InputError(f"{option} must be at most {len({*own})}, the number of groups with labels, got {folds}")
    folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer samples than folds
        found = [*folder.split(indices, [labels[index] for index in indices], own)]
    parts = [sorted(indices[place] for place in places) for _, places in found]
    for part in parts:
        if lost := {*labels.values()} - {labels[index] for index in labels.keys() - {*part}}:
            raise InputError(f"{option}: one group has all labels of {', '.join(sorted(lost))}; it cannot be held out")
    return [part for part in parts if part]


def fit_folds(
    config: Config, split: Split, folds: Sequence[list[int]], folder: Path, samples: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """Yield a finished run for each fold, trained without the labels of the fold.

    The samples of the fold are in the run's pool. A run is fitted when it is reached, unless it is finished already. A
    run that was stopped is resumed.

    Args:
        config: The config of the fits.
        split: The split whose labels are hidden in turn.
        folds: Samples of each fold.
        folder: Folder of the fits.
        samples: Hashes of the samples of the data by name; runs that were fitted on others do not count. Default: None,
            which means that they are not compared.
    """
    for number, fold in enumerate(folds):
        path = (folder / f"split_{number}.json").resolve()
        labeled = sorted({*split.labeled} - {*fold})
        replace(split, labeled=labeled, held_out=sorted({*split.held_out, *fold})).save(path)
        print(f"[{number + 1}/{len(folds)}] {config['name']}_fold_{number}")
        yield fit_once(config_of_fold(config, path, number), samples)


def config_of_fold(config: Config, split: Path, number: int) -> Config:
    """Return the config with the split of a fold; its run lies in the folder of the split."""
    config = deepcopy(config) | {"name": f"{config['name']}_fold_{number}", "ckpt_path": None}
    arguments = config["data"]["init_args"] = {**(config["data"].get("init_args") or {}), "labeled": str(split)}
    if "label_file" in arguments:
        arguments["label_file"] = None  # the split has its labels
    config["trainer"] |= {"default_root_dir": str(split.parent), "logger": True, "enable_model_summary": False}
    config["checkpoint"]["dirpath"] = None
    return config


def weight_files(config: Config) -> list[str]:
    """Return the weight files that all folds read; their networks may have been trained on the hidden labels."""
    found = [(key, value, find_class(owner) is load_weights) for _, key, value, owner in walk_config(config["model"])]
    loaded = [file for key, file, weights in found if key == "initial_weights" or (key == "path" and weights)]
    return [*dict.fromkeys(str(file) for file in loaded if file)]


@torch.no_grad()
def predict_fold(
    run: Run, data: SemiSupervisedDataModule, index: Sequence[int], device: torch.device, command: str
) -> Tensor:
    """Return the probabilities of a run's student for samples under evaluation transforms, (N, C) float64.

    For the multilabel task they are those of each label, (N, L); for the binary task those of both classes, (N, 2).

    Args:
        run: A finished run.
        data: The datamodule of the samples, set up.
        index: The samples.
        device: Device of the student.
        command: Name of the command in messages.

    Raises:
        InputError: If the outputs are not finite, or not one logit for each class or label, or one for the binary task.
    """
    student = run.student()
    student.to(device).eval()
    pool = data.pool_dataloader().dataset
    assert isinstance(pool, ViewDataset)
    samples = ViewDataset(pool.images, torch.tensor(index), data.eval_transform, data.seed)
    options: dict[str, Any] = {"batch_size": data.batch_size, "num_workers": data.num_workers}
    labels = data.visible_labels()
    loader = ViewLoader(samples, LabelTable(labels), **options)
    seams = Seams.of_run(run, device)
    task, batches = seams.task, batches_of(loader, seams.read(data), device)
    logits = torch.cat([seams.logits(student, batch.x).cpu().double() for batch in batches])
    several = labels.ndim == 2
    classes = labels.shape[1] if several else len(data.class_names or ()) or int(labels.max()) + 1
    exact = several or data.class_names
    if task == "binary":
        fits, needs = logits.shape[1:] in ((), (1,)), "one logit"
    else:
        fits = logits.ndim == 2 and (logits.shape[1] == classes or (not exact and logits.shape[1] > classes))
        needs = f"{classes} logits, one for each {'label' if several else 'class'}"
    if not fits:
        raise InputError(f"{command} needs a student with {needs}, got {[*logits.shape]}")
    if not logits.isfinite().all():
        raise InputError(f"the logits of the student of {run.folder} are not finite; did its training diverge?")
    if task == "binary":
        p = logits.flatten().sigmoid()
        return torch.stack([1 - p, p], dim=1)
    return logits.sigmoid() if task == "multilabel" else logits.softmax(dim=1)
