"""What the parser accepts beyond type hints: lists for tensors, and schedules without the length of the run."""

from __future__ import annotations

import inspect
import math
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader
from jsonargparse.typing import register_type
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from kd_lightning.runs.saved_values import can_be_saved
from kd_lightning.runs.yaml_file import dump_yaml, unshared

_BUILDING = ContextVar("building", default=False)  # objects from a config, after it was parsed
WRITTEN_AS = "a tensor must be written as"
"""How each message about the value of a tensor begins."""


_load = get_loader("yaml")
set_loader("yaml", lambda text: unshared(_load(text)), (yaml.YAMLError,))  # of files that a config names, too
set_dumper("yaml", dump_yaml)


class ArgumentTypes:
    """A base of parsers. An argument of type Tensor takes a number, or a list of numbers or of such lists, too.

    The config holds the list, as its user wrote it. Each object that is built gets a tensor of its own. It has the type
    of the argument's default, if that is a tensor; else torch's default float type, since weights multiply losses, or
    booleans, if the list holds booleans alone. A class path of a function that returns a tensor is accepted, too.
    ``T_max`` of CosineAnnealingLR may be left out.

    A default that a config cannot hold, such as a lambda or an object, is not part of it. The signature's own counts
    where an object is built.
    """

    def _add_signature_parameter(self, container: Any, nested_key: Any, param: Any, *args: Any, **kwargs: Any) -> Any:
        annotation = _with_lists(param.annotation, number_list(_dtype_of(param.default)))
        if param.name == "T_max" and CosineAnnealingLR in (param.parent, param.component):  # see schedules.takes_length
            annotation, param = annotation | None, replace(param, default=None)
        if not takes_lists(annotation) and not can_be_saved(param.default, param.annotation):
            annotation = Any if annotation is inspect.Parameter.empty else annotation
            param = replace(param, default=SUPPRESS)
        param = replace(param, annotation=annotation)
        return super()._add_signature_parameter(container, nested_key, param, *args, **kwargs)  # type: ignore[misc]

    def _dump_cleanup_actions(self, cfg: Namespace, actions: Any, dump_kwargs: Any, prefix: str = "") -> None:
        """Write values; a mapping, where an object can stand, is not the arguments of the hint's class."""
        mappings = [key for key, value in cfg.items() if type(value) is dict and "class_path" not in value]
        super()._dump_cleanup_actions(cfg, actions, dump_kwargs, prefix)  # type: ignore[misc]
        for key in mappings:
            written = cfg.get(key)
            if isinstance(written, dict | Namespace) and "class_path" in written:
                cfg.update(dict(written["init_args"]), key)

    def parse_object(self, config: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config that is a mapping."""
        parsed: Namespace = super().parse_object(unshared(config), *args, **kwargs)  # type: ignore[misc]
        return parsed

    def instantiate(self, *args: Any, **kwargs: Any) -> Namespace:
        """Build the objects of a parsed config."""
        with _building():
            built: Namespace = super().instantiate(*args, **kwargs)  # type: ignore[misc]
        return built


class NumberList:
    """The type of a number, or of lists of numbers, that stand for a tensor."""


@cache
def number_list(dtype: torch.dtype | None) -> type[NumberList]:
    """Return the type of lists that stand for a tensor of a type.

    Args:
        dtype: Type of the tensor. None if it follows from the numbers.
    """
    kind = type("NumberList", (NumberList,), {})
    register_type(kind, partial(_to_list, dtype), partial(to_numbers, dtype=dtype), (), lambda value, kind: False)
    return kind


def to_numbers(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a value that stands for a tensor, as a config holds it. While objects are built, return the tensor.

    Args:
        value: A number, a list of numbers, or a list of such lists of one length; or a tensor, from Python.
        dtype: Type of the tensor. Default: None, which means booleans for booleans, and else torch's default type.

    Raises:
        ValueError: If it is anything else, or if the type cannot hold the numbers: integers must stay what they are.
    """
    if isinstance(value, Tensor):
        return value
    numbers = [*_numbers_of(value)]
    booleans = {isinstance(number, bool) for number in numbers}
    if len(booleans) != 1:
        raise ValueError(f"{WRITTEN_AS} numbers alone, or true and false alone")
    if dtype is not None and booleans != {dtype == torch.bool}:
        raise ValueError(f"{WRITTEN_AS} {'true and false' if dtype == torch.bool else 'numbers'}, as its default is")
    if dtype is None:
        dtype = torch.bool if booleans == {True} else torch.get_default_dtype()
    for number in numbers:
        if not _holds(dtype, number):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{WRITTEN_AS} numbers that its type {kind} can hold, which {number} is not")
    return torch.tensor(value, dtype=dtype) if _BUILDING.get() else value


def _holds(dtype: torch.dtype, number: float) -> bool:
    """Return whether a type holds a number: an integer exactly, a decimal rounded."""
    try:
        held = torch.tensor(number, dtype=dtype).item()
    except (RuntimeError, TypeError, ValueError, OverflowError):  # an integer out of its range
        return False
    if isinstance(number, int) or not (dtype.is_floating_point or dtype.is_complex):
        return bool(held == number)
    return math.isfinite(held) == math.isfinite(number)


def _numbers_of(value: Any) -> Iterator[bool | int | float]:
    """Yield the numbers of nested lists."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple) and value:
        if len({len(row) if isinstance(row, list | tuple) else None for row in value}) > 1:
            raise ValueError(f"{WRITTEN_AS} rows of one length")
        for row in value:
            yield from _numbers_of(row)
    else:
        raise ValueError(f"{WRITTEN_AS} a number or as lists of numbers")


def _to_list(dtype: torch.dtype | None, value: Any) -> Any:
    """Return what a config file holds for a value: a list for the default of an argument, which is a tensor."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype not in (torch.bool, torch.get_default_dtype(), dtype):
        raise ValueError(f"a list cannot stand for a tensor of {value.dtype}")  # read again, it would be another type
    return _shortest(value.tolist()) if value.dtype == torch.float32 else value.tolist()


def _shortest(value: Any) -> Any:
    """Return the shortest decimals that stand for the same float32: 0.1 for 0.10000000149011612."""
    if isinstance(value, list):
        return [_shortest(row) for row in value]
    return next(short for short in (float(f"{value:.{n}g}") for n in range(6, 18)) if _same_float32(short, value))


def _same_float32(one: float, other: float) -> bool:
    return torch.equal(torch.tensor(one), torch.tensor(other)) or one != one


@contextmanager
def _building() -> Iterator[None]:
    token = _BUILDING.set(True)
    try:
        yield
    finally:
        _BUILDING.reset(token)


def takes_lists(hint: Any) -> bool:
    """Return whether a list of numbers can stand for a tensor in a type hint of :class:`ArgumentTypes`."""
    return (isinstance(hint, type) and issubclass(hint, NumberList)) or any(map(takes_lists, get_args(hint)))


def _dtype_of(default: Any) -> torch.dtype | None:
    """Return the type of a default that is a tensor, or that holds tensors of one type. None for any other."""
    if isinstance(default, Tensor):
        return default.dtype
    inner = default.values() if isinstance(default, dict) else default if isinstance(default, list | tuple) else ()
    dtypes = {*map(_dtype_of, inner)}
    return dtypes.pop() if len(dtypes) == 1 else None


def _with_lists(hint: Any, numbers: type[NumberList]) -> Any:
    """Return a type hint in which lists of numbers are allowed where a tensor is, and no float.

    Optimisers take ``float | Tensor`` as learning rate. All that are built would share the tensor of a list, which
    schedules change in place.
    """
    if hint is Tensor:
        return numbers | Tensor
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (None, Literal, type, Callable) or float in inner:
        return hint
    widened = tuple(_with_lists(part, numbers) for part in inner)
    if widened == inner:
        return hint
    return origin[widened] if origin in (list, dict, tuple) else Union[widened]  # noqa: UP007
