"""Checks of the labels and the gradients that a student is trained with. Each check returns one finding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.losses.base import Task
from kd_lightning.teachers.findings import Finding

NEGLIGIBLE = 100.0  # ratio of two gradient norms


def gradients(terms: Mapping[str, tuple[float, Tensor]], student: nn.Module, *, labeled: bool = True) -> Finding:
    """Compare the gradient norms of the weighted loss terms on the student.

    Args:
        terms: ``{name: (weight, value)}``, as a module's ``losses(batch)`` returns them.
        student: The network that trains.
        labeled: Whether the batch has labels. Without labels, a term may be 0.
    """
    name = "gradients"
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        return Finding(
            name,
            "no parameter of the student requires a gradient",
            "set requires_grad of its parameters",
            severity="error",
        )
    norms = {}
    for term, (weight, value) in terms.items():
        found: Sequence[Tensor | None] = []
        if value.requires_grad:
            found = torch.autograd.grad(weight * value, parameters, retain_graph=True, allow_unused=True)
        norms[term] = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))
    each = (f"{term} {norm:.3g} (weight {terms[term][0]:.3g})" for term, norm in norms.items())
    text = f"norms on the student: {', '.join(each)}"
    counted = {term: norm for term, norm in norms.items() if terms[term][0] != 0}
    bad = [term for term, norm in norms.items() if not math.isfinite(norm)]
    if bad:
        return Finding(name, text, f"{' and '.join(bad)}: not finite, so nothing is learned", severity="error")
    if not any(norms.values()):
        hint = "the student gets no gradient: are its layers detached or dead, or its last weights 0?"
        return Finding(name, text, hint, severity="error")
    if len(counted) < 2:
        return Finding(name, text)
    weak, strong = min(counted, key=counted.__getitem__), max(counted, key=counted.__getitem__)
    if counted[weak] == 0:
        hint = f"{weak} has no gradient: does its loss depend on the student? is there something to learn from it?"
        return Finding(name, text, hint if labeled else None)
    ratio = counted[strong] / counted[weak]
    text += f"; {strong} {ratio:.3g} times {weak}"
    hint = f"{weak} is negligible beside {strong}: change their weights, or rescale a loss"
    return Finding(name, text, hint if ratio >= NEGLIGIBLE else None)


def labels(
    y: Tensor | None,
    count: int,
    classes: int,
    task: Task,
    what: str,
    *,
    taught: bool,
    expected: int | None = None,
    positions: Tensor | None = None,
) -> Finding:
    """Count the samples that are labeled for training, and their classes.

    Args:
        y: Labels; None if there are none.
        count: Number of samples.
        classes: Number of the student's outputs.
        task: Of the labels.
        what: Name of the samples in the text.
        taught: Whether there is a teacher, so that training can do without labels.
        expected: Number of outputs that the student must have. If None, it is unknown.
        positions: Labels of the positions of a training batch, where a sample has many.
    """
    known = torch.zeros(count, dtype=torch.bool) if y is None else is_labeled(y).reshape(len(y), -1).any(dim=1)
    text = f"{int(known.sum())} of {len(known)} {what} labeled"
    if expected not in (None, classes):
        return Finding("labels", text, f"the student has {classes} outputs, but must have {expected}", "error")
    if y is None or not known.any():
        hint = None if taught else "there is nothing to learn from"
        return Finding("labels", text, hint, "info" if taught else "error")
    if positions is not None and task == "multiclass" and positions.ndim == 1:
        there = positions[is_labeled(positions)]
        text += f", {len(torch.unique(there))} of {classes} classes at {len(there)} positions of a training batch"
    elif positions is None and task == "multiclass":
        text += f", {len(torch.unique(y[known]))} of {classes} classes"
    return Finding("labels", text)
