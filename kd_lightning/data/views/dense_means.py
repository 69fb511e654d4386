"""Numbers of labels and rows of an optimiser step, where each position of a dense sample is a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from kd_lightning.batch import Batch

Count = Callable[[Batch], tuple[float, ...] | None]


def with_dense_means(batches: Iterable[Batch], trainer: Trainer | None, start: int, end: int) -> Iterator[Batch]:
    """Yield batches with ``dense_means``, where the trainer's module has a method ``count_rows`` that counts them.

    The numbers are known only when the batches are loaded. So all batches of an optimiser step are loaded before the
    first of them is yielded. Every process must load equally many.

    Args:
        batches: The batches of an epoch, from number ``start`` on.
        trainer: The trainer. Without one, the batches stay as they are.
        start: Number of the first batch in the epoch.
        end: Number of batches in the epoch.
    """
    count: Count | None = getattr(getattr(trainer, "lightning_module", None), "count_rows", None)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    counted = None if count is None else count(first)
    if trainer is None or count is None or counted is None:
        yield first
        yield from batches
        return
    window, end = trainer.accumulate_grad_batches, int(min(end, trainer.num_training_batches))
    step, counts, number, none = [first], [counted], start + 1, (0.0,) * len(counted)
    while step:
        if number % window and number < end and (batch := next(batches, None)) is not None:
            step.append(batch)
            counts.append(count(batch) or none)
            number += 1
            continue
        means = _means(trainer, counts)
        for batch in step:
            batch.dense_means = means
            yield batch
        batch = next(batches, None)
        step = [] if batch is None else [batch]
        counts = [count(batch) or none for batch in step]
        number += 1


def _means(trainer: Trainer, counts: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the means over some batches of each process, which must all call this."""
    sums = torch.tensor(counts, dtype=torch.float64).sum(dim=0)
    total: Tensor = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
    return tuple((total / (len(counts) * trainer.world_size)).tolist())
