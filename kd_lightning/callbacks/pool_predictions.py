"""Predictions of the labeled and the unlabeled samples, on all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.callbacks.label_sources import Source, predict_batch, run
from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.inputs import tensors_of
from kd_lightning.pseudo_labels.tasks.base import PseudoLabelTask
from kd_lightning.ranks import gather, stop_if_recorded
from kd_lightning.runs.student import batch_of_student
from kd_lightning.teachers.cache_fill import move_batch


@dataclass
class PoolPredictions:
    """The samples of a pool, sorted by index.

    Attributes:
        index: Samples, (N,), ascending.
        y: The labels that training may see, (N,) or (N, K).
        predictions: What the task makes of the outputs, (N, C); for a graph features (N, D). Of V views (N, V, C).
        outputs: Number of outputs C.
        varied: Whether a sample has views that differ, (N,) booleans. None for one view of each.
    """

    index: Tensor
    y: Tensor
    predictions: Tensor
    outputs: int
    varied: Tensor | None = None


def predict_pool(
    trainer: Trainer, module: LightningModule, source: Source, task: PseudoLabelTask, num_views: int | None = None
) -> PoolPredictions | None:
    """Predict the samples of all processes in eval mode; None if there are none. All processes must call this.

    Args:
        trainer: Trainer with a datamodule.
        module: The module whose networks predict.
        source: The network that predicts.
        task: What predictions are.
        num_views: Number of views of each sample under the training transform. Default: None, which means one under
            the evaluation transform.

    Raises:
        InputError: If the loader gives other batches, outputs do not fit the task or are not finite, or all views of
            each sample are equal.
    """
    parts: list[tuple[Tensor, ...]] = []
    outputs = 0
    # a loader samples a seed for its workers; the random state of the training must not change
    with isolate_rng(include_cuda=False), torch.no_grad(), evaluating(module), validating(trainer):
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for loaded in data.pool_dataloader() if num_views is None else data.pool_dataloader(num_views):
            stop_if_recorded(trainer)
            moved = move_batch(trainer, loaded)
            batch = batch_of_student(module, moved)
            known = moved if isinstance(moved, Batch) else batch  # an unpack need not return index and labels
            if known.index is None or known.y is None:
                raise InputError("pool_dataloader must return Batches with index and y (-100: unlabeled)")
            with trainer.precision_plugin.forward_context():
                found = predict_batch(trainer, module, batch, source)
                if not outputs:
                    logits = found if isinstance(source, str) else run(module, batch.x)  # a graph gives features
                    outputs = task.rows(logits, "a network").shape[1]
            if isinstance(source, str):
                found = task.predictions(task.rows(found, f"pseudo-labels: the {source}").float(), known.candidates)
            if not known.is_padding:
                part = known.index.cpu(), known.y.cpu(), found.float().cpu()
                parts.append(part if num_views is None else _join_views(*part, batch, num_views))
    if trainer.world_size > 1:
        gathered = gather(trainer, (parts, outputs))
        parts = [part for share, _ in gathered for part in share]
        outputs = max(number for _, number in gathered)  # a rank without samples has 0
    if not parts:
        return None
    index, y, predictions, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
    if not predictions.isfinite().all():
        sample = int(index[~predictions.flatten(1).isfinite().all(dim=1)][0])
        network = source if isinstance(source, str) else "student"
        raise InputError(f"pseudo-labels: the output of the {network} for sample {sample} is not finite")
    order = index.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = index[order][1:] != index[order][:-1]  # samplers repeat samples to make shares equal
    order = order[first]
    varied = rest[0][order] if rest else None
    if varied is not None and not varied.any():
        raise InputError(
            f"PseudoLabelRefresh: the {num_views} views of each sample are equal, so all predictions would agree; set "
            "a train_transform in the datamodule that is random"
        )
    return PoolPredictions(index[order], y[order], predictions[order], outputs, varied)


def _join_views(index: Tensor, y: Tensor, found: Tensor, batch: Batch, num_views: int) -> tuple[Tensor, ...]:
    """Return index (n,), labels and predictions (n, V, C) of the samples of a batch, and whether their views differ."""
    if len(index) % num_views or (index.view(-1, num_views) != index[::num_views, None]).any():
        raise InputError(f"pool_dataloader(num_views={num_views}) must give all views of a sample one behind another")
    varied = torch.zeros(len(index) // num_views, dtype=torch.bool)
    for tensor in tensors_of(batch.x):
        views = tensor.reshape(len(varied), num_views, -1)
        varied |= (views != views[:, :1]).flatten(1).any(dim=1).cpu()
    return index[::num_views], y[::num_views], found.view(len(varied), num_views, -1), varied


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """Set the trainer's stage to validating. Hooks that augment a batch on the device read the stage."""
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
