"""Checks of what a teacher returns for the very views that it teaches from. Each check returns one finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from kd_lightning.losses.base import Task
from kd_lightning.teachers.checks import soft_targets
from kd_lightning.teachers.decisions import Change, Decisions, between_samples, decisions_of, on_same_samples
from kd_lightning.teachers.findings import Finding, LabeledLogits
from kd_lightning.teachers.intervals import share_interval
from kd_lightning.teachers.regression_checks import LEAST

LARGE = 0.10
"""A difference of accuracies from here on is large, if its interval excludes 0 as well."""
WRONG = 0.10
"""Share of wrong decisions from which on labels had better overrule the teacher: the interval's lower end counts."""
LABELED = 0.20
"""Share of labeled training samples; below it labels overrule too few decisions to matter."""
EXPLAINED = 0.5
"""Share of the wrong decisions under training views that the views must explain to be the reason."""
_SHOWN = 3  # confusions


def memory(seen: Decisions, held_out: Decisions, *, same_views: bool) -> Finding:
    """Compare the teacher on the training samples, which it may have learned from, with samples that it has not seen.

    A teacher that has memorised its training samples returns little more than their labels. There is a warning if it is
    at least 10 points better on the training samples, the 95 % interval of the difference excludes 0, and both have at
    least 10 samples.

    Args:
        seen: Its decisions on labeled training samples under training views.
        held_out: Its decisions on validation samples.
        same_views: Whether the validation samples are under training views, too. If not, views that are hard for the
            teacher hide a part of the difference.
    """
    name = "memory"
    if min(len(seen), len(held_out)) < LEAST:
        counts = f"{len(seen)} labeled training samples and {len(held_out)} validation samples"
        return Finding(name, f"not checked: {counts} are too few to judge")
    gap = between_samples(seen, held_out)
    text = f"right on {seen.describe('labeled training samples')} under training views, "
    text += f"mean confidence {float(seen.confidence.mean()):.1%}; on {held_out.describe('validation samples')} "
    text += f"{'under the same views' if same_views else 'under evaluation transforms'}, mean confidence "
    text += f"{float(held_out.confidence.mean()):.1%}: {gap}"
    if gap.value < LARGE or gap.low <= 0:
        return Finding(name, text)
    hint = "it has memorised its training samples, so that its soft targets are little more than their labels: teach "
    hint += (
        "each sample by a teacher that has not seen it, `kd-lightning crossfit TEACHER_CONFIG`, or lower soft_weight"
    )
    return Finding(name, text, hint, reason="memory")


def wrong_decisions(
    views: LabeledLogits,
    task: Task,
    names: Sequence[str] | None = None,
    *,
    labeled: float | None = None,
    noisy: bool = False,
    change: Change | None = None,
) -> Finding:
    """Measure the share of wrong decisions on training views whose labels are known, and list the commonest ones.

    A student that has these labels learns the teacher's errors instead. There is a warning if the lower end of the
    share's 95 % interval is at least 10 %, and at least 20 % of the training samples are labeled. There is none if
    finished runs show that the student loses more where the teacher is right: then its errors are not what harms.

    Args:
        views: The teacher's logits of labeled training samples under training views, and the labels that training sees.
            ``sample`` names the views of a sample.
        task: Of the labels; not regression.
        names: Names of the classes. Default: None, which means their numbers.
        labeled: Share of the training samples that are labeled. Default: None, which means that it is not known.
        noisy: Whether the labels may be wrong themselves.
        change: What finished runs with the teacher and without it show on these rows. Default: None, which means that
            it is not known.
    """
    name = "wrong decisions"
    wrong = ~views.correct
    samples = views.samples
    if samples < LEAST:
        return Finding(name, f"not checked: {samples} labeled training samples are too few to judge")
    share = float(wrong.double().mean())
    low, high = share_interval(share, samples)
    what = f"decisions on {samples} labeled training samples" if len(wrong) != samples else f"{samples} labeled samples"
    text = f"{share:.1%} of the {what} under training views wrong (95% interval {low:.1%} to {high:.1%})"
    if wrong.any():
        text += f", mean confidence {decisions_of(views, task).wrong_confidence:.1%} when wrong"
        if task == "multiclass" and (most := _confusions(views, names)):
            text += f"; most often {', '.join(most)}"
    if noisy:
        return Finding(name, f"{text}; not judged, since labels may be wrong, too")
    if low < WRONG:
        return Finding(name, text)
    if labeled is not None and labeled < LABELED:
        return Finding(name, f"{text}; {labeled:.1%} of the training samples are labeled, too few to overrule it")
    if change is not None:
        text += f"; the student with the teacher against the one alone: {change}"
        if not change.errors_harm:
            return Finding(name, f"{text}; so its errors are not what harms")
    if task == "multilabel":
        return Finding(name, text, "lower soft_weight, so that labels count more where they are known", reason="wrong")
    hint = "labels are known where it errs: let them overrule it by ConditionalLoss, or lower soft_weight"
    return Finding(name, text, hint, reason="wrong")


def _confusions(views: LabeledLogits, names: Sequence[str] | None) -> list[str]:
    """Return the commonest pairs of label and decision, with their share of all decisions."""
    wrong = ~views.correct
    pairs = Counter(zip(views.y[wrong].tolist(), views.logits[wrong].argmax(dim=1).tolist(), strict=True))
    numbers = {number for pair in pairs for number in pair}
    of = {number: str(names[number]) if names and number < len(names) else str(number) for number in numbers}
    total = len(views.correct)
    most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    return [f"{of[label]} taken for {of[found]} ({count / total:.1%})" for (label, found), count in most]


def view_strength(plain: Decisions, views: Decisions, what: str) -> Finding:
    """Compare the teacher under training views with the same samples under evaluation transforms.

    There is a warning if it loses at least 10 points, the 95 % interval of the loss excludes 0, and there are at least
    10 samples. It is a reason only if at least half of the wrong decisions under training views are lost by the views.

    Args:
        plain: Its decisions under evaluation transforms.
        views: Its decisions under training views, on the same samples.
        what: Name of the samples.
    """
    name = "view strength"
    if len(plain) < LEAST:
        return Finding(name, f"not checked: {len(plain)} {what} are too few to judge")
    loss = on_same_samples(plain, views)
    text = f"right on {views.describe(what)} under training views, {plain.accuracy:.1%} under evaluation transforms: "
    text += str(on_same_samples(views, plain))
    if loss.value < LARGE or loss.low <= 0:
        return Finding(name, text)
    hint = "training views are too strong for it: make them milder, such as a crop with a larger lowest `scale`, or "
    hint += "train the teacher on these views"
    explains = loss.value >= EXPLAINED * (1 - views.accuracy)
    return Finding(name, text, hint, reason="views" if explains else None)


def soft_targets_of_views(logits: Tensor, soft_loss: nn.Module, task: Task, sample: Tensor | None) -> Finding:
    """Check the entropy of the soft targets of training views, see :func:`~kd_lightning.teachers.checks.soft_targets`.

    On samples that a teacher has memorised, they may be one-hot while those of validation samples are not.
    """
    found = soft_targets(logits, soft_loss, task, sample)
    hint = found.hint
    if hint is not None and found.reason == "one-hot":
        hint += ", standardize the logits, or cross-fit the teacher (`kd-lightning crossfit TEACHER_CONFIG`)"
    return replace(found, name="soft targets of views", hint=hint)
