"""The baseline of a method: the config of the same student without a teacher."""

from __future__ import annotations

import inspect
import math
from copy import deepcopy

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.cli.parse import Config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.features.simkd import SimKDStudent
from kd_lightning.modules import DistillationTokenModule, FeatureDistillModule, SimKDModule, SupervisedModule
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class
from kd_lightning.runs.student import build_student, has_student, is_taught

_METHOD_CALLBACKS = ("SoftWeightAnnealing", "PseudoLabelRefresh", "BaselineMonitor")
"""Callbacks that the baseline does without: it learns from labels alone."""


def with_seed(config: Config, seed: int) -> Config:
    """Return the config with this seed for weights, split, order and augmentation.

    Raises:
        InputError: If its datamodule is no SemiSupervisedDataModule, whose argument ``seed`` sets the last three.
    """
    data = find_class(config["data"].get("class_path"))
    if isinstance(data, type) and not issubclass(data, SemiSupervisedDataModule):
        raise InputError(
            f"experiment needs data: SemiSupervisedDataModule, got {data.__name__}; SemiSupervisedDataModule with the "
            "source DatasetSource(train, test, unlabeled) has your datasets, and compare takes runs of any data"
        )
    config = deepcopy(config)
    config["seed_everything"] = seed
    config["data"].setdefault("init_args", {})["seed"] = seed
    return config


def baseline_of(method: Config) -> Config:
    """Return the config of the same student, trained on the same labels without a teacher and unlabeled images.

    Steps, augmentation and schedule are the same. Its epoch has as many steps as the method's: each labeled image
    appears in several views. Of a SimKDStudent the network inside is trained, with its own classifier. A student with
    two heads (DeiT) stays as it is: their mean learns from the labels.
    """
    data = build(LightningDataModule, method["data"])
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"experiment needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    data.prepare_data()
    batches = len(data.train_dataloader())
    limit = method["trainer"].get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    arguments = method["model"]["init_args"]
    if arguments.get("hint_epochs") and arguments.get("lr_scheduler"):
        rank_zero_warn("lr_scheduler is meant for stage 2; the baseline follows it over all epochs")
    baseline = without_teacher(method)
    alone = build(LightningDataModule, baseline["data"])  # its samples have fine or coarse labels
    alone.prepare_data()
    samples = len(alone.train_dataloader().dataset)
    baseline["data"]["init_args"]["views_per_epoch"] = math.ceil(batches * data.batch_size / samples)
    baseline["trainer"]["limit_train_batches"] = batches
    return baseline


def without_teacher(method: Config) -> Config:
    """Return the config of the same student without teacher and unlabeled images; its epochs may have other lengths.

    Unlike :func:`baseline_of` it reads no data.
    """
    baseline = deepcopy(method)
    baseline["name"] = f"{method['name']}_alone"
    baseline["model"] = _model_alone(method["model"])
    arguments = baseline["data"].setdefault("init_args", {})
    arguments |= {"unlabeled": "none", "labeled_batch_size": None, "strong_transform": None}
    callbacks = baseline["trainer"].get("callbacks") or []
    baseline["trainer"]["callbacks"] = [
        c for c in callbacks if c["class_path"].rsplit(".", 1)[-1] not in _METHOD_CALLBACKS
    ]
    return baseline


def _model_alone(model: Config) -> Config:
    """Return the config of a module without its teacher."""
    arguments = model["init_args"]
    if is_taught(model):
        alone: Config = deepcopy(arguments["module"])
        return alone
    if _is_a(model, FeatureDistillModule):
        name = model["class_path"].rpartition(".")[2]
        raise InputError(
            f"experiment compares a student with itself trained on labels, and {name} has none: fit "
            "it, then name a config that trains its student.safetensors on with labels"
        )
    if not has_student(model):
        raise InputError(f"experiment needs a model with a student, {model['class_path']} has none")
    shared = inspect.signature(SupervisedModule.__init__).parameters
    shared_arguments = {name: deepcopy(arguments[name]) for name in shared if name in arguments}
    student = shared_arguments["student"]
    if _is_a(student, SimKDStudent):
        shared_arguments["student"] = student["init_args"]["student"]
    elif _is_a(model, SimKDModule):
        raise InputError(
            "experiment trains the network in model.student alone, too, so this must be a SimKDStudent itself, got "
            f"{student.get('class_path')}"
        )
    if _is_a(model, DistillationTokenModule) and not hasattr(build_student(model), "set_distilled_training"):
        raise InputError(
            "experiment needs a student that returns the mean of its two heads unless set_distilled_training(True) is "
            f"called, as timm's distilled models do, got {student.get('class_path')}"
        )
    if start := arguments.get("initial_weights"):  # the first weights are no part of the method
        loaded = {"model": shared_arguments["student"], "path": start}
        shared_arguments["student"] = {"class_path": "kd_lightning.load_weights", "init_args": loaded}
    return {"class_path": "kd_lightning.SupervisedModule", "init_args": shared_arguments}


def _is_a(spec: Config, kind: type) -> bool:
    """Return whether the config of an object is that of a class, or of a subclass of it."""
    found = find_class(spec.get("class_path"))
    return isinstance(found, type) and issubclass(found, kind)


def describe_baseline(model: Config) -> str | None:
    """Describe the baseline's network, where it is not the method's, or is trained in another way."""
    if _is_a((model.get("init_args") or {}).get("student") or {}, SimKDStudent):
        return "the network in the SimKDStudent, with its own classifier, trained on the labels"
    if _is_a(model, DistillationTokenModule):
        return "the same network with two heads; their mean is trained on the labels"
    return None
