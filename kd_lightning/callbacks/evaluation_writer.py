"""Write what a test or a validation has measured on the deployed weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from kd_lightning.callbacks.any_batch import count_labeled, read_batch
from kd_lightning.callbacks.evaluated_samples import EvaluatedSamples, predictions_of, samples_of
from kd_lightning.callbacks.sample_names import sample_names
from kd_lightning.ranks import gather
from kd_lightning.runs.folder import run_folder, writes_files
from kd_lightning.runs.results import Result, figures_of, read_result, write_result
from kd_lightning.runs.run import CONFIG, WEIGHTS, Run, same_weights
from kd_lightning.runs.student import find_student


class EvaluationWriter(Callback):
    """Write the figures of ``test`` and ``validate``, and the predictions behind them, to the run's folder.

    The files are those of :func:`~kd_lightning.runs.results.write_result`; ``compare`` reads them. A result counts for
    the deployed weights alone: if the student in the run's folder has other weights than the evaluated one, no file is
    written. The validations of a fit write none.

    Figures are the logged metrics ``test/<name>`` (``transductive/test/<name>``, ``val/<name>``) of the first data
    loader; of a module that logs none of these, all metrics, ``test_acc`` as ``acc``. Predictions are written if
    ``test_step`` and ``validation_step`` return predicted labels: integers, (B,) or (B, L) as the batch's labels;
    values of the regression task; or those of dense samples, whose module has ``class_dim`` and ``to_rows``. A dense
    sample is one row, with the share of its right labels. Several processes write one file, with each sample once. If
    batches have no index, samples are numbered in the order of the loader. Path and content of a sample are written
    where the datamodule knows them. Works on any LightningModule. The command line adds this callback to every run.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._batches: list[EvaluatedSamples] = []
        self._seen = self._labeled = 0  # samples of this process
        self._has_index = True

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of ``test``. Clears the rows of an earlier call."""
        self._clear()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of each validation. Clears the rows of an earlier call."""
        self._clear()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs after each test batch. Collects its predictions."""
        if dataloader_idx == 0:
            self._collect(trainer, pl_module, outputs, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs after each validation batch. Collects its predictions, but not in a fit."""
        if dataloader_idx == 0 and trainer.state.fn == TrainerFn.VALIDATING:
            self._collect(trainer, pl_module, outputs, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of ``test``. Writes the result."""
        transductive = getattr(getattr(trainer, "datamodule", None), "transductive", False)
        self._write(trainer, pl_module, "transductive/test" if transductive else "test", trainer.test_dataloaders)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of each validation. Writes the result, but not in a fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val", trainer.val_dataloaders)

    def _collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._labeled += count_labeled(pl_module, batch)
        known = read_batch(pl_module, batch)
        if known is None:  # another library's batch
            return
        size, index = len(known), known.index
        if index is None:  # in the order in which Lightning's sampler distributes samples to processes
            index = (self._seen + torch.arange(size)) * trainer.world_size + trainer.global_rank
            self._has_index = False
        self._seen += size
        if isinstance(outputs, Tensor) and outputs.shape[:1] == (size,):
            batch = samples_of(pl_module, known, outputs, index.cpu())
            self._batches += [] if batch is None else [batch]

    def _write(self, trainer: Trainer, pl_module: LightningModule, part: str, loaders: Any) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        batches, labeled = self._gather(trainer)
        size = _size_of_first(loaders) if trainer.world_size > 1 else None
        if size is not None:  # Lightning's sampler repeats samples so that all ranks have as many
            labeled = min(labeled, size)
        folder = run_folder(trainer)
        figures = figures_of(part, trainer.callback_metrics)
        if not writes_files(trainer) or not figures:
            return
        weights = None
        student = find_student(pl_module)
        if student is not None:
            weights = _hash_if_deployed(folder / WEIGHTS, student)
            if weights is None:
                rank_zero_info(
                    f"the {part} figures are not those of the deployed weights, {folder / WEIGHTS}; compare leaves "
                    "them out, and no result is written"
                )
                return
        elif (other := _selected_instead(folder, trainer)) is not None:
            rank_zero_info(f"the {part} figures are not those of {other}, which compare means; no result is written")
            return
        data = getattr(trainer, "datamodule", None)
        rows = predictions_of(batches, getattr(data, "class_names", None) or ())
        if size is not None and not self._has_index:
            rows = {number: row for number, row in rows.items() if number < size}
        if rows:
            labeled = sum(not math.isnan(row.value) for row in rows.values())
        limit = trainer.limit_val_batches if part == "val" else trainer.limit_test_batches
        whole = limit == 1.0 and isinstance(limit, float)  # the integer 1 means one batch
        before = None if whole else read_result(folder, part)
        if before is not None and before.weights == weights and before.samples > labeled:
            rank_zero_info(
                f"the {part} figures of {labeled} samples do not replace those of {before.samples} in {folder}; no "
                "result is written"
            )
            return
        known = data if self._has_index and rows else None
        name_of = sample_names(known, loaders, "train" if part == "val" else "test")
        named = []
        for number in sorted(rows):
            path, content = name_of(number)
            named.append(replace(rows[number], path=path, content=content))
        write_result(Result(part, labeled, figures, weights, folder), named)

    def _gather(self, trainer: Trainer) -> tuple[list[EvaluatedSamples], int]:
        """Return the batches and the number of labeled samples of all processes, which must all call this."""
        parts = gather(trainer, (self._batches, self._labeled))
        return [batch for batches, _ in parts for batch in batches], sum(part[1] for part in parts)


def _hash_if_deployed(path: Path, student: nn.Module) -> str | None:
    """Return the SHA-256 of a file of weights; None unless the student has these weights."""
    try:
        content = path.read_bytes()
        deployed = load(content)
    except (FileNotFoundError, SafetensorError):
        return None
    return hashlib.sha256(content).hexdigest() if same_weights(deployed, student.state_dict()) else None


def _selected_instead(folder: Path, trainer: Trainer) -> Path | None:
    """Return the checkpoint that stands for a run without a student, if another one was evaluated."""
    if trainer.ckpt_path is None or not (folder / CONFIG).is_file():
        return None
    selected = Run(folder).selected_checkpoint()
    return None if Path(trainer.ckpt_path).resolve() == selected.resolve() else selected


def _size_of_first(loaders: Any) -> int | None:
    """Return the number of samples of the first data loader, None if it has no size."""
    first = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    if getattr(first, "batch_sampler", None) is None:  # its dataset has batches, or samples of unknown number
        return None
    try:
        return len(first.dataset)
    except (TypeError, NotImplementedError):
        return None
