"""Config files of a command line: reads them, and refuses what the parser would accept or report at another place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from kd_lightning.errors import InputError
from kd_lightning.runs.class_paths import (
    SPEC_KEYS,
    arguments_of,
    find_class,
    name_of,
    takes_any_argument,
    takes_none,
)
from kd_lightning.runs.key_hints import hint_for_key, no_such_key
from kd_lightning.runs.yaml_file import UnboundedYAMLError, compose_yaml, load_yaml

_SUFFIXES = (".yaml", ".yml", ".json")
Known = tuple[Any, list[str]]
"""The whole config, and all keys of the parser."""
_NOTHING: Known = (None, [])


def config_files(args: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield (key, file) of each config file on the command line: ``--config FILE``, or ``--KEY FILE`` for a part of it.

    The key of a whole config is empty.
    """
    args = list(args)
    for number, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        path = Path(value if equals else args[number + 1] if number + 1 < len(args) else "")
        key = "" if name in ("--config", "-c") else name.removeprefix("--")
        if (key == "" or (name.startswith("--") and _takes_config(key, path))) and path.is_file():
            yield key, path


def _takes_config(key: str, path: Path) -> bool:
    first, *inner = key.split(".")
    written_in_full = first not in ("model", "data") or "init_args" in inner  # not --model.student
    return path.suffix in _SUFFIXES and all(map(str.isidentifier, (first, *inner))) and (not inner or written_in_full)


def read_configs(args: Iterable[str]) -> dict[str, Any]:
    """Read the config files of a command line, later ones over earlier ones, and the files that they name.

    The parser changes the working directory, so that relative paths lead to other files then. Call this before.
    What is no YAML is left out.

    Raises:
        InputError: For a file or an argument that nests too deeply, holds itself, or has aliases that repeat too much.
    """
    merged: dict[str, Any] = {}
    args = list(args)
    for argument in args:
        try:
            compose_yaml(argument.partition("=")[2] or argument)
        except UnboundedYAMLError as error:
            raise InputError(f"{argument:.80} cannot be read: {error}") from error
        except yaml.YAMLError:
            continue
    for key, path in config_files(args):
        content = _read(path, top=not key)
        if isinstance(content, dict) and ("." not in key or content.keys() & {*SPEC_KEYS}):
            for name in reversed(key.split(".") if key else []):
                content = {name: content}
            _merge(merged, content)
    return merged


