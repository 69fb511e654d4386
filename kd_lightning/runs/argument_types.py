"""What the parser accepts beyond type hints: lists for tensors, and schedules without the length of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

_BUILDING = ContextVar("building", default=False)  # objects from a config, after it was parsed
WRITTEN_AS = "a tensor must be written as"
"""How each message about the value of a tensor begins."""


class ArgumentTypes:
    """A base of parsers. An argument of type Tensor takes a number, or a list of numbers or of such lists, too.

    The config holds the list, as its user wrote it. Each object that is built gets a tensor of its own, of torch's
    default float type, since weights multiply losses; of booleans alone it is a tensor of booleans. A class path of a
    function that returns a tensor is accepted, too. ``T_max`` of CosineAnnealingLR may be left out.
    """

    def _add_signature_parameter(self, container: Any, nested_key: Any, param: Any, *args: Any, **kwargs: Any) -> Any:
        annotation = _with_lists(param.annotation)
        if param.name == "T_max" and CosineAnnealingLR in (param.parent, param.component):  # see schedules.takes_length
            annotation, param = annotation | None, replace(param, default=None)
        param = replace(param, annotation=annotation)
        return super()._add_signature_parameter(container, nested_key, param, *args, **kwargs)  # type: ignore[misc]

    def instantiate(self, *args: Any, **kwargs: Any) -> Namespace:
        """Build the objects of a parsed config."""
        with _building():
            built: Namespace = super().instantiate(*args, **kwargs)  # type: ignore[misc]
        return built


class NumberList:
    """The type of a number, or of lists of numbers, that stand for a tensor."""


def to_numbers(value: Any) -> Any:
    """Return a value that stands for a tensor, as a config holds it. While objects are built, return the tensor.

    Args:
        value: A number, a list of numbers, or a list of such lists of one length; or a tensor, from Python.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, Tensor):
        return value
    numbers = [*_numbers_of(value)]
    booleans = {isinstance(number, bool) for number in numbers}
    if len(booleans) != 1:
        raise ValueError(f"{WRITTEN_AS} numbers alone, or true and false alone")
    dtype = torch.bool if booleans == {True} else torch.get_default_dtype()
    return torch.tensor(value, dtype=dtype) if _BUILDING.get() else value


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


def _to_list(value: Any) -> Any:
    """Return what a config file holds for a value: a list for the default of an argument, which is a tensor."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype not in (torch.bool, torch.get_default_dtype()):
        raise ValueError(f"a list cannot stand for a tensor of {value.dtype}")  # read again, it would be another type
    return _shortest(value.tolist()) if value.dtype == torch.float32 else value.tolist()


def _shortest(value: Any) -> Any:
    """Return the shortest decimals that stand for the same float32: 0.1 for 0.10000000149011612."""
    if isinstance(value, list):
        return [_shortest(row) for row in value]
    return next(short for short in (float(f"{value:.{n}g}") for n in range(6, 18)) if _same_float32(short, value))


def _same_float32(one: float, other: float) -> bool:
    return torch.equal(torch.tensor(one), torch.tensor(other)) or one != one


register_type(NumberList, _to_list, to_numbers, (), type_check=lambda value, kind: False)


@contextmanager
def _building() -> Iterator[None]:
    token = _BUILDING.set(True)
    try:
        yield
    finally:
        _BUILDING.reset(token)


def _with_lists(hint: Any) -> Any:
    """Return a type hint in which lists of numbers are allowed where a tensor is, and no float.

    Optimisers take ``float | Tensor`` as learning rate. All that are built would share the tensor of a list, which
    schedules change in place.
    """
    if hint is Tensor:
        return NumberList | Tensor
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (None, Literal, type, Callable) or float in inner:
        return hint
    widened = tuple(map(_with_lists, inner))
    if widened == inner:
        return hint
    return origin[widened] if origin in (list, dict, tuple) else Union[widened]  # noqa: UP007
