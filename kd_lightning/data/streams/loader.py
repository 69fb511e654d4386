"""The data loader of a stream: equally many batches on each process, totals of each step, and its position."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from kd_lightning.batch import Batch, is_labeled
from kd_lightning.data.streams.batches import Loaded, Mark, Start, StreamBatches
from kd_lightning.data.views.dataset import shorten_worker_errors
from kd_lightning.data.views.worker_limits import check_open_files
from kd_lightning.errors import InputError

_COLUMNS = 6  # of a batch that processes exchange


class StreamLoader(DataLoader[Any]):
    """Load the batches of a stream. Its length is not known.

    In training, an epoch ends when one process has no more batch, and batches hold the totals of their optimiser step.
    In evaluation, it ends when no process has one; a process that has none then gives one row of padding, see
    :attr:`~kd_lightning.batch.Batch.is_padding`.

    Args:
        dataset: The batches of this process.
        trainer: The trainer; None outside of one.
        training: Whether it loads for training. Otherwise each pass is the first one.
        kwargs: Other arguments of DataLoader. Workers are started anew for each pass.
    """

    dataset: StreamBatches

    def __init__(
        self, dataset: StreamBatches, trainer: Trainer | None = None, training: bool = True, **kwargs: Any
    ) -> None:
        # Lightning makes the loader anew for predictions, with all arguments of DataLoader
        super().__init__(dataset, **(kwargs | {"batch_size": None, "collate_fn": _same}))
        self.trainer = trainer
        self.training = training
        self._passes = 0
        self._position = (0, 0)  # epoch, batches
        self._resume: dict[str, Any] | None = None
        self._last: dict[tuple[int, int], Mark] = {}  # of each process and worker
        self._firsts: dict[tuple[int, int], int] = {}  # hash of the first batch of the pass, of each of them
        self._last_worker = [-1] * dataset.world
        self._before: dict[int, dict[str, Any]] = {}  # the marks before some batches

    # The position.

    def state_dict(self) -> dict[str, Any]:
        """Runs when a checkpoint is saved. Return epoch, number of its batches that are trained on, and the marks."""
        if self._resume is not None:  # no batch since the state was loaded
            return self._resume
        epoch, batches = self._position
        if self.trainer is not None:  # a batch may be loaded but not processed
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            batches = min(batches, progress.processed)
        before: dict[str, Any] = self._before.get(batches - batches % self._window, {})
        marks = [{**mark, "state": _storable(mark["state"])} for mark in before.get("marks", ())]
        firsts = [[*key, digest] for key, digest in self._firsts.items()]
        return {"epoch": epoch, "batches": batches, "firsts": firsts, **before, "marks": marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Runs when a fit resumes. If the next epoch is the one of the state, it begins behind these batches.

        If it is a later one, the first batch of the state's epoch is read, and compared. Of datasets with shares of
        their own, this needs ``num_workers`` 0.
        """
        self._position = (state["epoch"], state["batches"])
        self._resume = state

    @property
    def _window(self) -> int:
        return 1 if self.trainer is None or not self.training else self.trainer.accumulate_grad_batches

    def _start(self, epoch: int) -> tuple[Start, int]:
        """Return where a pass begins, and the number of its first batch that is yielded."""
        state, self._resume = self._resume, None
        self._last, self._last_worker, self._before, self._firsts = {}, [-1] * self.dataset.world, {}, {}
        if state is None or not state["batches"]:
            return Start(epoch), 0
        deals, rank = self.dataset.reader.deals, self.dataset.rank
        firsts = {(of, worker): digest for of, worker, digest in state["firsts"]}
        if state["epoch"] != epoch:
            first = firsts.get((0, 0) if deals else (rank, 0))
            if first is not None and (deals or not self.num_workers):
                self._start_reader(state["epoch"])
                self.dataset.read_behind(Mark(0, first))
            return Start(epoch), 0
        self._firsts = firsts
        for row in state["marks"]:
            self._last[row["rank"], row["worker"]] = Mark(row["number"], row["digest"], row["state"])
        self._last_worker = state["last_worker"]
        own = {worker: mark for (of, worker), mark in self._last.items() if of == rank}
        if deals:  # the mark of any process is that of all
            own = {0: max(self._last.values(), key=lambda mark: mark.number)} if self._last else {}
            self._last_worker = [-1] * self.dataset.world
        first = state["batches"] - state["batches"] % self._window
        return Start(epoch, first, own, self._last_worker[rank]), state["batches"]

    def _start_reader(self, epoch: int) -> None:
        data = self.dataset
        data.reader.start(epoch, data.rank, data.world, max(1, self.num_workers), data.batch_size)

    # The batches.

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: it starts with the first batch, after Lightning has counted the epoch.
        epoch = 0
        if self.training:
            epoch = self._passes if self.trainer is None else self.trainer.current_epoch
            self._passes += 1
        start, yielded = self._start(epoch)
        self.dataset.start = start
        self._start_reader(epoch)
        check_open_files(self)
        every: Any = shorten_worker_errors(super().__iter__())
        loaded = (one for one in every if one is not None)
        steps = self._training_steps(loaded, start.batches) if self.training else self._evaluation(loaded)
        for number, batch in enumerate(steps, start.batches):
            if number >= yielded:
                batch = self.dataset.views.finish(batch)
                if self.training:
                    self._position = (epoch, number + 1)
                    batch.index = batch.view = None  # no names of samples: in another epoch, they are of others
                yield batch

    def _training_steps(self, loaded: Iterator[Loaded], number: int) -> Iterator[Batch]:
        """Yield batches with the totals of their optimiser step, as long as each process has one."""
        firsts: dict[tuple[int, int], int] = {}
        while True:
            self._note_position(number)
            limit = float("inf") if self.trainer is None else self.trainer.num_training_batches
            window = int(min(self._window, max(1, limit - number)))
            step = [*islice(loaded, window)]
            rows = torch.tensor([self._row(one) for one in step]).reshape(len(step), _COLUMNS)
            every = self._gather(rows, window)  # (W, window, columns)
            count = int(every[:, :, 0].sum(dim=1).min())
            if self.dataset.compares:
                self._check_shares(every, firsts)
            if not count:
                if not number:
                    self._check_begins(every)
                return
            totals = every[:, :count, 1:3].double().sum(dim=(0, 1)) / (len(every) * count)
            for place, one in enumerate(step[:count]):
                one.batch.mean_labels, one.batch.mean_rows = totals.tolist()
                self._note(every[:, place], number, one.mark.state)
                number += 1
                self._note_position(number)
                yield one.batch
            if count < window:
                return

    def _evaluation(self, loaded: Iterator[Loaded]) -> Iterator[Batch]:
        firsts: dict[tuple[int, int], int] = {}
        padding: Batch | None = None
        while True:
            one = next(loaded, None)
            rows = torch.tensor([] if one is None else [self._row(one)], dtype=torch.long).reshape(-1, _COLUMNS)
            every = self._gather(rows, 1)
            if self.dataset.compares:
                self._check_shares(every, firsts)
            if padding is None:
                self._check_begins(every)
            if not every[:, :, 0].any():
                return
            if padding is None:
                assert one is not None
                padding = one.batch.select(torch.tensor([0])).as_padding()
            yield padding if one is None else one.batch

    def _row(self, one: Loaded) -> list[int]:
        """What processes exchange of a batch: labels, rows, digest, worker, first samples."""
        return [1, self._count_labels(one.batch.y), len(one.batch), one.mark.digest, one.worker, one.first]

    def _count_labels(self, y: Tensor | None) -> int:
        assert y is not None
        known = is_labeled(y)
        task = getattr(getattr(self.trainer, "lightning_module", None), "task", "multiclass")
        soft = known.ndim > 1 and task == "multiclass"  # probabilities are one label
        return int(known.all(dim=1).sum() if soft else known.sum())

    def _gather(self, rows: Tensor, window: int) -> Tensor:
        """Return the rows of all processes, (W, window, columns); rows of 0 where a process has no batch."""
        every = torch.zeros(self.dataset.world, window, _COLUMNS, dtype=torch.long)
        every[self.dataset.rank, : len(rows)] = rows
        if self.dataset.world == 1:
            return every
        assert self.trainer is not None
        strategy = self.trainer.strategy
        summed: Tensor = strategy.reduce(every.to(strategy.root_device), reduce_op="sum")  # all others are 0
        return summed.cpu()

    def _check_begins(self, every: Tensor) -> None:
        """Raise InputError if a process has no first batch. Processes know it all at the same time."""
        part, has = self.dataset.reader.part, int(every[:, 0, 0].sum())
        if not has:
            raise InputError(f"{part}: the stream has no samples")
        if has < len(every):
            raise InputError(
                f"{part}: each of {len(every)} processes needs a sample, but the stream has some for {has} only; use "
                "fewer devices"
            )

    def _check_shares(self, every: Tensor, firsts: dict[tuple[int, int], int]) -> None:
        """Raise InputError if processes and workers do not share the samples as the reader expects it."""
        reader = self.dataset.reader
        for rank, rows in enumerate(every.tolist()):
            for has, _, _, _, worker, first in rows:
                if has and first and (rank, worker) not in firsts:
                    firsts[rank, worker] = first
        several = len({*firsts.values()})
        if reader.deals and several > 1:
            raise InputError(
                f"{reader.part}: processes or workers read other samples from the same stream; set shared: true if the "
                "dataset itself gives each of them samples of its own, or seed its shuffling"
            )
        if not reader.deals and several < len(firsts):
            raise InputError(
                f"{reader.part}: shared is true, but several processes or workers read the same samples; set shared: "
                "false, or split the dataset by process and worker"
            )

    def _note(self, rows: Tensor, number: int, state: Any) -> None:
        """Note the batch of each process as its last one, with the state of this process' dataset."""
        deals = self.dataset.reader.deals
        for rank, (_, _, _, digest, worker, _) in enumerate(rows.tolist()):
            key = (0, 0) if deals else (rank, worker)
            before = self._last.get(key)
            own = number if deals else 0 if before is None else before.number + 1
            self._last[key] = Mark(own, digest, state if self.dataset.keeps_state else None)
            if not own:
                self._firsts[key] = digest
            self._last_worker[rank] = worker

    def _note_position(self, number: int) -> None:
        """Store the marks before a batch, and forget old ones."""
        marks = [
            {"rank": rank, "worker": worker, "number": mark.number, "digest": mark.digest, "state": mark.state}
            for (rank, worker), mark in self._last.items()
        ]
        self._before[number] = {"marks": marks, "last_worker": [*self._last_worker]}
        self._before.pop(number - 2 * self._window - 8, None)


def _same(loaded: Loaded) -> Loaded:
    return loaded


def _storable(state: Any) -> Any:
    """Return a dataset's state; None if a checkpoint cannot hold it, as objects of a class that is not torch's."""
    try:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of any class, from the objects themselves
        return None
    return state
