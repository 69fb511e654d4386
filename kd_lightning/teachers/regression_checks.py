"""Check of a teacher of the regression task: its error against that of the labels' mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_lightning.batch import is_labeled
from kd_lightning.teachers.findings import Finding, LabeledLogits

SIGMAS = 3.0  # a difference counts from so many standard errors on
FEW = 100  # labeled samples; with fewer a teacher is not compared with chance
LEAST = 10  # samples; with fewer there is no warning at all
_RELATED = 0.25  # gain in R2 from which on a linear map of the outputs is named


def error(teacher: LabeledLogits, student: LabeledLogits | None, what: str) -> Finding:
    """Compare the teacher's error with that of the labels' mean, and with the present student's.

    Training is pointless if the mean of the labels is as near to them as the teacher is (R2 is not above 0). Within 3
    standard errors of that there is a warning. Outputs of several units are compared in units of their own spread. All
    positions of a dense sample count as one. With fewer than 100 labeled samples there is no error.

    Args:
        teacher: The teacher's values and the labels.
        student: The student's. If None, the student is not compared.
        what: Name of the labels in the text.
    """
    known = is_labeled(teacher.y)
    n, samples = int(known.sum()), teacher.samples
    if not n:
        return Finding("teacher", f"not checked: there are no {what}")
    if not teacher.logits.isfinite().all():
        text = f"its outputs are not finite for {int((~teacher.logits.isfinite()).any(dim=1).sum())} of {len(known)}"
        return Finding("teacher", text, "check its weights, and whether its inputs are finite", severity="error")
    mean = teacher.y.nanmean(dim=0)
    squares, of_mean = (teacher.y - teacher.logits).square(), (teacher.y - mean).square()
    spread = of_mean.nanmean(dim=0)
    varied = spread > 0
    rmse, base = (math.sqrt(float(part.nanmean())) for part in (squares, of_mean))
    of_samples = "" if n == samples else f" of {samples} samples"
    text = f"RMSE {rmse:.3g} on {n} {what}{of_samples}, {base:.3g} with their mean"
    if not varied.any():
        return Finding("teacher", f"{text}; these are constant, so that nothing can be compared")
    r2 = float((1 - squares.nanmean(dim=0) / spread)[varied].mean())
    text += f" (R2 {r2:.3g})"
    if student is not None:
        text += f", present student {math.sqrt(float((student.y - student.logits).square().nanmean())):.3g}"
    gain = _of_rows((of_mean - squares)[:, varied] / spread[varied], teacher.sample)
    if not is_above_zero(gain):
        if samples < FEW:
            text += f"; {samples} labeled samples are too few to judge"
            hint = "it is poor on these; check it on more labeled samples" if samples >= LEAST and r2 <= 0 else None
            return Finding("teacher", text, hint)
        hint = _linear_map(teacher, varied, r2)
        if r2 > 0:
            return Finding(
                "teacher", text, hint or "it is hardly better than the labels' mean; check how it was trained"
            )
        hint = hint or "the labels' mean is as near: is it trained? are its weights, inputs and units the right ones?"
        return Finding("teacher", text, hint, severity="error")
    if student is not None:
        ahead = squares - (student.y - student.logits).square()
        if samples >= FEW and is_above_zero(_of_rows(ahead[:, varied] / spread[varied], teacher.sample)):
            return Finding("teacher", text, "the student is better already; use a better teacher, or lower soft_weight")
    return Finding("teacher", text, _linear_map(teacher, varied, r2) if samples >= FEW else None)


def _linear_map(teacher: LabeledLogits, varied: Tensor, r2: float) -> str | None:
    """Return a hint if a linear map of the outputs is much nearer to the labels than the outputs are."""
    found = []
    for output in varied.nonzero().flatten().tolist():
        known = is_labeled(teacher.y[:, output])
        x, y = teacher.logits[known, output].double(), teacher.y[known, output].double()
        slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var(unbiased=False).clamp_min(1e-30))
        rest = (y - y.mean() - slope * (x - x.mean())).square().mean() / y.var(unbiased=False)
        found.append((float(1 - rest), slope, float(y.mean() - slope * x.mean())))
    best = sum(one for one, _, _ in found) / len(found)
    if best - max(r2, 0.0) < _RELATED:
        return None
    text = f"a linear map of its outputs has R2 {best:.3g}: are labels and outputs in one unit?"
    return f"{text} labels are about {found[0][1]:.3g} x output {found[0][2]:+.3g}" if len(found) == 1 else text


def _of_rows(values: Tensor, sample: Tensor | None) -> Tensor:
    """Return the mean of each row (N, D), where NaN does not count; of each sample if it has several rows."""
    means = values.nanmean(dim=1)
    there = ~means.isnan()
    return mean_of_samples(means[there], None if sample is None else sample[there])


def mean_of_samples(values: Tensor, sample: Tensor | None) -> Tensor:
    """Return the means (S,) of values (N,) over the rows of each sample; the values as they are without ``sample``."""
    if sample is None:
        return values
    _, place, counts = torch.unique(sample, return_inverse=True, return_counts=True)
    means: Tensor = torch.zeros(len(counts), dtype=torch.double).index_add_(0, place, values.double()) / counts
    return means


def is_above_zero(values: Tensor) -> bool:
    """Whether the mean of independent values is above 0 by more than 3 standard errors."""
    if len(values) < 2:
        return False
    mean, deviation = float(values.double().mean()), float(values.double().std())
    return mean > 0 and mean > SIGMAS * deviation / math.sqrt(len(values))
