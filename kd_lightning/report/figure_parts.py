"""Parts of the report about figures: accuracy, cost, learning curves, classes, calibration, pseudo-labels."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import find_rounds, read_round
from kd_lightning.pseudo_labels.values_ledger import holds_values, read_values
from kd_lightning.report.calibration import reliability_bins
from kd_lightning.report.cast import Role
from kd_lightning.report.charts import Series, curves, dot_plot, reliability, rounds
from kd_lightning.report.classes import class_rows, shown_rows
from kd_lightning.report.facts import Facts
from kd_lightning.report.numbers import (
    MISSING,
    TITLES,
    change_text,
    count_text,
    interval_text,
    is_percent,
    ratio_text,
    si_text,
    value_text,
)
from kd_lightning.report.verdict import samples_text
from kd_lightning.runs.run import Run

_MOST_ROUNDS = 10  # in the table
_COSTS = (("parameters", "parameters"), ("size_kb", "weights, KB"), ("macs", "MACs"), ("latency_ms", "latency, ms"))
_WORDS = {"size_kb": "smaller", "macs": "fewer MACs", "latency_ms": "faster", "parameters": "fewer parameters"}

Context = dict[str, Any] | None


def accuracy_part(facts: Facts) -> Context:
    """The figure of each role, a dot for each seed, and the differences."""
    figure, scale = facts.figure, 100 if is_percent(facts.figure) else 1
    title = TITLES.get(figure, figure) + (", %" if is_percent(figure) else "")
    comparison = facts.cast.comparison
    names = [None if base is None else facts.cast.roles[base].label for base in comparison.bases]
    has_bases = len({*names} - {None}) > 1
    compared = {*comparison.contest.methods, *(base for base in comparison.bases if base is not None)}
    compared = compared if comparison.methods else set()
    series, rows = [], []
    for role, base in zip(facts.cast.roles, names, strict=True):
        values, found = role.group.values(figure), role.difference
        if values:
            series.append(Series(role.kind, role.label, [scale * value for value in values]))
        spread = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        rows.append(
            {
                "kind": role.kind,
                "label": role.label,
                "name": f"against {base}" if has_bases and base else role.group.name,
                "value": f"{value_text(statistics.mean(values), figure, 2).removesuffix(' %')}{spread}"
                if values
                else "-",
                "seeds": len(values),
                "samples": _span(role.group.samples),
                "steps": _span(_steps(role)),
                "change": change_text(found.mean, figure) if found and found.mean is not None else "",
                "over_seeds": interval_text(found.over_seeds, figure) if found and found.over_seeds else "",
                "over_samples": interval_text(found.over_samples, figure) if found and found.over_samples else "",
                "verdict": (found.verdict if found else None) or "",
            }
        )
    if not series:
        return None
    if (teacher := facts.file_teacher) is not None and figure == "accuracy":
        series.append(Series("teacher", "teacher", [100 * teacher.accuracy]))
        value, empty = f"{100 * teacher.accuracy:.2f}", dict.fromkeys(("change", "over_seeds", "over_samples"), "")
        row = {"kind": "teacher", "label": "teacher", "name": "not a run; run for this report", "seeds": 1, **empty}
        row["steps"] = ""
        rows.append({**row, "value": value, "samples": f"{teacher.samples:,}", "verdict": ""})
    return {
        "heading": "Error" if figure == "mae" else "Accuracy",
        "svg": dot_plot(series, title),
        "title": title,
        "rows": rows,
        "measured": samples_text(facts.cast),
        "base": facts.cast.roles[0].label,
        "several": len(comparison.methods),
        "has_samples": not comparison.methods or len({row["samples"] for row in rows if row["samples"]}) > 1,
        "has_steps": len({rows[number]["steps"] for number in compared}) > 1,
        "contest": _contest_rows(facts),
        "pairs": comparison.contest.pairs,
        "notes": comparison.notes(),
        "unit": " (points)" if is_percent(figure) else "",
    }


def _steps(role: Role) -> list[int]:
    steps = {step for run in role.group.runs.values() if isinstance(step := run.state.get("step"), int)}
    return sorted({min(steps), max(steps)}) if steps else []


def _contest_rows(facts: Facts) -> dict[str, Any] | None:
    """The differences of the methods of an experiment to the best one; None for a single method."""
    contest, roles = facts.cast.comparison.contest, facts.cast.roles
    if contest.best is None or not contest.to_best:
        return None
    rows = [(roles[number], found) for number, found in contest.to_best.items()]
    return {"best": roles[contest.best].label, "rows": rows}


def _span(sizes: list[int]) -> str:
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else ""


def cost_part(facts: Facts) -> Context:
    """Size, multiply-accumulates and latency of student and teacher, and their ratios."""
    student, teacher = facts.cast.main, facts.cast.find("teacher")
    of_teacher = teacher.group.costs if teacher else facts.file_teacher.costs if facts.file_teacher else {}
    comparison, roles = facts.cast.comparison, facts.cast.roles
    bases = {base for base in comparison.bases if comparison.methods}
    shown = [one for n, one in enumerate(roles) if one.group.costs and one.kind != "alone" and n not in bases]
    shown = shown or [role for role in facts.cast.roles if role.group.costs]
    if not shown:
        return None
    ratios = []
    for key in ("size_kb", "macs", "latency_ms"):
        mine, theirs = student.group.costs.get(key), of_teacher.get(key)
        if student is teacher or not mine or not theirs:
            continue
        slower = mine > theirs
        ratios.append(
            {
                "ratio": ratio_text(*((mine, theirs) if slower else (theirs, mine))),
                "word": {"smaller": "larger", "faster": "slower", "fewer MACs": "more MACs"}[_WORDS[key]]
                if slower
                else _WORDS[key],
                "student": _cost(key, mine),
                "teacher": _cost(key, theirs),
                "share": 100 * mine / max(mine, theirs),
                "teacher_share": 100 * theirs / max(mine, theirs),
            }
        )
    costs = [(role.kind, role.label, role.group.costs) for role in shown]
    costs += [("teacher", "teacher", of_teacher)] if teacher is None and of_teacher else []
    rows = [
        (kind, label, [*(_cost(key, one.get(key)) for key, _ in _COSTS), one["precision"]])
        for kind, label, one in costs
    ]
    return {"ratios": ratios, "rows": rows, "columns": [name for _, name in _COSTS]}


def _cost(key: str, value: float | None) -> str:
    if value is None:
        return MISSING
    return {"size_kb": f"{value:,.1f} KB", "latency_ms": f"{value:.2f} ms"}.get(key) or si_text(value)


def curves_part(facts: Facts) -> Context:
    """Learning curves on the validation part, of all seeds."""
    figure = facts.figure
    drawings = []
    for name in dict.fromkeys((figure, "loss")):
        scale = 100 if is_percent(name) else 1
        by_role = {}
        for role in facts.cast.roles:
            seeds = [_curve(run, f"val/{name}", scale) for run in role.group.runs.values()]
            if seeds := [points for points in seeds if len(points) > 1]:
                by_role[role.kind, role.label] = seeds
        if by_role:
            unit = f"validation {TITLES.get(name, name)}{', %' if is_percent(name) else ''}"
            drawings.append(curves(by_role, f"curve-{name}", unit))
    if not drawings:
        return None
    samples = (_counts(facts.cast.main.run).get("samples") or {}).get("validation")
    measured = f"{count_text(samples, 'validation sample')} of each seed" if samples else "the validation part"
    return {"drawings": drawings, "measured": measured}


def _curve(run: Run, name: str, scale: float) -> list[tuple[float, float]]:
    points = {row["step"]: scale * row[name] for row in run.validations() if name in row}
    return [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]


def _counts(run: Run) -> dict[str, Any]:
    """Return the numbers of samples of a run's parts; empty if they were not written."""
    try:
        found = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def classes_part(facts: Facts) -> Context:
    """Accuracy of each class of all three, and the classes that lose."""
    if facts.figure != "accuracy":
        return None
    rows = class_rows(facts.cast)
    if not rows:
        return None
    kinds = [kind for kind in ("alone", "method", "teacher", facts.cast.main.kind) if kind in rows[0].shares]
    kinds = [*dict.fromkeys(kinds)]
    lost = sorted((row for row in rows if row.lost), key=lambda row: row.change or 0)
    seeds = {facts.label_of(kind): len(role.group.results) for kind in kinds if (role := facts.cast.find(kind))}
    low = min(share for row in rows for share in row.shares.values())
    return {
        "rows": shown_rows(rows),
        "total": len(rows),
        "kinds": [(kind, facts.label_of(kind)) for kind in kinds],
        "lost": lost,
        "compared": {"alone", "method"} <= {*kinds},
        "measured": samples_text(facts.cast),
        "seeds": ", ".join(f"{label} {count_text(count, 'seed')}" for label, count in seeds.items()),
        "low": math.floor(10 * low) / 10 if low > 0.2 else 0.0,
    }


