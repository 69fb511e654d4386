"""What doctor needs of a module that is taught, see :class:`~kd_lightning.teach`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import pick_logits
from kd_lightning.inputs import Inputs, call
from kd_lightning.losses.base import Task
from kd_lightning.runs.student import batch_of_step, check_plain_logits, find_network


class TaughtModule:
    """A module that is taught, as an examination needs it. Its own steps show what its network is called with.

    Raises:
        InputError: If its logits are no (B, C), it has no teacher or optimises by hand, labels are no classes, or a
            step cannot run without a trainer.
    """

    ensemble, num_classes = None, None

    def __init__(self, module: LightningModule) -> None:
        teaching: Any = module.teaching
        check_plain_logits(module, "doctor")
        if teaching.teacher is None or not module.automatic_optimization:
            what = "automatic optimisation" if teaching.teacher is not None else "a teacher"
            raise InputError(f"model: doctor needs a module with {what} to check teach")
        self.teacher, self.soft_loss = teaching.teacher, teaching.soft_loss
        if teaching.output is not None:  # a teacher without a cache, as teach demands
            self.teacher = copy(teaching.teacher)
            self.teacher.compute = teaching.pick_teacher_logits  # of the copy alone
        self.task: Task = getattr(self.soft_loss, "task", "multiclass")
        self.student = find_network(module, teaching.network, "model")
        self.eval, self.train = module.eval, module.train
        self._module: Any = module
        self._loaded: list[tuple[Batch, Any]] = []  # training batches, and what they were loaded as

    def __call__(self, x: Inputs) -> Tensor:
        """Return the student's logits."""
        return pick_logits(call(self.student, x), self._module.teaching.output, "the student")

    def unpack(self, loaded: Any) -> Batch:
        """Return a loaded batch as the training step gives it to the student."""
        batch = self._checked(batch_of_step(self._module, loaded, "training_step"))
        self._loaded.append((batch, loaded))
        return batch

    def unpack_evaluation(self, loaded: Any) -> Batch:
        """Return a loaded batch as the validation step gives it to the student."""
        return self._checked(batch_of_step(self._module, loaded))

    def _checked(self, batch: Batch) -> Batch:
        if batch.y is not None and batch.y.is_floating_point() and not hasattr(self.soft_loss, "task"):
            name = type(self.soft_loss).__name__
            raise InputError(f"model: doctor compares classes, got labels of {batch.y.dtype} and soft_loss {name}")
        return batch

    def losses(self, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of both terms: the loss at soft weight 0, and at 1.

        If one of them is not finite, the other one is not either, since 0 times it is not.
        """
        loaded = next(loaded for known, loaded in self._loaded if known is batch)
        weight = self._module.soft_weight
        return {"hard": (1 - weight, self._loss(loaded, 0.0)), "soft": (weight, self._loss(loaded, 1.0))}

    def _loss(self, loaded: Any, soft_weight: float) -> Tensor:
        before, self._module.soft_weight = self._module.soft_weight, soft_weight
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*self.log.*")  # there is no trainer
                returned = self._module.training_step(loaded, 0)
        except InputError:
            raise
        except Exception as error:  # of a step that needs more of a fit can be anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"model: doctor cannot run training_step without a trainer: {reason}") from error
        finally:
            self._module.soft_weight = before
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if not isinstance(loss, Tensor):
            raise InputError(f"model: training_step must return a loss, got {type(returned).__name__}")
        return loss
