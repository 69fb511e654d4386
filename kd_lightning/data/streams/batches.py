"""The batches of a stream on one process and worker, from any position on."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from kd_lightning.batch import Batch
from kd_lightning.data.identity import hash_item
from kd_lightning.data.streams.readers import Reader
from kd_lightning.data.streams.views import StreamViews
from kd_lightning.errors import InputError

_FIRST = 8
"""Number of a stream's first samples that are compared between processes and workers."""


@dataclass
class Mark:
    """A position within a pass: the last batch before it.

    Attributes:
        number: Number of this batch.
        digest: Hash of its first and last sample in the stream.
        state: State of the dataset before this batch; None if it has none.
    """

    number: int
    digest: int
    state: Any = None


@dataclass
class Loaded:
    """A batch, and where it lies in the stream.

    Attributes:
        batch: The batch.
        worker: Number of the worker that has read it.
        mark: Its mark.
        first: Hash of the first samples of the worker's stream; 0 if they are not known.
    """

    batch: Batch
    worker: int
    mark: Mark
    first: int

    def pin_memory(self) -> Loaded:
        """Return the same with the batch in pinned memory. DataLoader calls it."""
        return Loaded(self.batch.pin_memory(), self.worker, self.mark, self.first)


@dataclass
class Start:
    """Where a pass begins.

    Attributes:
        epoch: Number of the pass.
        batches: Number of batches of the process that are left out.
        marks: The last batch that each worker has read before; of a stream whose samples are dealt out, that of the
            process, as worker 0. Empty at the beginning.
        last_worker: The worker that has read the last batch before; -1 for none.
    """

    epoch: int = 0
    batches: int = 0
    marks: Mapping[int, Mark] = field(default_factory=dict)
    last_worker: int = -1


class StreamBatches(IterableDataset["Loaded | None"]):
    """The batches of one process. Its workers read a share each.

    Samples are dealt out such that batch b of all processes together holds the next samples of the stream, however many
    processes and workers read it: process r of W takes each W-th of them. Datasets with shares of their own give each
    worker other samples instead.

    A pass that begins at a position reads the last batch before it once more. If its samples are not those of then,
    after the dataset's own state, the stream is read from its beginning. If they still are not, the pass is refused.

    Args:
        reader: Reads the dataset.
        views: Makes the batches.
        batch_size: Rows of a batch on each process.
        rank: Number of this process.
        world: Number of processes.
        compares: Whether the first samples are hashed.
    """

    def __init__(
        self, reader: Reader, views: StreamViews, batch_size: int, rank: int = 0, world: int = 1, compares: bool = False
    ) -> None:
        self.reader = reader
        self.views = views
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.compares = compares
        self.start = Start()

    @property
    def keeps_state(self) -> bool:
        """Whether the state of one process is that of all."""
        return self.reader.deals or self.world == 1

    def __iter__(self) -> Iterator[Loaded | None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mark = self.start.marks.get(0 if self.reader.deals else worker)
        blocks = self._blocks(self.reader, 0, worker, workers) if mark is None else self._resume(mark, worker, workers)
        if not self.reader.deals and worker <= self.start.last_worker:
            yield None  # this worker's turn of the round is over
        for items, numbers, mark, first in blocks:
            yield Loaded(self.views.make(items, numbers, self.start.epoch), worker, mark, first)

    def _resume(self, mark: Mark, worker: int, workers: int) -> Iterator[Any]:
        """Return the blocks behind a mark: from the dataset's own state, else by reading all before it."""
        if mark.state is not None:
            with suppress(Exception):  # of any class, from a dataset that cannot be copied, or does not know the state
                reader = copy.deepcopy(self.reader)
                reader.restore(mark.state)
                blocks = self._blocks(reader, mark.number, worker, workers, verify=mark)
                if next(blocks, None) == mark.digest:
                    return blocks
        return self.read_behind(mark, worker, workers)

    def read_behind(self, mark: Mark, worker: int = 0, workers: int = 1) -> Iterator[Any]:
        """Read up to a mark, and return the blocks behind it.

        Raises:
            InputError: If the samples at the mark are others.
        """
        blocks = self._blocks(self.reader, 0, worker, workers, verify=mark)
        if next(blocks, None) != mark.digest:
            raise InputError(
                f"{self.reader.part}: the stream gives other samples than before the resume (batch {mark.number} of "
                "the epoch differs): its data have changed, or it is shuffled without a fixed seed; start a new run"
            )
        return blocks

    def _blocks(
        self, reader: Reader, number: int, worker: int, workers: int, verify: Mark | None = None
    ) -> Iterator[Any]:
        """Yield items, numbers, mark and hash of the first samples of each batch of this worker.

        Args:
            reader: The reader.
            number: Number of the block at which the reader stands.
            worker: Number of the worker.
            workers: Number of workers.
            verify: The mark of a block. The hash of this block is yielded first, and then the blocks behind it. None
                for all blocks.
        """
        deals, share = reader.deals, self.rank * workers + worker
        world, shares = (self.world, 1) if deals else (1, self.world * workers)
        size, rank = self.batch_size * world, self.rank if deals else 0
        stream = self._samples(reader, number * size)
        hashes: list[str] | None = [] if self.compares and number == 0 else None
        while True:
            is_checked = verify is not None and number == verify.number
            turn = not deals or (number - self.start.batches) % workers == worker
            is_taken = not is_checked and turn and (verify is None or number > verify.number)
            state = reader.state() if is_taken and self.keeps_state else None
            items, ends, count = [], [None, None], 0
            for count, item in enumerate(islice(stream, size), 1):
                if hashes is not None and len(hashes) < min(_FIRST, size):
                    hashes.append(hash_item(item))
                if is_taken and (count - 1) % world == rank:
                    items.append(item)
                if is_taken or is_checked:
                    ends = [item if count == 1 else ends[0], item]
            digest = zlib.crc32("".join(map(hash_item, ends)).encode()) if is_taken or is_checked else 0
            if is_checked:
                yield digest if count else None
            if not count:
                return
            if items:
                own = number * size + rank + world * torch.arange(len(items))
                own = own if deals else own * shares + share
                first = 0 if hashes is None else zlib.crc32("".join(hashes).encode()) | 1
                yield items, own, Mark(number, digest, state), first
            number += 1

    def _samples(self, reader: Reader, number: int) -> Iterator[Any]:
        """Yield the samples of the reader; an error names the sample."""
        stream = iter(reader)
        while True:
            try:
                item = next(stream)
            except StopIteration:
                return
            except InputError:
                raise
            except Exception as error:  # of any class
                text = f"{type(error).__name__}: {error}"
                raise InputError(f"{reader.part}: sample {number} of the stream cannot be read: {text}") from error
            yield item
            number += 1
