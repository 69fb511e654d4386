"""The first training inputs, read before a fit begins, and a pass of the student on some."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning.batch import Batch, unpack
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.features.capture import evaluating
from kd_lightning.inputs import Inputs


def first_rows(batch: Batch, count: int) -> Batch:
    """Return a batch of the first inputs alone, with their mask, without labels."""
    rows = torch.arange(min(count, len(batch)), device=batch.device)
    return Batch(batch.x, teacher_inputs=batch.teacher_inputs, mask=batch.mask).select(rows)


def first_inputs(module: LightningModule, count: int) -> Batch:
    """Return up to ``count`` training inputs, as a step gets them. Call it while the trainer sets up a fit.

    Random generators stay as they are. A loader with a batch sampler starts no workers.
    """
    # not fit_loop.setup_data(), the public way: called this early it loses the position of a resumed loader
    loader: Any = module.trainer.fit_loop._data_source.dataloader()
    loader = loader.iterables if isinstance(loader, CombinedLoader) else loader
    while isinstance(loader, list | tuple | dict):
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
    data: Any = getattr(loader, "dataset", None)
    has_rows = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    with isolate_rng(), torch.device("cpu"):  # torch's default device may be the accelerator
        if has_rows and not isinstance(data, IterableDataset):
            batch = loader.collate_fn([data[n] for n in range(min(count, len(data)))])
            batch = data.finish(batch) if isinstance(data, ViewDataset) else batch
        else:
            batch = next(iter(loader))
        batch = module._apply_batch_transfer_handler(module._on_before_batch_transfer(batch), module.device)
    return first_rows(unpack(module, batch), count)


def run_once(module: LightningModule, student: nn.Module, x: Inputs) -> None:
    """Run a module's forward pass on inputs that a training step gets. The student is in eval mode.

    Random generators and the student stay as they are.
    """
    with torch.no_grad(), evaluating(student), module.trainer.precision_plugin.forward_context():
        module(x)
