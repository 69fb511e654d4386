"""Two optimisers in one, for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from kd_lightning.errors import InputError


class PairedOptimizer(Optimizer):
    """Step two optimisers of different parameters together.

    With a single optimiser, Lightning accumulates, clips and scales gradients automatically. This one shares its
    parameter groups and state with the two, so schedulers and checkpoints reach both. ``defaults`` holds the settings
    that both have, since a scheduler may set these in every group (OneCycleLR sets momentum).

    Args:
        first: Any optimiser but LBFGS.
        second: Any optimiser but LBFGS, of other parameters.

    Raises:
        InputError: If one is LBFGS.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        if isinstance(first, LBFGS) or isinstance(second, LBFGS):
            raise InputError("LBFGS evaluates the loss several times in a step, which PairedOptimizer cannot do")
        self.pair = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self.defaults = {name: value for name, value in first.defaults.items() if name in second.defaults}
        for optimizer in self.pair:  # Adagrad has state from the start
            self.state.update(optimizer.state)
        self._share()

    def _share(self) -> None:
        """Share this optimiser's groups and state with both. The state's keys are parameters, so none collide."""
        begin = 0
        for optimizer in self.pair:
            end = begin + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[begin:end]
            optimizer.state = self.state
            begin = end

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | float | None:  # type: ignore[override]
        """Step both optimisers. The closure is called once."""
        loss: Tensor | float | None = None if closure is None else closure()
        for optimizer in self.pair:
            optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"pair": self.pair}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # load_state_dict calls this, too
