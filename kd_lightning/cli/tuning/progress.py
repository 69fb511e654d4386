"""What a search prints: a line for each trial, and the value of the best one with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.cli.tuning.judge import Judge
from kd_lightning.cli.tuning.keys import short_name
from kd_lightning.cli.tuning.study import Ended
from kd_lightning.cli.tuning.trial import Metric
from kd_lightning.teachers.intervals import share_interval


def trial_line(name: str, total: int, metric: Metric, ended: Ended, best: Ended | None, left: float | None) -> str:
    """Return the line of a trial that has ended.

    Args:
        name: Name of the config.
        total: Number of trials of the search.
        metric: The metric.
        ended: The trial.
        best: The best whole trial so far. None without one.
        left: Seconds until the end of all searches. None if they are not known.
    """
    value = "" if ended.value is None else f"{metric.name} {ended.value:.4g}"
    if ended.state == "failed":
        value = f"failed: {ended.reason}"
    elif ended.state == "pruned":
        value += f", pruned {ended.reason}"
    parts = [f"trial {ended.number}/{total} of {name}: {value}"]
    if best is not None and best.number == ended.number:
        parts.append("the best so far")
    elif best is not None:
        parts.append(f"best {best.value:.4g} (trial {best.number})")
    parts.append(values_text(ended.values))
    if left is not None:
        parts.append(f"about {time_text(left)} left" if left else "done")
    return "; ".join(parts)


def values_text(values: Mapping[str, Any]) -> str:
    """Return settings in a few words.

    >>> values_text({"model.init_args.optimizer.init_args.lr": 0.01234567, "trainer.max_epochs": 10})
    'lr 0.01235, max_epochs 10'
    >>> values_text({})
    "the config's own values"
    """
    names = [short_name(path) for path in values]
    shown = {
        path if names.count(name) > 1 else name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, (path, value) in zip(names, values.items(), strict=True)
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "the config's own values"


def time_text(seconds: float) -> str:
    """Return a duration.

    >>> [time_text(seconds) for seconds in (0.2, 89, 90, 5400, 9000)]
    ['1 s', '89 s', '2 min', '1.5 h', '2.5 h']
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def value_text(ended: Ended, judge: Judge, metric: Metric) -> str:
    """Return the value of a trial with its number of samples, and its 95 % interval or standard error.

    The interval is Clopper and Pearson's, of an accuracy over single labels; it holds for one setting, and the best of
    several is optimistic. Other metrics have the standard error over folds, if there are folds.
    """
    assert ended.value is not None
    text = f"{metric.name} {ended.value:.4g}"
    if interval := accuracy_interval(ended.value, judge.samples, metric):
        return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}] (95 %, n = {judge.samples})"
    if len(ended.folds) > 1:
        error = statistics.stdev(ended.folds) / math.sqrt(len(ended.folds))
        return f"{text} ± {error:.2g} (standard error over {len(ended.folds)} folds, n = {judge.samples})"
    return f"{text} (n = {judge.samples})"


def accuracy_interval(value: float, samples: int, metric: Metric) -> tuple[float, float] | None:
    """Return the 95 % interval of an accuracy; None for a metric that is no share of the samples."""
    right = round(value * samples)
    if not metric.name.rpartition("/")[2].endswith("accuracy") or abs(right - value * samples) > 1e-3:
        return None
    return share_interval(right / samples, samples) if 0 <= right <= samples else None


def counts_text(ended: Sequence[Ended]) -> str:
    """Return how the trials of a search have ended.

    >>> counts_text([Ended(1, "complete", 0.5, {}, [], "", 1.0), Ended(2, "pruned", 0.1, {}, [], "", 1.0)])
    '2 trials (1 pruned)'
    """
    states = [one.state for one in ended]
    more = ", ".join(f"{states.count(state)} {state}" for state in ("pruned", "failed") if state in states)
    return f"{len(states)} trial{'s' * (len(states) != 1)}" + (f" ({more})" if more else "")
