"""Parts of the report about why a teacher does not help, and about the gradients of its terms."""

from __future__ import annotations

import math
from typing import Any

from kd_lightning.report.charts import curves
from kd_lightning.report.facts import Facts
from kd_lightning.report.numbers import count_text, is_percent
from kd_lightning.report.run_parts import finding_row
from kd_lightning.report.why import GRADIENT
from kd_lightning.runs.run import Run

_TITLES = {"worse": "Why the teacher harms", "unclear": "Why the teacher does not help"}
_MAY_NOT = "Why the teacher may not help"
_COLORS = ("method", "alone", "teacher", "other1", "other2", "other3")

Context = dict[str, Any] | None


def why_part(facts: Facts) -> Context:
    """The reasons that doctor has found, and their cures, where the method is not better than the student alone.

    Where there are too few samples or seeds for a verdict, a mean that is not better is enough.
    """
    title = _TITLES.get(facts.verdict.kind)
    difference = facts.cast.main.difference
    if facts.verdict.kind == "none" and difference is not None and difference.mean is not None:
        title = _MAY_NOT if is_percent(facts.figure) and difference.mean <= 0 else None
    if title is None or facts.cast.main.method != "teacher":
        return None
    last = next((one for one in reversed(facts.findings) if one.name == "verdict"), None)
    if last is None:  # of a module without soft targets
        return None
    found = [one for one in facts.findings if one is not last and one.hint is not None]
    first = [one for one in found if one.reason is not None and one.reason == last.reason]
    others = [one for one in found if one not in first]
    return {
        "heading": title,
        "verdict": last.text[:1].upper() + last.text[1:],
        "findings": [*map(finding_row, [*first, *others])],
        "name": facts.cast.main.label,
        "run": facts.cast.main.run.folder.as_posix(),
    }


def balance_part(facts: Facts) -> Context:
    """The norms of the gradients of all terms, as the callback GradientBalance logs them, of all seeds."""
    runs = [*facts.cast.main.group.runs.values()]
    names = [*dict.fromkeys(key for run in runs for row in run.rows() for key in row)]
    names = [name for name in names if name.startswith(GRADIENT)]
    shown = {}
    for color, name in zip(_COLORS, names, strict=False):
        if seeds := [points for points in (_course(run, name) for run in runs) if len(points) > 1]:
            shown[color, name.removeprefix(GRADIENT)] = seeds
    if not shown:
        return None
    finding = None
    try:
        finding = next((one for one in facts.findings if one.name == "gradients over training"), None)
    except Exception:  # without the data, the course is there all the same
        finding = None
    return {
        "svg": curves(shown, "gradients", "norm of the gradient"),
        "seeds": count_text(len(runs), "seed"),
        "finding": "" if finding is None else finding.text,
        "hint": "" if finding is None else finding.hint or "",
    }


def _course(run: Run, name: str) -> list[tuple[float, float]]:
    points = {row["step"]: row[name] for row in run.rows() if name in row}
    return [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]
