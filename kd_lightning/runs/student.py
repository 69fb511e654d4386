"""Which network of a module is its student, and what that network is called with."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from kd_lightning.batch import Batch, unpack
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, rows_of, tensors_of
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class
from kd_lightning.runs.weights import load_weights

STUDENT = "student"
"""The usual path of the student in a module."""


def student_path(module: Any) -> str | None:
    """Return the dotted path of a module's student; "" for the module itself, and None if it has none.

    It is the network of a module that :class:`~kd_lightning.teach` has changed, else ``student``.
    """
    teaching = getattr(module, "teaching", None)
    if isinstance(teaching, nn.Module) and isinstance(network := getattr(teaching, "network", None), str):
        return network
    return STUDENT if isinstance(module, nn.Module) and _step(module, STUDENT) is not None else None


def find_student(module: Any) -> nn.Module | None:
    """Return a module's student; None if it has none, or has not built it yet."""
    path = student_path(module)
    return None if path is None else _walk(module, path)


def find_network(module: nn.Module, path: str, owner: str) -> nn.Module:
    """Return a network of a module.

    Args:
        module: The module, with or without ``torch.compile``.
        path: Dotted path of the network; "" for the module itself.
        owner: What needs the network, such as a callback's name, for the message.

    Raises:
        InputError: If there is none. The message names similar paths.
    """
    found = _walk(module, path)
    if found is not None:
        return found
    names = [name for name, _ in module.named_modules() if name and "_orig_mod" not in name]
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or [name for name in names if "." not in name][:5]
    if (taught := student_path(module)) is not None and taught != path and _walk(module, taught) is not None:
        near = [taught or '""', *(name for name in near if name != taught)]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise InputError(f"{owner}: network: {type(module).__name__} has no network {path!r}{hint}")


def example_inputs(metadata: Mapping[str, str]) -> Inputs | None:
    """Return zeros of one sample, as the metadata of deployed weights describe them; None if they do not."""
    shapes, dtypes = (json.loads(metadata.get(name, "null")) for name in ("input_shape", "input_dtype"))
    return None if shapes is None else _zeros(shapes, dtypes)


def _zeros(shapes: Any, dtypes: Any) -> Any:
    if isinstance(shapes, dict):
        return {name: _zeros(shape, dtypes and dtypes[name]) for name, shape in shapes.items()}
    if any(not isinstance(size, int) for size in shapes):
        return tuple(_zeros(shape, dtypes and dtypes[number]) for number, shape in enumerate(shapes))
    return torch.zeros(1, *shapes, dtype=getattr(torch, dtypes) if dtypes else None)


def check_plain_logits(module: Any, owner: str) -> None:
    """Raise InputError if a module is taught on dense logits, so that they are not (B, C).

    Args:
        module: The module.
        owner: What needs the logits, for the message.
    """
    teaching = getattr(module, "teaching", None)
    for name in ("class_dim", "mask") if isinstance(teaching, nn.Module) else ():
        if getattr(teaching, name, None) is not None:
            raise InputError(f"model: {owner} needs a network whose logits are (B, C), but teach has {name}")


def batch_of_step(module: Any, loaded: Any, step: str | None = None) -> Batch:
    """Return a batch whose inputs are what a step of a module calls its student with.

    Args:
        module: The module.
        loaded: A batch as the step gets it. Labels and index are those that it holds.
        step: Name of the step. Default: None, which means ``validation_step``, or ``training_step`` without one.

    Raises:
        InputError: If the batch is of a kind that is not known, the step does not call the student, fails before, or
            calls it with another number of rows.
    """
    step = step or ("validation_step" if is_overridden("validation_step", module) else "training_step")
    x, known = inputs_of_step(module, loaded, step), unpack(module, loaded)
    if known.y is not None and len(known.y) != rows_of(x):
        raise InputError(f"model: {step} calls the student with {rows_of(x)} rows for {len(known.y)} labels")
    same = [*map(id, tensors_of(x))] == [*map(id, tensors_of(known.x))]
    # as teach does: inputs of its own are for the teacher in a mapping, or in a Batch whose x the network gets
    own = known.teacher_inputs if isinstance(loaded, Mapping) or (isinstance(loaded, Batch) and same) else None
    return replace(known, x=x, teacher_inputs=own, teacher=known.teacher if same else None)


