"""The inputs of an exported file: their names, and their dimensions of variable size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, call, describe

INPUT, OUTPUT, BATCH, LENGTH = "input", "logits", "batch", "length"
Logits = Callable[[nn.Module, Inputs], Tensor]
"""From a student and its inputs to its logits."""


def plain_logits(student: nn.Module, x: Inputs) -> Tensor:
    """Call a student with its inputs, and return its logits."""
    return logits_of(call(student, x), "the student")


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
    """A network that takes the student's inputs by position, and returns its logits as a tensor.

    Args:
        student: The student.
        x: Inputs of the same kind, a tensor, or a mapping or tuple of tensors.
        logits: From the student and inputs to its logits. Default: a plain call.
    """

    def __init__(self, student: nn.Module, x: Inputs, logits: Logits = plain_logits) -> None:
        super().__init__()
        self.student = student
        self.logits = logits
        self.names = [*x] if isinstance(x, Mapping) else None
        self.takes_tuple = isinstance(x, tuple | list)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the logits."""
        x: Inputs = tensors if self.takes_tuple else tensors[0]
        return self.logits(self.student, x if self.names is None else dict(zip(self.names, tensors, strict=True)))


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


def axes_of(network: PositionalStudent, x: Inputs) -> dict[str, dict[int, str]]:
    """Return the names of the dimensions that vary, by input, and by ``OUTPUT``."""
    tokens = token_inputs(x)
    found = {name: {0: BATCH} if part.ndim else {} for name, part in named_tensors(x).items()} | {OUTPUT: {0: BATCH}}
    for name in tokens:
        found[name] |= {1: LENGTH}
    if tokens:
        inputs = x, without_last_token(x)
        with torch.no_grad():
            outputs = [network(*named_tensors(part).values()) for part in inputs]
        sizes = zip(*(output.shape for output in outputs), strict=True)
        found[OUTPUT] |= {dim: LENGTH for dim, (one, other) in enumerate(sizes) if one != other}
    return found