def calibration_part(facts: Facts) -> Context:
    """Reliability diagrams and expected calibration errors."""
    outputs = facts.outputs
    drawings: list[Any] = []
    errors: list[tuple[str, str, str]] = []
    for kind in ("alone", "method", "teacher", facts.cast.main.kind):
        if kind not in outputs.probabilities or any(kind == done for done, *_ in errors):
            continue
        bins, error = reliability_bins(outputs.probabilities[kind], outputs.labels)
        label = facts.label_of(kind)
        drawings.append(reliability(bins, kind, label, error, len(outputs.labels)))
        errors.append((kind, label, f"{100 * error:.2f} %"))
    return {"drawings": drawings, "errors": errors, "what": outputs.what, "seed": outputs.seed}


def pseudo_labels_part(facts: Facts) -> Context:
    """Precision and coverage of the pseudo-labels of each round."""
    run = facts.cast.main.run
    found = {row["step"]: row for row in run.rows() if "pseudo_labels/coverage" in row}
    names = {
        "pseudo_labels/coverage": "coverage",
        "pseudo_labels/accepted_precision": "precision of accepted",
        "pseudo_labels/precision": "precision of all",
    }
    if not found:
        found = {row["step"]: row for row in run.rows() if "train/coverage" in row}
        names = {"train/coverage": "coverage"}
    if not found:
        return None
    table = [found[step] for step in sorted(found)]
    present = {key: name for key, name in names.items() if any(key in row for row in table)}
    shares = {name: [row.get(key, math.nan) for row in table] for key, name in present.items()}
    step = max(1, math.ceil(len(table) / _MOST_ROUNDS))
    shown = sorted({*range(0, len(table), step), len(table) - 1})
    texts = [(int(table[number]["step"]), [_share(table[number].get(key)) for key in present]) for number in shown]
    return {
        "svg": rounds([row["step"] for row in table], shares),
        "columns": [*present.values()],
        "rows": texts,
        "pool": _pool_text(run),
        "seed": run.seed,
        "knows": len(present) > 1,
    }


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _pool_text(run: Run) -> str:
    """Return the size of the pool and of the accepted part in the last round; empty without a ledger."""
    try:
        files = find_rounds(run.folder)
        path = files[max(files)]
        last = read_values(path) if holds_values(path) else read_round(path)
    except (InputError, ValueError, OSError):
        return ""
    samples, accepted = count_text(last.samples, "unlabeled sample"), int(last.accepted.sum())
    what = samples if last.samples == len(last.index) else f"{len(last.index):,} labels of {samples}"
    return f"last round: {accepted:,} of {what} accepted"


