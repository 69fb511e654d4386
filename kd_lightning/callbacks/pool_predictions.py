"""Predictions of the labeled and the unlabeled samples, on all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from kd_lightning.batch import Batch, unpack
from kd_lightning.callbacks.label_sources import Source, predict_batch, run
from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.pseudo_labels.tasks.base import PseudoLabelTask
from kd_lightning.ranks import gather
from kd_lightning.teachers.cache_fill import move_batch


@dataclass
class PoolPredictions:
    """The samples of a pool, sorted by index.

    Attributes:
        index: Samples, (N,), ascending.
        y: The labels that training may see, (N,) or (N, K).
        predictions: What the task makes of the outputs, (N, C); for a graph features (N, D).
        outputs: Number of outputs C.
    """

    index: Tensor
    y: Tensor
    predictions: Tensor
    outputs: int


def predict_pool(
    trainer: Trainer, module: LightningModule, source: Source, task: PseudoLabelTask
) -> PoolPredictions | None:
    """Predict the samples of all processes in eval mode; None if there are none. All processes must call this.

    Raises:
        InputError: If the loader gives other batches, or outputs do not fit the task or are not finite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    outputs = 0
    # a loader samples a seed for its workers; the random state of the training must not change
    with isolate_rng(include_cuda=False), torch.no_grad(), evaluating(module), validating(trainer):
        for loaded in trainer.datamodule.pool_dataloader():  # type: ignore[attr-defined]
            moved = move_batch(trainer, loaded)
            batch = unpack(module, moved)
            known = moved if isinstance(moved, Batch) else batch  # an unpack need not care for index and labels
            if known.index is None or known.y is None:
                raise InputError("pool_dataloader must return Batches with index and y (-100: unlabeled)")
            with trainer.precision_plugin.forward_context():
                found = predict_batch(trainer, module, batch, source)
                if not outputs:
                    logits = found if isinstance(source, str) else run(module, batch.x)  # a graph gives features
                    outputs = task.rows(logits, "a network").shape[1]
            if isinstance(source, str):
                found = task.predictions(task.rows(found, f"pseudo-labels: the {source}").float(), batch.candidates)
            if not known.is_padding:
                parts.append((known.index.cpu(), known.y.cpu(), found.float().cpu()))
    if trainer.world_size > 1:
        gathered = gather(trainer, (parts, outputs))
        parts = [part for share, _ in gathered for part in share]
        outputs = max(number for _, number in gathered)  # a rank without samples has 0
    if not parts:
        return None
    index, y, predictions = (torch.cat(column) for column in zip(*parts, strict=True))
    if not predictions.isfinite().all():
        sample = int(index[~predictions.isfinite().all(dim=1)][0])
        network = source if isinstance(source, str) else "student"
        raise InputError(f"pseudo-labels: the output of the {network} for sample {sample} is not finite")
    order = index.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]  # samplers repeat samples to make shares equal
    order = order[first]
    return PoolPredictions(index[order], y[order], predictions[order], outputs)


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """Set the trainer's stage to validating. Hooks that augment a batch on the device read the stage."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