def batch_of_student(module: Any, loaded: Any) -> Batch:
    """Return a batch as the student of a module gets it: by ``unpack``, or of a taught module as its step gives it.

    Raises:
        InputError: If the batch is of a kind that is not known, or the step does not lead to the student.
    """
    taught = isinstance(getattr(module, "teaching", None), nn.Module)
    return batch_of_step(module, loaded) if taught else unpack(module, loaded)


def inputs_of_step(module: Any, batch: Any, step: str = "training_step") -> Inputs:
    """Return what a step of a module calls its student with. The step ends there.

    Args:
        module: The module.
        batch: The batch, on the module's device.
        step: Name of the step.

    Raises:
        InputError: If there is no student, or the step does not call it, or fails before.
    """
    path = student_path(module)
    found: list[Inputs] = []

    def stop(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(inputs_of_call(network, args, kwargs))
        raise _Called

    network = find_network(module, STUDENT if path is None else path, "model")
    handle = network.register_forward_pre_hook(stop, with_kwargs=True)
    problem = "it does not call it"
    try:
        with torch.no_grad():
            getattr(module, step)(batch, 0)
    except Exception as error:  # of a step that needs more of a fit can be anything
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        handle.remove()
    if not found:
        raise InputError(f"model: {step} does not lead to what the student is called with: {problem}")
    return found[0]


class _Called(Exception):  # noqa: N818  (not an error: it ends a step)
    """Raised when a network is called."""


# The same of the config of a module, its ``class_path`` and ``init_args``, as a run's folder holds it.


def has_student(model: Mapping[str, Any]) -> bool:
    """Return whether the config of a module has an argument ``student``, or is that of a module that is taught."""
    return is_taught(model) or isinstance((model.get("init_args") or {}).get(STUDENT), Mapping)


def build_student(model: Mapping[str, Any]) -> nn.Module:
    """Build the student of a config, with new weights. The files of ``load_weights`` in it are not read.

    Raises:
        InputError: If it cannot be built, as by a taught module that builds its network from the data.
    """
    arguments = model["init_args"]
    if not is_taught(model):
        return build(nn.Module, _without_weights(arguments[STUDENT]))
    module = build(LightningModule, _without_weights(arguments["module"]))
    if is_overridden("configure_model", module):
        module.configure_model()
    return find_network(module, arguments.get("network", "net"), "model")


def build_module(model: Mapping[str, Any]) -> LightningModule:
    """Build the module of a config, with new weights; one that is taught without its teacher.

    Raises:
        InputError: If it cannot be built.
    """
    arguments = {**(model.get("init_args") or {}), **({"teacher": None} if is_taught(model) else {})}
    module = build(LightningModule, _without_weights({**model, "init_args": arguments}))
    if is_overridden("configure_model", module):
        module.configure_model()
    return module


def student_prefix(model: Mapping[str, Any]) -> str:
    """Return the text before the names of the student's weights in a checkpoint."""
    path = model["init_args"].get("network", "net") if is_taught(model) else STUDENT
    return f"{path}." if path else ""


def is_taught(model: Mapping[str, Any]) -> bool:
    """Return whether the config of a module is that of ``kd_lightning.teach`` around a module."""
    place = str(model.get("class_path"))
    if place.rpartition(".")[2] != "teach" or not isinstance((model.get("init_args") or {}).get("module"), Mapping):
        return False
    return str(getattr(find_class(place), "__module__", "")).startswith("kd_lightning.")


def inputs_of_call(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Return what a network is called with as inputs: a tensor, a tuple, or a mapping by the names of arguments.

    Arguments that hold no tensor stay in tuples and mappings, but for those that are None.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    bound = inspect.signature(network.forward).bind_partial(*args).arguments
    return {**bound, **kwargs}


def _without_weights(node: Any) -> Any:
    """Return the config of a network with each ``load_weights`` replaced by the network inside."""
    if isinstance(node, list):
        return [_without_weights(child) for child in node]
    if not isinstance(node, dict):
        return node
    if find_class(node.get("class_path")) is load_weights:
        return _without_weights(node["init_args"]["model"])
    return {key: _without_weights(child) for key, child in node.items()}


def _walk(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in path.split(".") if path else ():
        found = None if found is None else _step(found, part)
    return found


def _step(module: nn.Module, name: str) -> nn.Module | None:
    """Return a part of a module, also of one under ``torch.compile``."""
    found = module._modules.get(name)
    compiled = module._modules.get("_orig_mod")
    return found if found is not None or compiled is None else compiled._modules.get(name)
