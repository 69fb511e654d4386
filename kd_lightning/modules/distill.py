"""Distillation from one teacher."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Adam

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.modules._shared.teacher_arguments import (
    check_same_teacher,
    check_soft_weight,
    is_fitting,
    make_soft_loss,
    say,
)
from kd_lightning.modules.supervised import LossTerm, SupervisedModule
from kd_lightning.teachers.cache_fill import keep_outputs
from kd_lightning.teachers.probe import TeacherProbe
from kd_lightning.teachers.teacher import Teacher, check_outputs

_NO_TEACHER = "training needs the teacher; teacher=None is for test and predict alone"


class DistillModule(SupervisedModule):
    """Train a student on a frozen teacher's soft targets and on what labels there are (Hinton et al. 2015).

    The objective is ``(1 - soft_weight) * hard + soft_weight * soft``: hard over the labeled rows, soft over all.

    Args:
        student: The network to train, see :class:`SupervisedModule`.
        teacher: The trained network, or a :class:`Teacher` around it. None serves ``test`` and ``predict`` of a
            trained student where the teacher is not at hand.
        soft_loss: Called as ``(student_logits, teacher_logits, target)``. None: ``KDLoss`` at temperature 4.
        soft_weight: w in [0, 1]; a callback may anneal it.
        task: See :class:`SupervisedModule`, as for all that follow.
        hard_loss: Called as ``(logits, target)``.
        optimizer: Takes the parameters.
        lr_scheduler: Takes the optimiser.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For a soft weight outside [0, 1], a soft loss of another task or one that cannot use the few logits
            that a teacher's cache keeps, a teacher whose logits have
            another shape than the student's, training without a teacher, and resuming with another teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        soft_loss: nn.Module | None = None,
        soft_weight: float = 0.9,
        task: Task = "multiclass",
        hard_loss: nn.Module | None = None,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        super().__init__(
            student,
            task=task,
            hard_loss=hard_loss,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
        )
        check_soft_weight(soft_weight)
        self.save_hyperparameters("soft_weight")
        self.teacher = teacher if teacher is None or isinstance(teacher, Teacher) else Teacher(teacher)
        if self.teacher is not None and self.teacher.missing_classes:
            raise InputError(f"teacher does not know the classes {self.teacher.missing_classes}, but must know all")
        self.soft_loss = make_soft_loss(soft_loss, task, [self.teacher])
        self.soft_weight = soft_weight
        self._first_look: TeacherProbe | None = None

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The hard and the soft term."""
        target = self.teacher_logits(batch)  # before the student's activations are held: they cost room and time
        if target is None:
            raise InputError(_NO_TEACHER)
        logits = self(batch.x)
        check_outputs(logits, target)
        check_soft_weight(self.soft_weight)  # a callback may have set it
        hard = self.hard_term(logits, batch)  # says what is wrong with labels
        soft = self.soft_loss(logits, target, batch.y)
        return {"hard": LossTerm(1.0 - self.soft_weight, hard), "soft": LossTerm(self.soft_weight, soft)}

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """The teacher's logits, for the metrics."""
        return None if self.teacher is None else self.teacher(batch)

    def setup(self, stage: str) -> None:
        """Take the teacher's fingerprint before the precision plugin may change its weights."""
        super().setup(stage)
        if stage != TrainerFn.FITTING:
            return
        if self.teacher is None:
            raise InputError(_NO_TEACHER)
        if isinstance(self.teacher, Teacher):
            self.teacher.fingerprint(anew=True)

    def on_fit_start(self) -> None:
        """Fill the teacher's cache, if any, and have its first answers looked at: is it any good on this data?"""
        if self._first_look is not None:  # of a fit that ended before
            self._first_look.close()
        if not isinstance(self.teacher, Teacher):
            return
        keep_outputs([self.teacher], self.trainer)
        if self.trainer.is_global_zero:
            self._first_look = TeacherProbe(self.teacher, self.soft_loss, self.task, say)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which teacher it was, not the teacher."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.teacher, Teacher):
            checkpoint["teacher_fingerprint"] = self.teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under another teacher."""
        super().on_load_checkpoint(checkpoint)
        before = checkpoint.get("teacher_fingerprint")
        if is_fitting(self) and before and isinstance(self.teacher, Teacher):
            check_same_teacher("teacher", self.teacher, before)
