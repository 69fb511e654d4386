"""Read datasets in order: the share of a process and a worker, and the position within the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kd_lightning.errors import InputError


class Reader:
    """Read a dataset in order. Every reader of it gets all samples, and :class:`StreamBatches` deals them out.

    Args:
        dataset: Any object with ``__iter__``, which begins anew each time. Its ``set_epoch``, ``state_dict`` and
            ``load_state_dict`` are used if it has them.
        part: Name of the part, for messages.

    Attributes:
        deals: Whether this package deals out the samples. If not, each process and worker gets samples of its own.
        checks: Whether the first samples of processes and workers are compared.
        has_own_pass: Whether the dataset itself holds the position of its pass, so that a second pass ends the first.
    """

    deals = True
    checks = True
    has_own_pass = False

    def __init__(self, dataset: Any, part: str) -> None:
        self.dataset = dataset
        self.part = part

    def start(self, epoch: int, rank: int, world: int, workers: int, batch_size: int) -> None:
        """Runs before each pass, in the process whose workers read.

        Args:
            epoch: Number of the pass.
            rank: Number of the process.
            world: Number of processes.
            workers: Number of workers of each process, at least 1.
            batch_size: Rows of a batch on each process.
        """
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def state(self) -> Any:
        """Return the position of the dataset, from its own ``state_dict``; None if it has none, or fails."""
        if not self._has_state:
            return None
        try:
            return self.dataset.state_dict()
        except Exception:  # of any class: the position is not needed, since all before it can be read
            return None

    def restore(self, state: Any) -> None:
        """Set the position before ``__iter__``."""
        self.dataset.load_state_dict(state)

    @property
    def _has_state(self) -> bool:
        return all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict"))


class SharedReader(Reader):
    """Read a dataset that itself gives each process and each worker samples of its own."""

    deals = False


class HuggingFaceReader(SharedReader):
    """Read an ``IterableDataset`` of the package datasets. It is split among the processes, and among their workers."""

    checks = False

    def __init__(self, dataset: Any, part: str) -> None:
        super().__init__(dataset, part)
        if getattr(dataset, "_distributed", None) is not None:
            raise InputError(f"{part}: give the whole dataset; split_dataset_by_node is called for each process")
        self._whole = dataset

    def start(self, epoch: int, rank: int, world: int, workers: int, batch_size: int) -> None:
        """Runs before each pass: take the share of this process."""
        from datasets.distributed import split_dataset_by_node

        self.dataset = self._whole if world == 1 else split_dataset_by_node(self._whole, rank, world)
        self.dataset.set_epoch(epoch)


class LitDataReader(SharedReader):
    """Read a ``StreamingDataset`` of the package litdata, each of its samples once: ``drop_last`` is not used.

    Its own position needs litdata's loader, and is not used either.
    """

    checks = False
    has_own_pass = True

    def start(self, epoch: int, rank: int, world: int, workers: int, batch_size: int) -> None:
        """Runs before each pass: set the share of this process, which the dataset finds before processes are known."""
        data = self.dataset
        data.distributed_env = type(data.distributed_env)(world, rank, 1)
        data.drop_last = False  # its default depends on whether the process knew the number of processes when made
        data.shuffler = None
        data.set_num_workers(workers)
        data.set_batch_size(batch_size)
        data.set_epoch(epoch)

    def state(self) -> None:
        """Return None."""


def make_reader(dataset: Any, part: str, *, shared: bool) -> Reader:
    """Return the reader of a dataset.

    Args:
        dataset: The dataset.
        part: Name of the part, for messages.
        shared: Whether a dataset that is of no known package gives each process and worker samples of its own.

    Raises:
        InputError: For what cannot be read several times in order.
    """
    dataset = getattr(dataset, "stream", dataset)  # of HuggingFaceStream
    packages = {one.__module__.partition(".")[0] for one in type(dataset).__mro__}
    if "litdata" in packages:
        if not hasattr(dataset, "distributed_env"):
            raise InputError(f"{part}: of litdata a StreamingDataset can be read, got {type(dataset).__name__}")
        return LitDataReader(dataset, part)
    if "datasets" in packages and hasattr(dataset, "_ex_iterable"):
        return HuggingFaceReader(dataset, part)
    if isinstance(dataset, Iterator) or not hasattr(dataset, "__iter__"):
        what = "can be read once only" if isinstance(dataset, Iterator) else "has no __iter__"
        raise InputError(f"{part} must be a dataset whose __iter__ begins anew, but {type(dataset).__name__} {what}")
    return (SharedReader if shared else Reader)(dataset, part)
