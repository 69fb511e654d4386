"""The inputs of a network: a tensor, or a mapping or tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError

Inputs = Tensor | Mapping[str, Any] | tuple[Any, ...]
"""A tensor (B, ...), or a mapping or tuple of such tensors. Mappings and tuples may hold further ones."""


def call(network: Callable[..., Any], x: Inputs) -> Any:
    """Call a network: ``network(x)`` for a tensor, ``network(**x)`` for a mapping, ``network(*x)`` for a tuple.

    >>> call(lambda ids, mask: ids * mask, {"ids": torch.tensor([2, 3]), "mask": torch.tensor([1, 0])})
    tensor([2, 0])
    """
    args, kwargs = arguments_of(x)
    return network(*args, **kwargs)


def arguments_of(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, by position and by name, that a network is called with."""
    if isinstance(x, Mapping):
        return (), {**x}
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def tensors_of(x: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of inputs, in their order."""
    if isinstance(x, Tensor):
        yield x
        return
    for part in x.values() if isinstance(x, Mapping) else x:
        if isinstance(part, Tensor | Mapping | tuple | list):
            yield from tensors_of(part)  # type: ignore[arg-type]


def map_inputs(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return inputs of the same form with all tensors changed. Anything else stays as it is."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {name: map_inputs(change, part) for name, part in x.items()}
    if isinstance(x, tuple | list):
        parts = [map_inputs(change, part) for part in x]
        return parts if isinstance(x, list) else tuple(parts)
    return x


def rows_of(x: Inputs) -> int:
    """Return the number of rows B, the length of the tensors along their first dimension.

    Raises:
        InputError: If there is no tensor with rows, or two tensors have different numbers of rows.
    """
    if isinstance(x, Tensor):
        return len(x)
    found = {len(part) for part in tensors_of(x) if part.ndim}
    if len(found) != 1:
        raise InputError(f"x must hold tensors of one number of rows, got {describe(x)}")
    return found.pop()


def device_of(x: Inputs) -> torch.device:
    """Return the device of the first tensor."""
    return x.device if isinstance(x, Tensor) else next(tensors_of(x)).device


def describe(x: Any) -> str:
    """Describe inputs by their shapes.

    >>> describe({"ids": torch.zeros(2, 8), "mask": torch.zeros(2, 8)})
    '{ids: [2, 8], mask: [2, 8]}'
    """
    if isinstance(x, Tensor):
        return str([*x.shape])
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{name}: {describe(part)}" for name, part in x.items()) + "}"
    if isinstance(x, tuple | list):
        return "(" + ", ".join(map(describe, x)) + ")"
    return type(x).__name__
