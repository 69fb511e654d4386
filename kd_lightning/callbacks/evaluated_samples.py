"""Labels and predictions of evaluated samples: what a file of results holds of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from kd_lightning.batch import IGNORE_INDEX, Batch, class_labels, is_labeled
from kd_lightning.errors import InputError
from kd_lightning.runs.results import Prediction

_MOST_VALUES = 16  # of a sample, that are written in full


class EvaluatedSamples(NamedTuple):
    """B samples, on the CPU.

    Attributes:
        samples: (B,) indices of the samples; negative for what is no sample, see ``Batch.is_padding``.
        correct: (B,) shares of right labels, NaN if none is known.
        label: Pairs (N, 2) of a row and a class: one for each known label, of the multilabel task for each 1.
        prediction: The same of the predictions.
        errors: (B,) mean absolute errors of the regression task, NaN if no target is known; else None.
        counts: (B,) numbers of known labels, where each counts; else None.
        texts: B pairs of texts of label and prediction, in place of ``label`` and ``prediction``; else None.
    """

    samples: Tensor
    correct: Tensor
    label: Tensor
    prediction: Tensor
    errors: Tensor | None = None
    counts: Tensor | None = None
    texts: list[tuple[str, str]] | None = None

    @classmethod
    def of(cls, samples: Tensor, label: Tensor, prediction: Tensor, multilabel: bool) -> EvaluatedSamples:
        """Make it of labels and predictions (B, L), where unknown labels are negative."""
        known = label >= 0
        correct = (known & (label == prediction)).sum(dim=1).double() / known.sum(dim=1)  # 0 / 0 is NaN
        if multilabel:
            return cls(samples, correct, (label == 1).nonzero(), (prediction == 1).nonzero())
        rows = torch.arange(len(samples))
        label, prediction = (torch.stack([rows, of[:, 0].long()], dim=1) for of in (label, prediction))
        return cls(samples, correct, label[known[:, 0]], prediction)

    @classmethod
    def of_many(
        cls, samples: Tensor, sums: Tensor, counts: Tensor, texts: list[tuple[str, str]], errors: bool
    ) -> EvaluatedSamples:
        """Make it of samples with many labels.

        Args:
            samples: (B,) indices.
            sums: (B,) numbers of right labels, or sums of absolute errors.
            counts: (B,) numbers of known labels.
            texts: Texts of label and prediction.
            errors: Whether sums are of errors.
        """
        means, none = sums.double() / counts, torch.zeros(0, 2, dtype=torch.long)  # 0 / 0 is NaN
        unknown = torch.full_like(means, math.nan)
        return cls(samples, unknown if errors else means, none, none, means if errors else None, counts, texts)


def samples_of(module: Any, batch: Batch, outputs: Tensor, index: Tensor) -> EvaluatedSamples | None:
    """Return the samples of a batch, or None if there is no prediction for each label.

    Args:
        module: The evaluated module.
        batch: The batch, as the module reads it.
        outputs: What ``test_step`` returned, (B, ...).
        index: (B,) numbers of the samples.
    """
    task = getattr(module, "task", "multiclass")
    if outputs.is_floating_point() != (task == "regression"):
        return None
    if getattr(module, "class_dim", None) is not None:
        return _dense(module, task, batch, outputs, index)
    if task == "regression":
        return _regressed(batch.y, outputs, index)
    size, y = len(batch), None if batch.y is None else _labels(batch.y, task)
    predicted = outputs.reshape(size, -1).cpu()
    labels = torch.full_like(predicted, -1)
    labels = labels if y is None else torch.where(is_labeled(y), y, -1).reshape(size, -1).cpu()
    if labels.shape != predicted.shape or (task != "multilabel" and predicted.shape[1] != 1):
        return None  # no prediction of one class for each sample
    return EvaluatedSamples.of(index, labels, predicted, task == "multilabel")


def _labels(y: Tensor, task: str) -> Tensor:
    """Return labels as integers, -100 where they are not known; targets of the regression task as they are."""
    if task == "multiclass":
        return class_labels(y)
    if task == "regression" or not y.is_floating_point():
        return y
    return torch.where(y.isnan(), IGNORE_INDEX, (y > 0.5).long())


def _regressed(y: Tensor | None, outputs: Tensor, index: Tensor) -> EvaluatedSamples | None:
    size = len(outputs)
    values = outputs.reshape(size, -1).cpu().double()
    if y is not None and y.numel() != values.numel():
        return None  # labels of the project's own
    known = torch.zeros_like(values, dtype=torch.bool) if y is None else is_labeled(y).reshape(size, -1).cpu()
    target = torch.zeros_like(values) if y is None else y.reshape(size, -1).cpu().double()
    errors = (values - target).abs().masked_fill(~known, 0).sum(dim=1)
    texts = [
        (_numbers(target[row], known[row]), _numbers(values[row], torch.ones_like(known[row]))) for row in range(size)
    ]
    return EvaluatedSamples.of_many(index, errors, known.sum(dim=1), texts, errors=True)


def _numbers(values: Tensor, known: Tensor) -> str:
    """Return values as text, empty where they are not known; of many values their number and hash."""
    if not known.any():
        return ""
    if len(values) > _MOST_VALUES:
        return _digest(values.masked_fill(~known, math.nan))
    return ";".join(
        f"{value:.6g}" if there else "" for value, there in zip(values.tolist(), known.tolist(), strict=True)
    )


def _digest(values: Tensor) -> str:
    """Return the number of labels and a hash of them."""
    values = values.double() if values.is_floating_point() else values.long()
    return f"{len(values)} labels {xxhash.xxh3_64_hexdigest(values.contiguous().numpy().tobytes())}"


def _dense(module: Any, task: str, batch: Batch, outputs: Tensor, index: Tensor) -> EvaluatedSamples | None:
    """Return dense samples. Positions count as in the module's metrics."""
    values = outputs if task in ("multilabel", "regression") else outputs.unsqueeze(module.class_dim)
    size = len(batch)
    numbered = replace(batch, index=torch.arange(size, device=outputs.device), candidates=None, soft=None)
    try:
        rows, found = module.to_rows(numbered, values)
    except InputError:
        return None
    found, sample, y = found.cpu(), rows.index.cpu(), None if rows.y is None else _labels(rows.y, task).cpu()
    if y is None:
        known = torch.zeros_like(found, dtype=torch.bool)
        y = torch.zeros_like(found)
    else:
        y = y.reshape(len(found), -1)
        if y.shape != found.shape:
            return None
        known = is_labeled(y)
    score = (found.double() - y.double()).abs() if task == "regression" else (found == y).double()
    score = score.masked_fill(~known, 0).sum(dim=1)
    sums = torch.zeros(size, dtype=torch.double).index_add_(0, sample, score)
    counts = torch.zeros(size, dtype=torch.long).index_add_(0, sample, known.sum(dim=1))
    parts = torch.split(y, torch.bincount(sample, minlength=size).tolist())  # rows of a sample follow one another
    texts = [(_digest(part.flatten()) if count else "", "") for part, count in zip(parts, counts.tolist(), strict=True)]
    return EvaluatedSamples.of_many(index, sums, counts, texts, errors=task == "regression")


