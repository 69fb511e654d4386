"""The base of all modules: training on hard targets alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Adam
from torchmetrics import Metric

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import describe_choice, logits_of
from kd_lightning.inputs import Inputs
from kd_lightning.losses.base import Task, check_weight
from kd_lightning.losses.protocols import check_row_fields, reset_state
from kd_lightning.modules._shared.auxiliary_heads import AuxiliaryHeads
from kd_lightning.modules._shared.checks import check_choice, check_number_of_outputs
from kd_lightning.modules._shared.class_weights import ClassWeights, Weights
from kd_lightning.modules._shared.dense import check_dense, dense_probabilities
from kd_lightning.modules._shared.dense_checks import DenseChecks
from kd_lightning.modules._shared.evaluation import Evaluation
from kd_lightning.modules._shared.evaluations import Evaluations
from kd_lightning.modules._shared.hard_loss import default_loss
from kd_lightning.modules._shared.loss_terms import LossTerm, SampleTerm
from kd_lightning.modules._shared.loss_weights import check_loss_weights
from kd_lightning.modules._shared.network_errors import explain_shapes
from kd_lightning.modules._shared.regression_evaluation import RegressionEvaluation
from kd_lightning.modules._shared.row_module import RowModule
from kd_lightning.teachers.teacher import check_outputs


class SupervisedModule(RowModule):
    """Train a student on hard targets: the baseline, the training of teachers, and the base of every method.

    A method adds its constructor and :meth:`losses`, and passes the arguments below on as ``**kwargs``. A batch is what
    :meth:`~kd_lightning.Batch.from_any` takes: a ``Batch``, ``x``, ``(x, y, ...)``, or a mapping with labels. A project
    with other batches overrides :meth:`unpack`, one with networks that are called in another way :meth:`call`.

    Outputs of the student may be logits, ``(logits, features)``, ``(loss, logits)``, a mapping with ``logits`` or
    ``out``, or an object with ``logits``. Auxiliary heads (of Inception, GoogLeNet, or ``aux`` of a mapping) train on
    the hard loss.

    It takes all inputs (a tensor, or a mapping or tuple of tensors), outputs (B, C), (B,) or dense, and all four tasks.

    Logs ``train/loss`` and each term as ``train/<name>``, as means over the epoch. Validation and test log ``loss``
    (hard), ``accuracy``, ``balanced_accuracy`` (the mean recall; not for the multilabel task), ``f1`` (macro),
    ``recall_<class>`` (of up to 20 classes, and of one that a callback or scheduler monitors; of the binary task's both
    classes), ``calibration_error`` and, with a teacher, ``teacher_accuracy``, ``agreement`` and ``teacher_kl`` (KL at
    temperature 1, in nats).

    Args:
        student: Network that gives logits: (B, C) for multiclass and multilabel, (B,) or (B, 1) for binary; for
            regression values (B, D) or (B,). Dense outputs, such as (B, C, H, W) or (B, T, C), need ``class_dim``.
        task: ``"multiclass"`` (y holds class indices, or as floats probabilities (B, C)), ``"multilabel"`` (zeros and
            ones, (B, L)), ``"binary"`` or ``"regression"`` (y has the outputs' shape). A missing label is -100, or NaN
            if y is floating point.
        class_dim: The dimension of dense outputs that holds classes: 1 for maps (B, C, H, W), -1 for tokens (B, T, C).
            Each position is a row of losses and metrics then. It counts unless ``Batch.mask`` (or ``attention_mask``
            among the inputs) leaves it out. In a sample that has some labels, positions without a label (void) do not
            count; a sample without any label is unlabeled, and all of its positions count in the soft term. Default:
            None, which means one row for each sample.
        causal: Whether the output of token t is compared with the label of token t + 1, as in a language model whose
            labels are its inputs. It needs ``class_dim: -1``.
        hard_loss: Loss with reduction "mean" or "none", called as ``(logits, target)`` with the labeled rows. It always
            gets whole rows. If labels of a multilabel row are missing, it is called with reduction "none", and must
            return one value for each label (B, L); those of missing labels are left out of the mean. It may declare
            ``row_fields`` to get ``kind`` or ``index`` of each row, see :mod:`kd_lightning.losses.protocols`. Coarse
            labels always use :class:`~kd_lightning.losses.CoarseLoss`, and count as much as others. The sum of
            CrossEntropyLoss with class weights is divided by the sum of its labels' weights, as in torch, over all
            processes; with ``class_dim`` and our loader over all accumulated batches, too, else for each of them. A
            project's own loss also takes labels of other shapes than the task's. Default: None, which means
            cross-entropy (on logits, for multilabel and binary), or ``MSELoss`` for regression.
        class_weights: Weight of each class in the hard loss of training, for ``CrossEntropyLoss`` (its ``weight``) or
            ``BCEWithLogitsLoss`` (its ``pos_weight``, one for each label); or ``"balanced"``, which means inversely
            proportional to the numbers of labels that training may see: n / (k n_c) as in scikit-learn, and zeros for
            each one in the binary and multilabel tasks. ``val/loss`` and ``test/loss`` have no class weights, so that
            runs compare. Default: None, which means none.
        optimizer: Called with the parameters that require a gradient.
        lr_scheduler: Called with the optimiser. ReduceLROnPlateau follows its ``monitor``, or ``val/loss`` if it has
            none. Default: None, which means a constant learning rate. CosineAnnealingLR without ``T_max``, OneCycleLR
            without ``total_steps``, and the last part of a :class:`~kd_lightning.schedules.SequentialSchedule` take
            the length of the run, in the unit of ``lr_interval``.
        lr_interval: When the scheduler steps: each ``"epoch"`` or each optimiser ``"step"``.
        num_classes: Number of outputs that the student must have. Default: None, which means the number of the
            datamodule's classes, where it is known (``class_names``).
        auxiliary_weight: Weight of the hard loss of each auxiliary head, at least 0 (Szegedy et al. 2015, section 5,
            https://arxiv.org/abs/1409.4842, take 0.3). Logged as ``train/auxiliary_hard``.
        weight_decay_exclude_1d: Whether biases and other parameters of at most 1 dimension, as of norms, have no weight
            decay, as timm's ``param_groups_weight_decay`` does; nor those that a network's ``no_weight_decay()`` names.
            The optimiser then has the groups ``decay`` and ``no_decay``.

    Raises:
        InputError: If the task or the interval is unknown. In a fit, if the student has another number of outputs or
            nothing to train, if a label is no class, if ``hard_loss`` has another number of weights than there are
            outputs, if OneCycleLR ends before training does, or if the length of the run is needed and not known.
    """

    trains_auxiliary_heads: ClassVar[bool] = True
    """Whether auxiliary heads can learn from the hard loss of the whole batch."""

    def __init__(
        self,
        student: nn.Module,
        *,
        task: Task = "multiclass",
        class_dim: int | None = None,
        causal: bool = False,
        hard_loss: nn.Module | None = None,
        class_weights: Weights | None = None,
        optimizer: OptimizerCallable = Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        num_classes: int | None = None,
        auxiliary_weight: float = 0.3,
        weight_decay_exclude_1d: bool = False,
    ) -> None:
        super().__init__(
            student,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            weight_decay_exclude_1d=weight_decay_exclude_1d,
        )
        check_choice("task", task, get_args(Task))
        self.save_hyperparameters("task", "lr_interval", "class_dim", "causal")
        self.task: Task = task
        self.class_dim = class_dim
        self.causal = causal
        self.hard_loss = default_loss(task) if hard_loss is None else hard_loss
        if getattr(self.hard_loss, "reduction", "mean") not in ("mean", "none"):
            raise InputError(f"hard_loss: its reduction must be mean or none, got {self.hard_loss.reduction!r}")
        check_row_fields("hard_loss", self.hard_loss)
        dense = class_dim is not None
        self._class_weights = (
            None if class_weights is None else ClassWeights(class_weights, self.hard_loss, task, dense)
        )
        check_dense(class_dim, causal, task, self.hard_loss)
        if num_classes is not None and num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        check_weight("auxiliary_weight", auxiliary_weight)
        self.auxiliary_weight = auxiliary_weight
        self._auxiliary_heads = AuxiliaryHeads()
        self._outputs_are_checked = True  # until a fit begins
        self._dense_checks = DenseChecks()
        self._evaluations = Evaluations()

    def forward(self, x: Inputs) -> Tensor:
        """Return the student's logits."""
        try:
            output = self.guarded_call("student", self.student, x)
            logits = logits_of(output, "the student")
            if not isinstance(output, Tensor) and torch.is_grad_enabled():
                self._auxiliary_heads.record(x, output)
        except RuntimeError as error:
            explain_shapes(error, x)
            raise
        if not self._outputs_are_checked and self.is_fitting:
            names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
            outputs = logits if self.class_dim is None else logits.movedim(self.class_dim, -1)
            check_number_of_outputs(outputs, self.task, self.num_classes, names)
            check_loss_weights(self.training_loss, outputs, self.task, self._class_weights is not None)
            if text := describe_choice(output):
                rank_zero_info(f"student: it returns {text}")
            self._outputs_are_checked = True
        return logits

    def setup(self, stage: str) -> None:
        """Runs at the start of fit, validate, test and predict. Resets what an earlier run stored."""
        super().setup(stage)
        self._evaluations.clear()
        self._outputs_are_checked = stage != TrainerFn.FITTING
        self._dense_checks = DenseChecks()
        if stage == TrainerFn.FITTING:
            reset_state(self.hard_loss)
            self.balance_classes(getattr(self.trainer, "datamodule", None))

    # What a method overrides.

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of the objective, by name."""
        rows, logits = self.to_rows(batch, self(batch.x))
        return {"hard": LossTerm(1.0, self.hard_term(logits, rows))}

    def teacher_logits(self, batch: Batch) -> Tensor | None:
        """Return the logits that validation and test compare the student with. Default: None, for no teacher."""
        return None

    def configure_metrics(self) -> Mapping[str, Metric] | None:
        """Return new metrics, by name, in place of ours. Default: None, for ours.

        They are logged as ``val/<name>`` and ``test/<name>``, beside the hard loss, and updated with the probabilities
        (or values) and the labels of the rows that have a label. Where labels do not fit the task, as a project's own
        ``hard_loss`` may take them, the metrics get outputs and labels as they are.
        """
        return None

    def make_evaluation(self, classes: int) -> Any:
        """Make our metrics of one pass over one data loader."""
        if self.task == "regression":
            return RegressionEvaluation(classes, self.device)
        return Evaluation(self.task, classes, self.class_dim is not None)

    # The steps.

    def step_terms(self, batch: Batch) -> dict[str, LossTerm]:
        """Return the terms of a training step, by name, with that of the auxiliary heads."""
        self._mean_labels, self._rows = batch.mean_labels, len(batch)
        if self.class_dim is not None:
            self._dense_checks.check(self, batch)
        self._auxiliary_heads.clear()
        terms = self.losses(batch)
        if (value := self._auxiliary_heads.hard_term(self, batch)) is not None:
            terms["auxiliary_hard"] = LossTerm(self.auxiliary_weight, value)
        return terms

    def record_terms(self, terms: dict[str, LossTerm], loss: Tensor, batch: Batch) -> None:
        """Add the terms and their weighted sum to the means over the epoch: hard terms are means over labels."""
        rows, mean = max(self._rows, 1e-9), self._mean_labels
        labels = rows if mean is None else max(float(mean), 1e-9)  # a batch without any counts next to nothing
        add = self._epoch_means.add
        for name, term in terms.items():
            weight, value = term
            count = len(batch) if isinstance(term, SampleTerm) else rows
            add(f"train/{name}", value, labels if name.endswith("hard") else count)
            if name != "hard":
                add(f"{name}_weight", weight, rows)
        of_labels = self.class_dim is not None and all(name.endswith("hard") for name in terms)
        add("train/loss", loss, labels if of_labels else rows)  # processes may have other numbers of positions

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each validation batch. Updates the metrics, and returns the predicted labels."""
        return self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each test batch. Updates the metrics, and returns the predicted labels."""
        return self._evaluate("test", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Runs for each batch of predict. Returns probabilities (B, C), or (B,) for the binary task.

        Those of dense outputs have the outputs' shape, without the classes for the binary task. Values of the
        regression task stay as they are.
        """
        return dense_probabilities(self(self.unpack(batch).x), self.task, self.class_dim)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        batch = self.unpack(batch)
        if not (names := self.evaluated_features()):
            return self._evaluations.evaluate(self, stage, batch, batch_idx, dataloader_idx)
        with self.capture_features(batch, names) as captured:
            predicted = self._evaluations.evaluate(self, stage, batch, batch_idx, dataloader_idx)
        self.features.record(captured, batch, names)
        return predicted

    def _is_comparable(self, logits: Tensor, teacher: Tensor | None) -> bool:
        """Whether metrics can compare student and teacher. If not, a soft loss of the project's own does."""
        return True

    def _evaluation_rows(self, batch: Batch, logits: Tensor, teacher: Tensor | None) -> tuple[Any, ...]:
        """Return a batch, the student's logits and, if there is one, the teacher's, as :meth:`to_rows` does."""
        if teacher is None:
            return self.to_rows(batch, logits)
        if self.class_dim is not None:
            check_outputs(logits, teacher)
        return self.to_rows(batch, logits, teacher)

    def _cached_teacher_logits(self, key: tuple[str, int, int], batch: Batch) -> Tensor | None:
        """Return the teacher's logits, computed once where that is possible."""
        return self._evaluations.teacher_logits(key, batch, self.teacher_logits)

    def on_validation_epoch_end(self) -> None:
        """Runs at the end of each validation. Logs its metrics."""
        self._evaluations.log(self, "val")
        self.log_feature_means()

    def on_test_epoch_end(self) -> None:
        """Runs at the end of the test. Logs its metrics and figures."""
        data = getattr(self.trainer, "datamodule", None)
        prefix = "transductive/test" if getattr(data, "transductive", False) else "test"
        names = getattr(data, "class_names", None)
        self._evaluations.log_figures(self, prefix, lambda evaluation: evaluation.figures(names))
        self._evaluations.log(self, prefix)
