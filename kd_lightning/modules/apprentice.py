"""Apprentice: a student of low precision, and a teacher that may train beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.protocols import is_stateful
from kd_lightning.modules._shared.auxiliary_heads import AuxiliaryHeads
from kd_lightning.modules._shared.checks import check_choice, check_soft_weight, check_two_networks
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.optimizers import build_optimizer, build_optimizers
from kd_lightning.modules._shared.paired_optimizer import PairedOptimizer
from kd_lightning.modules._shared.soft_loss import call_soft_loss, has_own_loss, soft_losses_of
from kd_lightning.modules.distill import DistillModule
from kd_lightning.runs.figures.log_figure import only_warn
from kd_lightning.runs.weights import load_weights
from kd_lightning.teachers.exported import ExportedNetwork, is_exported
from kd_lightning.teachers.teacher import Teacher, check_outputs

Scheme = Literal["joint", "fixed_teacher", "finetune"]


class ApprenticeModule(DistillModule):
    """Train an apprentice by one of the three schemes of Mishra and Marr (2018).

    - A, ``"joint"``: teacher and apprentice both train from the start. The objective is
      ``teacher_weight * teacher_hard + (1 - soft_weight) * hard + soft_weight * soft``, the paper's alpha, beta and
      gamma with beta + gamma = 1. The teacher learns from labels alone: the soft term has no gradient for it. The
      checkpoint holds the teacher under ``teacher.``; ``load_weights(network, path, prefix="teacher.")`` loads it.
    - B, ``"fixed_teacher"``: the teacher is trained and frozen. The apprentice starts from random weights.
    - C, ``"finetune"``: like B, but the apprentice starts from its trained full-precision weights, with a low learning
      rate. B with a student that already holds these weights is the same.

    :func:`kd_lightning.quantization.quantize` makes students of low precision. A float student works, too. It takes all
    inputs, outputs and tasks of :class:`SupervisedModule`.

    Args:
        student: Network to train, see :class:`SupervisedModule`.
        teacher: Scheme A: a network that gives logits of the student's shape. It gets ``teacher_inputs`` of a batch, if
            there are any, and its auxiliary heads learn the hard loss as the student's do. B and C: as in
            :class:`DistillModule`. None is for ``test`` and ``predict`` alone.
        scheme: ``"joint"``, ``"fixed_teacher"`` or ``"finetune"``.
        teacher_weight: Scheme A: weight of the teacher's terms, above 0.
        soft_weight: Weight of the soft term, in [0, 1]. A callback may anneal it.
        soft_loss: Loss called as ``(student_logits, teacher_logits, target)``. Default: None, which means ``KDLoss``
            at temperature 1, as in the paper; for apprentices of low precision it works better than higher ones.
        teacher_optimizer: Scheme A: optimiser of the teacher, called with its parameters. ``lr_scheduler`` then scales
            the learning rates of both (OneCycleLR sets them: give its ``max_lr`` the student's and the teacher's).
            Default: None, which means that ``optimizer`` trains both.
        mutual: Scheme A: whether the teacher also learns from the student, by the same soft loss with the roles
            exchanged, with weight ``teacher_weight * soft_weight``. This is deep mutual learning (Zhang et al. 2018),
            and not in the paper.
        initial_weights: Scheme C: file of the student's full-precision weights, for ``load_weights``.
        **kwargs: The arguments of :class:`SupervisedModule`. In scheme A the hard loss is the teacher's, too.

    Raises:
        InputError: If the scheme is unknown; if an argument is of another scheme; in scheme A, if the teacher is
            frozen or the hard loss is stateful; in scheme C, if there are no initial weights in training; and as of
            :class:`DistillModule`.
    """

    default_temperature: ClassVar[float] = 1.0

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        scheme: Scheme = "joint",
        *,
        teacher_weight: float = 1.0,
        soft_weight: float = 0.5,
        soft_loss: nn.Module | dict[str, tuple[float, nn.Module]] | None = None,
        teacher_optimizer: OptimizerCallable | None = None,
        mutual: bool = False,
        initial_weights: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("scheme", scheme, ("joint", "fixed_teacher", "finetune"))
        joint = scheme == "joint"
        if not joint:
            for name, given in {"teacher_optimizer": teacher_optimizer is not None, "mutual": mutual}.items():
                if given:
                    raise InputError(f"{name} is for scheme joint, where the teacher learns, got scheme {scheme}")
        if initial_weights is not None and scheme != "finetune":
            raise InputError(f"initial_weights are for scheme finetune, got scheme {scheme}")
        super().__init__(student, None if joint else teacher, soft_loss=soft_loss, soft_weight=soft_weight, **kwargs)
        if joint and teacher is not None:
            self.teacher = _check_trainable(teacher, student)  # not a Teacher: it trains
        for name, term in self.features.all.items() if joint else ():
            if term.standardizations:
                raise InputError(
                    f"features.{name}: standardize is fitted once, to a frozen teacher; scheme joint trains the teacher"
                )
        if joint and is_stateful(self.hard_loss):
            raise InputError(
                f"hard_loss: {type(self.hard_loss).__name__} stores values of samples, for one network only"
            )
        if not teacher_weight > 0:
            raise InputError(f"teacher_weight must be above 0, got {teacher_weight}")
        self.save_hyperparameters("scheme", "teacher_weight", "mutual")
        self.scheme = scheme
        self.teacher_weight = teacher_weight
        self.teacher_optimizer = teacher_optimizer
        self.mutual = mutual
        self.initial_weights = initial_weights
        self._teacher_heads = AuxiliaryHeads()
        if initial_weights is not None:
            load_weights(student, initial_weights)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the student's terms and, in scheme A, the teacher's."""
        if self.scheme != "joint" or self.teacher is None:
            return super().losses(batch)
        with self.capture_features(batch) as captured:
            target: Any = self.teacher_logits(batch)
            logits = self(batch.x)
        check_soft_weight(self.soft_weight)  # a callback may have set it
        if not has_own_loss(self.soft_loss):
            check_outputs(logits, target)
        rows, logits, target = self.to_rows(batch, logits, target)
        hard, teacher_hard = self.hard_term(logits, rows), self.hard_term(target, rows)
        terms = {
            "hard": LossTerm(1.0 - self.soft_weight, hard),
            **self.soft_terms(logits, target.detach(), rows),
            "teacher_hard": LossTerm(self.teacher_weight, teacher_hard),
            **self.feature_losses(captured, batch),
        }
        if (value := self._teacher_heads.hard_term(self, batch)) is not None:
            terms["teacher_auxiliary_hard"] = LossTerm(self.teacher_weight * self.auxiliary_weight, value)
        if self.mutual:
            losses = soft_losses_of(self.soft_loss).values()
            parts = [weight * call_soft_loss(loss, target, logits.detach(), rows.y) for weight, loss in losses]
            soft = self.step_mean(torch.stack(parts).sum(), rows)
            terms["teacher_soft"] = LossTerm(self.teacher_weight * self.soft_weight, soft)
        return terms

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """Return the teacher's logits, in scheme A with a gradient."""
        if self.teacher is None or isinstance(self.teacher, Teacher):
            return super().teacher_logits(batch)
        output = self.guarded_call("teacher", self.teacher, batch.teacher_x)
        if not isinstance(output, Tensor) and torch.is_grad_enabled():
            self._teacher_heads.record(batch.x, output)
        return logits_of(output, "the teacher")

    def _cached_teacher_logits(self, key: tuple[str, int, int], batch: Batch) -> Tensor | None:
        """Compute the logits each time in scheme A, where the teacher changes."""
        return self.teacher_logits(batch) if self.scheme == "joint" else super()._cached_teacher_logits(key, batch)

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, refuses scheme C without initial weights."""
        if stage == TrainerFn.FITTING and self.scheme == "finetune" and self.initial_weights is None:
            raise InputError("scheme finetune needs initial_weights: the file of the student's full-precision weights")
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Makes TensorBoard draw both accuracies in one plot."""
        super().on_fit_start()
        accuracies = ["val/accuracy", "val/teacher_accuracy"]
        layout = {"accuracy": {"teacher and apprentice": ["Multiline", accuracies]}}
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                with only_warn("plot of both accuracies"):
                    logger.experiment.add_custom_scalars(layout)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Drops scheme A's teacher in a test without a teacher."""
        if self.scheme == "joint" and self.teacher is None and not self.is_fitting:
            for key in [key for key in checkpoint["state_dict"] if key.startswith("teacher.")]:
                del checkpoint["state_dict"][key]
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Runs at the start of fit. Builds one optimiser of all trainable parameters, or one of each network."""
        teacher = self.teacher
        if self.teacher_optimizer is None or teacher is None:
            return super().configure_optimizers()
        of_teacher = {id(p) for p in teacher.parameters()}
        first = build_optimizer(self, [p for p in self.parameters() if id(p) not in of_teacher])
        second = build_optimizer(self, teacher.parameters(), "teacher_optimizer", prefix="teacher_")
        try:
            pair = PairedOptimizer(first, second)
        except InputError as error:
            raise InputError(f"optimizer: {error}") from error
        return build_optimizers(self, pair)


def _check_trainable(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Return the teacher of scheme A; raise InputError if it cannot train beside the student."""
    if isinstance(teacher, Teacher):
        raise InputError("teacher: scheme joint trains it; give the network itself, not a frozen Teacher around it")
    if is_exported(teacher) or isinstance(teacher, ExportedNetwork):
        raise InputError("teacher: scheme joint trains it, but a program of torch.export stays in eval mode")
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher must be a network, got {type(teacher).__name__}")
    if not any(p.requires_grad for p in teacher.parameters()):
        raise InputError("teacher: scheme joint trains it, but none of its parameters requires a gradient")
    check_two_networks("teacher", teacher, student)
    return teacher
