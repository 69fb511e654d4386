"""Settings that follow from the data, and the YAML of a fit, commented and ready to edit."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.cli.short.networks import Network
from kd_lightning.runs.yaml_file import dump_yaml

_SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
_STEPS = 3000  # of a fit, between _EPOCHS
_EPOCHS = (30, 100)
_BATCHES = (8, 64)
_FEW = 100
"""Validation pictures that are too few to choose the best epoch by."""
_MANY = 2000
"""Pictures from which on worker processes pay off."""


@dataclass(frozen=True)
class Recipe:
    """Settings of the fits on a folder.

    Attributes:
        root: Folder of all runs and files, ``OUT/NAME``.
        folder: Folder of the pictures.
        table: The table of the pictures' parts.
        classes: Number of classes.
        labeled: Labeled training pictures of each class; None for all.
        unlabeled: The datamodule's ``unlabeled``.
        val_size: The datamodule's; None for a validation part of the folder's own.
        val_pictures: Number of validation pictures.
        image_size: Side in pixels.
        batch_size: Pictures of a batch.
        pictures: Training pictures of an epoch.
        epochs: Number of epochs.
    """

    root: Path
    folder: Path
    table: Path
    classes: int
    labeled: int | None
    unlabeled: str
    val_size: float | None
    val_pictures: int
    image_size: int
    batch_size: int
    pictures: int
    epochs: int

    @property
    def steps(self) -> int:
        """Steps of an epoch, about."""
        return max(1, round(self.pictures / self.batch_size))


def image_size_of(side: int) -> int:
    """Return the side of the training pictures: the largest usual one that is no larger than the median picture.

    >>> [image_size_of(side) for side in (8, 64, 100, 4000)]
    [32, 64, 96, 224]
    """
    return max((size for size in _SIZES if size <= side), default=_SIZES[0])


def batch_size_of(pictures: int) -> int:
    """Return a batch size that gives an epoch about eight steps or more.

    >>> [batch_size_of(pictures) for pictures in (20, 300, 50000)]
    [8, 32, 64]
    """
    least, most = _BATCHES
    return min(most, max(least, 2 ** int(math.log2(max(pictures, 1) / 8 + 1e-9)))) if pictures > 8 * least else least


def epochs_of(pictures: int, batch_size: int) -> int:
    """Return a number of epochs that gives about 3000 steps.

    >>> [epochs_of(pictures, batch_size_of(pictures)) for pictures in (60, 3000, 100000)]
    [100, 64, 30]
    """
    least, most = _EPOCHS
    return min(most, max(least, round(_STEPS * batch_size / max(pictures, 1))))


def teacher_yaml(recipe: Recipe, teacher: Network, name: str, start: Path | None, start_classes: int | None) -> str:
    """Return the config that trains the teacher on the labeled pictures.

    Args:
        recipe: The settings.
        teacher: The network.
        name: Name of the runs.
        start: Its first weights. Default: None, which means new ones.
        start_classes: Number of classes of the first weights; None for the network's default.
    """
    spec = teacher.spec(recipe.classes)
    why = "from new weights"
    if start is not None:
        loaded = {"model": teacher.spec(start_classes), "path": str(start)}
        spec = {
            "class_path": "kd_lightning.reset_classifier",
            "init_args": {
                "network": {"class_path": "kd_lightning.load_weights", "init_args": loaded},
                "num_classes": recipe.classes,
            },
        }
        why = f"from the weights in {start}, with a new last layer"
    head = [f"The teacher, {teacher.name}, trained {why}.", *_commands(recipe, name)]
    model = f"""model:
  class_path: SupervisedModule  # hard targets alone
  init_args:
    student: {_flow(spec)}
{_optimizer(recipe, 0.0003 if start is not None else 0.001)}"""
    return _join(recipe, name, head, model, unlabeled="none")


def distill_yaml(
    recipe: Recipe, student: Network, teacher: Network, name: str, weights: Path, split: Path | None
) -> str:
    """Return the config that distils the teacher into the student.

    Args:
        recipe: The settings.
        student: The student.
        teacher: The teacher.
        name: Name of the runs.
        weights: The teacher's weights.
        split: The teacher's split, so that both have the same labels, and no picture that the teacher has learned from
            validates. None for a split of the student's own.
    """
    head = [
        f"{teacher.name} teaches {student.name}.",
        *_commands(recipe, name),
        "Does the teacher help? The same student with and without it, over three seeds:",
        f"  kd-lightning experiment {recipe.root / name}.yaml --seeds 3",
    ]
    loaded = {"model": teacher.spec(recipe.classes), "path": str(weights)}
    few = recipe.labeled is not None and 2 * recipe.labeled * recipe.classes < recipe.pictures
    model = f"""model:
  class_path: DistillModule  # loss = (1 - soft_weight) * hard + soft_weight * soft
  init_args:
    student: {_flow(student.spec(recipe.classes))}
    teacher: {_flow({"class_path": "kd_lightning.load_weights", "init_args": loaded})}
    soft_weight: {0.9 if few else 0.5}  # 0.9 if few of the pictures have a label, else 0.5
    soft_loss: {{class_path: kd_lightning.losses.KDLoss, init_args: {{temperature: 4.0}}}}
{_optimizer(recipe, 0.001)}"""
    return _join(recipe, name, head, model, unlabeled=recipe.unlabeled, split=split)


def supervised_yaml(recipe: Recipe, student: Network, name: str, labels: Path | None = None) -> str:
    """Return the config that trains a network on labels alone.

    Args:
        recipe: The settings.
        student: The network.
        name: Name of the runs.
        labels: A label file for the pictures without a label. Default: None, which means that the labels of the folder
            alone train.
    """
    commands = _commands(recipe, name)
    if labels is None:  # nothing is held back to test
        head, unlabeled, more = [f"{student.name}, trained on all labels.", commands[0]], "none", ""
    else:
        head = [f"{student.name}, trained on the labels of the folder and of {labels.name}.", *commands]
        unlabeled = recipe.unlabeled
        more = f"    label_file: {_text(labels)}  # of pictures without a label: check it first\n"
    model = f"""model:
  class_path: SupervisedModule  # hard targets alone
  init_args:
    student: {_flow(student.spec(recipe.classes))}
{_optimizer(recipe, 0.001)}"""
    return _join(recipe, name, head, model, unlabeled=unlabeled, data=more)


def pseudo_label_yaml(recipe: Recipe, student: Network, name: str, labeled_batch_size: int) -> str:
    """Return the config that learns from few labels and the pseudo-labels of the other pictures (FixMatch)."""
    head = [f"{student.name} learns from few labels, and from pseudo-labels (FixMatch).", *_commands(recipe, name)]
    selection = {"class_path": "FixedThreshold", "init_args": {"threshold": 0.95}}
    model = f"""model:
  class_path: PseudoLabelModule
  init_args:
    student: {_flow(student.spec(recipe.classes))}
    pseudo_labels: online
    selection: {_flow(selection)}  # least probability of a pseudo-label that counts
{_optimizer(recipe, 0.001)}"""
    every = {
        "every_n_epochs": max(1, recipe.epochs // 5),
        "selection": selection,
        "warmup_epochs": min(1, recipe.epochs - 1),
    }
    report = f"""  callbacks:
    - class_path: PseudoLabelRefresh  # reports on the pseudo-labels: kd-lightning labels RUN
      init_args: {_flow(every)}
