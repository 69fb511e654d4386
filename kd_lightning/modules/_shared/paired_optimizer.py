"""Two optimisers that Lightning takes for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from kd_lightning.errors import InputError


class PairedOptimizer(Optimizer):
    """Two optimisers of different parameters, stepped together.

    With one optimiser Lightning accumulates, clips and scales gradients by itself. Parameter groups and state are
    shared with the two, so schedulers and checkpoints reach both. ``defaults`` holds the settings that both know: what
    a scheduler finds there (OneCycleLR a momentum) it may set in every group.

    Args:
        first: Any but LBFGS.
        second: Of other parameters.

    Raises:
        InputError: For LBFGS.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        if isinstance(first, LBFGS) or isinstance(second, LBFGS):
            raise InputError("LBFGS evaluates the loss several times in a step, which two optimisers in one cannot")
        self.pair = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.defaults = {name: value for name, value in first.defaults.items() if name in second.defaults}
        for optimizer in self.pair:  # Adagrad has some from the start
            self.state.update(optimizer.state)
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

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"pair": self.pair}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # load_state_dict comes here, too
