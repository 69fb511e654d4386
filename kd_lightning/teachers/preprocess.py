"""A function as a teacher's preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Preprocess(nn.Module):
    """A function, such as a lambda or torchvision's v1 ``Compose``, as a module.

    A teacher's fingerprint covers its code and what it closes over, or the attributes of a callable object.

    Args:
        function: Called with the inputs of the teacher's network.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)
