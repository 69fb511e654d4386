"""Training on few labels, and on pseudo-labels for the other samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import join_rows, take_rows
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.modules._shared.averaged_student import average_of
from kd_lightning.modules._shared.checks import check_choice
from kd_lightning.modules._shared.dense import labeled_samples
from kd_lightning.modules._shared.dense_checks import check_strong_transform, check_strong_view
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.taught_module import TaughtModule
from kd_lightning.pseudo_labels.selection import FixedThreshold, Selection
from kd_lightning.pseudo_labels.selection.base import one_line
from kd_lightning.pseudo_labels.selection.set_up import set_up
from kd_lightning.pseudo_labels.table import check_classes
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
      and ``Sharpen(FixedThreshold(0), 1)``.

    The unsupervised term is the cross-entropy with the targets, times their weights, summed over the unlabeled samples
    and divided by the number of *all* of them, so that few accepted ones weigh little. Samples with a coarse label are
    in both terms; their pseudo-label is one of the classes of the coarse label. Labeled and unlabeled samples go
    through the student in one forward pass, and so share their batch statistics.

    It takes all inputs, outputs (B, C) or dense, and the multiclass task. With ``class_dim`` each position of a sample
    without any label has a pseudo-label of its own (online, with a selection that needs no index), and the divisor
    counts these positions, without masked ones. The strong view must then have the positions of the weak one: it may
    change colours, but not crop, flip or shorten on its own.

    Logs what :class:`SupervisedModule` does; ``train/unsupervised`` and ``unsupervised_weight``; ``train/coverage``,
    the mean weight of the unlabeled samples, which is the accepted share if weights are 0 or 1; for online
    pseudo-labels ``train/confidence``, the mean probability of their class; and ``train/regularizer`` and
    ``regularizer_weight``, if the selection has such a term.

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
            smaller. ``PseudoLabelRefresh(source="ema")`` uses the average, too. It is not deployed. Default: None,
            which means that they come from the student itself.
        **kwargs: The arguments of :class:`SupervisedModule`. The task must be ``"multiclass"``. The hard loss is that
            of the labeled rows alone.

    Raises:
        InputError: If a value is out of range; if refreshed pseudo-labels have a selection here (it is the callback's);
            if online ones have a teacher and an average; if the task is another one; if there are no unlabeled samples,
            or a class has no labeled one (unless a teacher labels); if the selection needs what is not there, such as
            an index; if pseudo-labels are refreshed with ``class_dim``; if the strong view has other positions; if a
            run is resumed with another teacher.
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
        if self.task != "multiclass":
            raise InputError(f"task must be multiclass, since a pseudo-label is one class, got {self.task!r}")
        check_choice("pseudo_labels", pseudo_labels, ("online", "refreshed"))
        _check_unsupervised_weight(unsupervised_weight)
        if pseudo_labels == "refreshed" and selection is not None:
            raise InputError("selection is for online pseudo-labels; for refreshed ones set it in PseudoLabelRefresh")
        if self.class_dim is not None and (pseudo_labels == "refreshed" or (selection and selection.needs_index)):
            option = "pseudo_labels: refreshed" if pseudo_labels == "refreshed" else type(selection).__name__
            raise InputError(f"{option} is for one pseudo-label a sample, got class_dim: {self.class_dim}")
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise InputError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        if pseudo_labels == "online" and teacher is not None and ema_decay is not None:
            raise InputError("online pseudo-labels come from one network, got a teacher and ema_decay; leave out one")
        self.save_hyperparameters(*self.saved_arguments)
        self.unsupervised_weight = unsupervised_weight
        self.pseudo_labels = pseudo_labels
        self.selection = FixedThreshold(0.0) if selection is None else selection
        self.teacher = self.make_teacher(teacher)
        self.ema = None if ema_decay is None else average_of(student, ema_decay)
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
        predicted = self._predict(batch, unlabeled)
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
            predicted = logits if predicted is None else predicted
            target, weight = self._select(unlabeled_batch, *_split(predicted, unlabeled), unlabeled_logits)
        else:
            target, weight = _refreshed_target(unlabeled_batch, unlabeled_logits)
        assert self._mean_labels is not None  # set by hard_term
        mean_fine = float(self._mean_labels) - mean_coarse
        mean_unlabeled = (len(batch) if batch.mean_rows is None else batch.mean_rows) - mean_fine
        return self._terms(hard, unlabeled_logits, target, weight, mean_unlabeled)

    def _terms(self, hard: Tensor, logits: Tensor, target: Tensor, weight: Tensor, mean: float) -> dict[str, LossTerm]:
        """Return the terms.

        Args:
            hard: The hard term.
            logits: Logits of the unlabeled rows, (U, C).
            target: Their pseudo-labels, (U, C).
            weight: Weights of these, (U,).
            mean: Mean number of unlabeled rows over the batches of the optimiser step.
        """
        log_p = logits.log_softmax(dim=-1)
        value = (-(target * log_p).sum(dim=-1) * weight).sum() / max(mean, 1e-9)
        self._record_coverage(weight)
        terms = {"hard": LossTerm(1.0, hard), "unsupervised": LossTerm(self.unsupervised_weight, value)}
        if self.pseudo_labels == "online":
            regularizer = self.selection.regularizer(log_p.exp(), weight)
            if regularizer is not None:
                terms["regularizer"] = LossTerm(*regularizer)
        return terms

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
    def _select(self, rows: Batch, predicted: Tensor, labeled: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets (U, C) and weights (U,) of the unlabeled rows, in the type of their logits.

        Args:
            rows: The unlabeled rows.
            predicted: Logits of the network that makes the pseudo-labels, for these rows, (U, C).
            labeled: Its logits of the labeled rows, (L, C).
            logits: Logits of the student, for the unlabeled rows, (U, C).
        """
        check_outputs(logits, predicted)
        if rows.partner is not None and self.selection.needs_index:
            name = type(self.selection).__name__
            raise InputError(f"{name} stores values of single samples; mixed rows (mix) are of two samples")
        probabilities = mask_candidates(predicted.detach().float(), rows.candidates).softmax(dim=-1)
        if self._trainer is not None:
            confidence = probabilities.amax(dim=-1).mean() if len(rows) else 0.0
            self._record_mean("train/confidence", confidence, max(float(len(rows)), 1e-9))
        target, weight = self.selection(probabilities, labeled.detach().float().softmax(dim=-1), rows.index)
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
        means = batch.dense_means
        mean = self._mean_over_processes(len(rows), logits) if means is None else means[1] - means[0]
        every = len(labeled_batch) + len(rows)
        self._rows = self._mean_over_processes(every, logits) if means is None else means[1]
        return self._terms(self.hard_term(labeled_logits, labeled_batch), strong, target, weight, mean)

    def _record_coverage(self, weight: Tensor) -> None:
        if self._trainer is not None:
            unlabeled = len(weight)
            share = weight.float().mean() if unlabeled else 0.0
            # always a float: the weights of all processes must have one type
            self._record_mean("train/coverage", share, max(float(unlabeled), 1e-9))
            self._unlabeled_count = self._unlabeled_count + unlabeled
            self._accepted_count = self._accepted_count.to(weight.device) + weight.sum()

    # The run.

    def on_fit_start(self) -> None:
        """Runs at the start of fit. Fills the cache of a teacher that makes online pseudo-labels."""
        super().on_fit_start()
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
        set_up(self.selection, data, self.num_classes, dense=self.class_dim is not None)

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
        one_label = self.pseudo_labels == "online" and self.class_dim is None and self.teacher is None
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
                f"no pseudo-label of this epoch was accepted ({one_line(self.selection)}), so the student trained on "
                "the labels alone; lower the threshold, or train longer on the labels first"
            )

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
        counts = (self._unlabeled_count, self._accepted_count)
        checkpoint["pseudo_label_counts"] = [count.cpu() for count in counts]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint's weights are loaded. Restores the counts, and the sizes of the selection."""
        self.selection.take_sizes(checkpoint["state_dict"], "selection.")
        super().on_load_checkpoint(checkpoint)
        if "pseudo_label_counts" in checkpoint:
            self._unlabeled_count, self._accepted_count = checkpoint["pseudo_label_counts"]

    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)


