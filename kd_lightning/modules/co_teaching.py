"""Co-teaching: two students that select each other's samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from kd_lightning.batch import IGNORE_INDEX, Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import auxiliary_logits_of, logits_of
from kd_lightning.losses.base import at_least_float32, check_reducible, class_weights, per_row
from kd_lightning.losses.coarse import coarse_rows
from kd_lightning.losses.protocols import is_stateful, row_values
from kd_lightning.modules._shared.checks import check_trainable, check_two_networks
from kd_lightning.modules._shared.loss_terms import LossTerm
from kd_lightning.modules._shared.loss_weights import without_class_weights
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.ranks import compute_metrics_together


class CoTeachingModule(SupervisedModule):
    """Train on noisy labels: each of two students learns the rows that the other finds easy (Han et al. 2018).

    A network first finds a wrong label hard. So each student sorts the labeled rows of a batch by its own loss, and the
    other student learns those with the smallest loss: all but a share R, which grows linearly from 0 to ``forget_rate``
    over ``ramp_epochs``. There are two students, since one alone would select the errors that it has already learned.

    Rows of kind "clean" and rows with coarse labels are always learned. If batches have no kind, all labeled rows are
    sorted. (The datamodule's ``noisy: true`` marks the labels of a source as noisy; beside a label file they would be
    clean.) Weights, also those of classes, multiply the loss, and do not change the order. Several processes sort their
    rows together.

    The ``student`` is evaluated and deployed. The ``peer`` is in checkpoints, for a resume. Auxiliary heads of neither
    learn.

    It takes all inputs, outputs (B, C) and the multiclass task.

    Logs what :class:`SupervisedModule` does, ``train/peer_hard``, and ``forget_rate`` (R).

    Args:
        student: Network that gives logits (B, C), see :class:`SupervisedModule`.
        peer: Another network of these classes, with other weights.
        forget_rate: The last value of R, in [0, 1): the share of wrong labels, if it is known.
        ramp_epochs: Number of epochs until R is ``forget_rate``, at least 1.
        **kwargs: The arguments of :class:`SupervisedModule`. The task must be ``"multiclass"``. The hard loss must have
            a ``reduction``, and must not be stateful. The optimiser trains both networks.

    Raises:
        InputError: If a value is out of range; if the task is another one; if the hard loss has no ``reduction`` or is
            stateful; if the peer is the student, or has its weights.
    """

    trains_auxiliary_heads: ClassVar[bool] = False  # they would learn all rows

    def __init__(
        self,
        student: nn.Module,
        peer: nn.Module,
        forget_rate: float,
        *,
        ramp_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, **kwargs)
        if self.task != "multiclass":
            raise InputError(f"task must be multiclass, got {self.task!r}")
        if self.class_dim is not None:
            raise InputError(f"class_dim must be left out: samples are selected, not positions; got {self.class_dim}")
        if not 0.0 <= forget_rate < 1.0:
            raise InputError(f"forget_rate must lie in [0, 1), got {forget_rate}")
        if ramp_epochs < 1:
            raise InputError(f"ramp_epochs must be at least 1, got {ramp_epochs}")
        check_reducible("hard_loss", self.hard_loss)
        if is_stateful(self.hard_loss):
            raise InputError(
                f"hard_loss: {type(self.hard_loss).__name__} stores values of samples, for one network only"
            )
        self.save_hyperparameters("forget_rate", "ramp_epochs")
        self.peer = peer
        self._order_loss = (without_class_weights(self.hard_loss),)  # no submodule
        self.forget_rate = forget_rate
        self._sorted_rows: Tensor | int = 0  # since the fit began
        self._warned_of_heads = False
        self.ramp_epochs = ramp_epochs

    def forget_rate_at(self, epoch: int) -> float:
        """Return R, the share of the noisy rows that is left out in an epoch.

        >>> module = CoTeachingModule(nn.Linear(2, 2), nn.Linear(2, 2), 0.4, ramp_epochs=4)
        >>> [round(module.forget_rate_at(epoch), 2) for epoch in (0, 1, 4, 9)]
        [0.0, 0.1, 0.4, 0.4]
        """
        return self.forget_rate * min(epoch / self.ramp_epochs, 1.0)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Return each student's hard term, on the rows that the other has selected."""
        logits, output = self(batch.x), self.guarded_call("peer", self.peer, batch.x)
        self._warn_of_heads(output)
        both = logits, logits_of(output, "the peer")
        if both[0].shape != both[1].shape:
            raise InputError(f"student and peer must have one shape, got {[*both[0].shape]} and {[*both[1].shape]}")
        y = torch.full((len(batch),), IGNORE_INDEX, device=batch.device) if batch.y is None else batch.y
        labels = self.compute_hard_loss(both[0], batch)[1]  # also checks the labels
        if y.shape != (len(batch),):  # probabilities
            raise InputError(f"labels must be one class a sample, (B,) = [{len(batch)}], got {[*y.shape]}")
        mean = batch.mean_labels
        self._mean_labels = mean = self._mean_over_processes(labels, both[0]) if mean is None else mean
        known = is_labeled(y)
        noisy = known if batch.kind is None else known & (batch.kind != LabelKind.CLEAN)
        self._sorted_rows = self._sorted_rows + noisy.sum()
        coarse = batch.candidates.any(dim=1) if batch.candidates is not None else torch.zeros_like(known)
        loss, order_loss = self.training_loss, self._order_loss[0].to(both[0].device)
        rows = [self._row_losses(loss, logits, y, batch, known, coarse) for logits in both]
        order = rows
        if order_loss is not loss:  # that of a rare class is large because of its weight
            order = [self._row_losses(order_loss, logits.detach(), y, batch, known, coarse) for logits in both]
        sizes = self._sizes(y, known)
        selected = [self._smallest(values.detach(), noisy) | (known & ~noisy) | coarse for values in order]
        terms = {}
        for name, values, learned in (("hard", rows[0], selected[1]), ("peer_hard", rows[1], selected[0])):
            counted = learned.sum() if sizes is None else (sizes * learned).sum()
            count, total = self._sum_over_processes(torch.stack([counted, (known | coarse).sum().to(counted)]))
            size = float(mean) * count / max(total, 1.0)
            values = values if batch.weight is None else values * batch.weight
            terms[name] = LossTerm(1.0, (values * learned).sum() / max(size, 1e-9))
        if self._trainer is not None:
            self._record_mean("forget_rate", self.forget_rate_at(self.current_epoch), len(batch))
        return terms

    def _warn_of_heads(self, output: Any) -> None:
        """Warn once if the peer has auxiliary heads. Those of the student are reported where its terms are summed."""
        if self._warned_of_heads or isinstance(output, Tensor) or not self.auxiliary_weight:
            return
        if heads := auxiliary_logits_of(output):
            rank_zero_warn(
                f"the peer's {len(heads)} auxiliary heads do not learn in CoTeachingModule; build it without them "
                "(aux_logits=False), or set auxiliary_weight: 0"
            )
            self._warned_of_heads = True

    def _sizes(self, y: Tensor, known: Tensor) -> Tensor | None:
        """Return the class weight of each row's label, (B,), and 1 for other rows; None if there are none."""
        weights = class_weights(self.training_loss, y[known].long())
        return None if weights is None else torch.ones(len(y)).to(weights).masked_scatter(known, weights)

    def _row_losses(
        self, loss: nn.Module, logits: Tensor, y: Tensor, batch: Batch, known: Tensor, coarse: Tensor
    ) -> Tensor:
        """Return the loss of each row without ``batch.weight``, (B,). It is 0, in the graph, without a label."""
        logits = at_least_float32(logits)
        fields = {name: values[known] for name, values in row_values(loss, batch).items()}
        rows = logits.new_zeros(len(logits)) + logits[:0].sum()
        rows = rows.masked_scatter(known, per_row(loss, logits[known], y[known].long(), **fields).to(rows))
        if batch.candidates is not None:
            rows = rows.masked_scatter(coarse, coarse_rows(logits[coarse], batch.candidates[coarse]).to(rows))
        return rows

    def _smallest(self, values: Tensor, noisy: Tensor) -> Tensor:
        """Return which noisy rows have the smallest loss, all but the share R over all processes: booleans (B,)."""
        values = torch.where(noisy, values, torch.inf)
        gathered, before = [values], 0
        if self._is_distributed():
            gathered = gather_all_tensors(values)
            before = sum(map(len, gathered[: self.trainer.global_rank]))
        every = torch.cat(gathered)
        count = int(every.isfinite().sum())
        rank = every.argsort(stable=True).argsort(stable=True)[before : before + len(values)]
        return noisy & (rank < round((1 - self.forget_rate_at(self.current_epoch)) * count))

    def _sum_over_processes(self, counts: Tensor) -> list[float]:
        """Return the sums of counts (N,) over all processes."""
        if self._is_distributed():
            counts = torch.stack(gather_all_tensors(counts)).sum(dim=0)
        return [float(count) for count in counts.reshape(-1)]

    def on_train_epoch_end(self) -> None:
        """Runs at the end of each training epoch. Warns after the first if no row was noisy."""
        super().on_train_epoch_end()
        if self.current_epoch > 0 or self.forget_rate == 0:
            return
        compute_metrics_together(self)
        if not self._sum_over_processes(torch.as_tensor(self._sorted_rows, device=self.device))[0]:
            rank_zero_warn(
                "forget_rate: no row was left out, since the kind of every label is clean; mark noisy labels by "
                "data.noisy: true (those of the source), or by a column kind in a label file"
            )

    def _is_distributed(self) -> bool:
        return self._trainer is not None and self.trainer.world_size > 1

    def setup(self, stage: str) -> None:
        """Runs at the start of each run. In a fit, checks that the two networks have different weights."""
        super().setup(stage)
        self._sorted_rows = 0
        if stage != TrainerFn.FITTING:
            return
        check_trainable("peer", self.peer)
        check_two_networks("peer", self.peer, self.student)
        mine, other = dict(self.student.named_parameters()), dict(self.peer.named_parameters())
        same = mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        if same:
            raise InputError(
                "peer must have other weights than the student, got the same; initialise it with another seed"
            )
