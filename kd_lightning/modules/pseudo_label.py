"""Training on few labels, and on pseudo-labels for the other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import join_rows, take_rows
from kd_lightning.modules._shared.accepted_counts import AcceptedCounts
from kd_lightning.modules._shared.averaged_student import average_of, start_average
from kd_lightning.modules._shared.checks import check_choice
from kd_lightning.modules._shared.dense import labeled_samples
from kd_lightning.modules._shared.dense_checks import check_strong_transform, check_strong_view
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.refresh_check import check_refresh
from kd_lightning.modules._shared.taught_module import TaughtModule
from kd_lightning.pseudo_labels.pool import unlabeled_samples
from kd_lightning.pseudo_labels.selection import Selection
from kd_lightning.pseudo_labels.selection.base import check_task, one_line
from kd_lightning.pseudo_labels.selection.set_up import set_up
from kd_lightning.pseudo_labels.tasks import pseudo_label_task
from kd_lightning.ranks import compute_metrics_together
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.teacher import check_outputs


class PseudoLabelModule(TaughtModule):
    """Train on labeled samples, and on pseudo-labels of the unlabeled ones (self-training).

    The objective is ``hard + unsupervised_weight * unsupervised``.

    - ``pseudo_labels="online"``: in every step, the pseudo-label is the current prediction of the student, of its
      running average, or of a teacher. A :class:`~kd_lightning.pseudo_labels.Selection` says which ones count.
    - ``pseudo_labels="refreshed"``: the pseudo-label, hard or soft, is the last of the ``PseudoLabelRefresh`` callback.

    The prediction is that of the weak view ``x``. The loss is that of ``x_strong``, if the datamodule has a
    ``strong_transform``, or samples have a strong view of their own. Known methods are:

    - Lee (2013): no selection, no strong view, and a weight that
      ``SoftWeightAnnealing(attribute="unsupervised_weight")`` ramps.
    - FixMatch (Sohn et al. 2020): ``FixedThreshold``, and a strong view. ``FlexMatch``, ``FreeMatch``, ``SoftMatch``
      and ``AdaMatch`` are other selections.
    - Mean Teacher (Tarvainen and Valpola 2017), with the cross-entropy in place of the squared error: ``ema_decay``,
      and ``Sharpen(FixedThreshold(0), 1)``. The papers of these methods evaluate the average; here it is the student,
      unless Lightning's ``EMAWeightAveraging`` averages the module.

    The unsupervised term is the cross-entropy with the targets, times their weights, summed over the unlabeled samples
    and divided by the number of *all* of them, so that few accepted ones weigh little. Samples with a coarse label are
    in both terms; their pseudo-label is one of the classes of the coarse label. Labeled and unlabeled samples go
    through the student in one forward pass, and so share their batch statistics.

    In the binary and multilabel tasks, each label that is not given has a pseudo-label 0 or 1 of its own, also one of a
    row whose other labels are given. The selection is ``LabelThresholds``, the loss binary cross-entropy, and the
    divisor the number of all these labels. Each label must be known to be 1 in some sample, and 0 in another.

    In the regression task, pseudo-labels are refreshed: they need several views of a sample, of which a batch has one.
    The unsupervised term is the hard loss (by default the squared error) of each pseudo-label in place of the
    cross-entropy.

    It takes all inputs; outputs (B, C) or (B,); and dense ones of the multiclass task. With ``class_dim`` each position
    of a sample without any label has a pseudo-label of its own (online, with a selection that needs no index), and the
    divisor counts these positions, without masked ones. The strong view must then have the positions of the weak one:
    it may change colours, but not crop, flip or shorten on its own.

    Logs what :class:`SupervisedModule` does; ``train/unsupervised`` and ``unsupervised_weight``; ``train/coverage``,
    the mean weight of the unlabeled samples, which is the accepted share if weights are 0 or 1; for online
    pseudo-labels ``train/confidence``, the mean probability of their class; and ``train/regularizer`` and
    ``regularizer_weight``, if the selection has such a term. Warns if no online pseudo-label of an epoch counts; and,
    from the second epoch on, if nearly all that count are of one class, which most labels are not.

    Args:
        student: Network that gives logits, see :class:`SupervisedModule`.
        unsupervised_weight: Weight of the unsupervised term (Lee's alpha), at least 0. A callback may anneal it.
        pseudo_labels: ``"online"`` or ``"refreshed"``.
        selection: Which online pseudo-labels count, and how much. Its state is in the checkpoint. Default: None, which
            means that all count.
        teacher: A trained network, or a :class:`~kd_lightning.Teacher` around it, that makes the online pseudo-labels,
            or those of ``PseudoLabelRefresh(source="teacher")``. It may have a cache. Default: None, for no teacher.
        ema_decay: Online pseudo-labels come from a running average of the student (buffers included) with this decay,
            in [0, 1). The first step copies the student; after n steps the decay is ``(1 + n) / (10 + n)``, if that is
            smaller. ``PseudoLabelRefresh(source="ema")`` uses the average, too. It is not deployed. It needs weights of
            float32: mixed precision, if any. Default: None, which means that they come from the student itself.
        **kwargs: The arguments of :class:`SupervisedModule`. The task ``"regression"`` is for refreshed pseudo-labels
            alone. The hard loss is that of the labeled rows alone.

    Raises:
        InputError: If a value is out of range; if refreshed pseudo-labels have a selection here (it is the callback's);
            if online ones have a teacher and an average; if the task is another one, or the selection is for another
            one; if there are no unlabeled samples, or a class has no labeled one (unless a teacher labels); if the
            selection needs what is not there, such as an index; if pseudo-labels are refreshed with ``class_dim``, or
            by another network than the average or the teacher that is given; if an average would be in half precision;
            if the strong view has other positions; if a run is resumed with another teacher.
    """

    trains_auxiliary_heads: ClassVar[bool] = False  # their rows are not those of the batch
    has_soft_term: ClassVar[bool] = False  # a teacher makes pseudo-labels
    saved_arguments: ClassVar[tuple[str, ...]] = ("unsupervised_weight", "pseudo_labels", "ema_decay")

    def __init__(
        self,
        student: nn.Module,
        unsupervised_weight: float = 1.0,
        pseudo_labels: Literal["online", "refreshed"] = "online",
        *,
        selection: Selection | None = None,
        teacher: nn.Module | None = None,
        ema_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        self.label_task = pseudo_label_task(self.task, type(self).__name__)
        check_choice("pseudo_labels", pseudo_labels, ("online", "refreshed"))
        if pseudo_labels == "online":
            self.label_task.check_online(type(self).__name__)
        _check_unsupervised_weight(unsupervised_weight)
        if pseudo_labels == "refreshed" and selection is not None:
            raise InputError("selection is for online pseudo-labels; for refreshed ones set it in PseudoLabelRefresh")
        if self.class_dim is not None and (pseudo_labels == "refreshed" or (selection and selection.needs_index)):
            option = "pseudo_labels: refreshed" if pseudo_labels == "refreshed" else type(selection).__name__
            raise InputError(f"{option} is for one pseudo-label a sample, got class_dim: {self.class_dim}")
        if self.class_dim is not None and self.task != "multiclass":
            raise InputError(f"pseudo-labels of dense outputs need task: multiclass, got {self.task}")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        if pseudo_labels == "online" and teacher is not None and ema_decay is not None:
            raise InputError("online pseudo-labels come from one network, got a teacher and ema_decay; leave out one")
        self.save_hyperparameters(*self.saved_arguments)
        self.unsupervised_weight = unsupervised_weight
        self.pseudo_labels = pseudo_labels
        self.selection = self.label_task.accept_all() if selection is None else selection
        check_task(self.selection, self.label_task.name)
        self.teacher = self.make_teacher(teacher)
        self.ema = None if ema_decay is None else average_of(student, ema_decay)
        self._unchecked_labels: Tensor | None = None  # until the first logits have the number of classes
        self._counts = AcceptedCounts()

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the hard and the unsupervised term."""
        _check_unsupervised_weight(self.unsupervised_weight)  # a callback may have set it
        if self.class_dim is not None:
            return self._dense_losses(batch)
        given = self.label_task.given(batch)
        coarse = torch.zeros_like(given[:, 0]) if batch.candidates is None else batch.candidates.any(dim=1)
        labeled, unlabeled = given.any(dim=1) | coarse, ~given.all(dim=1)
        predicted = self._predict(batch, unlabeled)
        logits, unlabeled_logits = self._forward(batch, unlabeled, labeled)
        unlabeled_logits = self.label_task.rows(unlabeled_logits, "the student")
        if self._unchecked_labels is not None:
            name = type(self).__name__
            self.label_task.check_labels(self._unchecked_labels, unlabeled_logits.shape[1], self._data(), name)
            self._unchecked_labels = None
        if batch.mean_labels is None:
            mean_labels, mean_coarse = None, self._mean_over_processes(int(coarse.sum()), logits)
        else:
            mean_labels, mean_coarse = batch.mean_labels - batch.mean_pseudo, batch.mean_coarse
        # no copies of images: x only has as many rows
        rest = replace(batch, x=labeled, x_strong=None, teacher_inputs=None, teacher=None)
        labeled_batch = self.label_task.without_pseudo_labels(rest, given).select(labeled)
        labeled_batch = replace(labeled_batch, mean_labels=mean_labels)
        hard = self.hard_term(logits[labeled] if len(logits) == len(batch) else logits, labeled_batch)
        unlabeled_batch, unknown = rest.select(unlabeled), ~given[unlabeled]
        if self.pseudo_labels == "online":
            predicted = logits if predicted is None else predicted
            target, weight = self._select(unlabeled_batch, *_split(predicted, unlabeled), unlabeled_logits, unknown)
        else:
            target, weight = self.label_task.refreshed(unlabeled_batch, unlabeled_logits)
        assert self._mean_labels is not None  # set by hard_term
        mean_fine = float(self._mean_labels) - mean_coarse
        labels_of_row = weight.shape[1:].numel()
        mean_rows = len(batch) if batch.mean_rows is None else batch.mean_rows
        if weight.ndim > 1:
            weight = weight * unknown
        self._record_coverage(_of_unknown(weight, unknown), target, labeled_batch.y)
        return self._terms(hard, unlabeled_logits, target, weight, mean_rows * labels_of_row - mean_fine)

    def _terms(self, hard: Tensor, logits: Tensor, target: Tensor, weight: Tensor, mean: float) -> dict[str, LossTerm]:
        """Return the terms.

        Args:
            hard: The hard term.
            logits: Logits of the unlabeled rows, (U, C).
            target: Their pseudo-labels, (U, C).
            weight: Weights of these, (U,).
            mean: Mean number of unlabeled rows over the batches of the optimiser step.
        """
        values, predictions = self.label_task.compare(logits, target, self.hard_loss)
        value = (values * weight).sum() / max(mean, 1e-9)
        terms = {"hard": LossTerm(1.0, hard), "unsupervised": LossTerm(self.unsupervised_weight, value)}
        if self.pseudo_labels == "online":
            regularizer = self.selection.regularizer(predictions, weight)
            if regularizer is not None:
                terms["regularizer"] = LossTerm(*regularizer)
        return terms

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
            count, all_weak = len(batch), self.pseudo_labels == "online" and self._labeler is None
            weak = batch.x if all_weak else take_rows(batch.x, labeled, count)
            first = count if all_weak else int(labeled.sum())
            both = self(join_rows(weak, take_rows(batch.x_strong, unlabeled, count)))
            logits, unlabeled_logits = both.tensor_split([first])
        return logits, unlabeled_logits.float() if unlabeled_logits.dtype != torch.float64 else unlabeled_logits

    @property
    def _labeler(self) -> nn.Module | None:
        """The network that makes online pseudo-labels, None if it is the student."""
        return self.ema if self.teacher is None else self.teacher

    @torch.no_grad()
    def _predict(self, batch: Batch, unlabeled: Tensor) -> Tensor | None:
        """Return logits of the network that makes the online pseudo-labels; None if it is the student, or has no rows.

        They are those of all rows if the selection needs labeled ones, else of the unlabeled rows, (B,).
        """
        if self._labeler is None or self.pseudo_labels != "online":
            return None
        if not self.selection.needs_labeled and not unlabeled.any():
            return None
        rows = batch if self.selection.needs_labeled else replace(batch, x_strong=None).select(unlabeled)
        if self.teacher is not None:
            return logits_of(self.teacher(rows), "the teacher")
        assert self.ema is not None
        self.ema.eval()
        return logits_of(self.call(self.ema.module, rows.x), "the averaged student")

    @torch.no_grad()
    def _select(
        self, rows: Batch, predicted: Tensor, labeled: Tensor, logits: Tensor, unknown: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return targets (U, C) and weights (U,) or (U, K) of the unlabeled rows, in the type of their logits.

        Args:
            rows: The unlabeled rows.
            predicted: Logits of the network that makes the pseudo-labels, for these rows, (U, C).
            labeled: Its logits of the labeled rows, (L, C).
            logits: Logits of the student, for the unlabeled rows, (U, C).
            unknown: Which labels of the rows are not given, (U, K) or (U, 1). Default: None, which means all.
        """
        check_outputs(logits, predicted)
        if rows.partner is not None and self.selection.needs_index:
            name = type(self.selection).__name__
            raise InputError(f"{name} stores values of single samples; mixed rows (mix) are of two samples")
        every, others = (
            self.label_task.rows(part.detach().float(), "the network of the pseudo-labels")
            for part in (predicted, labeled)
        )
        predictions = self.label_task.predictions(every, rows.candidates)
        if self._trainer is not None:
            confidence = _of_unknown(self.label_task.confidence(predictions), unknown)
            mean = confidence.mean() if len(confidence) else 0.0
            self._record_mean("train/confidence", mean, max(float(len(confidence)), 1e-9))
        target, weight = self.selection(predictions, self.label_task.predictions(others), rows.index)
        return target.to(logits), weight.to(logits)

    def _dense_losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of dense outputs. Positions of samples without any label have pseudo-labels."""
        assert self.class_dim is not None
        mask, count = batch.position_mask, len(batch)
        check_strong_view(batch)
        labeled = labeled_samples(batch, self.task, self.class_dim, self.causal)
        predicted = self._predict(batch, ~labeled)
        logits, strong = self._forward(batch, ~labeled, labeled)
        predicted = logits if predicted is None else predicted
        # no copies of images: x only has as many rows
        rest = replace(batch, x=labeled, mask=mask, x_strong=None, teacher_inputs=None, teacher=None)
        labeled_batch, labeled_logits = self.to_rows(
            rest.select(labeled), logits[labeled] if len(logits) == count else logits
        )
        rows, strong = self.to_rows(rest.select(~labeled), strong)
        own, others = _split(predicted, ~labeled)
        own = self.to_rows(rest.select(~labeled), own)[1]
        others = self.to_rows(rest.select(labeled), others)[1] if self.selection.needs_labeled else own[:0]
        target, weight = self._select(rows, own, others, strong)
        self._record_coverage(weight, target, labeled_batch.y)
        means = batch.dense_means
        mean = self._mean_over_processes(len(rows), logits) if means is None else means[1] - means[0]
        every = len(labeled_batch) + len(rows)
        self._rows = self._mean_over_processes(every, logits) if means is None else means[1]
        return self._terms(self.hard_term(labeled_logits, labeled_batch), strong, target, weight, mean)

    def _record_coverage(self, weight: Tensor, target: Tensor, labels: Tensor | None) -> None:
        if self._trainer is not None:
            unlabeled = len(weight)
            share = weight.float().mean() if unlabeled else 0.0
            self._record_mean("train/coverage", share, max(float(unlabeled), 1e-9))  # the same type on all processes
            self._counts.add(weight, *((target, labels) if self.task == "multiclass" else (None, None)))

    # The run.

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Fills the cache of a teacher that makes online pseudo-labels, starts an average."""
        super().on_fit_start()
        if self.ema is not None:
            start_average(self.ema, self.student)
        if self.teacher is not None and self.pseudo_labels == "online":
            fill_caches(self.teacher, self.trainer)

    def configure_model(self) -> None:
        """Runs after setup, and before weight averaging copies the module. In a fit, sets up the selection."""
        super().configure_model()
        if self.is_fitting:
            self.set_up_selection(self._data())
            # all processes have the same state; torch's DDP reads this
            self._ddp_params_and_buffers_to_ignore = [f"selection.{name}" for name, _ in self.selection.named_buffers()]

    def set_up_selection(self, data: Any) -> None:
        """Runs at the start of a fit. Resets the state of the selection, for the samples of a datamodule."""
        outputs = self.label_task.num_outputs or self.num_classes
        set_up(self.selection, data, outputs, dense=self.class_dim is not None)

    def on_train_start(self) -> None:
        """Runs before the first epoch. Checks that there are unlabeled samples, and a source of pseudo-labels."""
        super().on_train_start()
        data: Any = self._data()
        samples = unlabeled_samples(data, dense=self.class_dim is not None)
        if samples is not None and not samples:
            raise InputError(
                "PseudoLabelModule: there are no unlabeled samples; set labeled to a part of the labels, or unlabeled "
                "to rest, source or test; or train a SupervisedModule"
            )
        if self.class_dim is not None:
            check_strong_transform(data)
        # PseudoLabelRefresh checks this itself, since a teacher may know classes without a label
        one_label = self.pseudo_labels == "online" and self.class_dim is None and self.teacher is None
        self._unchecked_labels = data.visible_labels() if one_label and hasattr(data, "visible_labels") else None
        if self.pseudo_labels == "refreshed":
            check_refresh(getattr(self.trainer, "callbacks", ()), self.ema, self.teacher)

    def on_train_epoch_start(self) -> None:
        """Runs at the start of each training epoch. Resets the counts."""
        self._counts.reset()

    def on_train_epoch_end(self) -> None:
        """Runs at the end of each training epoch. Warns of no unlabeled sample, none accepted, or one class alone."""
        super().on_train_epoch_end()
        selects = self.pseudo_labels == "online" and self.unsupervised_weight > 0
        ends = self.trainer.max_epochs == 1 or self.trainer.max_steps == self.global_step
        early = self.current_epoch == 0 and not ends
        compute_metrics_together(self)
        self._counts.warn(self.device, one_line(self.selection) if selects else None, early)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Runs for each optimiser step. Steps, and updates the average before a checkpoint can be written."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update_parameters(self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the epoch's counts of pseudo-labels."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pseudo_labels_by_class"] = [part.cpu() for part in self._counts.of_all_processes(self.device)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Restores the counts, and the sizes of the selection."""
        self.selection.take_sizes(checkpoint["state_dict"], "selection.")
        super().on_load_checkpoint(checkpoint)
        if "pseudo_labels_by_class" in checkpoint:
            self._counts.restore(checkpoint["pseudo_labels_by_class"], first=self.global_rank == 0)

    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)


def _split(predicted: Tensor, unlabeled: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of the unlabeled rows and of the others; those of unlabeled rows alone have no others."""
    if len(predicted) != len(unlabeled):
        return predicted, predicted[:0]
    return predicted[unlabeled], predicted[~unlabeled]


def _of_unknown(values: Tensor, unknown: Tensor | None) -> Tensor:
    """Return the values (M,) of the pseudo-labels, of one for each row (U,) or for each label of it (U, K)."""
    return values if values.ndim == 1 or unknown is None else values[unknown.expand_as(values)]


def _check_unsupervised_weight(weight: float) -> None:
    if not weight >= 0.0:
        raise InputError(f"unsupervised_weight must be at least 0, got {weight}")
