"""The verdict of doctor: which single reason is the most probable one if a teacher does not help."""

from __future__ import annotations

from collections.abc import Sequence

from kd_lightning.teachers.findings import Finding

REASONS = {
    "class order": "the teacher's classes are in another order than the labels",
    "normalisation": "the teacher was trained on inputs of another scale",
    "no better": "the teacher is no better than the student alone",
    "memory": "the teacher has memorised its training samples, and has little to add to their labels",
    "poor": "the teacher is poor on these data",
    "views": "the training views are too strong for the teacher",
    "wrong": "the teacher errs on training samples whose labels are known",
    "one-hot": "the soft targets are one-hot, so that they hold no more than labels",
    "uniform": "the soft targets are uniform, so that classes hardly differ",
    "gap": "the student does not follow the teacher, so that it has not learned what it is taught",
    "balance": "one term of the loss leaves no room for the other",
    "level": "the teacher is as good as the student alone, which leaves little to gain",
    "few": "there are few labels, and no unlabeled samples on which a teacher could add something",
}
"""Reasons by name, in the order of :func:`verdict`."""


def verdict(findings: Sequence[Finding], *, helps: bool | None = None, measured: bool | None = True) -> Finding:
    """Name the most probable reason.

    The rule: of the reasons that a finding is evidence of, the first one in the order of :data:`REASONS` counts. A
    cause stands before its effects:

    - Another class order or scale of the inputs makes the teacher err everywhere.
    - A teacher that is no better than the student alone has nothing to teach, whatever its soft targets are like. If it
      is no worse either, it does not explain that the student with it is worse: then other reasons count first.
    - A teacher that has memorised its samples is poor on others, and its soft targets are one-hot.
    - A teacher that is poor on validation samples, or on training views, errs on training samples.
    - Errors on training samples stand before the form of the soft targets.
    - A student that does not follow, and gradients out of balance, may have all of these as their cause.
    - A teacher that is level with the student, and few samples, come last: they leave little to gain, but do no harm.

    Args:
        findings: All findings.
        helps: Whether finished runs show that the teacher helps; then no reason is named. Default: None, which means
            that it is not known.
        measured: Whether there are finished runs with the teacher and without it; if not, the text says how to make
            them, since they decide between reasons. None if ``experiment`` cannot make them.
    """
    name = "verdict"
    if helps:
        return Finding(name, "the teacher helps: the student with it is better than the one without")
    order = [*REASONS]
    found = sorted((one for one in findings if one.reason is not None), key=lambda one: order.index(str(one.reason)))
    if not found:
        text = "no reason found why the teacher should not help"
        if measured is not None:
            text += "; `kd-lightning experiment CONFIG --tune 20` tunes the student with it and without it alike"
        return Finding(name, text if helps is None else text.replace("should", "does"))
    first = found[0]
    start = "if the teacher does not help, the most probable reason" if helps is None else "the most probable reason"
    text = f"{start}: {REASONS[str(first.reason)]} (see {first.name})"
    if measured is False and helps is None:
        text += (
            "; `kd-lightning experiment CONFIG` trains the student with it and without it, and doctor then compares "
        )
        text += "these runs"
    return Finding(name, text, severity="warning", reason=first.reason)
