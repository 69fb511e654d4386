"""Which group is compared with which, and the words about several methods."""

from types import SimpleNamespace

import numpy as np
import pytest

from kd_lightning.runs.figures.run_groups import Group
from kd_lightning.runs.figures.several_methods import Contest, MethodRuns, find_bases, headline, hold_contest
from kd_lightning.runs.figures.statistics import Difference
from kd_lightning.runs.results import Prediction, Result, write_result


@pytest.fixture
def groups(tmp_path):
    """Two baselines, three methods and a teacher, of three seeds each, with 400 samples."""
    found = []
    for number, share in enumerate((0.5, 0.6, 0.9, 0.7, 0.89, 0.99)):
        runs, results = {}, {}
        for seed in range(3):
            folder = tmp_path / f"{number}" / str(seed)
            folder.mkdir(parents=True)
            row = np.random.default_rng(10 * number + seed).random(400) < share
            results[seed] = Result("test", 400, {"accuracy": float(row.mean())}, None, folder)
            write_result(results[seed], [Prediction(k, "a", "b", float(one), "", "") for k, one in enumerate(row)])
            runs[seed] = SimpleNamespace(folder=folder)
        found.append(Group(f"g{number}", runs, results))
    return found


def methods_of(groups, *pairs):
    return [MethodRuns(groups[one].runs[0].folder, groups[base].runs[1].folder) for one, base in pairs]


def test_each_method_has_its_baseline_and_a_teacher_has_none(groups):
    methods = methods_of(groups, (2, 0), (3, 1), (4, 1))
    assert find_bases(groups, methods) == [None, None, 0, 1, 1, None]
    assert find_bases(groups, []) == [None, 0, 0, 0, 0, 0]


def test_the_best_mean_is_what_other_methods_are_compared_with(groups):
    contest = hold_contest(groups, methods_of(groups, (2, 0), (3, 1), (4, 1)), "accuracy")
    assert (contest.best, contest.pairs, [*contest.to_best]) == (2, 3, [3, 4])
    assert contest.to_best[3].verdict == "worse" and contest.to_best[4].verdict == "no clear difference"
    assert not contest.has_winner
    assert hold_contest(groups, methods_of(groups, (2, 0), (3, 1)), "accuracy").has_winner
    assert hold_contest(groups, [], "accuracy") == Contest([], None, {}, 0)


def test_less_error_is_best(groups):
    for group in groups:
        for result in group.results.values():
            result.figures["mae"] = result.figures.pop("accuracy")
    assert hold_contest(groups, methods_of(groups, (2, 0), (3, 1)), "mae").best == 3


HELPS, HARMS, UNCLEAR = ((0.1, 0.2),) * 2, ((-0.2, -0.1),) * 2, ((-0.1, 0.1),) * 2


@pytest.mark.parametrize(
    ("of_methods", "to_best", "text"),
    [
        ([HELPS, HELPS], [HARMS], "Both methods help; g2 is best"),
        ([HELPS, HELPS, HELPS], [HARMS, UNCLEAR], "All 3 methods help; none is clearly best"),
        ([HELPS, UNCLEAR, HELPS], [UNCLEAR, HARMS], "g2 and g4 help; none is clearly best"),
        ([HELPS, HARMS], [HARMS], "g2 helps; g3 does harm; g2 is best"),
        ([HELPS, UNCLEAR], [UNCLEAR], "g2 helps"),
        ([UNCLEAR, UNCLEAR], [UNCLEAR], "No method clearly helps"),
    ],
)
def test_headline(groups, of_methods, to_best, text):
    made = [Difference(0.0, 3, *ends) for ends in of_methods]
    contest = Contest([2, 3, 4][: len(made)], 2, dict(enumerate((Difference(0.0, 3, *ends) for ends in to_best), 3)), 1)
    assert headline(groups, [None, None, *made], contest) == text
    few = [Difference(0.1, 1, reasons=["1 common seed"]) for _ in made]
    assert headline(groups, [None, None, *few], contest) == "No verdict yet"