def _split(predicted: Tensor, unlabeled: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of the unlabeled rows and of the others; those of unlabeled rows alone have no others."""
    if len(predicted) != len(unlabeled):
        return predicted, predicted[:0]
    return predicted[unlabeled], predicted[~unlabeled]


def _refreshed_target(unlabeled: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the refreshed pseudo-labels as probabilities (U, C), and their weights, (U,)."""
    if unlabeled.kind is None or unlabeled.y is None:  # before the first refresh
        return torch.zeros_like(logits), logits.new_zeros(len(logits))
    accepted = unlabeled.kind == LabelKind.PSEUDO
    weight = accepted.to(logits)
    if unlabeled.weight is not None:
        weight = weight * unlabeled.weight.to(logits)
    if unlabeled.soft is not None:
        return unlabeled.soft.to(logits), weight
    if unlabeled.y.ndim == 2:  # mixed pseudo-labels
        return torch.where(accepted[:, None], unlabeled.y, 0).to(logits), weight
    label = torch.where(accepted, unlabeled.y, 0)
    return F.one_hot(label, logits.shape[-1]).to(logits), weight


def _check_unsupervised_weight(weight: float) -> None:
    if not weight >= 0.0:
        raise InputError(f"unsupervised_weight must be at least 0, got {weight}")
