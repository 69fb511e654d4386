"""Distillation from several teachers."""

from __future__ import annotations

import os
from copy import copy
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, standardize_logits
from kd_lightning.modules._shared.ensemble_evaluation import EnsembleEvaluation
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.teacher_arguments import (
    check_same_teacher,
    check_soft_weight,
    is_fitting,
    make_soft_loss,
    say,
)
from kd_lightning.modules.supervised import LossTerm, SupervisedModule, check_choice
from kd_lightning.teachers.cache_fill import keep_outputs
from kd_lightning.teachers.ensemble import Ensemble, draw
from kd_lightning.teachers.probe import TeacherProbe


class EnsembleDistillModule(SupervisedModule):
    """Train a student on the soft targets of K frozen teachers, joined in one of three ways (Fukuda et al. 2017).

    - ``average``: of their probabilities at the loss's temperature, q(c) = sum of w_k q_k(c).
    - ``random``: one teacher is drawn for each optimiser step, or for each sample.
    - ``relabel``: each sample is K training examples an epoch, one for each teacher, each with its own augmentation,
      shuffled through the epoch: set the datamodule's ``views_per_epoch`` to K. The teacher of a view is its number modulo K.
      An example of a loader whose batches tell no view gets a uniformly drawn teacher.

    The objective is :class:`DistillModule`'s. Teachers may differ in architecture, inputs (``Teacher``'s
    ``preprocess``), order and choice of classes (``classes``), and place (``device``). A class that a teacher does not
    know is averaged over those that do, also where a single teacher is drawn.

    Charts what :class:`DistillModule` does, with the unweighted or weighted (not by confidence) average for the
    teacher: ``val/teacher_accuracy`` is the ensemble's, which the student may hope for. Further, for each teacher k,
    ``train/teacher_<k>_share`` (how often drawn, or its weight), ``val/teacher_<k>_accuracy``,
    ``val/teacher_<k>_agreement`` (with the student), ``val/teacher_<k>_ensemble_agreement``, and
    ``val/disagreement``, the mean KL over pairs of teachers in nats; and a figure of their pairwise agreement.

    Args:
        student: The network to train, see :class:`SupervisedModule`.
        teachers: K trained networks, or ``Teacher``s around them. None for ``test`` and ``predict`` alone.
        strategy: ``"average"``, ``"random"`` or ``"relabel"``.
        teacher_weights: K numbers, scaled to sum 1: weights of the average, probabilities of the draw, weights of the
            copies' soft terms. None: all the same. ``"confidence"``, for the average alone: for each labeled sample
            by the teachers' cross-entropy, see :meth:`Ensemble.confidence`.
        draw_per: For ``random``, whether a teacher is drawn for each ``"batch"`` (the paper's way; the same for all
            processes and accumulated batches of an optimiser step) or each ``"sample"``. Both follow from
            ``seed_everything``'s seed, and from the step, or epoch and index.
        use_vmap: Compute teachers of one architecture as one network, see :class:`Ensemble`; for the average and in
            validation. What they say is then not looked at as the run begins.
        soft_loss: Called as ``(student_logits, teacher_logits, target)``. None: ``KDLoss`` at temperature 4.
        soft_weight: w in [0, 1]; a callback may anneal it.
        task: See :class:`SupervisedModule`, as for all that follow.
        hard_loss: Called as ``(logits, target)``.
        optimizer: Takes the parameters.
        lr_scheduler: Takes the optimiser.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For no teachers, weights that do not fit them, classes that none knows or the student does not
            have, a draw by sample of samples without index, ``relabel`` with other ``views_per_epoch`` than teachers, and for
            what :class:`DistillModule` refuses.
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
        check_choice("strategy", strategy, ("average", "random", "relabel"))
        check_choice("draw_per", draw_per, ("batch", "sample"))
        check_soft_weight(soft_weight)
        if isinstance(teacher_weights, str):
            check_choice("teacher_weights", teacher_weights, ("confidence",))
            if strategy != "average":
                raise InputError(f"teacher_weights: confidence weighs the average, but strategy is {strategy!r}")
        self.save_hyperparameters("strategy", "teacher_weights", "draw_per", "soft_weight")
        weights = None if isinstance(teacher_weights, str) else teacher_weights
        self.ensemble = None if teachers is None else Ensemble(teachers, task=task, weights=weights, use_vmap=use_vmap)
        self.strategy = strategy
        self.confident = isinstance(teacher_weights, str)
        self.draw_per = draw_per
        self.soft_loss = make_soft_loss(soft_loss, task, self.ensemble or ())
        self.soft_weight = soft_weight
        self._first_looks: list[TeacherProbe] = []
        self._told_of_views = self._pictured = False

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The hard and the soft term."""
        if self.ensemble is None:
            raise InputError("training needs the teachers; teachers=None is for test and predict alone")
        check_soft_weight(self.soft_weight)  # a callback may have set it
        averaged = self.strategy == "average" and len(self.ensemble) > 1
        answers = self.ensemble(batch) if averaged else None  # before the student's activations are held
        logits = self(batch.x)
        hard = self.hard_term(logits, batch)  # says what is wrong with labels
        soft = self._soft_term(self.ensemble, answers, logits, batch)
        return {"hard": LossTerm(1.0 - self.soft_weight, hard), "soft": LossTerm(self.soft_weight, soft)}

    def _soft_term(self, ensemble: Ensemble, answers: Tensor | None, logits: Tensor, batch: Batch) -> Tensor:
        classes = 1 if self.task == "binary" else logits.shape[-1]
        soft_loss, weights, choice = self.soft_loss, None, None
        if answers is None:
            choice = self._choice(ensemble, batch)
            weights = F.one_hot(choice, len(ensemble)).double()
        if choice is not None and ensemble.knows(classes).all():
            target = ensemble.choose(batch, choice, classes)
        else:
            answers = ensemble(batch) if answers is None else answers
            ensemble.check_classes(answers, classes)
            weights = ensemble.confidence(answers, batch.y) if self.confident else weights
            standardize = bool(getattr(soft_loss, "standardize", False))
            if standardize:  # the teachers before they are joined, so no more after it
                soft_loss = copy(soft_loss)
                soft_loss.standardize = False  # type: ignore[assignment]
                logits = standardize_logits(logits.to(answers.dtype))
            target = ensemble.pool(answers, weights, float(getattr(soft_loss, "temperature", 1.0)), standardize)
        self._log_shares(ensemble.weights if weights is None else weights.mean(dim=0), len(batch))
        target = target.reshape(logits.shape)
        if self.strategy != "relabel" or (ensemble.weights == ensemble.weights[0]).all():
            soft: Tensor = soft_loss(logits, target, batch.y)
            return soft
        assert choice is not None
        if not hasattr(soft_loss, "reduction"):
            raise InputError("teacher_weights of relabel need a soft_loss with a reduction that can be 'none'")
        soft_loss = copy(soft_loss)
        soft_loss.reduction = "none"  # type: ignore[assignment]
        soft = soft_loss(logits, target, batch.y).reshape(len(batch), -1).mean(dim=1)
        return (len(ensemble) * ensemble.weights[choice].to(soft) * soft).mean()

    def _choice(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        """The number of each row's teacher, (B,)."""
        count, rows = len(ensemble), len(batch)
        if count == 1:
            return torch.zeros(rows, dtype=torch.long)
        seed, weights = int(os.environ.get("PL_GLOBAL_SEED", 0)), ensemble.weights.tolist()
        if self.strategy == "random":
            if self.draw_per == "sample" and batch.index is None:
                raise InputError(
                    "draw_per: sample needs batches with an index, as the datamodule's; or set it to batch"
                )
            if self._trainer is None:  # nothing tells step and epoch
                return torch.multinomial(ensemble.weights, 1 if self.draw_per == "batch" else rows, True).expand(rows)
            if self.draw_per == "batch" or batch.index is None:
                return torch.full((rows,), draw((seed, self.global_step), weights))
            epoch = self.current_epoch
            return torch.tensor([draw((seed, epoch, index), weights) for index in batch.index.tolist()])
        if batch.view is not None:
            return batch.view.cpu() % count
        if not self._told_of_views:
            rank_zero_warn(
                "relabel: these batches do not tell which view of its sample a row is, so each row gets a uniformly "
                "drawn teacher; SemiSupervisedDataModule(views_per_epoch=...) gives each sample to every teacher"
            )
            self._told_of_views = True
        return torch.randint(count, (rows,))

    def _log_shares(self, shares: Tensor, rows: int) -> None:
        if self._trainer is not None and self.trainer.training:
            for number, share in enumerate(shares.tolist() if shares.device.type == "cpu" else shares):
                self._log_epoch(f"train/teacher_{number}_share", share, rows)

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """All teachers' logits (K, B, C), for the metrics."""
        return None if self.ensemble is None else self.ensemble(batch)

    def make_evaluation(self, classes: int) -> Evaluation:
        """With the figures of each teacher."""
        if self.ensemble is None:
            return super().make_evaluation(classes)
        return EnsembleEvaluation(self.ensemble, self.task, classes)

    def setup(self, stage: str) -> None:
        """Take the teachers' fingerprints before the precision plugin may change their weights."""
        super().setup(stage)
        self._told_of_views = self._pictured = False
        if stage == TrainerFn.FITTING:
            for teacher in self.ensemble or ():
                teacher.fingerprint(anew=True)

    def on_fit_start(self) -> None:
        """Fill the teachers' caches, where they have some, and have each one's first answers looked at."""
        for look in self._first_looks:  # of a fit that ended before
            look.close()
        if self.ensemble is None:
            return
        keep_outputs([*self.ensemble], self.trainer)
        if self.trainer.is_global_zero:
            for number, teacher in enumerate(self.ensemble):
                if not teacher.missing_classes:
                    about = partial(say, about=f"teachers[{number}]")
                    self._first_looks.append(TeacherProbe(teacher, self.soft_loss, self.task, about))

    def on_train_start(self) -> None:
        """Check that each sample comes once to each teacher in an epoch where it should."""
        sampler: Any = getattr(self.trainer.train_dataloader, "sampler", None)
        views_per_epoch = getattr(sampler, "views_per_epoch", None)
        num_views = getattr(sampler, "num_views", None)
        count = len(self.ensemble or ())
        if (
            self.strategy == "relabel"
            and views_per_epoch is not None
            and (views_per_epoch != count or (num_views or count) % count)
        ):
            raise InputError(
                f"strategy: relabel gives each sample to each of {count} teachers, and so needs the data's "
                f"views_per_epoch: {count} (and num_views, if set, a multiple of it); got views_per_epoch {views_per_epoch}, num_views {num_views}"
            )

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures; the picture of the teachers, who do not change, once."""
        if not self.trainer.sanity_checking and not self._pictured:
            self._pictured = True
            self._add_figures("val", lambda e: e.teacher_figures() if isinstance(e, EnsembleEvaluation) else {})
        super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which teachers they were, not the teachers."""
        super().on_save_checkpoint(checkpoint)
        if self.ensemble is not None:
            checkpoint["teacher_fingerprints"] = [teacher.fingerprint() for teacher in self.ensemble]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under other teachers."""
        super().on_load_checkpoint(checkpoint)
        before = checkpoint.get("teacher_fingerprints")
        if not is_fitting(self) or before is None or self.ensemble is None:
            return
        if len(before) != len(self.ensemble):
            raise InputError(f"teachers: the checkpoint was trained under {len(before)}, got {len(self.ensemble)}")
        for number, (teacher, fingerprint) in enumerate(zip(self.ensemble, before, strict=True)):
            check_same_teacher(f"teachers[{number}]", teacher, fingerprint)
