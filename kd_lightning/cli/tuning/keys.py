"""Dotted keys of a config, as overrides of ``fit`` have them; ``[0]`` is the first item of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kd_lightning.cli.parse import Config
from kd_lightning.errors import InputError
from kd_lightning.runs.class_paths import SPEC_KEYS, did_you_mean, walk_config

_PART = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def find_key(config: Config, key: str) -> str:
    """Return the full path of a key, in which ``init_args`` may be left out.

    A key that the config does not have yet is returned too, if what would hold it is there: the parser judges it.

    >>> find_key({"model": {"class_path": "A", "init_args": {"soft_weight": 0.9}}}, "model.soft_weight")
    'model.init_args.soft_weight'

    Raises:
        InputError: If nothing in the config can hold the key.
    """
    node: Any = config
    parts = _parts(key)
    path: list[str | int] = []
    for number, part in enumerate(parts):
        if isinstance(node, Mapping) and "class_path" in node and part not in SPEC_KEYS:
            path.append("init_args")
            node = node.get("init_args") or {}
        is_last = number == len(parts) - 1
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            node = node[part]
        elif isinstance(node, Mapping) and (part in node or is_last):
            node = node.get(part)
        else:
            known = [name for name, _, value, _ in walk_config(config) if not isinstance(value, dict)]
            raise InputError(f"{key}: no such key{did_you_mean(key, known)}")
        path.append(part)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def value_at(config: Config, path: str) -> Any:
    """Return the value at a full path; None if there is none."""
    node: Any = config
    for part in _parts(path):
        if isinstance(part, int):
            node = node[part] if isinstance(node, list) and part < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    return node


def set_value(config: Config, path: str, value: Any) -> None:
    """Set the value at a full path of :func:`find_key`, in place."""
    *parents, last = _parts(path)
    node: Any = config
    for part in parents:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[last] = value


def short_name(path: str) -> str:
    """Return the end of a path that a line has room for.

    >>> [short_name(f"model.init_args.{key}") for key in ("optimizer.init_args.lr", "soft_weight")]
    ['lr', 'soft_weight']
    >>> short_name("data.init_args.train_transform.init_args.transforms[0].init_args.scale[0]")
    'scale[0]'
    """
    return path.rpartition(".")[2]


def _parts(key: str) -> list[str | int]:
    parts = [int(match[1]) if match[1] else match[2] for match in _PART.finditer(key)]
    if not parts or "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".") != key:
        raise InputError(f"{key}: a key must be names with dots between them, and numbers of lists in brackets")
    return parts
