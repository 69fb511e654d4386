"""Two optimisers that Lightning takes for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class PairedOptimizer(Optimizer):
    """Two optimisers of different parameters, stepped together.

    With one optimiser Lightning accumulates, clips and scales gradients by itself. Parameter groups and state are
    shared with the two, so schedulers and checkpoints reach both.

    Args:
        first: Its settings are those that a scheduler looks up in ``defaults``.
        second: Of other parameters.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.pair = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.defaults = first.defaults
        self._share()

    def _share(self) -> None:
        """Point both at this one's groups and state; the state's keys are parameters, so they do not collide."""
        begin = 0
        for optimizer in self.pair:
            end = begin + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[begin:end]
            optimizer.state = self.state
            begin = end

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | float | None:  # type: ignore[override]
        """Step both; the closure is called once."""
        loss: Tensor | float | None = None if closure is None else closure()
        for optimizer in self.pair:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self._share()
