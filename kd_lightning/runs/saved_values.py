"""Which values the config of a run can hold."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader

from kd_lightning.errors import InputError


def can_be_saved(default: Any, hint: Any) -> bool:
    """Return whether a config can hold the default of an argument: written and read again, it is the same value.

    A class cannot stand for itself where the hint is ``Callable``: its path is read as an object of that class. Where
    the hint is ``Callable[..., X]``, as of ShuffleNet's blocks, arguments that the caller gives would be asked for.
    Lambdas and objects have no path.

    Args:
        default: The default.
        hint: Type hint of the argument; ``inspect.Parameter.empty`` without one.
    """
    if _is_plain(default) or is_dataclass(default) or type(default).__module__.partition(".")[0] == "jsonargparse":
        return True
    hint = Any if hint is inspect.Parameter.empty else hint
    try:
        return _is_read_again(default, hint)
    except TypeError:  # a default without a hash
        return _is_read_again.__wrapped__(default, hint)


@cache
def _is_read_again(default: Any, hint: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.add_argument("--value", type=hint, default=default)
            config = parser.parse_args([])
            if isinstance(config.value, Namespace) and "class_path" in config.value:
                # an optimizer's class where a callable returns one; "..." does not tell what the caller gives
                return not _takes_anything(hint)
            read = parser.instantiate(parser.parse_string(parser.dump(config))).value
            return type(read) is type(default) and bool(read == default)
    except Exception:  # of types and values of others can be anything
        return False


def _takes_anything(hint: Any) -> bool:
    """Return whether a type hint is ``Callable[..., X]``, or a union with it."""
    inner = get_args(hint)
    return Ellipsis in inner if get_origin(hint) is Callable else any(map(_takes_anything, inner))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return type(value) in (list, tuple, dict) and all(map(_is_plain, parts))
    if type(value) is str:  # "1" can be read as a number, by some hints
        with suppress(yaml.YAMLError):
            return bool(get_loader("yaml")(value) == value)
    return value is inspect.Parameter.empty or value is None or type(value) in (bool, int, float, str)


def check_saved(config: Any, saved: Any, path: str = "") -> None:
    """Raise InputError for a value of a config that its saved form does not hold.

    Jsonargparse reads the texts in a list or mapping as YAML when it writes an argument without a type, and writes a
    message for an object without a path.

    Args:
        config: The parsed config, or a part of it.
        saved: The same as the file holds it.
        path: The place of the part.
    """
    if isinstance(config, Mapping) and isinstance(saved, Mapping) and "class_path" in saved.keys() - config.keys():
        raise InputError(f"{path}: the config of a run must hold the mapping {config}, but would hold an object")
    if isinstance(config, Mapping | Namespace) and isinstance(saved, Mapping):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            if key in saved:
                check_saved(value, saved[key], f"{path}.{key}" if path else str(key))
    elif isinstance(config, list | tuple) and isinstance(saved, list):
        for number, (value, other) in enumerate(zip(config, saved, strict=False)):
            check_saved(value, other, f"{path}[{number}]")
    elif isinstance(config, str) and config != saved:
        raise InputError(
            f"{path}: the config of a run must hold the text {config!r}, but would hold {saved!r}; give the argument a "
            "type hint, such as list[str]"
        )
    elif isinstance(saved, str) and saved.startswith("Unable to serialize") and not isinstance(config, str):
        raise InputError(f"{path} must be what the config of a run can hold, got {' '.join(repr(config).split())}")
