"""The hard loss of a student's auxiliary heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.features.outputs import auxiliary_logits_of
from kd_lightning.losses.protocols import is_stateful

if TYPE_CHECKING:
    from kd_lightning.modules.supervised import SupervisedModule


class AuxiliaryHeads:
    """The auxiliary heads of a student: their logits in a training step, and their term of the objective."""

    def __init__(self) -> None:
        self._recorded: tuple[Any, list[Tensor]] | None = None  # inputs and logits of the last forward pass
        self._warned = False

    def clear(self) -> None:
        """Drop what was recorded in an earlier step."""
        self._recorded = None

    def record(self, x: Any, output: Any) -> None:
        """Record the auxiliary logits of the student's output for inputs ``x``."""
        self._recorded = x, auxiliary_logits_of(output)

    def hard_term(self, module: SupervisedModule, batch: Batch) -> Tensor | None:
        """Return the sum of the heads' hard terms; None if there are no heads. Warn once if heads do not learn."""
        x, heads = self._recorded or (None, [])
        self._recorded = None
        if not heads or not module.auxiliary_weight:
            return None
        if x is batch.x and module.trains_auxiliary_heads and not is_stateful(module.hard_loss):
            terms = [module.to_rows(batch, logits) for logits in heads]
            return torch.stack([module.hard_term(logits, rows) for rows, logits in terms]).sum()
        if not self._warned:
            rank_zero_warn(
                f"the student's {len(heads)} auxiliary heads do not learn in {type(module).__name__} with "
                f"{type(module.hard_loss).__name__}; build it without them (aux_logits=False), or set "
                "auxiliary_weight: 0"
            )
        self._warned = True
        return None
