"""The Apprentice: a student of low precision, and a teacher that may learn beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses import KDLoss
from kd_lightning.losses.base import Task
from kd_lightning.losses.label_kind import remembers
from kd_lightning.modules._shared.paired_optimizer import PairedOptimizer
from kd_lightning.modules._shared.teacher_arguments import check_soft_weight, is_fitting
from kd_lightning.modules.distill import DistillModule
from kd_lightning.modules.supervised import LossTerm, check_choice
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.teacher import Teacher, check_outputs

Scheme = Literal["joint", "fixed_teacher", "finetune"]


class ApprenticeModule(DistillModule):
    """Teacher and apprentice in the three schemes of Mishra and Marr (2018).

    - A, ``"joint"``: both learn from the start. The objective is ``teacher_weight * teacher_hard +
      (1 - soft_weight) * hard + soft_weight * soft``, the paper's alpha, beta and gamma with beta + gamma = 1. The
      teacher learns from labels alone: the soft term sends no gradient into it. The checkpoint holds it under
      ``teacher.``, where ``load_weights(network, path, prefix="teacher.")`` finds it.
    - B, ``"fixed_teacher"``: a trained teacher, frozen; the apprentice from its own start.
    - C, ``"finetune"``: as B, but the apprentice starts from its trained full-precision weights, with a low learning
      rate. One that holds its weights already needs no ``initial_weights`` and trains under B, which is the same.

    For students of low precision see :func:`kd_lightning.quantization.quantize`; a float one serves, too.

    Args:
        student: See :class:`SupervisedModule`.
        teacher: Scheme A: a network that gives logits of the student's shape. B and C: as of
            :class:`DistillModule`. None serves ``test`` and ``predict`` alone.
        scheme: Which of the three.
        teacher_weight: Scheme A: weight of the teacher's terms.
        soft_weight: w in [0, 1]; a callback may anneal it.
        soft_loss: Called as ``(student_logits, teacher_logits, target)``. None: ``KDLoss`` at temperature 1,
            the paper's, and for apprentices of low precision better than higher ones.
        teacher_optimizer: Scheme A: takes the teacher's parameters, in place of ``optimizer``; ``lr_scheduler`` then
            scales the learning rates of both (OneCycleLR sets them: give it ``max_lr`` of the student's and the
            teacher's).
        mutual: Scheme A: the teacher also learns from the student, by the same soft loss with the roles exchanged
            (weight ``teacher_weight * soft_weight``): deep mutual learning (Zhang et al. 2018), not in the paper.
        initial_weights: Scheme C: file of the student's full-precision weights, as of ``load_weights``.
        task: See :class:`SupervisedModule`, as for all that follow.
        hard_loss: Called as ``(logits, target)``, for the teacher of scheme A, too.
        optimizer: Takes the parameters.
        lr_scheduler: Takes the optimiser.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For an unknown scheme, arguments of another scheme, in scheme A a frozen teacher or a hard loss that
            remembers samples, training by scheme C without initial weights; else as of :class:`DistillModule`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        scheme: Scheme = "joint",
        *,
        teacher_weight: float = 1.0,
        soft_weight: float = 0.5,
        soft_loss: nn.Module | None = None,
        teacher_optimizer: OptimizerCallable | None = None,
        mutual: bool = False,
        initial_weights: str | Path | None = None,
        task: Task = "multiclass",
        hard_loss: nn.Module | None = None,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
    ) -> None:
        check_choice("scheme", scheme, ("joint", "fixed_teacher", "finetune"))
        joint = scheme == "joint"
        if not joint:
            for name, given in {"teacher_optimizer": teacher_optimizer is not None, "mutual": mutual}.items():
                if given:
                    raise InputError(f"{name} is for scheme joint, where the teacher learns, got scheme {scheme}")
        if initial_weights is not None and scheme != "finetune":
            raise InputError(f"initial_weights are for scheme finetune, got scheme {scheme}")
        super().__init__(
            student,
            None if joint else teacher,
            soft_loss=KDLoss(temperature=1.0, task=task) if soft_loss is None else soft_loss,
            soft_weight=soft_weight,
            task=task,
            hard_loss=hard_loss,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
        )
        if joint and teacher is not None:
            self.teacher = _check_learner(teacher, student)  # type: ignore[assignment]  # no Teacher: it learns
        if joint and remembers(self.hard_loss):
            raise InputError(f"hard_loss: {type(self.hard_loss).__name__} remembers samples, of one network alone")
        if not teacher_weight > 0:
            raise InputError(f"teacher_weight must be above 0, got {teacher_weight}")
        self.save_hyperparameters("scheme", "teacher_weight", "mutual")
        self.scheme = scheme
        self.teacher_weight = teacher_weight
        self.teacher_optimizer = teacher_optimizer
        self.mutual = mutual
        self.initial_weights = initial_weights
        if initial_weights is not None:
            load_weights(student, initial_weights)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The student's terms; in scheme A the teacher's, too."""
        target = self.teacher_logits(batch) if self.scheme == "joint" else None
        if target is None:
            return super().losses(batch)
        logits = self(batch.x)
        check_outputs(logits, target)
        check_soft_weight(self.soft_weight)  # a callback may have set it
        hard, teacher_hard = self.hard_term(logits, batch), self.hard_term(target, batch)
        terms = {
            "hard": LossTerm(1.0 - self.soft_weight, hard),
            "soft": LossTerm(self.soft_weight, self.soft_loss(logits, target.detach(), batch.y)),
            "teacher_hard": LossTerm(self.teacher_weight, teacher_hard),
        }
        if self.mutual:
            soft = self.soft_loss(target, logits.detach(), batch.y)
            terms["teacher_soft"] = LossTerm(self.teacher_weight * self.soft_weight, soft)
        return terms

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """The teacher's logits; in scheme A with its gradient."""
        if self.teacher is None or isinstance(self.teacher, Teacher):
            return super().teacher_logits(batch)
        return logits_of(self.teacher(batch.x), "the teacher")

    def _kept_teacher_logits(self, key: tuple[str, int, int], batch: Batch) -> Tensor | None:
        """In scheme A they change from pass to pass."""
        return self.teacher_logits(batch) if self.scheme == "joint" else super()._kept_teacher_logits(key, batch)

    def setup(self, stage: str) -> None:
        """Refuse scheme C from a random start."""
        if stage == TrainerFn.FITTING and self.scheme == "finetune" and self.initial_weights is None:
            raise InputError("scheme finetune needs initial_weights: the file of the student's full-precision weights")
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Have TensorBoard draw both accuracies in one plot."""
        super().on_fit_start()
        accuracies = ["val/accuracy", "val/teacher_accuracy"]
        layout = {"accuracy": {"teacher and apprentice": ["Multiline", accuracies]}}
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Test without the teacher that learned in scheme A where it is not at hand."""
        if self.scheme == "joint" and self.teacher is None and not is_fitting(self):
            for key in [key for key in checkpoint["state_dict"] if key.startswith("teacher.")]:
                del checkpoint["state_dict"][key]
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser over all that learns, or one for each network."""
        teacher, build = self.teacher, self.teacher_optimizer
        if build is None or teacher is None:
            return super().configure_optimizers()
        try:
            of_teacher = build([p for p in teacher.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise InputError(f"teacher_optimizer: {error}") from error
        theirs = {id(p) for p in teacher.parameters()}

        def pair(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return PairedOptimizer(self.optimizer([p for p in parameters if id(p) not in theirs]), of_teacher)

        return self.optimization(self.parameters(), pair, self.lr_scheduler)


def _check_learner(teacher: nn.Module, student: nn.Module) -> nn.Module:
    if isinstance(teacher, Teacher):
        raise InputError("teacher: scheme joint trains it; give the network itself, not a frozen Teacher around it")
    if not any(p.requires_grad for p in teacher.parameters()):
        raise InputError("teacher: scheme joint trains it, but none of its parameters requires a gradient")
    if teacher is student:
        raise InputError("teacher and student must be two networks, got one and the same")
    return teacher
