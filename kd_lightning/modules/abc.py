"""ABC: pseudo-labels under imbalance, by a second classifier that trains on balanced rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture_call, find_layer
from kd_lightning.features.heads import find_head
from kd_lightning.losses.base import at_least_float32, check_weight
from kd_lightning.losses.coarse import mask_candidates
from kd_lightning.modules._shared.label_counts import count_each_class
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.row_draws import uniform_of_rows
from kd_lightning.modules.pseudo_label import PseudoLabelModule
from kd_lightning.pseudo_labels.selection import Selection
from kd_lightning.pseudo_labels.selection.base import check_share


class ABCModule(PseudoLabelModule):
    r"""Train on few, imbalanced labels and on pseudo-labels, with an auxiliary balanced classifier (ABC).

    Two linear classifiers read the same features, and both train them:

    - The **base classifier** has the objective of :class:`PseudoLabelModule`, with online pseudo-labels of its own.
      It is made for the training, in the shape of the student's head, and is not deployed.
    - The **balanced classifier** is the student's own head, so that validation, test, costs and exported files are
      those of the student. It trains on rows that a mask balances.

    The objective is ``hard + unsupervised_weight * unsupervised + balanced_weight * (balanced_hard +
    balanced_unsupervised)``. With N_c labels of class c, the lowest number N_L, the balanced classifier's probabilities
    p for the view that it learns from, q for the weak view without gradient, and the share t of the run that is over:

    .. math:: \text{balanced\_hard} = \frac{1}{B_L} \sum_b M_b (-\log p_{y_b}), \quad
              M_b \sim \text{Bernoulli}(N_L / N_{y_b})

    .. math:: \text{balanced\_unsupervised} = \frac{1}{B_U} \sum_b M_b [\max q_b \ge \tau]
              \sum_c (-q_{bc} \log p_{bc}), \quad
              M_b \sim \text{Bernoulli}\left(1 - t (1 - N_L / N_{\arg\max q_b})\right)

    So the class with the fewest labels is always in; of the others, as many are in as of this one. The pseudo-labels of
    the balanced classifier are soft. The mask of a row depends on the datamodule's seed, the step, and the row's index
    and view, so that a resumed run equals an unbroken one, and several processes equal one. Rows without an index and a
    view draw from torch's generator.

    It needs a label of each class. Inputs are those of :class:`PseudoLabelModule`; outputs are (B, C), out of a linear
    layer. Rows with a coarse label count in both divisors, as they do there, and have a pseudo-label of their classes.
    The balanced classifier's loss is cross-entropy, whatever ``hard_loss`` is. A compiled student runs uncompiled in
    training steps.

    Source: Lee et al., "ABC: Auxiliary Balanced Classifier for Class-Imbalanced Semi-Supervised Learning" (NeurIPS
    2021), https://arxiv.org/abs/2110.10368, with the schedule of the authors' code. They use two strong views, and the
    sum of their terms; here there is one.

    Logs what :class:`PseudoLabelModule` does; ``train/balanced_hard``, ``train/balanced_unsupervised`` and their
    weights; and ``train/balanced_coverage``, the share of the unlabeled rows that the second term accepts.

    Args:
        student: Network whose head is a linear layer that gives the logits, see :class:`SupervisedModule`.
        unsupervised_weight: Weight of the base classifier's unsupervised term, see :class:`PseudoLabelModule`.
        balanced_weight: Weight of both terms of the balanced classifier, finite and at least 0.
        threshold: tau: lowest probability of a pseudo-label of the balanced classifier, in [0, 1].
        selection: Which pseudo-labels of the base classifier count, see :class:`PseudoLabelModule`. Its own default is
            for all; FixMatch's is ``FixedThreshold(0.95)``.
        head: Dotted name of the student's head. Default: None, which means that
            :func:`~kd_lightning.features.heads.find_head` finds it.
        **kwargs: The arguments of :class:`SupervisedModule`.

    Raises:
        InputError: If a value is out of range; if the head is not linear, or does not give the logits; with
            ``class_dim``. In a fit, if a class has no label, if the labels are not known, or if the length of the run
            is not known. For labels that are probabilities.
    """

    saved_arguments: ClassVar[tuple[str, ...]] = ("unsupervised_weight",)

    def __init__(
        self,
        student: nn.Module,
        unsupervised_weight: float = 1.0,
        balanced_weight: float = 1.0,
        threshold: float = 0.95,
        *,
        selection: Selection | None = None,
        head: str | None = None,
        **kwargs: Any,
    ) -> None:
        if "task" in kwargs and kwargs["task"] != "multiclass":  # kwargs.get would hide its type from config files
            raise InputError(f"ABCModule: task must be multiclass, got {kwargs['task']!r}")
        super().__init__(
            student, unsupervised_weight, "online", selection=selection, teacher=None, ema_decay=None, **kwargs
        )
        if self.class_dim is not None:
            raise InputError(f"ABCModule is for one label a sample, got class_dim: {self.class_dim}")
        check_weight("balanced_weight", balanced_weight)
        check_share("threshold", threshold)
        self.save_hyperparameters("balanced_weight", "threshold", "head")
        self.balanced_weight = balanced_weight
        self.threshold = threshold
        self.head = find_head(student, head)
        self.base_classifier = _new_classifier(find_layer(student, self.head), self.head)
        self._ratios: Tensor | None = None  # N_L / N_c
        self._seed = 0  # of the masks
        self._balanced: tuple[Tensor, Tensor] | None = None  # logits of the balanced classifier in this step
        self._mean_unlabeled = 0.0
        self._head_is_checked = False

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of the base classifier, and those of the balanced one."""
        check_weight("balanced_weight", self.balanced_weight)  # a callback may have set it
        if batch.y is not None and batch.y.ndim > 1:
            raise InputError(f"ABCModule takes one class a sample, (B,), got labels {[*batch.y.shape]}")
        fine, terms = self.label_task.given(batch)[:, 0], super().losses(batch)
        assert self._balanced is not None  # both are set by the line before
        assert self._mean_labels is not None
        (all_logits, strong), self._balanced = self._balanced, None  # a module that holds a graph cannot be copied
        weak = all_logits.detach()[~fine]
        ratios = self._class_ratios(all_logits)
        draws = self._draws(batch)
        labels = torch.zeros_like(fine, dtype=torch.long) if batch.y is None else batch.y.long()
        labels = labels.where(fine, 0)
        hard = F.cross_entropy(at_least_float32(all_logits), labels, reduction="none")
        inside = fine & (draws < ratios[labels])
        hard = hard if batch.weight is None else hard * batch.weight
        candidates = None if batch.candidates is None else batch.candidates[~fine]
        q = mask_candidates(at_least_float32(weak), candidates).softmax(dim=1)
        confidence, guess = q.max(dim=1)
        chance = 1 - self._progress() * (1 - ratios[guess])
        accepted = ((confidence >= self.threshold) & (draws[~fine] < chance)).to(q)
        soft = -(q * at_least_float32(strong).log_softmax(dim=1)).sum(dim=1)
        if self._trainer is not None:
            count = float(len(q))
            self._record_mean("train/balanced_coverage", accepted.mean() if len(q) else 0.0, max(count, 1e-9))
        values = {
            "balanced_hard": torch.where(inside, hard, 0.0).sum() / max(float(self._mean_labels), 1e-9),
            "balanced_unsupervised": (accepted * soft).sum() / max(self._mean_unlabeled, 1e-9),
        }
        return terms | {name: LossTerm(self.balanced_weight, value) for name, value in values.items()}

    def _forward(self, batch: Batch, unlabeled: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the base classifier, see :class:`PseudoLabelModule`; store those of the balanced one."""
        with capture_call(self.student, self.head) as calls:
            self._balanced = balanced = super()._forward(batch, unlabeled, labeled)
        if not self._head_is_checked or len(calls) != 1:
            self._check_head(calls, balanced[0].detach())
        logits = self.base_classifier(calls[0][0])
        if batch.x_strong is None:
            return logits, at_least_float32(logits[unlabeled])
        weak, strong = logits.tensor_split([len(balanced[0])])
        return weak, at_least_float32(strong)

    def _terms(self, hard: Tensor, logits: Tensor, target: Tensor, weight: Tensor, mean: float) -> dict[str, LossTerm]:
        self._mean_unlabeled = mean
        return super()._terms(hard, logits, target, weight, mean)

    def _check_head(self, calls: list[tuple[Tensor, Any]], logits: Tensor) -> None:
        """Raise InputError unless the head is called once, and gives the logits, (B, C), of its first rows."""
        if len(calls) != 1:
            raise InputError(f"head: the student must call {self.head!r} once, got {len(calls)} calls")
        outputs = calls[0][1].detach()[: len(logits)]
        if outputs.shape != logits.shape or not torch.equal(outputs.to(logits).nan_to_num(), logits.nan_to_num()):
            raise InputError(f"head: {self.head!r} must give the student's logits (B, C); name another layer")
        self._head_is_checked = len(logits) > 0

    def _class_ratios(self, logits: Tensor) -> Tensor:
        """Return N_L / N_c, (C,), on the device of the logits."""
        if self._ratios is None:
            raise InputError("ABCModule counts the labels at the start of a fit; it trains in a Trainer alone")
        if len(self._ratios) != logits.shape[1]:
            raise InputError(f"ABCModule counted labels of {len(self._ratios)} classes, got {logits.shape[1]} outputs")
        self._ratios = self._ratios.to(logits.device)
        return self._ratios

    def _draws(self, batch: Batch) -> Tensor:
        """Return the number in [0, 1) that decides on each row, (B,). It is another one in each step."""
        return uniform_of_rows(batch, self._seed, 0 if self._trainer is None else self.global_step)

    def _progress(self) -> float:
        """Return the share of the run that is over: of its epochs, or of its steps if these end it first."""
        if self._trainer is None:
            return 0.0
        epochs, steps = self.trainer.max_epochs or -1, self.trainer.max_steps
        shares = [done / last for done, last in ((self.current_epoch, epochs), (self.global_step, steps)) if last > 0]
        return min(max(shares, default=0.0), 1.0)

    # The run.

    def balance_classes(self, data: Any) -> None:
        """Runs at the start of a fit. Counts the labels that training may see.

        Args:
            data: The datamodule.
        """
        super().balance_classes(data)
        counts = count_each_class(data, self.num_classes, "ABCModule")
        self._ratios = (counts.min() / counts).float()
        self._seed = int(getattr(data, "seed", 0))

    def setup(self, stage: str) -> None:
        """Runs at the start of each run."""
        super().setup(stage)
        self._head_is_checked = False

    def on_train_start(self) -> None:
        """Runs before the first epoch. Checks that the length of the run is known, too."""
        super().on_train_start()
        if max(self.trainer.max_epochs or -1, self.trainer.max_steps) <= 0:
            raise InputError("ABCModule needs the length of the run; set trainer.max_epochs or max_steps")


def _new_classifier(head: nn.Module, name: str) -> nn.Linear:
    """Return a new linear layer of the head's shape, in torch's initialisation."""
    if not isinstance(head, nn.Linear):
        raise InputError(f"head: {name or 'the student'} must be a linear layer, got {type(head).__name__}")
    if isinstance(head, LazyModuleMixin) and head.has_uninitialized_params():
        raise InputError(f"head: {name or 'the student'} has no weights yet; run the student once")
    weight = head.weight
    return nn.Linear(head.in_features, head.out_features, head.bias is not None, weight.device, weight.dtype)
