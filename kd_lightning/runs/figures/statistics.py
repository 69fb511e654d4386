"""Whether one group of runs is better than another: intervals over seeds and over samples."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from kd_lightning.runs.metric_direction import direction_of
from kd_lightning.runs.results import Prediction, Result, labeled

LEAST_SAMPLES = 100
LEAST_SEEDS = 3
_RESAMPLES = 9999
_VALUES = 2001  # most distinct values
_CELLS = 5_000_000  # most numbers of resamples in memory

Interval = tuple[float, float]
Pair = tuple[Result, Result]
Table = dict[tuple[Any, str, int], tuple[float, int]]
"""Correctness (or error) and number of labels, by content (or index), label, and number among samples of equal both."""


@dataclass
class Difference:
    """The difference in accuracy, or in the error of the regression task, of a group of runs to another one.

    It is paired by seed.

    Attributes:
        mean: Mean over the common seeds. None without any, or if the two runs of a seed were measured on other samples
            or labels.
        seeds: Number of common seeds.
        over_seeds: 95 % interval over the seeds, by Student's t; corrected if it is one of several comparisons.
        over_samples: Likewise over the samples that all runs have, by the bootstrap, for these seeds.
        reasons: Why no verdict is drawn; empty if one is.
        less_is_better: Whether the figure is an error.
    """

    mean: float | None = None
    seeds: int = 0
    over_seeds: Interval | None = None
    over_samples: Interval | None = None
    reasons: list[str] = field(default_factory=list)
    less_is_better: bool = False

    @property
    def verdict(self) -> str | None:
        """``better`` or ``worse`` if both intervals lie on this side of zero; None if there is a reason for none."""
        if self.reasons or self.over_seeds is None or self.over_samples is None:
            return None
        if min(self.over_seeds[0], self.over_samples[0]) > 0:
            return "worse" if self.less_is_better else "better"
        if max(self.over_seeds[1], self.over_samples[1]) < 0:
            return "better" if self.less_is_better else "worse"
        return "no clear difference"


def difference(
    after: Mapping[Any, Result], before: Mapping[Any, Result], figure: str = "accuracy", comparisons: int = 1
) -> Difference:
    """Return the difference of two groups of runs, given as {seeds: result}.

    A verdict needs at least 100 samples, 3 common seeds, variance over the seeds, and predictions of the same samples
    that do not all agree.

    Args:
        after: Results of the one group.
        before: Results of the other one.
        figure: The figure.
        comparisons: Number of differences that are looked at together, at least 1. The intervals are corrected for it
            (Bonferroni): with 95 % probability all of them hold.
    """
    common = [seeds for seeds, result in after.items() if seeds in before and figure in result.figures]
    pairs = [(after[seeds], before[seeds]) for seeds in common if figure in before[seeds].figures]
    found = Difference(seeds=len(pairs), less_is_better=direction_of(figure) == "min")
    if not pairs:
        found.reasons.append("no common seed")
        return found
    tables, named = _read_tables(pairs)
    others = [_describe_other(pair, tables[number], named) for number, pair in enumerate(pairs)]
    if other := next(filter(None, others), ""):
        found.reasons.append(other)
        if not named:
            return found
    if (least := min(result.samples for pair in pairs for result in pair)) < LEAST_SAMPLES:
        found.reasons.append(f"{least} samples; a verdict needs {LEAST_SAMPLES}")
    if len(pairs) < LEAST_SEEDS:
        found.reasons.append(f"{len(pairs)} common seed{'s' * (len(pairs) > 1)}; a verdict needs {LEAST_SEEDS}")
    if not other:
        differences = [one.figures[figure] - reference.figures[figure] for one, reference in pairs]
        found.mean = statistics.mean(differences)
        if len(pairs) > 1 and max(differences) - min(differences) < 1e-9:
            found.reasons.append("the difference is the same for all seeds")
        elif len(pairs) > 1:
            found.over_seeds = seed_interval(differences, comparisons)
    correctness, problem = _sample_differences(pairs, tables, named)
    if problem and (correctness is None or not other):
        found.reasons.append(problem)
    if correctness is not None and np.ptp(correctness) < 1e-9:
        found.reasons.append("all samples agree")
    elif correctness is not None:
        found.over_samples = sample_interval(correctness, comparisons)
    return found


def describe_other_samples(one: Result, other: Result) -> str:
    """Describe in one line which samples and labels of two results differ; empty if none do, or if it is not known."""
    (tables,), named = _read_tables([(one, other)])
    return _describe_other((one, other), tables, named)


def seed_interval(differences: Sequence[float], comparisons: int = 1) -> Interval:
    """Return the 95 % interval of the mean of at least two values, by Student's t; one of several comparisons."""
    mean, count = statistics.mean(differences), len(differences)
    half = float(student_t.ppf(1 - 0.025 / comparisons, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def sample_interval(differences: npt.NDArray[np.float64], comparisons: int = 1) -> Interval:
    """Return the 95 % interval of the mean by the percentile bootstrap, with a fixed seed; one of several comparisons.

    A resample is drawn as the number of times that each distinct value occurs, which has the same distribution as a
    draw of single samples, and takes no longer for 50,000 samples than for 100.
    """
    generator = np.random.default_rng(0)
    values, counts = np.unique(differences, return_counts=True)
    if len(values) > _VALUES:  # steps of 1/2000 of the range are fine enough for a mean
        step = float(np.ptp(differences)) / (_VALUES - 1)
        steps, counts = np.unique(np.round(differences / step), return_counts=True)
        values = steps * step
    size, chunk = len(differences), max(1, _CELLS // len(values))
    means = [
        generator.multinomial(size, counts / size, min(chunk, _RESAMPLES - start)) @ values / size
        for start in range(0, _RESAMPLES, chunk)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5 / comparisons, 100 - 2.5 / comparisons))
    return float(low), float(high)


def _read_tables(pairs: Sequence[Pair]) -> tuple[list[tuple[Table, Table]], bool]:
    """Read the predictions of each pair, and return whether all are named by their content, not by their index."""
    rows = [[[*labeled(result.predictions()).values()] for result in pair] for pair in pairs]
    named = all(table and all(row.content for row in table) for pair in rows for table in pair)
    return [(_by_name(after, named), _by_name(before, named)) for after, before in rows], named


def _by_name(rows: Sequence[Prediction], named: bool) -> Table:
    """Return the table of a result.

    Equal contents have equal predictions, so that only the label decides which of them is which: the number in the
    suffix of a content changes when a copy of it comes or goes.
    """
    table: Table = {}
    counts: Counter[tuple[Any, str]] = Counter()
    for row in rows:
        name = (row.content.partition("#")[0] if named else row.index, row.label)
        table[*name, counts[name]] = row.value, row.labels
        counts[name] += 1
    return table


def _describe_other(pair: Pair, tables: tuple[Table, Table], named: bool) -> str:
    """Describe in one line which samples and labels of a pair differ; empty if none do.

    Of samples without a name only the number is compared.
    """
    sizes = [result.samples for result in pair]
    parts = [f"n = {sizes[0]}, not {sizes[1]}"] if sizes[0] != sizes[1] else []
    if named:
        after, before = (table.keys() for table in tables)
        mine, theirs = (Counter(name for name, _, _ in keys) for keys in (after - before, before - after))
        alone = (mine - theirs).total(), (theirs - mine).total()
        parts += [f"{count} only in {result.folder}" for count, result in zip(alone, pair, strict=True) if count]
        relabeled = (mine & theirs).total()
        parts += [f"{relabeled} with another label"] if relabeled else []
    left_out = "; the interval over samples leaves them out" if parts and named else ""
    return f"other samples: {', '.join(parts)}{left_out}" if parts else ""


def _sample_differences(
    pairs: Sequence[Pair], tables: Sequence[tuple[Table, Table]], named: bool
) -> tuple[npt.NDArray[np.float64] | None, str]:
    """Return the mean over the pairs of each sample's difference of correctness, and what is wrong with it.

    The samples are those that all runs have, with the same label. If less than half of the samples are left, or some
    samples of runs that do not name them, there is no difference.
    """
    results, every = [result for pair in pairs for result in pair], [table for pair in tables for table in pair]
    if lacking := next((result for result, table in zip(results, every, strict=True) if not table), None):
        return None, f"{lacking.folder} has no predictions"
    common = set.intersection(*({*table} for table in every))
    largest = max(map(len, every))
    if len(common) < (largest / 2 if named else largest):
        return None, "the runs were measured on other samples or labels"
    order = [*common]
    labels = np.array([tables[0][0][key][1] for key in order], dtype=np.float64)  # equal in all: their hashes are
    totals = np.array([sum(after[key][0] - before[key][0] for after, before in tables) for key in order])
    totals *= labels / labels.mean()  # figures count each label
    few = f"only {len(common)} of {largest} samples are the same for all seeds; the interval over samples is over these"
    return totals / len(pairs), few if len(common) < largest else ""
