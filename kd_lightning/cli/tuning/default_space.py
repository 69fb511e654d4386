"""The default search space: what of a config decides most, each key around the config's own value."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from kd_lightning.cli.parse import Config
from kd_lightning.cli.tuning.space import Setting
from kd_lightning.runs.class_paths import find_class, walk_config
from kd_lightning.runs.lengths import following_keys, length_of, shorter_lengths

_RATES = 10.0
_SOFT_WEIGHTS = (0.1, 1.0)
_TEMPERATURES = (1.0, 10.0)
_LEAST_CROP = 0.08


def with_written_loss(config: Config) -> Config:
    """Return the config with its default soft loss written out, so that its temperature has a key."""
    model = config["model"]
    arguments = model.get("init_args") or {}
    kind = find_class(model.get("class_path"))
    is_teach = getattr(kind, "__name__", "") == "teach"
    temperature = getattr(kind, "default_temperature", 4.0 if is_teach else None)
    no_temperature = temperature is None or arguments.get("task") == "regression"
    if "soft_loss" not in arguments or arguments["soft_loss"] is not None or no_temperature:
        return config
    written = deepcopy(config)
    loss: dict[str, Any] = {"temperature": temperature}
    if "task" in arguments:
        loss["task"] = arguments["task"]
    written["model"]["init_args"]["soft_loss"] = {"class_path": "kd_lightning.losses.KDLoss", "init_args": loss}
    return written


def default_space(config: Config) -> tuple[list[Setting], list[str]]:
    """Return the settings that a config has keys for, and lines about those that are left out.

    - Learning rate of each optimiser (the highest one of OneCycleLR): a tenth to ten times its value, by its logarithm.
    - Soft weight: 0.1 to 1. Temperature of each soft loss: 1 to 10, by its logarithm.
    - Smallest crop of a RandomResizedCrop in ``train_transform``: 0.08 to the largest.
    - Epochs (or steps): a quarter, half, or all of them. Schedules keep their shape.

    Args:
        config: A whole config of ``fit``, from :func:`with_written_loss`.
    """
    settings, notes = [*_rates(config["model"])], []
    annealed = _annealed(config)
    for path, key, value, owner in walk_config(config["model"], "model"):
        if not _is_number(value):
            continue
        name = path.removeprefix("model.init_args.").replace(".init_args", "")
        if key == "soft_weight" and path == "model.init_args.soft_weight":
            setting = Setting(path, *_SOFT_WEIGHTS)
        elif key == "temperature" and owner is not None and ".soft_loss" in path:
            setting = Setting(path, *_TEMPERATURES, log=True)
        else:
            continue
        if name in annealed:
            notes.append(f"{name} is not tuned: a callback anneals it")
        else:
            settings.append(setting)
    crops = [*_crops(config)]
    if crops and any(key == "cache" and value for _, key, value, _ in walk_config(config["model"])):
        notes.append("the crop's scale is not tuned: the teacher's cache would hold other views for each value")
    else:
        settings += crops
    if lengths := shorter_lengths(config):
        found = length_of(config)
        assert found is not None
        settings.append(Setting(found[0], values=lengths))
        if names := following_keys(config):
            notes.append(f"{', '.join(names)} follow{'s' * (len(names) == 1)} the number of epochs: schedules keep "
                         "their shape")  # fmt: skip
    return settings, notes


def _rates(model: Config) -> Iterator[Setting]:
    found = [
        (path, key, float(value), find_class(owner))
        for path, key, value, owner in walk_config(model, "model")
        if key in ("lr", "max_lr") and _is_number(value) and value > 0
    ]
    cycles = [one for one in found if one[1] == "max_lr" and _is_a(one[3], OneCycleLR, CyclicLR)]
    for path, _, value, _ in cycles or [one for one in found if one[1] == "lr" and _is_a(one[3], Optimizer)]:
        yield Setting(path, value / _RATES, value * _RATES, log=True)


def _crops(config: Config) -> Iterator[Setting]:
    transform = (config["data"].get("init_args") or {}).get("train_transform")
    for path, key, value, owner in walk_config(transform, "data.init_args.train_transform"):
        is_crop = str(owner).rpartition(".")[2] == "RandomResizedCrop"
        if (
            key == "scale"
            and is_crop
            and isinstance(value, list | tuple)
            and len(value) == 2
            and value[1] > _LEAST_CROP
        ):
            yield Setting(f"{path}[0]", _LEAST_CROP, float(value[1]))


def _annealed(config: Config) -> set[str]:
    """Return the attributes that callbacks anneal."""
    return {
        str((callback.get("init_args") or {}).get("attribute", "soft_weight"))
        for callback in config["trainer"].get("callbacks") or []
        if str(callback.get("class_path")).endswith("SoftWeightAnnealing")
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(kind: Any, *classes: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, classes)
