"""Co-teaching: two students that choose each other's samples."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam
from torchmetrics.utilities.distributed import gather_all_tensors

from kd_lightning.batch import Batch, LabelKind, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.losses.base import Task, check_reducible, per_row
from kd_lightning.losses.coarse import coarse_rows
from kd_lightning.losses.label_kind import remembers
from kd_lightning.modules.supervised import LossTerm, SupervisedModule


class CoTeachingModule(SupervisedModule):
    """Learn from labels of which many are wrong: each student learns what the other finds easy (Han et al. 2018).

    A wrong label is at first the one that a network finds hard. So each student sorts the labeled rows of every batch
    by its own loss, and the other one learns those with the smallest: all but a share R, which grows linearly from 0
    to ``forget_rate`` over ``ramp_epochs``. Two, since one alone would choose what it has already got wrong.
    Rows whose kind is clean are always learned, and coarse ones, too; where batches have no kind, all are sorted. (The
    datamodule's ``noisy: true`` says so of a source's own labels; beside a label file they would else be clean.)
    Weights multiply what is learned, and have no say in the sorting.
    Several processes sort their rows together.

    The ``student`` is evaluated and deployed; the ``peer`` is in checkpoints, for a resume.

    Charts what :class:`SupervisedModule` does, ``train/peer_hard``, and ``forget_rate``, R.

    Args:
        student: Gives logits (B, C), see :class:`SupervisedModule`.
        peer: Another network of these classes, with weights of its own.
        forget_rate: The share that is forgotten in the end, in [0, 1): that of wrong labels, if it is known.
        ramp_epochs: Epochs until then, at least 1.
        task: ``"multiclass"`` alone.
        hard_loss: Cross-entropy if None; one with a ``reduction``, and without a memory of samples.
        optimizer: Takes the parameters of both.
        lr_scheduler: See :class:`SupervisedModule`, as for what follows.
        lr_interval: ``"epoch"`` or ``"step"``.

    Raises:
        InputError: For values out of range, another task, a hard loss that cannot tell rows apart, a peer that is the
            student, or has its weights.
    """

    def __init__(
        self,
        student: nn.Module,
        peer: nn.Module,
        forget_rate: float,
        *,
        ramp_epochs: int = 10,
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
            raise InputError(f"task must be multiclass, got {task!r}")
        if not 0.0 <= forget_rate < 1.0:
            raise InputError(f"forget_rate must lie in [0, 1), got {forget_rate}")
        if ramp_epochs < 1:
            raise InputError(f"ramp_epochs must be at least 1, got {ramp_epochs}")
        check_reducible("hard_loss", self.hard_loss)
        if remembers(self.hard_loss):
            raise InputError(f"hard_loss: {type(self.hard_loss).__name__} remembers samples, of one student alone")
        self.save_hyperparameters("forget_rate", "ramp_epochs")
        self.peer = peer
        self.forget_rate = forget_rate
        self._sorted: Tensor | int = 0  # rows, since the fit began
        self.ramp_epochs = ramp_epochs

    def forgotten(self, epoch: int) -> float:
        """R, the share of the noisy rows that is left out in an epoch.

        >>> module = CoTeachingModule(nn.Linear(2, 2), nn.Linear(2, 2), 0.4, ramp_epochs=4)
        >>> [round(module.forgotten(epoch), 2) for epoch in (0, 1, 4, 9)]
        [0.0, 0.1, 0.4, 0.4]
        """
        return self.forget_rate * min(epoch / self.ramp_epochs, 1.0)

    def losses(self, batch: Batch) -> dict[str, LossTerm]:
        """Each student's hard term, on the rows that the other has chosen."""
        both = self(batch.x), logits_of(self.peer(batch.x), "the peer")
        if both[0].shape != both[1].shape:
            raise InputError(f"student and peer must have one shape, got {[*both[0].shape]} and {[*both[1].shape]}")
        if batch.y is None:
            batch.y = torch.full((len(batch),), -100, device=batch.x.device)
        labels = self.hard_loss_of(both[0], batch)[1]  # says what is wrong with labels
        if batch.mean_labels is None:
            batch.mean_labels = self._mean_over_processes(labels, both[0])
        known = is_labeled(batch.y)
        sorted_rows = known if batch.kind is None else known & (batch.kind != LabelKind.CLEAN)
        self._sorted = self._sorted + sorted_rows.sum()
        coarse = batch.candidates.any(dim=1) if batch.candidates is not None else torch.zeros_like(known)
        rows = [self._rows(logits, batch, known, coarse) for logits in both]
        chosen = [self._small(values.detach(), sorted_rows) | (known & ~sorted_rows) | coarse for values in rows]
        terms = {}
        for name, values, learned in (("hard", rows[0], chosen[1]), ("peer_hard", rows[1], chosen[0])):
            count, everyone = self._sums(torch.stack([learned.sum(), (known | coarse).sum()]))
            size = float(batch.mean_labels) * count / max(everyone, 1.0)
            values = values if batch.weight is None else values * batch.weight
            terms[name] = LossTerm(1.0, (values * learned).sum() / max(size, 1e-9))
        if self._trainer is not None:
            self._log_epoch("forget_rate", self.forgotten(self.current_epoch), len(batch))
        return terms

    def _rows(self, logits: Tensor, batch: Batch, known: Tensor, coarse: Tensor) -> Tensor:
        """The unweighted loss of each row, (B,); 0 where nothing is known, still in the graph."""
        assert batch.y is not None
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        told = {} if batch.kind is None else {"kind": batch.kind[known]}
        rows = logits.new_zeros(len(logits)) + logits[:0].sum()
        rows = rows.masked_scatter(
            known, per_row(self.hard_loss, logits[known], batch.y[known].long(), **told).to(rows)
        )
        if batch.candidates is not None:
            rows = rows.masked_scatter(coarse, coarse_rows(logits[coarse], batch.candidates[coarse]).to(rows))
        return rows

    def _small(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Which of the chosen rows are not forgotten: those of the smallest loss, of all processes' together, (B,)."""
        values = torch.where(chosen, values, torch.inf)
        everyone, before = [values], 0
        if self._together():
            everyone = gather_all_tensors(values)
            before = sum(map(len, everyone[: self.trainer.global_rank]))
        every = torch.cat(everyone)
        count = int(every.isfinite().sum())
        rank = every.argsort(stable=True).argsort(stable=True)[before : before + len(values)]
        return chosen & (rank < round((1 - self.forgotten(self.current_epoch)) * count))

    def _sums(self, counts: Tensor) -> list[float]:
        """Over all processes."""
        if self._together():
            counts = torch.stack(gather_all_tensors(counts)).sum(dim=0)
        return [float(count) for count in counts.reshape(-1)]

    def on_train_epoch_end(self) -> None:
        """Warn where nothing can be forgotten."""
        super().on_train_epoch_end()
        first = self.current_epoch == 0 and self.forget_rate > 0
        if first and not self._sums(torch.as_tensor(self._sorted, device=self.device))[0]:
            rank_zero_warn(
                "CoTeachingModule forgets nothing, since the kind of every label is clean; data.noisy: true says that "
                "the source's labels may be wrong, a column kind in a label file that some may"
            )

    def _together(self) -> bool:
        return self._trainer is not None and self.trainer.world_size > 1

    def setup(self, stage: str) -> None:
        """Check that there are two."""
        super().setup(stage)
        self._sorted = 0
        mine, other = dict(self.student.named_parameters()), dict(self.peer.named_parameters())
        same = mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        if stage == "fit" and (self.peer is self.student or same):
            raise InputError(
                "peer: it has the student's weights, and would choose as the student does; initialise it anew"
            )
