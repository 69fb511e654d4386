"""Turn a parser's complaint into one line: which key, what is allowed, and the nearest right one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from kd_lightning.errors import InputError

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


def one_line(message: str, parser: jsonargparse.ArgumentParser | None = None, args: Iterable[str] = ()) -> str:
    """What is wrong, where, and the nearest right name.

    Args:
        message: What jsonargparse said.
        parser: Whose keys are allowed at the top.
        args: The command line, whose config files tell where a key stands.
    """
    if "Errors:" in message:  # of a union only the first try is the one that was meant
        message = re.split(r"Errors:\s*-?\s*", message)[-1].split("\n  - Expected a <class 'NoneType'>")[0]
        message = re.split(r"\n\s*(?:- Expected a <class 'NoneType'>|Given value)", message)[0]
    configs = list(_configs(args))
    if found := re.search(r"[Oo]ption '([^']+)' is not accepted|not accept option '([^']+)'", message):
        return _unknown_key(found[1] or found[2], parser, configs)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found[1]
        names = [n for home in _HOMES for n in vars(importlib.import_module(home)) if not n.startswith("_")]
        return f"{_where(name, configs)}: no class {name!r}{_hint(name.rsplit('.', 1)[-1], names)}"
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message).replace("typing.", "")
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        inner = " no such key" in found[2] or ": no class " in found[2]  # already says where
        message = found[2] if inner else f"{_where(found[1], configs, of_key=True)}: {found[2]}"
    elif found := re.match(r"(\w+)(: | must )", message):  # one of our own, which names its argument
        message = _where(found[1], configs, of_key=True) + message[found.end(1) :]
    elif found := re.search(r"given class_path '([\w.]+)\.(\w+)': module .* has no attribute", message):
        near = _hint(found[2], vars(importlib.import_module(found[1])))
        message = f"{_where(f'{found[1]}.{found[2]}', configs)}: {found[1]} has no {found[2]!r}{near}"
    return " ".join(message.split())


def check_doubled_keys(args: Iterable[str]) -> None:
    """Refuse a config file that says a thing twice, of which YAML's reader would silently take the last.

    Raises:
        InputError: For a doubled key, with its place; and for a file that is no YAML.
    """
    for path in _config_files(args):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        _check_node(root, "", path)


def _check_node(node: yaml.Node | None, place: str, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            _check_node(child, f"{place}[{number}]", path)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            here = f"{place}.{key.value}" if place else str(key.value)
            if key.value in seen:
                raise InputError(f"{here} stands twice, the second time in line {key.start_mark.line + 1} of {path}")
            seen.add(key.value)
            _check_node(child, here, path)


def _unknown_key(key: str, parser: jsonargparse.ArgumentParser | None, configs: list[Any]) -> str:
    name = key.rsplit(".", 1)[-1]
    for path, parent in _places(name, configs):
        owner = _import(parent) if isinstance(parent, str) else None
        if owner is not None:
            allowed = [p for p in inspect.signature(owner).parameters if p != "self"]
            return f"{path}: {owner.__name__} has no such key{_hint(name, allowed)}; allowed: {', '.join(allowed)}"
    known = [] if parser is None else [k for k in _keys(parser) if k.rpartition(".")[0] == key.rpartition(".")[0]]
    return f"{key}: no such key{_hint(key, known)}"


def _keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    """All keys of a parser and of its subcommands."""
    keys = [action.dest for action in parser._actions]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys += [key for child in action.choices.values() for key in _keys(child)]
    return keys


def _hint(name: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _config_files(args: Iterable[str]) -> Iterator[Path]:
    """The config files named on the command line."""
    args = list(args)
    for number, argument in enumerate(args):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c"):
            path = Path(value or (args[number + 1] if number + 1 < len(args) else ""))
            if path.is_file():
                yield path


def _configs(args: Iterable[str]) -> Iterator[Any]:
    for path in _config_files(args):
        try:
            yield yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue


def _walk(node: Any, path: str = "", owner: str | None = None) -> Iterator[tuple[str, Any, Any, str | None]]:
    """Every (path, key, value, class path of the arguments it stands among)."""
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from _walk(child, f"{path}[{number}]", owner)
    if isinstance(node, dict):
        for key, child in node.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, key, child, owner
            yield from _walk(child, here, node.get("class_path") if key in ("init_args", "dict_kwargs") else None)


def _places(name: str, configs: list[Any]) -> Iterator[tuple[str, str | None]]:
    for config in configs:
        yield from ((path, owner) for path, key, _, owner in _walk(config) if key == name)


def _where(name: str, configs: list[Any], *, of_key: bool = False) -> str:
    """The path of a key or value in the config files, as far as it can be found."""
    last = name.rsplit(".", 1)[-1]
    for config in configs:
        for path, key, value, _ in _walk(config):
            if (key == last) if of_key else (value == name):
                return path
    return name if of_key else "class_path"


def _import(class_path: str) -> Any:
    home, _, name = class_path.rpartition(".")
    for module in [home] if home else _HOMES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None
