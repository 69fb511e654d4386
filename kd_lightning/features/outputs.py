"""Take the logits, or the features, out of a network's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kd_lightning.errors import InputError

Output = str | int | Callable[[Any], Tensor]
"""What picks a part out of a network's output: a key or attribute, a number, or a function."""


def logits_of(output: Any, owner: str) -> Tensor:
    """Take the logits out of a network's output.

    Args:
        output: One of these:

            - a tensor;
            - a mapping, named tuple or dataclass with ``logits`` (as returned in training by torchvision's Inception
              and the models of Hugging Face), or a mapping with ``out`` (torchvision's segmentation models);
            - a mapping, tuple or list with one tensor that is no scalar, such as ``(loss, logits)``;
            - a tuple or list with several, ``(logits, features, ...)``: the first.
        owner: Name of the network in the error message.

    Raises:
        InputError: For any other output.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 3), "features": torch.zeros(2, 8)}, "the student").shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    names = ("logits", "out")
    parts = dict(output) if isinstance(output, Mapping) else dict(enumerate(output)) if _is_row(output) else {}
    named = [parts.get(name) for name in names] if isinstance(output, Mapping) else [getattr(output, "logits", None)]
    if found := [part for part in named if isinstance(part, Tensor)]:
        return found[0]
    tensors = [part for part in parts.values() if isinstance(part, Tensor) and part.ndim]
    if len(tensors) == 1 or (tensors and _is_row(output)):
        return tensors[0]
    held = ", ".join(f"{name}: {_describe(part)}" for name, part in parts.items())
    raise InputError(
        f"{owner} must return logits: a tensor, an object with a part named logits or out, a tuple whose first tensor "
        f"they are, or a mapping with one tensor; got {type(output).__name__}{f' with {held}' if held else ''}"
    )


def pick_logits(output: Any, pick: Output | None, owner: str) -> Tensor:
    """Pick the logits out of a network's output.

    Args:
        output: The output. A tensor is taken as it is, except by a function.
        pick: What picks them. Default: None, which means what :func:`logits_of` finds.
        owner: Name of the network in the error message.

    Raises:
        InputError: If it picks nothing, or no tensor.

    >>> import torch
    >>> pick_logits({"scores": torch.zeros(2, 3), "features": torch.zeros(2, 8)}, "scores", "the student").shape
    torch.Size([2, 3])
    """
    if pick is None:
        return logits_of(output, owner)
    try:
        if callable(pick):
            found = pick(output)
        elif isinstance(output, Tensor):
            found = output
        else:
            found = output[pick] if isinstance(pick, int) or isinstance(output, Mapping) else getattr(output, pick)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(
            f"output: {pick!r} picks nothing out of what {owner} returns, {type(output).__name__}"
        ) from error
    if not isinstance(found, Tensor):
        raise InputError(f"output must pick a tensor, got {type(found).__name__} from {owner}")
    return found


def feature_of_output(output: Any, owner: str) -> Tensor:
    """Take the feature out of the output of a network that has no logits, such as a backbone.

    Args:
        output: One of these:

            - a tensor;
            - a mapping, named tuple or object with ``pooler_output``, else with ``last_hidden_state`` (the backbones of
              Hugging Face);
            - a mapping, tuple or list with one tensor of floating point that is no scalar.
        owner: Name of the network in the error message.

    Raises:
        InputError: For any other output.

    >>> import torch
    >>> output = {"last_hidden_state": torch.zeros(2, 5, 8), "pooler_output": torch.zeros(2, 8)}
    >>> feature_of_output(output, "the teacher").shape
    torch.Size([2, 8])
    """
    if isinstance(output, Tensor):
        return output
    parts = dict(output) if isinstance(output, Mapping) else dict(enumerate(output)) if _is_row(output) else {}
    for name in ("pooler_output", "last_hidden_state"):
        part = parts[name] if name in parts else getattr(output, name, None)
        if isinstance(part, Tensor):
            return part
    found = [part for part in parts.values() if isinstance(part, Tensor) and part.ndim and part.is_floating_point()]
    if len(found) == 1:
        return found[0]
    held = ", ".join(f"{name}: {_describe(part)}" for name, part in parts.items())
    raise InputError(
        f"{owner} must return a feature: a tensor, an object with pooler_output or last_hidden_state, or a mapping or "
        f"tuple with one tensor of floats; got {type(output).__name__}{f' with {held}' if held else ''}; or use one of "
        "its layers"
    )


def describe_choice(output: Any) -> str:
    """Describe which tensor of a tuple is taken for the logits, where there are several; else return an empty text."""
    if not _is_row(output) or isinstance(getattr(output, "logits", None), Tensor):
        return ""
    shapes = [str([*part.shape]) for part in output if isinstance(part, Tensor) and part.ndim]
    return f"a tuple of tensors {', '.join(shapes)}; the first is taken for the logits" if len(shapes) > 1 else ""


def auxiliary_logits_of(output: Any) -> list[Tensor]:
    """Take the logits of auxiliary heads out of a network's output.

    Args:
        output: As of torchvision's Inception and GoogLeNet in training, or a mapping with ``aux``.

    Returns:
        The logits of each head; an empty list if there are none.
    """
    if isinstance(output, Mapping):
        found = [output.get("aux")]
    else:
        found = [getattr(output, name, None) for name in ("aux_logits", "aux_logits1", "aux_logits2")]
    return [part for part in found if isinstance(part, Tensor)]


def _is_row(output: Any) -> bool:
    return isinstance(output, tuple | list)


def _describe(part: Any) -> str:
    return f"a tensor {[*part.shape]}" if isinstance(part, Tensor) else type(part).__name__