def _read(path: Path, top: bool, above: tuple[Path, ...] = ()) -> Any:
    """Return the content of a file, with the content of the config files that it names in their place."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except UnboundedYAMLError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return None
    return _with_files(content, path.resolve(), top, (*above, path.resolve()))


def _with_files(node: Any, path: Path, top: bool, above: tuple[Path, ...]) -> Any:
    if isinstance(node, list):
        return [_with_files(child, path, False, above) for child in node]
    if isinstance(node, dict):
        return {key: _with_file(child, path, top, above) for key, child in node.items()}
    return node


def _with_file(value: Any, path: Path, top: bool, above: tuple[Path, ...]) -> Any:
    if isinstance(value, str) and value.endswith(_SUFFIXES):
        file = path.parent / value
        if file.is_file() and file.resolve() not in above:
            content = _read(file, False, above)
            if isinstance(content, dict) and (top or "class_path" in content):
                return content
    return _with_files(value, path, False, above)


def known_keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    """Return all keys of a parser and of its subcommands."""
    keys = [action.dest for action in parser._actions]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys += [key for child in action.choices.values() for key in known_keys(child)]
    return keys


def check_configs(args: Iterable[str], parser: jsonargparse.ArgumentParser) -> None:
    """Refuse in config files what the parser accepts without a warning, or reports at the wrong place.

    Args:
        args: The command line.
        parser: The parser whose keys are allowed.

    Raises:
        InputError: For a key that appears twice (YAML's reader takes the last one), an unknown key, an object without
            its class, arguments that are no mapping, null where an argument cannot be None, and a file that is no YAML.
    """
    args = list(args)
    for _, path in config_files(args):
        try:
            root = compose_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        _check_duplicates(root, "", path)
    config, keys = read_configs(args), known_keys(parser)
    for command in _subcommands(parser):  # a file given before the command holds its keys below its name
        if isinstance(config.get(command), dict):
            config |= config.pop(command)
    top = {key.partition(".")[0] for key in keys}
    if not isinstance(config.get("model", {}), dict | str):
        raise InputError(f"model must be a mapping with a class_path, got {config['model']!r}")
    given = [argument.lstrip("-").partition("=")[0] for argument in args if argument.startswith("--")]
    known = (config, keys)
    for key, value in config.items():
        if key not in top:
            raise InputError(f"{key}: no such key{hint_for_key(str(key), top, *known)}")
        inner = [k for k in keys if k.startswith(f"{key}.")]
        if key in ("model", "data"):
            _check_spec(value, key, given, known)
        elif inner and isinstance(value, dict):
            for name in value:
                if f"{key}.{name}" not in inner:
                    hint = hint_for_key(f"{key}.{name}", inner, *known)
                    raise InputError(f"{key}.{name}: no such key{hint}")
            _check_values(value, key, given, known)
        elif inner and not isinstance(value, str):
            raise InputError(f"{key} must hold keys and their values, got {value!r}")


def _subcommands(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    if "class_path" in other and other["class_path"] != into.get("class_path"):
        for key in SPEC_KEYS[1:]:  # another class has other arguments
            into.pop(key, None)
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _check_duplicates(node: yaml.Node | None, path: str, file: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            _check_duplicates(child, f"{path}[{number}]", file)
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for number, (key, child) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"line {key.start_mark.line + 1} of {file}: a key must be a plain word")
            key_path = f"{path}.{key.value}" if path else str(key.value)
            if key.value in names[:number] and key.value != "<<":
                line = key.start_mark.line + 1
                raise InputError(f"{key_path} appears twice, the second time in line {line} of {file}")
            _check_duplicates(child, key_path, file)


def _check_values(node: Any, path: str, given: list[str], known: Known = _NOTHING) -> None:
    if isinstance(node, list):
        for number, child in enumerate(node):
            _check_values(child, f"{path}[{number}]", given, known)
    if isinstance(node, dict):
        is_spec = find_class(node.get("class_path")) is not None
        if is_spec or (node and all(difflib.get_close_matches(str(key), SPEC_KEYS, n=1, cutoff=0.75) for key in node)):
            _check_spec(node, path, given, known)
        else:
            for key, child in node.items():
                _check_values(child, f"{path}.{key}", given, known)


def _check_spec(spec: Any, path: str, given: list[str], known: Known = _NOTHING) -> None:
    """Check a mapping that describes an object; the parser checks anything else."""
    if not isinstance(spec, dict):
        return
    for key in spec:
        if key not in SPEC_KEYS:
            allowed = ", ".join(SPEC_KEYS)
            raise InputError(
                f"{path}.{key}: no such key{hint_for_key(str(key), SPEC_KEYS, *known)}; allowed: {allowed}"
            )
    class_path = spec.get("class_path")
    if "class_path" not in spec and not any(key in (path, f"{path}.class_path") for key in given):
        raise InputError(f"{path}.class_path is missing: it names what to build, such as kd_lightning.DistillModule")
    if "class_path" in spec and (not isinstance(class_path, str) or not class_path):
        raise InputError(f"{path}.class_path must be the import path of a class, got {class_path!r}")
    for part in SPEC_KEYS[1:]:
        arguments = spec.get(part, {})
        if not isinstance(arguments, dict):
            raise InputError(f"{path}.{part} must hold arguments and their values, got {arguments!r}")
        for name, value in arguments.items():
            _check_values(value, f"{path}.{part}.{name}", given, known)
    owner = find_class(class_path)
    if takes_any_argument(owner):
        return
    allowed_names = arguments_of(owner)
    for key, value in spec.get("init_args", {}).items():
        if key not in allowed_names:
            raise InputError(f"{path}.init_args.{key}: {no_such_key(owner, str(key), allowed_names, *known)}")
        if value is None:
            check_null(f"{path}.init_args.{key}", owner, key)


def check_null(place: str, owner: Any, key: str) -> None:
    """Raise InputError if an argument cannot be None, which the parser accepts without a warning.

    Args:
        place: The path of the argument.
        owner: The class or function whose argument it is.
        key: Its name.
    """
    if not takes_none(owner, key):
        raise InputError(f"{place}: {name_of(owner)} takes no null here; leave the key out")