def predictions_of(batches: Iterable[EvaluatedSamples], names: Sequence[str]) -> dict[int, Prediction]:
    """Return the prediction of each sample by its index.

    Args:
        batches: The samples.
        names: Names of the classes; empty if they are not known.
    """
    found = {}
    for batch in batches:
        pairs = _texts(batch, names) if batch.texts is None else batch.texts
        errors = [math.nan] * len(pairs) if batch.errors is None else batch.errors.tolist()
        counts = [1] * len(pairs) if batch.counts is None else batch.counts.tolist()
        columns = batch.samples.tolist(), pairs, batch.correct.tolist(), errors, counts
        for index, (label, prediction), correct, error, count in zip(*columns, strict=True):
            if index >= 0:
                found[index] = Prediction(index, label, prediction, correct, error=error, labels=count)
    return found


def _texts(batch: EvaluatedSamples, names: Sequence[str]) -> list[tuple[str, str]]:
    texts: list[tuple[list[str], list[str]]] = [([], []) for _ in range(len(batch.samples))]
    for side, pairs in enumerate((batch.label, batch.prediction)):
        for row, number in pairs.tolist():
            texts[row][side].append(_name(number, names))
    return [(";".join(label), ";".join(prediction)) for label, prediction in texts]


def _name(number: int, names: Sequence[str]) -> str:
    return "" if number < 0 else str(names[number]) if number < len(names) else str(number)
