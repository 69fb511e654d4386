"""A function as a teacher's preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kd_lightning.cache.content import fingerprint


class Preprocess(nn.Module):
    """A function, such as a lambda or torchvision's v1 ``Compose``, as a module that a fingerprint can identify.

    Args:
        function: Called with the inputs of the teacher's network.

    Attributes:
        identity: Hash of the function: its code and what it closes over, or the attributes of a callable object.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.identity = fingerprint(function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)
