"""The inputs of a network: a tensor, or a mapping or tuple of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError

Inputs = Tensor | Mapping[Any, Any] | tuple[Any, ...]
"""A tensor (B, ...), or a mapping or tuple of such tensors. Mappings and tuples may hold further ones."""


def call(network: Callable[..., Any], x: Inputs) -> Any:
    """Call a network: ``network(x)`` for a tensor, ``network(**x)`` for a mapping, ``network(*x)`` for a tuple.

    >>> call(lambda ids, mask: ids * mask, {"ids": torch.tensor([2, 3]), "mask": torch.tensor([1, 0])})
    tensor([2, 0])
    """
    args, kwargs = arguments_of(x)
    try:
        return network(*args, **kwargs)
    except TypeError as error:
        explain_call(error, network, args, kwargs)
        raise


def explain_call(
    error: TypeError,
    network: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    owner: str = "network",
) -> None:
    """Raise InputError if the error is Python's about arguments that a network does not take.

    Args:
        error: What the call has raised.
        network: The network.
        args: The arguments by position.
        kwargs: The arguments by name.
        owner: What the network is called in the message.
    """
    forward = getattr(network, "forward", network)
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # compiled code may have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        if f"{getattr(forward, '__name__', '')}() " not in str(error):  # raised further inside
            return
        given = f"the inputs {', '.join(kwargs)}" if kwargs else f"{len(args)} input{'s'[: len(args) != 1]}"
        raise InputError(
            f"the {owner} {type(network).__name__} takes {_without_hints(signature)}, but a batch has {given}; the "
            "module's unpack(batch) can return other ones"
        ) from error


def _without_hints(signature: inspect.Signature) -> str:
    parts = signature.parameters.values()
    return str(inspect.Signature([part.replace(annotation=inspect.Parameter.empty) for part in parts]))


def arguments_of(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, by position and by name, that a network is called with."""
    if isinstance(x, Mapping):
        return (), {**x}
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def tensors_of(x: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of inputs, in their order."""
    return (tensor for _, tensor in named_tensors_of(x))


def named_tensors_of(x: Inputs, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each of the inputs. The name is a path such as ``['a'][0]``; empty for one."""
    if isinstance(x, Tensor):
        yield name, x
        return
    for key, part in x.items() if isinstance(x, Mapping) else enumerate(x):
        if isinstance(part, Tensor | Mapping | tuple | list):
            yield from named_tensors_of(part, f"{name}[{key!r}]")  # type: ignore[arg-type]


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


def take_rows(x: Any, rows: Tensor | slice, count: int) -> Any:
    """Return some rows of all tensors that have ``count`` rows; others stay as they are.

    >>> take_rows((torch.arange(3), torch.tensor(7)), torch.tensor([True, False, True]), 3)
    (tensor([0, 2]), tensor(7))
    """
    return map_inputs(lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == count else tensor, x)


def join_rows(first: Any, second: Any) -> Any:
    """Return the rows of two inputs of one form, one after the other. Tensors without rows are those of the first.

    Raises:
        InputError: If the inputs have other names.

    >>> join_rows({"a": torch.ones(2), "b": torch.ones(2)}, {"b": torch.zeros(1), "a": torch.zeros(1)})["b"]
    tensor([1., 1., 0.])
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second]) if first.ndim else first
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {name: join_rows(part, second[name]) for name, part in first.items()}
    row = (tuple, list)
    if isinstance(first, row) and isinstance(second, row) and len(first) == len(second):
        return tuple(map(join_rows, first, second))
    if isinstance(first, (Tensor, Mapping, *row)) or isinstance(second, (Tensor, Mapping, *row)):
        raise InputError(f"inputs must have one form, got {describe(first)} and {describe(second)}")
    return first


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