def key_figures(facts: Facts) -> list[dict[str, str]]:
    """Return the large numbers at the top of the page."""
    main, tiles = facts.cast.main, []
    values = main.group.values(facts.figure)
    if values:
        tiles.append(_tile(value_text(statistics.mean(values), facts.figure), f"{_title(facts)}, {main.label}", main))
    roles = facts.cast.roles
    for number in facts.cast.comparison.contest.to_best:
        values = roles[number].group.values(facts.figure)
        tiles.append(_tile(value_text(statistics.mean(values), facts.figure), roles[number].label, roles[number]))
    for kind in ("alone", "teacher"):
        role = facts.cast.find(kind)
        if role and role is not main and (other := role.group.values(facts.figure)):
            tiles.append(_tile(value_text(statistics.mean(other), facts.figure), role.label, role))
    if facts.file_teacher is not None and facts.figure == "accuracy":
        tiles.append(
            {"value": value_text(facts.file_teacher.accuracy, "accuracy"), "text": "teacher", "kind": "teacher"}
        )
    costs = cost_part(facts)
    for ratio in (costs or {}).get("ratios", []):
        tiles.append({"value": ratio["ratio"], "text": f"{ratio['word']} than the teacher", "kind": ""})
    return tiles


def _tile(value: str, text: str, role: Role) -> dict[str, str]:
    return {"value": value, "text": text, "kind": role.kind}


def _title(facts: Facts) -> str:
    return TITLES.get(facts.figure, facts.figure)
