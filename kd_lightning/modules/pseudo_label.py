"""Training on few labels, and on pseudo-labels for the other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import join_rows, take_rows
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.modules._shared.checks import check_choice
from kd_lightning.modules._shared.dense import labeled_samples
from kd_lightning.modules._shared.dense_checks import check_strong_transform, check_strong_view
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.pseudo_labels.selection.flexmatch import AdaptiveThresholds
from kd_lightning.pseudo_labels.table import check_classes, check_threshold


class PseudoLabelModule(SupervisedModule):
    """Train on labeled samples, and on pseudo-labels of the unlabeled ones (self-training).

    The objective is ``hard + unsupervised_weight * unsupervised``.

    - ``pseudo_labels="online"``: in every step, the pseudo-label is the current student's prediction. Without a
      threshold this is Lee (2013), with the weight ramped by ``SoftWeightAnnealing(attribute="unsupervised_weight")``.
      With a threshold and a datamodule that has a ``strong_transform`` it is FixMatch (Sohn et al. 2020): the
      pseudo-label comes from the weak view ``x``, if its probability reaches the threshold, and the loss is that of
      ``x_strong``. With ``adaptive_thresholds`` it is FlexMatch (Zhang et al. 2021).
    - ``pseudo_labels="refreshed"``: the pseudo-label, hard or soft, is the last of the ``PseudoLabelRefresh`` callback.

    The unsupervised term is the cross-entropy summed over the accepted samples and divided by the number of *all*
    unlabeled samples, so that few accepted ones weigh little. Samples with a coarse label are in both terms; their
    pseudo-label is one of the classes of the coarse label. Labeled and unlabeled samples go through the student in one
    forward pass, and so share their batch statistics.

    It takes all inputs, outputs (B, C) or dense, and the multiclass task. With ``class_dim`` each position of a sample
    without any label has a pseudo-label of its own (online, with a fixed threshold), and the divisor counts these
    positions, without masked ones. The strong view must then have the positions of the weak one: it may change colours,
    but not crop, flip or shorten on its own.

    Logs what :class:`SupervisedModule` does; ``train/unsupervised`` and ``unsupervised_weight``; ``train/coverage``,
    the accepted share of the unlabeled samples; and for online pseudo-labels ``train/confidence``, their mean
    probability.

    Args:
        student: Network that gives logits, see :class:`SupervisedModule`.
        unsupervised_weight: Weight of the unsupervised term (Lee's alpha), at least 0. A callback may anneal it.
        pseudo_labels: ``"online"`` or ``"refreshed"``.
        threshold: Lowest probability of accepted online pseudo-labels, in (0, 1]. Default: None, which means that all
            are accepted.
        adaptive_thresholds: Lower the threshold of each class by how little of it is learned, see
            :class:`AdaptiveThresholds`.
        ema_decay: Online pseudo-labels come from a running average of the student (buffers included) with this decay,
            in [0, 1). The first step copies the student; after n steps the decay is ``(1 + n) / (10 + n)``, if that is
            smaller. ``PseudoLabelRefresh(source="ema")`` uses the average, too. It is not deployed. Default: None,
            which means that they come from the student itself.
        **kwargs: The arguments of :class:`SupervisedModule`. The task must be ``"multiclass"``. The hard loss is that
            of the labeled rows alone.

    Raises:
        InputError: If a value is out of range; if refreshed pseudo-labels have a threshold here (it is the callback's);
            if the task is another one; if there are no unlabeled samples, or a class has no labeled one; if thresholds
            are adaptive and batches have no index; if pseudo-labels are refreshed, or thresholds adaptive, with
            ``class_dim``; if the strong view has other positions.
    """

    trains_auxiliary_heads: ClassVar[bool] = False  # their rows are not those of the batch

    def __init__(
        self,
        student: nn.Module,
        unsupervised_weight: float = 1.0,
        pseudo_labels: Literal["online", "refreshed"] = "online",
        threshold: float | None = None,
        *,
        adaptive_thresholds: bool = False,
        ema_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        if self.task != "multiclass":
            raise InputError(f"task must be multiclass, since a pseudo-label is one class, got {self.task!r}")
        check_choice("pseudo_labels", pseudo_labels, ("online", "refreshed"))
        check_threshold(threshold)
        _check_unsupervised_weight(unsupervised_weight)
        if pseudo_labels == "refreshed" and (threshold is not None or adaptive_thresholds):
            raise InputError("threshold is for online pseudo-labels; for refreshed ones set it in PseudoLabelRefresh")
        if adaptive_thresholds and threshold is None:
            raise InputError("adaptive_thresholds needs a threshold, the highest that a class can have")
        if self.class_dim is not None and (pseudo_labels == "refreshed" or adaptive_thresholds):
            option = "pseudo_labels: refreshed" if pseudo_labels == "refreshed" else "adaptive_thresholds"
            raise InputError(f"{option} is for one pseudo-label a sample, got class_dim: {self.class_dim}")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        self.save_hyperparameters(
            "unsupervised_weight", "pseudo_labels", "threshold", "adaptive_thresholds", "ema_decay"
        )
        self.unsupervised_weight = unsupervised_weight
        self.pseudo_labels = pseudo_labels
        self.threshold = threshold
        self.adaptive_thresholds = adaptive_thresholds
        self.ema = None if ema_decay is None else _make_ema(student, ema_decay)
        self._thresholds: AdaptiveThresholds | None = None
        self._unchecked_labels: Tensor | None = None  # until the first logits have the number of classes
        self._unlabeled_count = self._accepted_count = torch.zeros(())  # of this epoch

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hard and the unsupervised term."""
        _check_unsupervised_weight(self.unsupervised_weight)  # a callback may have set it
        if self.class_dim is not None:
            return self._dense_losses(batch)
        fine = self._has_fine_label(batch)
        coarse = torch.zeros_like(fine) if batch.candidates is None else batch.candidates.any(dim=1)
        labeled, unlabeled = fine | coarse, ~fine
        averaged = self._averaged_logits(batch, unlabeled)
        logits, unlabeled_logits = self._forward(batch, unlabeled, labeled)
        if logits.ndim != 2:
            raise InputError(f"the student must give logits (B, C), got {[*logits.shape]}; dense ones need class_dim")
        if self._unchecked_labels is not None:
            check_classes(self._unchecked_labels, logits.shape[-1], self._data(), type(self).__name__)
            self._unchecked_labels = None
        if batch.mean_labels is None:
            mean_labels, mean_coarse = None, self._mean_over_processes(int(coarse.sum()), logits)
        else:
            mean_labels, mean_coarse = batch.mean_labels - batch.mean_pseudo, batch.mean_coarse
        # no copies of images: x only has as many rows
        rest = replace(batch, x=fine, x_strong=None, teacher_inputs=None, teacher=None)
        labeled_batch = replace(rest.select(labeled), mean_labels=mean_labels)
        hard = self.hard_term(logits[labeled] if len(logits) == len(batch) else logits, labeled_batch)
        unlabeled_batch = rest.select(unlabeled)
        if self.pseudo_labels == "online":
            predicted = logits[unlabeled] if averaged is None else averaged
            label, accepted = self._pseudo_label(batch, unlabeled, predicted)
            target = F.one_hot(label, unlabeled_logits.shape[-1]).to(unlabeled_logits.dtype)
        else:
            target, accepted = _refreshed_target(unlabeled_batch, unlabeled_logits)
        value = -(target * unlabeled_logits.log_softmax(dim=-1)).sum(dim=-1)
        assert self._mean_labels is not None  # set by hard_term
        mean_fine = float(self._mean_labels) - mean_coarse
        mean_unlabeled = (len(batch) if batch.mean_rows is None else batch.mean_rows) - mean_fine
        value = (value * accepted).sum() / max(mean_unlabeled, 1e-9)
        self._record_coverage(accepted, len(unlabeled_batch))
        return {"hard": LossTerm(1.0, hard), "unsupervised": LossTerm(self.unsupervised_weight, value)}

    @staticmethod
    def _has_fine_label(batch: Batch) -> Tensor:
        """Return which rows have a label (of one class) that is no pseudo-label: booleans (B,)."""
        if batch.y is None:
            return torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
        soft = batch.y.ndim == 2 and batch.y.is_floating_point()  # probabilities, as of mixed samples
        if batch.y.shape != (len(batch),) and not soft:
            raise InputError(f"labels must be one class a sample, (B,) = [{len(batch)}], got {[*batch.y.shape]}")
        known = is_labeled(batch.y).all(dim=1) if soft else is_labeled(batch.y)
        return known if batch.kind is None else known & (batch.kind != LabelKind.PSEUDO)

    def _forward(self, batch: Batch, unlabeled: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
        """Run the student.

        Args:
            batch: The batch.
            unlabeled: Which rows have no fine label, (B,).
            labeled: Which rows have a fine or a coarse label, (B,).

        Returns:
            The logits of the batch, or of its labeled rows if no others are needed; and the logits (U, C) of the rows
            without a fine label: of their strong views if there are any.
        """
        if batch.x_strong is None:
            logits = self(batch.x)
            unlabeled_logits = logits[unlabeled]
        else:
            # pseudo-labels from the student itself need the weak views, too
            count, all_weak = len(batch), self.pseudo_labels == "online" and self.ema is None
            weak = batch.x if all_weak else take_rows(batch.x, labeled, count)
            first = count if all_weak else int(labeled.sum())
            both = self(join_rows(weak, take_rows(batch.x_strong, unlabeled, count)))
            logits, unlabeled_logits = both.tensor_split([first])
        return logits, unlabeled_logits.float() if unlabeled_logits.dtype != torch.float64 else unlabeled_logits

    @torch.no_grad()
    def _averaged_logits(self, batch: Batch, unlabeled: Tensor) -> Tensor | None:
        """Return the averaged student's logits of the samples without a fine label; None if there is no average."""
        if self.ema is None or self.pseudo_labels != "online":
            return None
        self.ema.eval()
        output = self.call(self.ema.module, take_rows(batch.x, unlabeled, len(batch)))
        return logits_of(output, "the averaged student")

    @torch.no_grad()
    def _pseudo_label(self, batch: Batch, unlabeled: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Return pseudo-labels (U,), and which of them are accepted, (U,).

        Args:
            batch: The batch.
            unlabeled: Which of its rows have no fine label, (B,).
            predicted: Logits of these rows, (U, C).
        """
        allowed = None if batch.candidates is None else batch.candidates[unlabeled]
        confidence, label = mask_candidates(predicted.detach().float(), allowed).softmax(dim=-1).max(dim=-1)
        if self._trainer is not None:
            self._record_mean(
                "train/confidence", confidence.mean() if len(label) else 0.0, max(float(len(label)), 1e-9)
            )
        if self.threshold is None:
            return label, torch.ones_like(confidence)
        if self.adaptive_thresholds and batch.index is None:
            raise InputError("adaptive_thresholds needs batches with an index, as SemiSupervisedDataModule's")
        if self._thresholds is None:  # a fixed threshold, or no fit
            return label, (confidence >= self.threshold).to(confidence)
        thresholds = self._adapt_thresholds(batch, unlabeled, confidence, label, predicted.shape[-1])
        return label, (confidence >= thresholds).to(confidence)

    def _adapt_thresholds(
        self, batch: Batch, unlabeled: Tensor, confidence: Tensor, label: Tensor, classes: int
    ) -> Tensor:
        """Return the threshold of each unlabeled row, (U,); then update the thresholds with those of all processes."""
        assert self._thresholds is not None
        assert batch.index is not None
        thresholds: Tensor = self._thresholds(classes)[label]
        confident = torch.full_like(batch.index, -1)
        confident[unlabeled] = torch.where(confidence >= self._thresholds.threshold, label, -1)
        index = batch.index
        if self.trainer.world_size > 1:  # all processes have equally many rows
            index, confident = (self.all_gather(part).flatten() for part in (index, confident))  # type: ignore[union-attr]
        self._thresholds.update(index, confident)
        return thresholds

    def _dense_losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of dense outputs. Positions of samples without any label have pseudo-labels."""
        assert self.class_dim is not None
        mask, count = batch.position_mask, len(batch)
        check_strong_view(batch)
        labeled = labeled_samples(batch, self.task, self.class_dim, self.causal)
        averaged = None if labeled.all() else self._averaged_logits(batch, ~labeled)
        logits, strong = self._forward(batch, ~labeled, labeled)
        # no copies of images: x only has as many rows
        rest = replace(batch, x=labeled, mask=mask, x_strong=None, teacher_inputs=None, teacher=None)
        labeled_batch, labeled_logits = self.to_rows(
            rest.select(labeled), logits[labeled] if len(logits) == count else logits
        )
        rows, strong = self.to_rows(rest.select(~labeled), strong)
        predicted = self.to_rows(rest.select(~labeled), logits[~labeled] if averaged is None else averaged)[1]
        label, accepted = self._pseudo_label(rows, torch.ones(len(rows), dtype=torch.bool), predicted)
        means = batch.dense_means
        mean = self._mean_over_processes(len(rows), logits) if means is None else means[1] - means[0]
        value = F.cross_entropy(strong, label, reduction="none")
        value = (value * accepted).sum() / max(mean, 1e-9)
        self._record_coverage(accepted, len(rows))
        every = len(labeled_batch) + len(rows)
        self._rows = self._mean_over_processes(every, logits) if means is None else means[1]
        hard = self.hard_term(labeled_logits, labeled_batch)
        return {"hard": LossTerm(1.0, hard), "unsupervised": LossTerm(self.unsupervised_weight, value)}

    def _record_coverage(self, accepted: Tensor, unlabeled: int) -> None:
        if self._trainer is not None:
            share = accepted.float().mean() if unlabeled else 0.0
            # always a float: the weights of all processes must have one type
            self._record_mean("train/coverage", share, max(float(unlabeled), 1e-9))
            self._unlabeled_count = self._unlabeled_count + unlabeled
            self._accepted_count = self._accepted_count.to(accepted.device) + accepted.sum()

    # The run.

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, makes the adaptive thresholds."""
        super().setup(stage)
        data: Any = self._data()
        self._thresholds = None
        if stage == "fit" and self.adaptive_thresholds:
            if not hasattr(data, "unlabeled_indices") or not hasattr(data, "visible_labels"):
                raise InputError(
                    "adaptive_thresholds needs a datamodule with unlabeled_indices() and visible_labels(), and batches "
                    "with an index, as SemiSupervisedDataModule's"
                )
            assert self.threshold is not None
            pool = len(data.unlabeled_indices())
            self._thresholds = AdaptiveThresholds(self.threshold, pool, len(data.visible_labels()))

    def on_train_start(self) -> None:
        """Runs before the first epoch. Checks that there are unlabeled samples, and a source of pseudo-labels."""
        super().on_train_start()
        data: Any = self._data()
        if hasattr(data, "unlabeled_indices") and not data.unlabeled_indices():
            raise InputError(
                "PseudoLabelModule: there are no unlabeled samples; set labeled to a part of the labels, or unlabeled "
                "to rest, source or test; or train a SupervisedModule"
            )
        if self.class_dim is not None:
            check_strong_transform(data)
        # PseudoLabelRefresh checks this itself, since a teacher may know classes without a label
        one_label = self.pseudo_labels == "online" and self.class_dim is None  # dense labels are not in memory
        self._unchecked_labels = data.visible_labels() if one_label and hasattr(data, "visible_labels") else None
        callbacks = [type(callback).__name__ for callback in getattr(self.trainer, "callbacks", ())]
        if self.pseudo_labels == "refreshed" and "PseudoLabelRefresh" not in callbacks:
            raise InputError(
                "pseudo_labels: refreshed needs the callback PseudoLabelRefresh; add it to trainer.callbacks"
            )

    def on_train_epoch_start(self) -> None:
        """Runs at the start of each training epoch. Resets the counts of pseudo-labels."""
        self._unlabeled_count = self._accepted_count = torch.zeros(())

    def on_train_epoch_end(self) -> None:
        """Runs at the end of each training epoch. Warns if it had no unlabeled sample, or accepted no pseudo-label."""
        super().on_train_epoch_end()
        if not int(self._unlabeled_count):
            rank_zero_warn("no batch of this epoch had an unlabeled sample (y = -100): nothing to pseudo-label")
        elif self.pseudo_labels == "online" and self.unsupervised_weight > 0 and not float(self._accepted_count):
            rank_zero_warn(
                f"no pseudo-label of this epoch reached the threshold {self.threshold}, so the student trained on the "
                "labels alone; lower it, or train longer on the labels first"
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Runs for each optimiser step. Steps, and updates the average before a checkpoint can be written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the epoch's counts and the state of the adaptive thresholds."""
        super().on_save_checkpoint(checkpoint)
        counts = (self._unlabeled_count, self._accepted_count)
        checkpoint["pseudo_label_counts"] = [count.cpu() for count in counts]
        if self._thresholds is not None:
            checkpoint["adaptive_thresholds"] = self._thresholds.last_class

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Restores the counts and the adaptive thresholds."""
        super().on_load_checkpoint(checkpoint)
        if "pseudo_label_counts" in checkpoint:
            self._unlabeled_count, self._accepted_count = checkpoint["pseudo_label_counts"]
        if self._thresholds is not None and "adaptive_thresholds" in checkpoint:
            before, now = checkpoint["adaptive_thresholds"], self._thresholds.last_class
            if len(before) != len(now):
                raise InputError(
                    f"adaptive_thresholds: the checkpoint has {len(before)} samples, the data {len(now)}; resume with "
                    "the samples of that run"
                )
            now.copy_(before)

    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)


def _refreshed_target(unlabeled: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the refreshed pseudo-labels as probabilities (U, C), and which rows have one, (U,)."""
    if unlabeled.kind is None or unlabeled.y is None:  # before the first refresh
        return torch.zeros_like(logits), logits.new_zeros(len(logits))
    accepted = unlabeled.kind == LabelKind.PSEUDO
    if unlabeled.soft is not None:
        return unlabeled.soft.to(logits), accepted.to(logits)
    if unlabeled.y.ndim == 2:  # mixed pseudo-labels
        return torch.where(accepted[:, None], unlabeled.y, 0).to(logits), accepted.to(logits)
    label = torch.where(accepted, unlabeled.y, 0)
    return F.one_hot(label, logits.shape[-1]).to(logits), accepted.to(logits)


def _check_unsupervised_weight(weight: float) -> None:
    if not weight >= 0.0:
        raise InputError(f"unsupervised_weight must be at least 0, got {weight}")


def _make_ema(student: nn.Module, decay: float) -> AveragedModel:
    """Make the running average of a student's parameters and buffers."""

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
