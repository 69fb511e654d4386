"""Whether one group of runs is better than another: intervals over seeds and over samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from kd_lightning.runs.results import Result, labeled

LEAST_SAMPLES = 100
LEAST_SEEDS = 3
_RESAMPLES = 9999
_VALUES = 2001  # most distinct values
_CELLS = 5_000_000  # most numbers of resamples in memory

Interval = tuple[float, float]


@dataclass
class Difference:
    """The difference in accuracy of a group of runs to another one, paired by seed.

    Attributes:
        mean: Mean over the common seeds. None without any, or if they were measured on other numbers of samples.
        seeds: Number of common seeds.
        over_seeds: 95 % interval over the seeds, by Student's t.
        over_samples: 95 % interval over the samples, by the bootstrap, for these seeds.
        reasons: Why no verdict is drawn; empty if one is.
    """

    mean: float | None = None
    seeds: int = 0
    over_seeds: Interval | None = None
    over_samples: Interval | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str | None:
        """``better`` or ``worse`` if both intervals lie on this side of zero; None if there is a reason for none."""
        if self.reasons or self.over_seeds is None or self.over_samples is None:
            return None
        if min(self.over_seeds[0], self.over_samples[0]) > 0:
            return "better"
        return "worse" if max(self.over_seeds[1], self.over_samples[1]) < 0 else "no clear difference"


def difference(after: Mapping[Any, Result], before: Mapping[Any, Result], figure: str = "accuracy") -> Difference:
    """Return the difference of two groups of runs, given as {seeds: result}.

    A verdict needs at least 100 samples, 3 common seeds, variance over the seeds, and predictions of the same samples
    that do not all agree.
    """
    common = [seeds for seeds, result in after.items() if seeds in before and figure in result.figures]
    pairs = [(after[seeds], before[seeds]) for seeds in common if figure in before[seeds].figures]
    found = Difference(seeds=len(pairs))
    if not pairs:
        found.reasons.append("no common seed")
        return found
    if other := next((pair for pair in pairs if pair[0].samples != pair[1].samples), None):
        found.reasons.append(f"other samples: n = {other[0].samples}, not {other[1].samples}")
        return found
    if (least := min(result.samples for result, _ in pairs)) < LEAST_SAMPLES:
        found.reasons.append(f"{least} samples; a verdict needs {LEAST_SAMPLES}")
    if len(pairs) < LEAST_SEEDS:
        found.reasons.append(f"{len(pairs)} common seed{'s' * (len(pairs) > 1)}; a verdict needs {LEAST_SEEDS}")
    differences = [one.figures[figure] - other.figures[figure] for one, other in pairs]
    found.mean = statistics.mean(differences)
    if len(pairs) > 1 and max(differences) - min(differences) < 1e-9:
        found.reasons.append("the difference is the same for all seeds")
    elif len(pairs) > 1:
        found.over_seeds = seed_interval(differences)
    correctness = _sample_differences(pairs)
    if isinstance(correctness, str):
        found.reasons.append(correctness)
    elif np.ptp(correctness) < 1e-9:
        found.reasons.append("all samples agree")
    else:
        found.over_samples = sample_interval(correctness)
    return found


def seed_interval(differences: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean of at least two values, by Student's t."""
    mean, count = statistics.mean(differences), len(differences)
    half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def sample_interval(differences: npt.NDArray[np.float64]) -> Interval:
    """Return the 95 % interval of the mean by the percentile bootstrap, with a fixed seed.

    A resample is drawn as the number of times that each distinct value occurs, which has the same distribution as a
    draw of single samples, and takes no longer for 50,000 samples than for 100.
    """
    generator = np.random.default_rng(0)
    values, counts = np.unique(differences, return_counts=True)
    if len(values) > _VALUES:  # of the multilabel task; steps of 0.001 are fine enough for a mean
        values, counts = np.unique(np.round(differences, 3), return_counts=True)
    size, chunk = len(differences), max(1, _CELLS // len(values))
    means = [
        generator.multinomial(size, counts / size, min(chunk, _RESAMPLES - start)) @ values / size
        for start in range(0, _RESAMPLES, chunk)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def _sample_differences(pairs: Sequence[tuple[Result, Result]]) -> npt.NDArray[np.float64] | str:
    """Return the mean over the pairs of each sample's difference of correctness, or why there is none."""
    total: npt.NDArray[np.float64] = np.zeros(0)
    labels: dict[int, str] | None = None
    for pair in pairs:
        tables = [labeled(result.predictions()) for result in pair]
        for result, table in zip(pair, tables, strict=True):
            if not table:
                return f"{result.folder} has no predictions"
            mine = {index: row.label for index, row in table.items()}
            if labels is None:
                labels = mine
                total = np.zeros(len(mine))
            if mine != labels:
                return "the runs were measured on other samples or labels"
        assert labels is not None
        after, before = (np.array([table[index].correct for index in labels]) for table in tables)
        total = total + after - before
    return total / len(pairs)
