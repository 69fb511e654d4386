"""Take the logits out of a network's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_lightning.errors import InputError


def logits_of(output: Any, owner: str) -> Tensor:
    """Take the logits out of a network's output.

    Args:
        output: A tensor; a mapping, named tuple or dataclass with ``logits`` (as returned in training by torchvision's
            Inception and the models of Hugging Face); or a mapping, tuple or list with exactly one tensor.
        owner: Name of the network in the error message.

    Raises:
        InputError: For any other output.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 3), "features": torch.zeros(2, 8)}, "the student").shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = dict(output) if isinstance(output, Mapping) else dict(enumerate(output)) if _is_row(output) else {}
    tensors = [part for part in parts.values() if isinstance(part, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    held = ", ".join(f"{name}: {_describe(part)}" for name, part in parts.items())
    raise InputError(
        f"{owner} must return logits: a tensor, an object with a part named logits, or a tuple or mapping with one "
        f"tensor; got {type(output).__name__}{f' with {held}' if held else ''}"
    )


def _is_row(output: Any) -> bool:
    return isinstance(output, tuple | list)


def _describe(part: Any) -> str:
    return f"a tensor {[*part.shape]}" if isinstance(part, Tensor) else type(part).__name__
