"""Write what a test or a validation has measured on the deployed weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from kd_lightning.batch import class_labels, is_labeled
from kd_lightning.callbacks.any_batch import count_labeled, read_batch
from kd_lightning.callbacks.sample_names import sample_names
from kd_lightning.ranks import gather
from kd_lightning.runs.folder import run_folder, writes_files
from kd_lightning.runs.results import Prediction, Result, read_result, write_result
from kd_lightning.runs.run import CONFIG, WEIGHTS, Run, same_weights
from kd_lightning.runs.student import find_student

# the end of the name of a metric of another data loader than the first
_OTHER_LOADER = re.compile(r"/(dataloader_idx_)?[1-9]\d*$")


class EvaluationWriter(Callback):
    """Write the figures of ``test`` and ``validate``, and the predictions behind them, to the run's folder.

    The files are those of :func:`~kd_lightning.runs.results.write_result`; ``compare`` reads them. A result counts for
    the deployed weights alone: if the student in the run's folder has other weights than the evaluated one, no file is
    written. The validations of a fit write none.

    Figures are the logged metrics ``test/<name>`` (``transductive/test/<name>``, ``val/<name>``) of the first data
    loader. Predictions are written if ``test_step`` and ``validation_step`` return predicted labels: integers, (B,) or
    (B, L) as the batch's labels. Several processes write one file, with each sample once. If batches have no index,
    samples are numbered in the order of the loader. Path and content of a sample are written where the datamodule
    knows them. Works on any LightningModule. The command line adds this callback to every run.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._batches: list[_Batch] = []
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
        y, size = None if known.y is None else class_labels(known.y), len(known)
        index = known.index
        if index is None:  # in the order in which Lightning's sampler distributes samples to processes
            index = (self._seen + torch.arange(size)) * trainer.world_size + trainer.global_rank
            self._has_index = False
        self._seen += size
        task = getattr(pl_module, "task", "multiclass")
        if not isinstance(outputs, Tensor) or outputs.is_floating_point() or outputs.shape[:1] != (size,):
            return
        predicted = outputs.reshape(size, -1).cpu()
        labels = torch.full_like(predicted, -1)
        labels = labels if y is None else torch.where(is_labeled(y), y, -1).reshape(size, -1).cpu()
        if labels.shape != predicted.shape or (task != "multilabel" and predicted.shape[1] != 1):
            return  # no prediction of one class for each sample
        self._batches.append(_Batch.of(index.cpu(), labels, predicted, task == "multilabel"))

    def _write(self, trainer: Trainer, pl_module: LightningModule, part: str, loaders: Any) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        batches, labeled = self._gather(trainer)
        size = _size_of_first(loaders) if trainer.world_size > 1 else None
        if size is not None:  # Lightning's sampler repeats samples so that all ranks have as many
            labeled = min(labeled, size)
        folder = run_folder(trainer)
        prefix = f"{part}/"
        figures = {
            name.removeprefix(prefix).removesuffix("/dataloader_idx_0"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix) and not _OTHER_LOADER.search(name)
        }
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
        rows = _predictions(batches, getattr(data, "class_names", None) or ())
        if size is not None and not self._has_index:
            rows = {number: row for number, row in rows.items() if number < size}
        if rows:
            labeled = sum(row.correct == row.correct for row in rows.values())  # not NaN
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

    def _gather(self, trainer: Trainer) -> tuple[list[_Batch], int]:
        """Return the batches and the number of labeled samples of all processes, which must all call this."""
        parts = gather(trainer, (self._batches, self._labeled))
        return [batch for batches, _ in parts for batch in batches], sum(part[1] for part in parts)


class _Batch(NamedTuple):
    """Labels and predictions of B samples, on the CPU.

    Attributes:
        samples: (B,) indices of the samples; negative for what is no sample, see ``Batch.is_padding``.
        correct: (B,) shares of right labels, NaN if none is known.
        label: Pairs (N, 2) of a row and a class: one for each known label, of the multilabel task for each 1.
        prediction: The same of the predictions.
    """

    samples: Tensor
    correct: Tensor
    label: Tensor
    prediction: Tensor

    @classmethod
    def of(cls, samples: Tensor, label: Tensor, prediction: Tensor, multilabel: bool) -> _Batch:
        """Make it of labels and predictions (B, L), where unknown labels are negative."""
        known = label >= 0
        correct = (known & (label == prediction)).sum(dim=1).double() / known.sum(dim=1)  # 0 / 0 is NaN
        if multilabel:
            return cls(samples, correct, (label == 1).nonzero(), (prediction == 1).nonzero())
        rows = torch.arange(len(samples))
        label, prediction = (torch.stack([rows, of[:, 0].long()], dim=1) for of in (label, prediction))
        return cls(samples, correct, label[known[:, 0]], prediction)


def _predictions(batches: Iterable[_Batch], names: Sequence[str]) -> dict[int, Prediction]:
    """Return the prediction of each sample by its index."""
    found = {}
    for batch in batches:
        texts: list[tuple[list[str], list[str]]] = [([], []) for _ in range(len(batch.samples))]
        for side, pairs in enumerate((batch.label, batch.prediction)):
            for row, number in pairs.tolist():
                texts[row][side].append(_name(number, names))
        for index, correct, (label, prediction) in zip(
            batch.samples.tolist(), batch.correct.tolist(), texts, strict=True
        ):
            if index >= 0:
                found[index] = Prediction(index, ";".join(label), ";".join(prediction), correct)
    return found


def _name(number: int, names: Sequence[str]) -> str:
    return "" if number < 0 else str(names[number]) if number < len(names) else str(number)


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
