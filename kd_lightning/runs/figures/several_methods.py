"""Several methods in one comparison: which group is compared with which, and the methods among each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kd_lightning.runs.figures.run_groups import Group
from kd_lightning.runs.figures.statistics import Difference, difference
from kd_lightning.runs.metric_direction import direction_of


class MethodRuns(NamedTuple):
    """A method of an experiment, by the folders of runs.

    Attributes:
        run: Folder of one of its runs.
        baseline: Folder of one of the runs of its baseline. Several methods may have the same.
    """

    run: Path
    baseline: Path


@dataclass(frozen=True)
class Contest:
    """The methods of a comparison among each other.

    Attributes:
        methods: Numbers of the methods' groups.
        best: Number of the group with the best mean; None if no method was measured.
        to_best: {number: difference to the best} of the other methods.
        pairs: Number of pairs of methods. Intervals are corrected for it, so that they hold whichever is the best.
    """

    methods: list[int]
    best: int | None
    to_best: dict[int, Difference]
    pairs: int

    @property
    def has_winner(self) -> bool:
        """Whether all other methods are clearly worse than the best one."""
        return bool(self.to_best) and all(one.verdict == "worse" for one in self.to_best.values())


def find_bases(groups: Sequence[Group], methods: Sequence[MethodRuns]) -> list[int | None]:
    """Return for each group the number of the group that it is compared with; None for none.

    Without methods it is the first group. With methods each has its baseline, and other groups, such as a teacher, have
    none.
    """
    if not methods:
        return [None if number == 0 else 0 for number in range(len(groups))]
    bases: list[int | None] = [None] * len(groups)
    for one in methods:
        method, baseline = _number(groups, one.run), _number(groups, one.baseline)
        if method is not None:
            bases[method] = baseline
    return bases


def hold_contest(groups: Sequence[Group], methods: Sequence[MethodRuns], figure: str) -> Contest:
    """Compare each method with the one whose mean is best."""
    numbers = [number for one in methods if (number := _number(groups, one.run)) is not None]
    means = {number: statistics.mean(values) for number in numbers if (values := groups[number].values(figure))}
    pairs = len(means) * (len(means) - 1) // 2
    if not means:
        return Contest(numbers, None, {}, pairs)
    best = (min if direction_of(figure) == "min" else max)(means, key=means.__getitem__)
    to_best = {
        number: difference(groups[number].results, groups[best].results, figure, pairs)
        for number in means
        if number != best
    }
    return Contest(numbers, best, to_best, pairs)


def headline(groups: Sequence[Group], differences: Sequence[Difference | None], contest: Contest) -> str:
    """Return in a few words which methods help, and which one is best."""
    verdicts = {number: found.verdict for number in contest.methods if (found := differences[number]) is not None}
    if not any(verdicts.values()):
        return "No verdict yet"
    helping, harming = ([n for n, verdict in verdicts.items() if verdict == kind] for kind in ("better", "worse"))
    total = len(contest.methods)
    if len(helping) == total > 1:
        text = "Both methods help" if total == 2 else f"All {total} methods help"
    elif helping:
        text = f"{_names(groups, helping)} help{'s' * (len(helping) == 1)}"
    else:
        text = "No method clearly helps"
    if harming:
        text += f"; {_names(groups, harming)} do{'es' * (len(harming) == 1)} harm"
    if contest.best is not None and contest.has_winner:
        return f"{text}; {groups[contest.best].name} is best"
    return text + ("; none is clearly best" if len(helping) > 1 else "")


def _names(groups: Sequence[Group], numbers: Sequence[int]) -> str:
    names = [groups[number].name for number in numbers]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _number(groups: Sequence[Group], folder: Path) -> int | None:
    """Return the number of the group that a run belongs to."""
    place = folder.resolve()
    found = (n for n, group in enumerate(groups) if any(run.folder.resolve() == place for run in group.runs.values()))
    return next(found, None)
