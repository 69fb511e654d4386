"""Turn a parser's complaint into one line: which key, what is allowed, and the nearest right one."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kd_lightning.runs.class_paths import SPEC, find_class, hint, names_of_classes, no_such_key, parameters_of, walk


def one_line(message: str, config: Mapping[str, Any] | None = None, keys: Iterable[str] = ()) -> str:
    """What is wrong, where, and the nearest right name.

    Args:
        message: The message of jsonargparse.
        config: The content of the config files, in which the place of a key is looked up.
        keys: All keys that the parser knows.
    """
    config = {} if config is None else config
    outer = re.match(r'Parser key "([^"]+)":', message)
    values = re.findall(r"(?:Given|Got) value: (.*?)(?:\s+Subclass types|\n|$)", message)
    got = f", got {values[-1]}" if values and len(values[-1]) < 80 else ""
    if "Errors:" in message:  # of a union only the first try is the one that was meant
        message = re.split(r"Errors:\s*-?\s*", message)[-1].split("\n  - Expected a <class 'NoneType'>")[0]
        message = re.split(r"\n\s*(?:- Expected a <class 'NoneType'>|- Not of type Path|Given value)", message)[0]
    message = re.sub(r"\n\s*- Expected a ", " or a ", message)
    if found := re.search(r"[Oo]ption '([^']+)' is not accepted|not accept option '([^']+)'", message):
        return _unknown_key(found[1] or found[2], keys, config)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found[1]
        if (known := find_class(name)) is not None:
            place = _where(outer[1] if outer else name, config, of_key=True)
            if inspect.isfunction(known):
                return f"{place}: a function needs its full path, {known.__module__}.{known.__qualname__}"
            return f"{place}: {name} is not what can stand here"
        return f"{_where(name, config)}: no class {name!r}{hint(name.rsplit('.', 1)[-1], names_of_classes())}"
    if found := re.search(r"following arguments are required: (.+)", message):
        return _missing(found[1].split(", "), config)
    if found := re.search(r"given class_path '([\w.]+)\.(\w+)': module .* has no attribute", message):
        near = hint(found[2], vars(importlib.import_module(found[1])))
        return f"{_where(f'{found[1]}.{found[2]}', config)}: {found[1]} has no {found[2]!r}{near}"
    if found := re.search(r"negative dimension (-\d+)", message):  # torch says the number alone
        for path, _, value, _ in walk(config):
            if not isinstance(value, bool) and value == int(found[1]):
                return f"{path}: it makes a tensor of {found[0]}"
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("typing.", "")
    message = re.sub(r"Type Callable\[.*\] expects a function or a callable class: ", "", message)
    message = re.sub(r"\.+\s+Got value: .*|\s+Subclass types expect one of:.*", "", message, flags=re.DOTALL)
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        inner = re.match(r"\w+\.[\w.\[\]]+: ", found[2])  # already says where
        message = found[2] if inner else f"{_where(found[1], config, of_key=True)}: {found[2]}{got}"
    elif re.match(r"\w+\.[\w.\[\]]+: ", message):
        message += "" if ", got " in message else got
    elif found := re.match(r"(\w+)(: | must )", message):  # one of our own, which names its argument
        message = _where(found[1], config, of_key=True) + message[found.end(1) :]
    elif outer:
        message = f"{_where(outer[1], config, of_key=True)}: {message}{got}"
    return " ".join(message.split())


def _unknown_key(key: str, keys: Iterable[str], config: Mapping[str, Any]) -> str:
    name = key.rsplit(".", 1)[-1]
    for path, found, _, parent in walk(config):
        owner = find_class(parent)
        if found == name and owner is not None:
            allowed = [p for p in parameters_of(owner) if p != "self"]
            return f"{path}: {no_such_key(owner, name, allowed)}"
    known = [k for k in keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
    return f"{key}: no such key{hint(key, known)}"


def _missing(names: list[str], config: Mapping[str, Any]) -> str:
    """Which object lacks a required argument."""
    for path, key, value, _ in walk(config):
        if key != "class_path" or (owner := find_class(value)) is None:
            continue
        place = path.removesuffix(".class_path")
        parameters = parameters_of(owner)
        given = {k for p, k, v, _ in walk(config) if v is not None and p == f"{place}.init_args.{k}"}
        if all(name in parameters and name not in given for name in names):
            missing = ", ".join(f"{place}.init_args.{name}" for name in names)
            return f"{missing}: missing, but {owner.__name__} needs {'it' if len(names) == 1 else 'them'}"
    for path, key, value, _ in walk(config):
        # of an empty mapping the parser tries to make the base class, such as Optimizer
        if value == {} and key not in SPEC and path.startswith("model."):
            return f"{path}.class_path is missing: it says what to build"
    return f"{', '.join(name.rsplit('.', 1)[-1] for name in names)}: missing, but needed"


def _where(name: str, config: Mapping[str, Any], *, of_key: bool = False) -> str:
    """The path of a key or value in the config files, as far as it can be found."""
    last = name.rsplit(".", 1)[-1]
    for path, key, value, _ in walk(config):
        if (key == last and key not in SPEC) if of_key else (value == name):
            return path
    return name if of_key else "class_path"
