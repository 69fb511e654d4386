"""Inputs that a network must not change, since others get them, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.inputs import map_inputs, tensors_of


class InputGuard:
    """Protects inputs that several networks, or several passes, get from a network that changes them in place.

    The first pass gets a copy. From then on only a network that has changed its copy gets further ones.

    Args:
        owner: Name of the network in messages.

    Attributes:
        copies: Whether passes get copies. None as long as that is not known.
    """

    def __init__(self, owner: str = "teacher") -> None:
        self.owner = owner
        self.copies: bool | None = None

    @contextmanager
    def protect(self, inputs: Any) -> Iterator[Any]:
        """Yield the inputs of a pass, or a copy of them.

        Raises:
            InputError: If the network changes its inputs now, and did not in its first pass.
        """
        given = inputs if self.copies is False else map_inputs(torch.clone, inputs)
        tensors = [*tensors_of(given)]
        # inference tensors have no version; what a pass does to them cannot be seen
        before = None if any(tensor.is_inference() for tensor in tensors) else _versions(tensors)
        try:
            yield given
        finally:  # also after a pass that ends early
            is_changed = before is not None and before != _versions(tensors)
            if is_changed and self.copies is False:
                raise InputError(f"{self.owner}: it changes its inputs in place, but in some passes alone")
            if before is not None:
                self.copies = is_changed or bool(self.copies)


def _versions(tensors: list[Tensor]) -> list[int]:
    """Return numbers that increase with each change in place."""
    return [tensor._version for tensor in tensors]
