"""Class paths and the arguments that stand below them in a config."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SPEC = ("class_path", "init_args", "dict_kwargs")
"""What says how an object is built."""
_HOMES = (
    "kd_lightning",
    "kd_lightning.models",
    "kd_lightning.losses",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.nn",
    "lightning.pytorch.callbacks",
    "torchvision.models",
    "torchvision.transforms.v2",
)


def walk(node: Any, path: str = "", owner: Any = None) -> Iterator[tuple[str, Any, Any, Any]]:
    """Every (path, key, value, class path of the arguments it stands among)."""
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from walk(child, f"{path}[{number}]", owner)
    if isinstance(node, dict):
        for key, child in node.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, key, child, owner
            yield from walk(child, here, node.get("class_path") if key in SPEC[1:] else None)


def names_of_classes() -> list[str]:
    """Short names that a class path might have meant."""
    homes = [importlib.import_module(home) for home in _HOMES]
    return [name for home in homes for name, value in vars(home).items() if callable(value) and name[0] != "_"]


def find_class(class_path: Any) -> Any:
    """The class or function of a path or short name; None where it cannot be found."""
    if not isinstance(class_path, str):
        return None
    home, _, name = class_path.rpartition(".")
    for module in [home] if home else _HOMES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError):
            continue
    return None


def parameters_of(owner: Any) -> Mapping[str, inspect.Parameter]:
    """What a class or function takes; nothing where it cannot be known."""
    try:
        return inspect.signature(owner).parameters
    except (TypeError, ValueError):
        return {}


def hint(name: str, allowed: Iterable[str]) -> str:
    """``; did you mean ...?`` where something is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def no_such_key(owner: Any, name: str, allowed: Iterable[str]) -> str:
    """What to say of an argument that a class does not have."""
    message = f"{owner.__name__} has no such key{hint(name, allowed)}; allowed: {', '.join(allowed)}"
    if name.startswith("cache") and name in parameters_of(find_class("kd_lightning.Teacher")):
        message += f"; {name} is an argument of kd_lightning.Teacher, which goes around a teacher's network"
    return message
