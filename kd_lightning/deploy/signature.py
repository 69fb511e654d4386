"""The inputs of an exported file: their names, and their dimensions of variable size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, describe

INPUT, OUTPUT, BATCH, LENGTH = "input", "logits", "batch", "length"


def named_tensors(x: Inputs) -> dict[str, Tensor]:
    """Return the tensors of inputs by the names that they have in a file, in the order of the network's arguments.

    Raises:
        InputError: If inputs are nested.
    """
    parts: Mapping[Any, Any] = x if isinstance(x, Mapping) else {INPUT: x}
    if isinstance(x, tuple | list):
        parts = {f"{INPUT}_{number}": part for number, part in enumerate(x)}
    if not all(isinstance(part, Tensor) for part in parts.values()):
        raise InputError(f"export needs a student that takes tensors, by position or by name, got {describe(x)}")
    return {str(name): part for name, part in parts.items()}


class PositionalStudent(nn.Module):
    """A network that takes the student's inputs by position, and returns its logits as a tensor."""

    def __init__(self, student: nn.Module, x: Inputs) -> None:
        super().__init__()
        self.student = student
        self.x = dict.fromkeys(x) if isinstance(x, Mapping) else None

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the logits."""
        return logits_of(call_by_position(self.student, self.x, tensors), "the student")


def call_by_position(network: nn.Module, x: Any, tensors: Iterable[Tensor]) -> Any:
    """Call a network with the tensors of inputs ``x``: by name if it is a mapping, else by position."""
    return network(**dict(zip(x, tensors, strict=True))) if isinstance(x, Mapping) else network(*tensors)


def token_inputs(x: Inputs) -> list[str]:
    """Return the names of inputs that have one entry for each token of an ``attention_mask`` (B, T), T above 1."""
    tensors = named_tensors(x)
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < 2:
        return []
    return [name for name, part in tensors.items() if part.ndim > 1 and part.shape[1] == mask.shape[1]]


def without_last_token(x: Inputs) -> Inputs:
    """Return inputs of token sequences that are shorter by one."""
    assert isinstance(x, Mapping)
    tokens = token_inputs(x)
    return {name: part[:, :-1] if name in tokens else part for name, part in x.items()}


def axes_of(student: nn.Module, x: Inputs) -> dict[str, dict[int, str]]:
    """Return the names of the dimensions that vary, by input, and by ``OUTPUT``."""
    tokens = token_inputs(x)
    found = {name: {0: BATCH} if part.ndim else {} for name, part in named_tensors(x).items()} | {OUTPUT: {0: BATCH}}
    for name in tokens:
        found[name] |= {1: LENGTH}
    if tokens:
        inputs = x, without_last_token(x)
        with torch.no_grad():
            outputs = [
                logits_of(call_by_position(student, part, named_tensors(part).values()), "the student")
                for part in inputs
            ]
        sizes = zip(*(output.shape for output in outputs), strict=True)
        found[OUTPUT] |= {dim: LENGTH for dim, (one, other) in enumerate(sizes) if one != other}
    return found
