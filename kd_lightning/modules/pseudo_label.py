"""Learning from few labels and many images, by the student's own labels for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.base import Task
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.modules.supervised import LossTerm, SupervisedModule, check_choice
from kd_lightning.pseudo_labels.selection.flexmatch import AdaptiveThresholds
from kd_lightning.pseudo_labels.table import check_classes, check_threshold


class PseudoLabelModule(SupervisedModule):
    """Self-training: ``hard + unsupervised_weight * unsupervised``, where the unlabeled images have pseudo-labels.

    - ``pseudo_labels="online"``: the label is the current student's decision, made anew in every step. Without a threshold
      this is Lee (2013), with the weight ramped by ``SoftWeightAnnealing(attribute="unsupervised_weight")``. With a
      threshold and a datamodule that has a ``strong_transform`` it is FixMatch (Sohn et al. 2020): the label comes
      from the weak view ``x``, where its probability reaches the threshold; the loss is taken on ``x_strong``. With
      ``adaptive_thresholds`` it is FlexMatch.
    - ``pseudo_labels="refreshed"``: the label is what a ``PseudoLabelRefresh`` callback last handed out, hard or soft.

    The unsupervised term is cross-entropy summed over the accepted samples, and divided by the number of *all*
    unlabeled ones, so that few accepted labels weigh little. Samples with a coarse label are learned in both terms,
    their pseudo-label being one of its classes. Labeled and unlabeled samples go through the student in
    one forward pass, and so share their batch statistics.

    Charts what :class:`SupervisedModule` does; ``train/unsupervised`` and ``unsupervised_weight``; ``train/coverage``,
    the accepted share of the unlabeled samples; and for online labels ``train/confidence``, the mean probability of
    the label.

    Args:
        student: Gives logits (B, C), see :class:`SupervisedModule`.
        unsupervised_weight: Lee's alpha, at least 0; a callback may anneal it.
        pseudo_labels: ``"online"`` or ``"refreshed"``.
        threshold: Accept online labels of at least this probability, in (0, 1]; None: all.
        adaptive_thresholds: Lower it for each class by how much of it is learned, see :class:`AdaptiveThresholds`.
        ema_decay: Online labels come from a running average of the student with this decay, in [0, 1), buffers
            averaged, too; None: from the student itself. The first step copies the student; after n steps the decay
            is ``(1 + n) / (10 + n)``, where that is smaller. The average serves ``PseudoLabelRefresh(source="ema")``,
            too, and is not deployed.
        task: ``"multiclass"`` alone.
        hard_loss: See :class:`SupervisedModule`, as for all that follow; of labeled rows alone.
        optimizer: Takes the parameters.
        lr_scheduler: Takes the optimiser.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For values out of range, a threshold of refreshed labels (theirs is the callback's), another task,
            no unlabeled samples, classes without a labeled one, and adaptive thresholds where batches have no index.
    """

    def __init__(
        self,
        student: nn.Module,
        unsupervised_weight: float = 1.0,
        pseudo_labels: Literal["online", "refreshed"] = "online",
        threshold: float | None = None,
        *,
        adaptive_thresholds: bool = False,
        ema_decay: float | None = None,
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
        if task != "multiclass":
            raise InputError(f"task must be multiclass, since a pseudo-label is one class, got {task!r}")
        check_choice("pseudo_labels", pseudo_labels, ("online", "refreshed"))
        check_threshold(threshold)
        _check_weight(unsupervised_weight)
        if pseudo_labels == "refreshed" and (threshold is not None or adaptive_thresholds):
            raise InputError("threshold: refreshed labels are accepted by PseudoLabelRefresh; set it there")
        if adaptive_thresholds and threshold is None:
            raise InputError("adaptive_thresholds needs a threshold, the highest that a class can have")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        self.save_hyperparameters(
            "unsupervised_weight", "pseudo_labels", "threshold", "adaptive_thresholds", "ema_decay"
        )
        self.unsupervised_weight = unsupervised_weight
        self.pseudo_labels = pseudo_labels
        self.threshold = threshold
        self.adaptive_thresholds = adaptive_thresholds
        self.ema = None if ema_decay is None else _average(student, ema_decay)
        self._thresholds: AdaptiveThresholds | None = None
        self._visible: Tensor | None = None  # labels whose classes are yet to be checked
        self._seen = self._accepted = torch.zeros(())  # in this epoch

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """The hard and the unsupervised term."""
        _check_weight(self.unsupervised_weight)  # a callback may have set it
        clean = self._clean(batch)
        coarse = torch.zeros_like(clean) if batch.candidates is None else batch.candidates.any(dim=1)
        given = clean | coarse
        logits, learned = self._forward(batch, clean, given)
        if self._visible is not None:
            check_classes(self._visible, logits.shape[-1], self._class_names(), type(self).__name__)
            self._visible = None
        labeled = batch.select(given)
        if batch.mean_labels is None:
            batch.mean_coarse = self._mean_over_processes(int(coarse.sum()), logits)
        else:
            labeled.mean_labels = batch.mean_labels - batch.mean_pseudo
        hard = self.hard_term(logits[given] if len(logits) == len(batch) else logits, labeled)
        batch.mean_labels, batch.mean_pseudo = labeled.mean_labels, 0.0  # what the hard term is charted over
        unlabeled = batch.select(~clean)
        if self.pseudo_labels == "online":
            target, accepted = self._label(batch, clean, logits)
            target = F.one_hot(target, learned.shape[-1]).to(learned.dtype)
        else:
            target, accepted = _refreshed(unlabeled, learned)
        value = -(target * learned.log_softmax(dim=-1)).sum(dim=-1)
        assert batch.mean_labels is not None
        fine = float(batch.mean_labels) - batch.mean_coarse
        everyone = (len(batch) if batch.mean_rows is None else batch.mean_rows) - fine
        value = (value * accepted).sum() / max(everyone, 1e-9)
        self._note(accepted, len(unlabeled))
        return {"hard": LossTerm(1.0, hard), "unsupervised": LossTerm(self.unsupervised_weight, value)}

    @staticmethod
    def _clean(batch: Batch) -> Tensor:
        """Which rows have a label that is none of ours, (B,)."""
        if batch.y is None:
            return torch.zeros(len(batch), dtype=torch.bool, device=batch.x.device)
        if batch.y.shape != (len(batch),):
            raise InputError(f"labels must be one class a sample, (B,) = [{len(batch)}], got {[*batch.y.shape]}")
        known = is_labeled(batch.y)
        return known if batch.kind is None else known & (batch.kind != LabelKind.PSEUDO)

    def _forward(self, batch: Batch, clean: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the batch, or of its given rows alone where no more are needed; and those that are to learn.

        The latter are of the unlabeled rows, (U, C): of their strong views where there are any.
        """
        if batch.x_strong is None:
            logits = self(batch.x)
            learned = logits[~clean]
        else:
            # labels from the student itself need the weak views, too
            weak = batch.x if self.pseudo_labels == "online" and self.ema is None else batch.x[given]
            logits, learned = self(torch.cat([weak, batch.x_strong[~clean]])).tensor_split([len(weak)])
        if logits.ndim != 2:
            raise InputError(f"the student must give logits (B, C), got {[*logits.shape]}")
        return logits, learned.float() if learned.dtype != torch.float64 else learned

    @torch.no_grad()
    def _label(self, batch: Batch, clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The unlabeled rows' labels (U,), and which of them are accepted, (U,)."""
        if self.ema is None:
            answers = logits[~clean]
        else:
            answers = logits_of(self.ema.eval()(batch.x[~clean]), "the averaged student")
        allowed = None if batch.candidates is None else batch.candidates[~clean]
        confidence, label = mask_candidates(answers.detach().float(), allowed).softmax(dim=-1).max(dim=-1)
        if self._trainer is not None:
            self._log_epoch("train/confidence", confidence.mean() if len(label) else 0.0, max(float(len(label)), 1e-9))
        if self.threshold is None:
            return label, torch.ones_like(confidence)
        if self.adaptive_thresholds and batch.index is None:
            raise InputError("adaptive_thresholds needs batches with an index, as SemiSupervisedDataModule's")
        if self._thresholds is None:  # fixed ones, and outside of a fit
            return label, (confidence >= self.threshold).to(confidence)
        return label, (confidence >= self._adapted(batch, clean, confidence, label, answers.shape[-1])).to(confidence)

    def _adapted(self, batch: Batch, clean: Tensor, confidence: Tensor, label: Tensor, classes: int) -> Tensor:
        """The threshold of each unlabeled row, (U,); then takes in the confident ones of all processes."""
        assert self._thresholds is not None
        assert batch.index is not None
        thresholds: Tensor = self._thresholds(classes)[label]
        confident = torch.full_like(batch.index, -1)
        confident[~clean] = torch.where(confidence >= self._thresholds.threshold, label, -1)
        index = batch.index
        if self.trainer.world_size > 1:  # every process has as many rows
            index, confident = (self.all_gather(part).flatten() for part in (index, confident))  # type: ignore[union-attr]
        self._thresholds.note(index, confident)
        return thresholds

    def _note(self, accepted: Tensor, unlabeled: int) -> None:
        if self._trainer is not None:
            share = accepted.float().mean() if unlabeled else 0.0
            # a float even where it is an int: processes must agree on the type
            self._log_epoch("train/coverage", share, max(float(unlabeled), 1e-9))
            self._seen = self._seen + unlabeled
            self._accepted = self._accepted.to(accepted.device) + accepted.sum()

    # The run.

    def setup(self, stage: str) -> None:
        """Size the adaptive thresholds."""
        super().setup(stage)
        data: Any = self._data()
        self._thresholds = None
        if stage == "fit" and self.adaptive_thresholds:
            if not hasattr(data, "unlabeled_indices") or not hasattr(data, "visible_labels"):
                raise InputError(
                    "adaptive_thresholds needs a datamodule with unlabeled_indices() and visible_labels(), and batches "
                    "with index"
                )
            assert self.threshold is not None
            pool = len(data.unlabeled_indices())
            self._thresholds = AdaptiveThresholds(self.threshold, pool, len(data.visible_labels()))

    def on_train_start(self) -> None:
        """Check that there is something to label, and somebody to label it."""
        data: Any = self._data()
        if hasattr(data, "unlabeled_indices") and not data.unlabeled_indices():
            raise InputError(
                "PseudoLabelModule: there are no unlabeled samples; set labeled to a part of the labels, unlabeled to "
                "rest, source or test, or train a SupervisedModule"
            )
        # with refreshed labels it is the callback's concern, since a teacher may know what no label tells
        self._visible = (
            data.visible_labels() if self.pseudo_labels == "online" and hasattr(data, "visible_labels") else None
        )
        callbacks = [type(callback).__name__ for callback in getattr(self.trainer, "callbacks", ())]
        if self.pseudo_labels == "refreshed" and "PseudoLabelRefresh" not in callbacks:
            raise InputError(
                "pseudo_labels: refreshed, but nobody does; add PseudoLabelRefresh to the trainer's callbacks"
            )

    def on_train_epoch_start(self) -> None:
        """Count anew."""
        self._seen = self._accepted = torch.zeros(())

    def on_train_epoch_end(self) -> None:
        """Say where an epoch has taught nothing of the unlabeled samples."""
        super().on_train_epoch_end()
        if not int(self._seen):
            rank_zero_warn("no batch of this epoch had an unlabeled sample (y = -100): nothing to pseudo-label")
        elif self.pseudo_labels == "online" and self.unsupervised_weight > 0 and not float(self._accepted):
            rank_zero_warn(
                f"no pseudo-label of this epoch reached the threshold {self.threshold}, so only the labels were "
                f"learned; lower it, or train longer on the labels first"
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, and average; here, since a checkpoint may be written before any later hook."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the adaptive thresholds count."""
        super().on_save_checkpoint(checkpoint)
        if self._thresholds is not None:
            checkpoint["adaptive_thresholds"] = self._thresholds.chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        super().on_load_checkpoint(checkpoint)
        if self._thresholds is not None and "adaptive_thresholds" in checkpoint:
            before, now = checkpoint["adaptive_thresholds"], self._thresholds.chosen
            if len(before) != len(now):
                raise InputError(
                    f"adaptive_thresholds: the checkpoint counted on a pool among {len(before)} samples, now there are "
                    f"{len(now)}; resume with the images of that run, or start anew"
                )
            now.copy_(before)

    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def _class_names(self) -> list[str] | None:
        names: list[str] | None = getattr(self._data(), "class_names", None)
        return names


def _refreshed(unlabeled: Batch, learned: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities to learn (U, C), and in which rows there are any, (U,)."""
    if unlabeled.kind is None or unlabeled.y is None:  # before the first refresh
        return torch.zeros_like(learned), learned.new_zeros(len(learned))
    accepted = unlabeled.kind == LabelKind.PSEUDO
    if unlabeled.soft is not None:
        return unlabeled.soft.to(learned), accepted.to(learned)
    label = torch.where(accepted, unlabeled.y, 0)
    return F.one_hot(label, learned.shape[-1]).to(learned), accepted.to(learned)


def _check_weight(weight: float) -> None:
    if not weight >= 0.0:
        raise InputError(f"unsupervised_weight must be at least 0, got {weight}")


def _average(student: nn.Module, decay: float) -> AveragedModel:
    """A running average of parameters and buffers."""

    def update(averages: Any, values: Any, count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.dtype), weight)
            else:
                average.copy_(value)

    averaged = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    averaged.requires_grad_(False)
    return averaged
