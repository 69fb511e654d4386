"""The config files of a command line: read them, and refuse what no parser can make sense of, by place."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from kd_lightning.errors import InputError
from kd_lightning.runs.class_paths import SPEC, find_class, hint, no_such_key, parameters_of


def config_files(args: Iterable[str]) -> Iterator[Path]:
    """The config files named on the command line."""
    args = list(args)
    for number, argument in enumerate(args):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c"):
            path = Path(value or (args[number + 1] if number + 1 < len(args) else ""))
            if path.is_file():
                yield path


def read_configs(args: Iterable[str]) -> dict[str, Any]:
    """The config files of a command line, later ones over earlier ones; without what is no YAML."""
    merged: dict[str, Any] = {}
    for path in config_files(args):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if isinstance(content, dict):
            _merge(merged, content)
    return merged


def nulls_of(args: Sequence[str]) -> set[str]:
    """Keys, without ``init_args``, that a command line gives null."""
    pairs = [argument.partition("=")[::2] for argument in args]
    pairs += pairwise(args)
    return {key.lstrip("-").replace(".init_args", "") for key, value in pairs if value == "null"}


def known_keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    """All keys of a parser and of its subcommands."""
    keys = [action.dest for action in parser._actions]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys += [key for child in action.choices.values() for key in known_keys(child)]
    return keys


def check_configs(args: Iterable[str], parser: jsonargparse.ArgumentParser) -> None:
    """Refuse what would otherwise be taken silently, or complained of at the wrong place.

    Args:
        args: The command line.
        parser: Whose keys are allowed.

    Raises:
        InputError: For a key that stands twice (YAML's reader would take the last), a key that nobody knows, a class
            spec without its class, arguments that are no mapping, null where an argument cannot be None; and for a file
            that is no YAML.
    """
    args = list(args)
    for path in config_files(args):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        _check_doubled(root, "", path)
    config, keys = read_configs(args), known_keys(parser)
    for command in _subcommands(parser):  # a file given before the command holds its keys below its name
        if isinstance(config.get(command), dict):
            config |= config.pop(command)
    top = {key.partition(".")[0] for key in keys}
    if not isinstance(config.get("model", {}), dict | str):
        raise InputError(f"model must be a mapping with a class_path, got {config['model']!r}")
    given = [argument.lstrip("-").partition("=")[0] for argument in args if argument.startswith("--")]
    for key, value in config.items():
        if key not in top:
            raise InputError(f"{key}: no such key{hint(str(key), top)}")
        inner = {k.partition(".")[2] for k in keys if k.startswith(f"{key}.")}
        if key in ("model", "data"):
            _check_spec(value, key, given)
        elif inner and isinstance(value, dict):
            for name in value:
                if name not in inner:
                    raise InputError(f"{key}.{name}: no such key{hint(f'{key}.{name}', [f'{key}.{k}' for k in inner])}")
            _check_values(value, key, given)
        elif inner and not isinstance(value, str):
            raise InputError(f"{key} must hold keys and their values, got {value!r}")


def _subcommands(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    if "class_path" in other and other["class_path"] != into.get("class_path"):
        for key in SPEC[1:]:  # another class has other arguments
            into.pop(key, None)
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _check_doubled(node: yaml.Node | None, place: str, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            _check_doubled(child, f"{place}[{number}]", path)
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for number, (key, child) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"line {key.start_mark.line + 1} of {path}: a key must be a plain word")
            here = f"{place}.{key.value}" if place else str(key.value)
            if key.value in names[:number] and key.value != "<<":
                raise InputError(f"{here} stands twice, the second time in line {key.start_mark.line + 1} of {path}")
            _check_doubled(child, here, path)


def _check_values(node: Any, path: str, given: list[str]) -> None:
    if isinstance(node, list):
        for number, child in enumerate(node):
            _check_values(child, f"{path}[{number}]", given)
    if isinstance(node, dict):
        if node and all(difflib.get_close_matches(str(key), SPEC, n=1, cutoff=0.75) for key in node):
            _check_spec(node, path, given)
        else:
            for key, child in node.items():
                _check_values(child, f"{path}.{key}", given)


def _check_spec(spec: Any, path: str, given: list[str]) -> None:
    """A mapping that says how an object is built; anything else is the parser's to judge."""
    if not isinstance(spec, dict):
        return
    for key in spec:
        if key not in SPEC:
            raise InputError(f"{path}.{key}: no such key{hint(str(key), SPEC)}; allowed: {', '.join(SPEC)}")
    class_path = spec.get("class_path")
    if "class_path" not in spec and not any(key in (path, f"{path}.class_path") for key in given):
        raise InputError(f"{path}.class_path is missing: it says what to build, such as kd_lightning.DistillModule")
    if "class_path" in spec and (not isinstance(class_path, str) or not class_path):
        raise InputError(f"{path}.class_path must be the import path of a class, got {class_path!r}")
    for part in SPEC[1:]:
        arguments = spec.get(part, {})
        if not isinstance(arguments, dict):
            raise InputError(f"{path}.{part} must hold arguments and their values, got {arguments!r}")
        for name, value in arguments.items():
            _check_values(value, f"{path}.{part}.{name}", given)
    owner = find_class(class_path)
    parameters = parameters_of(owner)
    if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key, value in spec.get("init_args", {}).items():
        if key not in parameters:
            raise InputError(f"{path}.init_args.{key}: {no_such_key(owner, str(key), parameters)}")
        if value is None and parameters[key].default is not None and not _takes_none(owner, key):
            raise InputError(f"{path}.init_args.{key}: {owner.__name__} takes no null here; leave the key out")


def _takes_none(owner: Any, name: str) -> bool:
    """Whether an argument may be None, for all that is known: the parser lets null pass for any."""
    try:
        hints = get_type_hints(owner.__init__ if inspect.isclass(owner) else owner)
    except Exception:  # of somebody else's annotations anything may come
        return True
    kind = hints.get(name, Any)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType, Literal) else (kind,)
    return any(one in (None, NoneType, Any, object) or isinstance(one, TypeVar) for one in kinds)
