"""Lines of YAML that change a config as a finding of doctor proposes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from kd_lightning.data.transforms import RGB, Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop
from kd_lightning.losses import KDLoss
from kd_lightning.losses.protocols import temperature_of
from kd_lightning.runs.class_paths import walk_config
from kd_lightning.runs.lengths import length_of, scale_lengths
from kd_lightning.runs.yaml_file import dump_yaml
from kd_lightning.teachers.findings import Finding

Config = dict[str, Any]
_CROP = "RandomResizedCrop"
_MILD = 0.5
"""Lowest share of the picture that a milder crop shows; 0.8 if crops are as mild already."""
_ARGUMENTS: dict[type, tuple[str, ...]] = {
    RGB: (),
    RandomResizedCrop: ("size", "scale", "ratio"),
    RandomHorizontalFlip: ("p",),
    Normalize: ("mean", "std"),
}
"""Arguments of the transforms that a source's own transform is written out with."""


def with_cure(finding: Finding, module: Any, data: Any, config: Mapping[str, Any] | None) -> Finding:
    """Return a finding with the YAML lines of its cure; as it is without a reason, or if there are none.

    Args:
        finding: The finding.
        module: The module.
        data: The datamodule.
        config: Their config. None if it is not known.
    """
    make = _CURES.get(finding.reason or "")
    if make is None or finding.hint is None:
        return finding
    found = make(module, data, {} if config is None else config)
    if found is None:
        return finding
    lines, note = found
    return replace(finding, lines=dump_yaml(lines, default_flow_style=None, width=200), hint=finding.hint + note)


Cure = tuple[Config, str] | None
"""What changes in a config, and what the hint adds."""


def _model(**arguments: Any) -> Config:
    return {"model": {"init_args": arguments}}


def _lower_weight(module: Any) -> float:
    weight = float(getattr(module, "soft_weight", 1.0))
    return 0.5 if weight > 0.5 else round(weight / 2, 4)


def _cross_fit(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    if not hasattr(module, "teacher"):
        return _model(soft_weight=_lower_weight(module)), ""
    file = "runs/TEACHER_crossfit/crossfit.json"
    teacher = {"class_path": "kd_lightning.CrossFittedTeacher", "init_args": {"path": file}}
    return _model(teacher=teacher), ""


def _conditional(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    given = ((config.get("model") or {}).get("init_args") or {}).get("soft_loss")
    if isinstance(given, Mapping) and "class_path" not in given:  # a sum of losses by name
        return _model(soft_loss={name: [weight, _wrapped(loss)] for name, (weight, loss) in given.items()}), ""
    if isinstance(given, str):
        given = {"class_path": given}
    if not isinstance(given, Mapping):
        given = _loss(module.soft_loss)
    return None if given is None else (_model(soft_loss=_wrapped(given)), "")


def _wrapped(loss: Any) -> Config:
    return {"class_path": "kd_lightning.losses.ConditionalLoss", "init_args": {"loss": deepcopy(loss)}}


def _loss(loss: nn.Module) -> Config | None:
    """Return the config of a loss that was built without one; None of another kind than the default."""
    if not isinstance(loss, KDLoss):
        return None
    return {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": loss.temperature}}


def _milder(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    given = ((config.get("data") or {}).get("init_args") or {}).get("train_transform")
    if isinstance(given, Mapping):
        changed = deepcopy(given)
        crops = [node for node in _nodes(changed) if str(node.get("class_path")).rpartition(".")[2] == _CROP]
        if not crops:
            return None
        arguments = crops[0].setdefault("init_args", {})
        now = arguments.get("scale") or RandomResizedCrop(1).scale
        arguments["scale"] = _mild(now)
        key = next((key for key, name, _, owner in walk_config(given) if name == "scale" and _CROP in str(owner)), "")
        note = f" (data.init_args.train_transform{'.' + key if key else ''}: scale is {[*now]})"
        return {"data": {"init_args": {"train_transform": changed}}}, note
    transform = getattr(data, "train_transform", None)
    steps = [*transform.transforms] if isinstance(transform, Compose) else []
    crop = next((step for step in steps if isinstance(step, RandomResizedCrop)), None)
    if crop is None or any(type(step) not in _ARGUMENTS for step in steps):
        return None
    written = []
    for step in steps:
        arguments = {name: _plain(getattr(step, name)) for name in _ARGUMENTS[type(step)] if hasattr(step, name)}
        arguments |= {"scale": _mild(crop.scale)} if step is crop else {}
        written.append({"class_path": f"kd_lightning.data.transforms.{type(step).__name__}", "init_args": arguments})
    whole = {"class_path": "kd_lightning.data.transforms.Compose", "init_args": {"transforms": written}}
    return {
        "data": {"init_args": {"train_transform": whole}}
    }, f" (the source's own transform has scale {[*crop.scale]})"


def _mild(scale: Any) -> list[float]:
    low, high = (float(value) for value in scale)
    return [min(_MILD if low < _MILD else 0.8, high), high]


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _nodes(node: Any) -> Iterator[Config]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(child)


def _softer(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    loss = _loss(module.soft_loss)
    if loss is None:
        return None
    loss["init_args"]["temperature"] = 2 * temperature_of(module.soft_loss)
    return _model(soft_loss=loss), ""


def _longer(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    if not config.get("trainer"):
        return None
    known = {"model": {}, **config}
    if (length := length_of(known)) is None:
        return None
    longer = deepcopy(known)
    key = length[0].partition(".")[2]
    longer["trainer"][key] = 2 * length[1]
    scale_lengths(longer, 2)
    return _difference(known, longer), ""


def _difference(before: Any, after: Any) -> Any:
    """Return the parts of a config that differ; lists are whole."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return after
    return {key: _difference(before.get(key), value) for key, value in after.items() if value != before.get(key)}


def _labels_count(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    return _model(soft_weight=_lower_weight(module)), ""


def _more_samples(module: Any, data: Any, config: Mapping[str, Any]) -> Cure:
    if data.unlabeled == "none" and data.split is not None and data.split.unlabeled:
        return {"data": {"init_args": {"unlabeled": "rest"}}}, ""
    if "unlabeled" not in inspect.signature(type(data.source)).parameters:
        return None
    source = {"init_args": {"unlabeled": "PICTURES"}}
    return {"data": {"init_args": {"unlabeled": "source", "source": source}}}, ""


_CURES: dict[str, Callable[[Any, Any, Mapping[str, Any]], Cure]] = {
    "memory": _cross_fit,
    "wrong": _conditional,
    "views": _milder,
    "one-hot": _softer,
    "gap": _longer,
    "balance": _labels_count,
    "few": _more_samples,
}
