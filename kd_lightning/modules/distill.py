"""Distillation from one teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.term import FeatureTerm
from kd_lightning.modules._shared.checks import check_soft_weight
from kd_lightning.modules._shared.feature_terms import FeatureTerms
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.soft_loss import (
    call_soft_loss,
    has_own_loss,
    make_soft_loss,
    soft_losses_of,
    soft_terms,
)
from kd_lightning.modules._shared.taught_module import TaughtModule
from kd_lightning.modules._shared.teacher_report import report
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.probe import TeacherProbe
from kd_lightning.teachers.teacher import Teacher, check_outputs

_NO_TEACHER = "training needs the teacher; teacher=None is for test and predict alone"


class DistillModule(TaughtModule):
    """Train a student on a frozen teacher's soft targets and on the labels that there are (Hinton et al. 2015).

    The objective is ``(1 - soft_weight) * hard + soft_weight * soft``, plus the feature terms, if there are any. The
    hard term is over the labeled rows, the others over all rows. It takes all inputs, outputs and tasks of
    :class:`SupervisedModule`.

    Logs what :class:`SupervisedModule` does, and of each feature term ``train/<name>`` (without its weight),
    ``<name>_weight`` and ``val/<name>``.

    Args:
        student: Network to train, see :class:`SupervisedModule`.
        teacher: The trained network, or a :class:`Teacher` around it. None is for ``test`` and ``predict`` alone.
        soft_loss: Loss called as ``(student_logits, teacher_logits, target)``, or without the target if it takes two
            arguments. A project's own loss may compare outputs of two shapes. A dict ``{name: (weight, loss)}`` is a
            sum; each part is logged as ``train/<name>``. Default: None, which means ``KDLoss`` at temperature 4, or
            ``MSELoss`` for regression.
        soft_weight: Weight of the soft term, in [0, 1]. A callback may anneal it. 0.9 was better where most
            samples have no label and are of the labeled ones' kind, see the guide to tuning.
        features: Terms that compare layers of student and teacher, by name. Their projectors and losses train with the
            student. Default: None, which means none.
        **kwargs: The arguments of :class:`SupervisedModule`.

    Raises:
        InputError: If the soft weight lies outside [0, 1]; if the soft loss is of another task, or needs more logits
            than the teacher's cache holds; if the teacher's logits have another shape than the student's; if both share
            what training changes: parameters that are not frozen, or BatchNorm in training mode; if there is no teacher
            in training; if a run is resumed with another teacher.
    """

    default_temperature: ClassVar[float] = 4.0
    """Temperature of the default soft loss."""
    has_soft_term: ClassVar[bool] = True
    """Whether the objective has a soft term, so that soft targets are worth a check. One of weight 0 counts: a callback
    may anneal it."""
    saved_arguments: ClassVar[tuple[str, ...]] = ("soft_weight",)
    """Arguments of the constructor that a checkpoint holds, beside those of SupervisedModule."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        soft_loss: nn.Module | dict[str, tuple[float, nn.Module]] | None = None,
        soft_weight: float = 0.5,
        features: dict[str, FeatureTerm] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_soft_weight(soft_weight)
        if self.saved_arguments:
            self.save_hyperparameters(*self.saved_arguments)
        self.teacher = self.make_teacher(teacher)
        self.soft_loss = make_soft_loss(soft_loss, self.task, [self.teacher], self.default_temperature)
        self.soft_weight = soft_weight
        self.features = FeatureTerms(features, taken=soft_losses_of(self.soft_loss))
        self._probe: TeacherProbe | None = None

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hard term, the soft terms and the feature terms."""
        with self.capture_features(batch) as captured:
            target = self.teacher_logits(batch)  # first: the student's activations would take memory meanwhile
            if target is None:
                raise InputError(_NO_TEACHER)
            logits = self(batch.x)
        check_soft_weight(self.soft_weight)  # a callback may have set it
        if not has_own_loss(self.soft_loss):
            check_outputs(logits, target)
        rows, logits, target = self.to_rows(batch, logits, target)
        hard = self.hard_term(logits, rows)  # first, since it checks the labels
        return {
            "hard": LossTerm(1.0 - self.soft_weight, hard),
            **self.soft_terms(self.distilled_logits(logits, batch), target, rows),
            **self.feature_losses(captured, batch),
        }

    def distilled_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the student's outputs that the soft terms compare with the teacher's. Default: its logits.

        Args:
            logits: The student's logits, as rows of :meth:`to_rows`.
            batch: The batch.
        """
        return logits

    def soft_terms(self, logits: Tensor, target: Tensor, rows: Batch) -> dict[str, LossTerm]:
        """Return the soft terms of rows of :meth:`to_rows`."""
        return soft_terms(
            self.soft_loss,
            self.soft_weight,
            lambda loss: self.step_mean(call_soft_loss(loss, logits, target, rows.y), rows),
        )

    @property
    def feature_teachers(self) -> Sequence[nn.Module]:
        """The teacher, whose layers the feature terms compare with the student's."""
        if self.teacher is None:
            raise InputError(_NO_TEACHER)
        return [self.teacher]

    def _is_comparable(self, logits: Tensor, teacher: Tensor | None) -> bool:
        return teacher is None or teacher.numel() == logits.numel() or not has_own_loss(self.soft_loss)

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, checks that there is a teacher."""
        super().setup(stage)
        if stage == TrainerFn.FITTING and self.teacher is None:
            raise InputError(_NO_TEACHER)

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Fills the teacher's cache, if it has one, and checks its first outputs."""
        if self._probe is not None:  # of an interrupted fit
            self._probe.close()
        super().on_fit_start()
        if not isinstance(self.teacher, Teacher):
            return
        fill_caches(self.teacher, self.trainer)
        if self.trainer.is_global_zero:
            self._probe = TeacherProbe(
                self.teacher, self.soft_loss if self.has_soft_term else None, self.task, self._report, self.to_rows
            )

    def _report(self, findings: list[Finding]) -> None:
        if self.is_fitting:  # the probe of an interrupted fit may still be on the teacher
            report(findings)
