"""Accuracy of each class, and which classes lose."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kd_lightning.report.cast import Cast, Role
from kd_lightning.runs.figures.statistics import Interval, sample_interval
from kd_lightning.runs.results import Prediction, labeled

_MOST_CLASSES = 1000
MOST_ROWS = 40
"""Most classes in the table: of more those that lose and gain the most."""

LEAST = 30
"""Fewest samples of a class for an interval: of fewer, the bootstrap is too narrow."""

_Table = dict[tuple[int, str], float]


@dataclass(frozen=True)
class ClassRow:
    """A class.

    Attributes:
        name: Its name.
        samples: Number of test samples.
        shares: {kind of role: share of right predictions, a mean over the seeds}.
        change: The method's share minus that of the student alone; None without both.
        interval: 95 % interval of the change over samples, by the bootstrap; None if all samples agree, and
            for fewer than ``LEAST`` samples.
    """

    name: str
    samples: int
    shares: dict[str, float]
    change: float | None
    interval: Interval | None

    @property
    def lost(self) -> bool:
        """Whether the class has fewer right predictions than the student alone."""
        return self.change is not None and self.change < -1e-9

    @property
    def clearly(self) -> bool:
        """Whether the interval of the change lies on one side of zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def class_rows(cast: Cast) -> list[ClassRow]:
    """Return all classes; none if samples have no single class, or too many are needed.

    Roles whose samples are others than those of the main role are left out.
    """
    main = _mean_by_sample(cast.main)
    names = {label for _, label in main}
    if not main or not 1 < len(names) <= _MOST_CLASSES:
        return []
    kinds = dict.fromkeys(role.kind for role in (cast.find(kind) for kind in ("alone", "method", "teacher")) if role)
    tables = {kind: main if kind == cast.main.kind else _mean_by_sample(cast.find(kind)) for kind in kinds}
    tables |= {cast.main.kind: main}
    tables = {kind: table for kind, table in tables.items() if table.keys() == main.keys()}
    samples: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for key in main:
        samples[key[1]].append(key)
    order = cast.main.run.class_names or []
    rank = {str(name): number for number, name in enumerate(order)}
    rows = []
    for name in sorted(names, key=lambda name: (rank.get(name, len(rank)), len(name), name)):
        values = {kind: np.array([table[key] for key in samples[name]]) for kind, table in tables.items()}
        change, interval = None, None
        if "alone" in values and "method" in values:
            differences = values["method"] - values["alone"]
            change = float(differences.mean())
            judged = len(differences) >= LEAST and np.ptp(differences) > 1e-9
            interval = sample_interval(differences) if judged else None
        shares = {kind: float(one.mean()) for kind, one in values.items()}
        rows.append(ClassRow(name, len(samples[name]), shares, change, interval))
    return rows


def shown_rows(rows: list[ClassRow]) -> list[ClassRow]:
    """Return the rows of the table: all, or those that lose and gain the most, in the order of the classes."""
    if len(rows) <= MOST_ROWS:
        return rows
    by_change = sorted(rows, key=lambda row: row.change if row.change is not None else min(row.shares.values()))
    chosen = {row.name for row in by_change[: MOST_ROWS // 2] + by_change[-MOST_ROWS // 2 :]}
    return [row for row in rows if row.name in chosen]


def _mean_by_sample(role: Role | None) -> _Table:
    """Return {(index, label): share of right predictions over the seeds} of the samples that all seeds have."""
    results = [] if role is None else list(role.group.results.values())
    tables = [{(row.index, row.label): row.correct for row in labeled(one.predictions()).values()} for one in results]
    if not tables or not all(tables) or any(_is_no_class(row) for row in results[0].predictions()):
        return {}
    common = set.intersection(*({*table} for table in tables))
    return {key: float(np.mean([table[key] for table in tables])) for key in tables[0] if key in common}


def _is_no_class(row: Prediction) -> bool:
    return row.labels != 1 or not row.prediction or row.correct not in (0.0, 1.0)
