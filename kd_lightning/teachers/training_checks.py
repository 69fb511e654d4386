"""Checks of the labels and the gradients that a student is trained with. Each check returns one finding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task
from kd_lightning.teachers.findings import Finding

NEGLIGIBLE = 100.0  # ratio of two gradient norms
DOMINANT = 10.0
"""Ratio of soft and hard gradients above which labels hardly count."""
MOSTLY_LABELED = 0.5
"""Share of labeled training samples from which on labels should count."""
ENOUGH = 100
"""Labels of a class from which on unlabeled samples are not needed."""


def gradients(
    terms: Mapping[str, tuple[float, Tensor]],
    student: nn.Module,
    *,
    labeled: bool = True,
    of_pseudo_labels: Collection[str] = (),
) -> Finding:
    """Compare the gradient norms of the weighted loss terms on the student.

    Args:
        terms: ``{name: (weight, value)}``, as a module's ``losses(batch)`` returns them.
        student: The network that trains.
        labeled: Whether the batch has labels. Without labels, a term may be 0.
        of_pseudo_labels: Names of terms that are 0 until a pseudo-label is accepted, as with most new students.
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
    try:
        norms = gradient_norms(terms, parameters)
    except InputError as error:
        return Finding(name, f"not checked: {error}")
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
    if counted[weak] == 0 and weak in of_pseudo_labels:
        return Finding(name, f"{text}; no pseudo-label of this batch is accepted yet")
    if counted[weak] == 0:
        hint = f"{weak} has no gradient: does its loss depend on the student? is there something to learn from it?"
        return Finding(name, text, hint if labeled else None)
    ratio = counted[strong] / counted[weak]
    text += f"; {strong} {ratio:.3g} times {weak}"
    hint = f"{weak} is negligible beside {strong}: change their weights, or rescale a loss"
    return Finding(name, text, hint, reason="balance") if ratio >= NEGLIGIBLE else Finding(name, text)


def gradient_norms(
    terms: Mapping[str, tuple[float, Tensor]], parameters: Sequence[Tensor], scale: float = 1.0
) -> dict[str, float]:
    """Return the norm of the gradient of each weighted term. The graph stays, so that a backward pass may follow.

    Args:
        terms: ``{name: (weight, value)}``.
        parameters: What the gradients are of.
        scale: Factor of the terms in the backward pass, which norms do not have: small gradients of half precision
            would vanish.

    Raises:
        InputError: If a reentrant checkpoint hides the gradients of parameters.
    """
    norms = {}
    if any(
        type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes(value for _, value in terms.values())
    ):
        raise InputError("reentrant checkpointing hides the gradient of a single term; use_reentrant=False does not")
    for term, (weight, value) in terms.items():
        found: Sequence[Tensor | None] = []
        if value.requires_grad:
            found = torch.autograd.grad(scale * weight * value, parameters, retain_graph=True, allow_unused=True)
        norms[term] = math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None)) / scale
    return norms


def _nodes(values: Iterable[Tensor]) -> Iterator[Any]:
    """Yield all nodes of the graphs of some tensors."""
    seen: set[Any] = set()
    rest = [value.grad_fn for value in values]
    while rest:
        node = rest.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            rest.extend(following for following, _ in node.next_functions)


def balance(courses: Mapping[str, Sequence[float]], soft: Collection[str], labeled: float | None, when: str) -> Finding:
    """Compare the gradients of soft and hard terms over training.

    KDLoss has the factor T², so that the soft gradient does not shrink with the temperature; ``soft_weight`` alone
    decides the balance. There is a warning if a soft term has more than 10 times the gradient of the hard one most of
    the time, and at least half of the training samples are labeled: then their labels hardly count.

    Args:
        courses: Gradient norms of each weighted term, by its name, at the same times.
        soft: Names of the soft terms.
        labeled: Share of the training samples that are labeled. None if it is not known.
        when: Where the norms come from.
    """
    name = "gradients over training"
    others = [courses[term] for term in soft if term in courses]
    both = others and "hard" in courses
    pairs = [(max(values), base) for base, *values in zip(courses["hard"], *others, strict=True)] if both else []
    ratios = [strong / base for strong, base in pairs if base > 0 and math.isfinite(strong) and math.isfinite(base)]
    if not ratios:
        return Finding(name, "not checked: there are no gradients of a hard and a soft term")
    middle = statistics.median(ratios)
    text = f"soft {ratios[0]:.3g} times hard at first, {ratios[-1]:.3g} times at the end"
    text += f", {middle:.3g} times in the middle of {len(ratios)} measurements" if len(ratios) > 2 else ""
    text += f" ({when})"
    often = sum(ratio > DOMINANT for ratio in ratios) > len(ratios) / 2
    if not often or (labeled is not None and labeled < MOSTLY_LABELED):
        return Finding(name, text)
    hint = "labels hardly count beside the teacher: lower soft_weight (KDLoss has the factor T², so that another "
    hint += "temperature does not change the balance)"
    return Finding(name, text, hint, reason="balance")


def pool(labeled: int, unlabeled: int, classes: int, hidden: int = 0) -> Finding:
    """Count the unlabeled samples for each labeled one.

    A teacher adds most where labels are missing. There is a warning if there are no unlabeled samples, and fewer than
    100 labels for each class.

    Args:
        labeled: Number of labeled training samples.
        unlabeled: Number of unlabeled ones.
        classes: Number of classes.
        hidden: Number of samples of the training part whose labels training may not see, and that it leaves out.
    """
    name = "unlabeled samples"
    text = f"{unlabeled} beside {labeled} labeled ones"
    if labeled and unlabeled:
        text += f", {unlabeled / labeled:.3g} for each"
    if unlabeled or labeled >= ENOUGH * classes:
        return Finding(name, text)
    hint = "unlabeled pictures, of any kind, are where a teacher helps most: "
    if hidden:
        text += f"; {hidden} more of the training part are left out"
        return Finding(name, text, f"{hint}train on the rest, too", reason="few")
    return Finding(name, text, f"{hint}name a folder of them as the source's `unlabeled`", reason="few")


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