"""
    size = {"size": recipe.image_size}
    more = f"""    labeled_batch_size: {labeled_batch_size}  # of each batch; the other pictures have no label
    strong_transform: {_flow({"class_path": "kd_lightning.data.transforms.strong_photos", "init_args": size})}
"""
    return _join(recipe, name, head, model, unlabeled=recipe.unlabeled, trainer=report, data=more)


def _commands(recipe: Recipe, name: str) -> list[str]:
    return [
        f"  kd-lightning fit --config {recipe.root / name}.yaml",
        f"  kd-lightning test --config {recipe.root / name}.yaml",
    ]


def _optimizer(recipe: Recipe, rate: float) -> str:
    warmup = max(1, recipe.epochs // 20)
    lines = f"    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: {rate}, weight_decay: 0.01}}}}\n"
    if recipe.epochs > warmup:
        lines += f"""    lr_scheduler:  # the cosine ends with the last epoch of trainer.max_epochs
      class_path: SequentialSchedule
      init_args:
        schedulers:
          - {{class_path: LinearLR, init_args: {{start_factor: 0.1, total_iters: {warmup}}}}}
          - {{class_path: CosineAnnealingLR}}
        milestones: [{warmup}]
"""
    return lines


def _join(
    recipe: Recipe,
    name: str,
    head: list[str],
    model: str,
    *,
    unlabeled: str,
    split: Path | None = None,
    trainer: str = "",
    data: str = "",
) -> str:
    comments = "".join(f"# {line}".rstrip() + "\n" for line in head)
    monitor = ""
    if recipe.val_pictures < _FEW:
        why = f"{recipe.val_pictures} validation pictures are too few to choose by"
        monitor = f"checkpoint:\n  monitor: null  # deploys the last weights: {why}\n"
    if split is not None:
        labeled, val = f"    labeled: {_text(split)}  # the teacher's split: the same labels, and validation\n", ""
    else:
        labeled = "" if recipe.labeled is None else f"    labeled: {recipe.labeled}  # labels of each class\n"
        labeled += "    labeled_at_most: true  # a class of few pictures has what it has\n"
        val = "" if recipe.val_size is None else f"    val_size: {recipe.val_size:g}  # of the training pictures\n"
    pool = {
        "rest": "the pictures of training without a label also train",
        "source": "those of split unlabeled also train",
        "none": "pictures without a label do not train",
    }[unlabeled]
    workers = min(4, os.cpu_count() or 1) if recipe.pictures >= _MANY else 0
    return f"""{comments}name: {name}
seed_everything: 0
trainer:
  default_root_dir: {_text(recipe.root)}  # runs lie in its folder {name}
  max_epochs: {recipe.epochs}
  devices: 1
  log_every_n_steps: {max(1, min(50, recipe.steps))}
{trainer}{monitor}{model}data:
  class_path: SemiSupervisedDataModule
  init_args:
    source:
      class_path: ImageTable  # one row for each picture: path, label, split; edit it as you like
      init_args:
        table: {_text(recipe.table)}
        folder: {_text(recipe.folder)}
        image_size: {recipe.image_size}
{labeled}    unlabeled: {unlabeled}  # {pool}
{val}    duplicates: together  # copies of test pictures do not train
    batch_size: {recipe.batch_size}
{data}    num_workers: {workers}
    seed: 0  # of validation part, order and augmentation
"""


def _text(value: Any) -> str:
    """Return a text as YAML."""
    return dump_yaml(str(value), width=10**9).strip().removesuffix("...").strip()


def _flow(value: Any) -> str:
    """Return a mapping as YAML on one line."""
    return dump_yaml(value, default_flow_style=True, width=10**9).strip()
