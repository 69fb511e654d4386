"""Distillation from several teachers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.term import FeatureTerm
from kd_lightning.losses.protocols import standardizes, temperature_of
from kd_lightning.modules._shared.checks import (
    check_choice,
    check_different_teachers,
    check_same_teacher,
    check_soft_weight,
    check_two_networks,
    find_samples,
)
from kd_lightning.modules._shared.ensemble_evaluation import EnsembleEvaluation, EnsembleRegressionEvaluation
from kd_lightning.modules._shared.feature_terms import FeatureTerms
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.soft_loss import (
    call_soft_loss,
    make_soft_loss,
    soft_losses_of,
    soft_terms,
    standardizing_student,
)
from kd_lightning.modules._shared.teacher_report import report
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.probe import TeacherProbe
from kd_lightning.teachers.teacher import check_outputs
from kd_lightning.teachers.teacher_weights import weighted_choice

_NO_TEACHERS = "training needs the teachers; teachers=None is for test and predict alone"


class EnsembleDistillModule(SupervisedModule):
    """Train a student on the soft targets of K frozen teachers, combined by a strategy (Fukuda et al. 2017).

    - ``average``: the mean of their probabilities at the loss's temperature, q(c) = sum of w_k q_k(c); for regression
      that of their values.
    - ``random``: one teacher is sampled for each optimiser step, or for each sample.
    - ``relabel``: each sample is K training examples an epoch, one for each teacher, each with its own augmentation,
      and all shuffled. Set the datamodule's ``views_per_epoch`` to K. The teacher of a view is its number modulo K. If
      batches have no ``view``, a teacher is sampled uniformly for each row.

    The objective is :class:`DistillModule`'s. Teachers may differ in architecture, inputs (``Teacher``'s
    ``preprocess``), classes and their order (``classes``), and device (``device``). A class that a teacher does not
    know is averaged over the teachers that do, also where one teacher is sampled.

    It takes all inputs, outputs and tasks of :class:`SupervisedModule`. Of dense outputs, a sample has one teacher for
    all its positions (``random``, ``relabel``); the average, and its weights by confidence, are those of each position.

    Logs what :class:`DistillModule` does. The teacher of these metrics is the average of all teachers, weighted by
    numbers, but not by confidence; its ``val/teacher_accuracy`` is about what the student can reach. For each teacher
    k it also logs ``train/teacher_<k>_share`` (how often sampled, or its weight), ``val/teacher_<k>_accuracy``,
    ``val/teacher_<k>_agreement`` (with the student) and ``val/teacher_<k>_ensemble_agreement``; further
    ``val/disagreement``, the mean KL over pairs of teachers in nats, and a figure of their pairwise agreement. For
    regression it logs ``val/teacher_<k>_mae``, ``_rmse`` and ``_difference`` (to the student) in place of these.

    Args:
        student: Network to train, see :class:`SupervisedModule`.
        teachers: K trained networks, or ``Teacher``s around them. None is for ``test`` and ``predict`` alone.
        strategy: ``"average"``, ``"random"`` or ``"relabel"``.
        teacher_weights: K numbers, scaled to sum 1: weights of the average, probabilities of the sampling, or weights
            of the soft terms for ``relabel``. ``"confidence"``, for ``average`` alone and not for regression, weights
            the teachers of each labeled sample (or position) by their cross-entropy, see :meth:`Ensemble.confidence`.
            Default: None, which means equal weights.
        draw_per: For ``random``: whether a teacher is sampled for each ``"batch"`` (as in the paper; the same for all
            processes and accumulated batches of an optimiser step) or each ``"sample"``. The sampling depends on the
            seed of ``seed_everything``, and on the step, or on epoch and index.
        use_vmap: Compute teachers of one architecture as one network, for ``average`` and in validation, see
            :class:`Ensemble`. The first outputs of the teachers are then not checked.
        soft_loss: Loss called as ``(student_logits, teacher_logits, target)``, or without the target if it takes two
            arguments, or a sum ``{name: (weight, loss)}``. Default: None, which means ``KDLoss`` at temperature 4, or
            ``MSELoss`` for regression.
        soft_weight: Weight of the soft term, see :class:`DistillModule`.
        features: Terms that compare layers of the student and of teachers, by name, see :class:`DistillModule`. A
            teacher's layer begins with the teacher's number: ``"0.layer3"``. Except for ``average`` without
            ``use_vmap``, the features take a pass of their own. Default: None, which means none.
        **kwargs: The arguments of :class:`SupervisedModule`.

    Raises:
        InputError: If there are no teachers; if weights do not fit them; if no teacher knows a class, or one knows a
            class that the student does not have; if ``draw_per`` is ``"sample"`` and batches have no index; if
            ``views_per_epoch`` is not the number of teachers for ``relabel``; if two teachers are the same; and as of
            :class:`DistillModule`.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: list[nn.Module] | None,
        strategy: Literal["average", "random", "relabel"] = "average",
        *,
        teacher_weights: list[float] | Literal["confidence"] | None = None,
        draw_per: Literal["batch", "sample"] = "batch",
        use_vmap: bool = False,
        soft_loss: nn.Module | dict[str, tuple[float, nn.Module]] | None = None,
        soft_weight: float = 0.5,
        features: dict[str, FeatureTerm] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        check_choice("strategy", strategy, ("average", "random", "relabel"))
        check_choice("draw_per", draw_per, ("batch", "sample"))
        check_soft_weight(soft_weight)
        if isinstance(teacher_weights, str):
            check_choice("teacher_weights", teacher_weights, ("confidence",))
            if strategy != "average":
                raise InputError(f"teacher_weights: confidence is for strategy average, got strategy {strategy!r}")
            if self.task == "regression":  # exp of squared errors depends on the unit of the targets
                raise InputError("teacher_weights: confidence is for tasks with classes, got task regression")
        self.save_hyperparameters("strategy", "teacher_weights", "draw_per", "soft_weight")
        weights = None if isinstance(teacher_weights, str) else teacher_weights
        for number, teacher in enumerate(teachers if isinstance(teachers, list | tuple | nn.ModuleList) else ()):
            check_two_networks(f"teachers[{number}]", teacher, student)
        options: dict[str, Any] = {"weights": weights, "use_vmap": use_vmap, "class_dim": self.class_dim}
        self.ensemble = None if teachers is None else Ensemble(teachers, task=self.task, **options)
        for teacher in self.ensemble or ():
            teacher.share_layers(student)
        self.strategy = strategy
        self.weights_by_confidence = isinstance(teacher_weights, str)
        self.draw_per = draw_per
        self.soft_loss = make_soft_loss(soft_loss, self.task, self.ensemble or ())
        self.soft_weight = soft_weight
        self.features = FeatureTerms(features, several=True, taken=soft_losses_of(self.soft_loss))
        self._probes: list[TeacherProbe] = []
        self._warned_of_views = self._logged_agreement = False

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hard term, the soft terms and the feature terms."""
        if self.ensemble is None:
            raise InputError(_NO_TEACHERS)
        check_soft_weight(self.soft_weight)  # a callback may have set it
        # teachers first: the student's activations would take memory meanwhile
        averaged = self.strategy == "average" and len(self.ensemble) > 1
        selected = None if averaged else self._select_teachers(self.ensemble, batch)
        alone, logits = selected is not None and self.ensemble.are_complete(), None
        with self.capture_features(batch) as captured:
            if alone is None:  # it depends on the student's number of classes
                logits = self(batch.x)
                alone = bool(self.ensemble.known_classes(self._classes_of(logits)).all())
            if alone and selected is not None:
                outputs = self.ensemble.selected_logits(batch, selected).unsqueeze(0)
            else:
                outputs = self.ensemble(batch)
            logits = self(batch.x) if logits is None else logits
        if alone:
            check_outputs(logits, outputs[0])
        rows, logits, outputs, selected = self._rows_of(batch, logits, outputs, selected)
        hard = self.hard_term(logits, rows)  # first, since it checks the labels
        soft = partial(self._soft_term, self.ensemble, outputs, logits, rows, selected, alone)
        return {
            "hard": LossTerm(1.0 - self.soft_weight, hard),
            **soft_terms(self.soft_loss, self.soft_weight, lambda loss: self.step_mean(soft(loss), rows)),
            **self.feature_losses(captured, batch),
        }

    @property
    def feature_teachers(self) -> Sequence[nn.Module]:
        """The teachers, whose layers the feature terms compare with the student's."""
        if self.ensemble is None:
            raise InputError(_NO_TEACHERS)
        return [*self.ensemble]

    @property
    def teachers_compute_all(self) -> bool:
        """Whether each teacher's pass in a training step is over all samples."""
        return self.strategy == "average" and not (self.ensemble is not None and self.ensemble.use_vmap)

    def _rows_of(
        self, batch: Batch, logits: Tensor, outputs: Tensor, selected: Tensor | None = None
    ) -> tuple[Batch, Tensor, Tensor, Tensor | None]:
        """Return all of these with one row for each position that counts; without ``class_dim`` as they are.

        Args:
            batch: The batch.
            logits: The student's logits.
            outputs: The teachers' logits, (K, B, C), or dense ones such as (K, B, C, H, W).
            selected: The number of each sample's teacher, (B,).
        """
        if self.class_dim is None:
            return batch, logits, outputs, selected
        parts, dimension = [*outputs], self.class_dim % logits.ndim
        positions, others = ([n for d, n in enumerate(z.shape) if d != dimension] for z in (logits, parts[0]))
        if positions != others:
            raise InputError(
                f"teachers and student must have outputs of one shape, got {[*parts[0].shape]} from the teachers and "
                f"{[*logits.shape]} from the student"
            )
        if selected is not None:  # at each position, in place of the classes
            numbers = selected.to(logits.device).view(-1, *[1] * (logits.ndim - 1))
            parts.append(numbers.expand_as(logits.narrow(dimension, 0, 1)))
        rows, logits, *parts = self.to_rows(batch, logits, *parts)
        selected = None if selected is None else parts.pop().flatten().cpu()
        return rows, logits, torch.stack(parts), selected

    def _classes_of(self, logits: Tensor) -> int:
        """Return the number of the student's outputs for each sample or position."""
        if self.task == "binary" or (self.task == "regression" and logits.ndim == 1):
            return 1
        return logits.shape[-1 if self.class_dim is None else self.class_dim]

    def _soft_term(
        self,
        ensemble: Ensemble,
        outputs: Tensor,
        logits: Tensor,
        rows: Batch,
        selected: Tensor | None,
        alone: bool,
        soft_loss: nn.Module,
    ) -> Tensor:
        """Return the soft loss.

        Args:
            ensemble: The teachers.
            outputs: Logits of all teachers (K, N, C), or (1, N, C) of the selected ones alone.
            logits: The student's logits, (N, C).
            rows: The batch.
            selected: The number of each row's teacher, (N,); None if teachers are averaged.
            alone: Whether the selected teachers alone have computed.
            soft_loss: The loss.
        """
        weights = None
        if selected is not None:
            weights = F.one_hot(selected, len(ensemble)).double()
        if alone:
            target = outputs[0]
        else:
            single = self.task == "binary" or (self.task == "regression" and logits.ndim == 1)
            ensemble.check_classes(outputs, 1 if single else logits.shape[-1])
            weights = ensemble.confidence(outputs, rows.y) if self.weights_by_confidence else weights
            standardize = standardizes(soft_loss)
            target = ensemble.pool(outputs, weights, temperature_of(soft_loss), standardize)
            if standardize:  # each teacher before the average, and not the average
                soft_loss = standardizing_student(soft_loss)
        if len(rows):
            self._log_shares(ensemble.weights if weights is None else weights.mean(dim=0), len(rows))
        target = target.reshape(logits.shape)
        if self.strategy != "relabel" or (ensemble.weights == ensemble.weights[0]).all() or not len(rows):
            return call_soft_loss(soft_loss, logits, target, rows.y)
        assert selected is not None
        if not hasattr(soft_loss, "reduction"):
            raise InputError(
                "soft_loss must have a reduction, which can be 'none', for strategy relabel with teacher_weights"
            )
        soft_loss = copy(soft_loss)
        soft_loss.reduction = "none"  # type: ignore[assignment]
        soft = call_soft_loss(soft_loss, logits, target, rows.y).reshape(len(rows), -1).mean(dim=1)
        return (len(ensemble) * ensemble.weights[selected].to(soft) * soft).mean()

    def _select_teachers(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        """Return the number of each row's teacher, (B,)."""
        count, rows = len(ensemble), len(batch)
        if count == 1:
            return torch.zeros(rows, dtype=torch.long)
        seed, weights = int(os.environ.get("PL_GLOBAL_SEED", 0)), ensemble.weights.tolist()
        if self.strategy == "random":
            if self.draw_per == "sample" and batch.index is None:
                raise InputError(
                    "draw_per: sample needs batches with an index, as SemiSupervisedDataModule's; or set it to batch"
                )
            if self._trainer is None:  # so there is no step and no epoch
                return torch.multinomial(ensemble.weights, 1 if self.draw_per == "batch" else rows, True).expand(rows)
            if self.draw_per == "batch" or batch.index is None:
                return torch.full((rows,), weighted_choice((seed, self.global_step), weights))
            epoch = self.current_epoch
            return torch.tensor([weighted_choice((seed, epoch, index), weights) for index in batch.index.tolist()])
        if batch.view is not None:
            return batch.view.cpu() % count
        if not self._warned_of_views:
            rank_zero_warn(
                "relabel: batches have no view, so a teacher is sampled uniformly for each row; "
                "SemiSupervisedDataModule(views_per_epoch=...) gives each sample to every teacher"
            )
            self._warned_of_views = True
        return torch.randint(count, (rows,))

    def _log_shares(self, shares: Tensor, rows: int) -> None:
        if self._trainer is not None and self.trainer.training:
            for number, share in enumerate(shares.tolist() if shares.device.type == "cpu" else shares):
                self._record_mean(f"train/teacher_{number}_share", share, rows)

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """Return all teachers' logits (K, B, C); dense ones are (K, B, C, H, W), for example."""
        return None if self.ensemble is None else self.ensemble(batch)

    def make_evaluation(self, classes: int) -> Any:
        """Make metrics that include those of each teacher."""
        if self.ensemble is None:
            return super().make_evaluation(classes)
        if self.task == "regression":
            return EnsembleRegressionEvaluation(self.ensemble, classes, self.device)
        return EnsembleEvaluation(self.ensemble, self.task, classes, self.class_dim is not None)

    def _evaluation_rows(self, batch: Batch, logits: Tensor, teacher: Tensor | None) -> tuple[Any, ...]:
        if teacher is None:
            return super()._evaluation_rows(batch, logits, None)
        return self._rows_of(batch, logits, teacher)[:3]

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, hashes the teachers' weights before a plugin casts them."""
        super().setup(stage)
        self._warned_of_views = self._logged_agreement = False
        find_samples(self.ensemble or (), self._trainer, stage)
        if stage == TrainerFn.FITTING:
            for teacher in self.ensemble or ():
                teacher.fingerprint(anew=True)
            if self.ensemble is not None:
                check_different_teachers(self.ensemble)

    def teardown(self, stage: str) -> None:
        """Runs at the end of each run. After a test, the numbers of samples are not those of test samples any more."""
        super().teardown(stage)
        if stage == TrainerFn.TESTING:
            find_samples(self.ensemble or (), None, stage)

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Fills the teachers' caches, if they have some, and checks their first outputs."""
        for probe in self._probes:  # of an interrupted fit
            probe.close()
        self._probes.clear()
        super().on_fit_start()
        if self.ensemble is None:
            return
        fill_caches(self.ensemble, self.trainer)
        if self.trainer.is_global_zero:
            for number, teacher in enumerate(self.ensemble):
                if not teacher.missing_classes:
                    of_teacher = partial(self._report, number)
                    probe = TeacherProbe(teacher, self.soft_loss, self.task, of_teacher, self.to_rows)
                    self._probes.append(probe)

    def _report(self, number: int, findings: list[Finding]) -> None:
        if self.is_fitting:  # the probe of an interrupted fit may still be on the teacher
            report(findings, f"teachers[{number}]")

    def on_train_start(self) -> None:
        """Runs before the first epoch. Checks that ``relabel`` gives each sample once to each teacher in an epoch."""
        super().on_train_start()
        sampler: Any = getattr(self.trainer.train_dataloader, "sampler", None)
        views = getattr(sampler, "views_per_epoch", None)
        num_views = getattr(sampler, "num_views", None)
        count = len(self.ensemble or ())
        if self.strategy != "relabel" or views is None:
            return
        if views != count or (num_views or count) % count:
            raise InputError(
                f"strategy: relabel with {count} teachers needs the data's views_per_epoch: {count} (and num_views, if "
                f"set, a multiple of it); got views_per_epoch {views}, num_views {num_views}"
            )

    def on_validation_epoch_end(self) -> None:
        """Runs at the end of each validation. Logs the metrics, and once the figure of the teachers' agreement."""
        if not self.trainer.sanity_checking and not self._logged_agreement:
            self._logged_agreement = True
            self._evaluations.log_figures(self, "val", _teacher_figures)
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the teachers' fingerprints, not the teachers."""
        super().on_save_checkpoint(checkpoint)
        if self.ensemble is not None:
            checkpoint["teacher_fingerprints"] = [teacher.fingerprint() for teacher in self.ensemble]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. In a fit, refuses other teachers."""
        super().on_load_checkpoint(checkpoint)
        fingerprints = checkpoint.get("teacher_fingerprints")
        if not self.is_fitting or fingerprints is None or self.ensemble is None:
            return
        if len(fingerprints) != len(self.ensemble):
            raise InputError(
                f"teachers: the checkpoint was trained with {len(fingerprints)} teachers, got {len(self.ensemble)}"
            )
        for number, (teacher, fingerprint) in enumerate(zip(self.ensemble, fingerprints, strict=True)):
            check_same_teacher(f"teachers[{number}]", teacher, fingerprint)


def _teacher_figures(evaluation: Any) -> dict[str, Callable[[], Figure]]:
    return evaluation.teacher_figures() if isinstance(evaluation, EnsembleEvaluation) else {}
