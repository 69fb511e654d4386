"""Find the key that a wrong key or option means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kd_lightning.runs.class_paths import (
    SPEC_KEYS,
    arguments_of,
    did_you_mean,
    find_class,
    name_of,
    takes_any_argument,
    walk_config,
)

_ALIASES = {
    "epochs": "max_epochs",
    "seed": "seed_everything",
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "temperature": "soft_loss.temperature",
    "threshold": "selection",
    "adaptive_thresholds": "selection",
    "top_k_per_class": "selection",
}
"""Names that people use, and the key or its object that they mean."""


def right_key(name: str, config: Mapping[str, Any], known: Iterable[str] = ()) -> str:
    """Return the path of the key that a name means, empty if none is like it.

    Args:
        name: A key, a path, or the end of a path without ``init_args``, such as ``optimizer.lr``.
        config: The content of the config files.
        known: All keys of the parser, such as ``trainer.max_epochs``.
    """
    known = [key for key in known if not key.endswith(".help")]
    keys = [*known, *_keys_of_objects(config)]
    parts = _parts(name)
    alias = _parts(_ALIASES.get(parts[-1], parts[-1]))
    for wanted in (parts if len(parts) > 1 else alias, alias, parts[-1:]):
        fitting = [key for key in keys if _is_end(wanted, _parts(key))]
        if fitting:
            return min(fitting, key=lambda key: (len(_parts(key)), keys.index(key)))
        if len(wanted) > 1:  # of an object that the config does not have
            owners = [key for key in keys if _is_end(wanted[:-1], _parts(key)) and ".init_args." in key]
            if owners:
                return f"{min(owners, key=len)}.init_args.{wanted[-1]}"
    similar = difflib.get_close_matches(parts[-1], [_parts(key)[-1] for key in keys], n=1, cutoff=0.8)
    return next((key for key in keys if _parts(key)[-1] in similar), "")


def hint_for_key(name: str, allowed: Iterable[str], config: Any, known: Iterable[str] = ()) -> str:
    """Return the end of a message about a key that does not exist: another place that has it, or a similar key.

    Args:
        name: The key, or its path.
        allowed: The keys, or paths, that its place has.
        config: The whole config, whose objects are the other places.
        known: All keys of the parser, such as ``"trainer.max_epochs"``.
    """
    places = [(key.rpartition(".")[0], key.rpartition(".")[2]) for key in known]
    for path, key, value, _ in walk_config(config):
        if key == "class_path":
            place = path.removesuffix(key) + "init_args"
            places += [(place, argument) for argument in arguments_of(find_class(value))]
    allowed = list(allowed)
    last, similar = name.rpartition(".")[2], did_you_mean(name, allowed)
    if (alias := _ALIASES.get(last)) in allowed:
        return f"; did you mean {alias}?"
    found = [argument for _, argument in places if argument == last]
    if not found and not similar:
        found = difflib.get_close_matches(last, [argument for _, argument in places], n=1, cutoff=0.8)
    place = next((place or "the top level" for place, argument in places if argument in found[:1]), "")
    if not found and not similar and (meant := right_key(name, config or {}, known)):
        return f"; did you mean {meant}?"
    return f"; {place} has the key {found[0]}" if found else similar


def no_such_key(owner: Any, name: str, allowed: Iterable[str], config: Any = None, known: Iterable[str] = ()) -> str:
    """Return the message for an argument that a class does not have; see :func:`hint_for_key`."""
    allowed = list(allowed)
    hint = hint_for_key(name, allowed, config, known)
    message = f"{name_of(owner)} has no such key{hint}; allowed: {', '.join(allowed)}"
    if takes_any_argument(owner):
        message += ", and any in dict_kwargs"
    if name.startswith("cache") and name in arguments_of(find_class("kd_lightning.Teacher")):
        message += f"; {name} is an argument of kd_lightning.Teacher, which wraps a teacher's network"
    return message


def _keys_of_objects(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of all arguments of the objects of a config, outer objects first."""
    found = [
        f"{path.removesuffix('class_path')}init_args.{argument}"
        for path, key, value, _ in walk_config(dict(config))
        if key == "class_path"
        for argument in arguments_of(find_class(value))
    ]
    yield from sorted(found, key=lambda path: path.count("."))


def _parts(path: str) -> list[str]:
    return [part for part in re.sub(r"\[\d+\]", "", path).split(".") if part not in SPEC_KEYS]


def _is_end(few: list[str], many: list[str]) -> bool:
    """Return whether a path ends with the last of the parts, and has the others in this order."""
    rest = iter(many)
    return bool(few) and few[-1] == many[-1] and all(part in rest for part in few)
