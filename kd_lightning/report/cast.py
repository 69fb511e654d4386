"""Which runs stand for the student alone, the student with the method, and the teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.report.svg import OTHERS
from kd_lightning.runs.figures.comparison import Comparison, figure_of
from kd_lightning.runs.figures.costs import measure_costs
from kd_lightning.runs.figures.run_groups import Group, find_groups
from kd_lightning.runs.figures.several_methods import MethodRuns, find_bases, hold_contest
from kd_lightning.runs.figures.statistics import Difference
from kd_lightning.runs.results import Result
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.runs.teacher_runs import teacher_runs

_COMPARISON = "comparison.json"
_LABELS = {"teacher": "distilled", "pseudo-labels": "with pseudo-labels", "method": "with the method"}


@dataclass(frozen=True)
class Role:
    """A group of runs, and what it stands for.

    Attributes:
        kind: ``"alone"``, ``"method"``, ``"teacher"``, or the name of another colour of the page.
        label: Short name, such as ``distilled``.
        group: The runs.
        difference: To the first role of the page, or of several methods to the baseline; None for that one itself.
    """

    kind: str
    label: str
    group: Group
    difference: Difference | None

    @property
    def run(self) -> Run:
        """The run of the first seed, which stands for all where a part of the page shows one run."""
        return next(iter(self.group.runs.values()))

    @property
    def method(self) -> str:
        """What teaches it beside labels, see :func:`method_of`."""
        return method_of(self.run.config)

    @property
    def result(self) -> Result | None:
        """The figures of that run."""
        return self.group.results.get(next(iter(self.group.runs)))


@dataclass(frozen=True)
class Cast:
    """All groups of a report.

    Attributes:
        roles: The student alone if there is one, then methods, then teachers. In an experiment of several methods the
            baseline of the best one comes first, then other baselines, and then the best one.
        comparison: What the figures come from.
    """

    roles: list[Role]
    comparison: Comparison

    def find(self, kind: str) -> Role | None:
        """Return the first role of a kind."""
        return next((role for role in self.roles if role.kind == kind), None)

    @property
    def main(self) -> Role:
        """What the report is about: the method, or without one the first role."""
        return self.find("method") or self.roles[0]

    @property
    def part(self) -> str:
        """The part of the data that figures were measured on."""
        return self.main.group.part or self.comparison.part


def make_cast(runs: Iterable[Path | Run], comparison: Comparison | None = None) -> Cast:
    """Find the runs of a report. Runs that left the weights of a teacher are added.

    Args:
        runs: Runs, or folders of a run, of all runs of a name, or of the comparison of an experiment.
        comparison: A comparison whose costs are used. Default: None, which means that they are measured.

    Raises:
        InputError: For a folder that is none of these, or if no run is finished.
    """
    runs = [*runs]
    folders = [folder for one in runs for folder in _folders_of(one)]
    if not folders:
        raise InputError("report needs at least one run")
    groups, left_out = find_groups(folders, "test")
    teachers = _by_folder(run for group in groups for run in teacher_runs(next(iter(group.runs.values())).config))
    if teachers.keys() - _by_folder(run for group in groups for run in group.runs.values()).keys():
        groups, left_out = find_groups([*folders, *(run.folder for run in teachers.values())], "test")
    if not any(group.results for group in groups):  # no run was tested
        validated, _ = find_groups([run.folder for group in groups for run in group.runs.values()], "val")
        groups = validated if any(group.results for group in validated) else groups
    part = next((result.part for group in groups for result in group.results.values()), "test")
    methods = _methods_of(runs) if comparison is None else comparison.methods
    kinds = _kinds_of_methods(groups, methods, {*teachers}) if methods else _kinds_of(groups, {*teachers})
    order = sorted(range(len(groups)), key=lambda number: ("alone", "method", "", "teacher").index(kinds[number]))
    if (best := hold_contest(groups, methods, figure_of(groups)).best) is not None:
        bases = {*find_bases(groups, methods)}
        order.sort(key=lambda n: (kinds[n] != "alone", n not in bases, n != best, kinds[n] != "method"))
    groups = [groups[number] for number in order]
    remarks = _remarks_of(runs) if comparison is None else comparison.remarks
    made = Comparison("val" if part == "val" else "test", groups, left_out, remarks, methods)
    _take_costs(groups, comparison)
    return Cast(_roles(groups, [kinds[number] for number in order], made), made)


def _folders_of(one: Path | Run) -> list[Path]:
    """Return the folders of runs that a path means."""
    if isinstance(one, Run):
        return [one.folder]
    file = one / _COMPARISON
    if (one / CONFIG).is_file() or not file.is_file():
        return [one]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        named = [Path(run["folder"]) for group in content["groups"] for run in group["runs"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged: {error}") from error
    return [_find_again(folder, one) for folder in named]


def _remarks_of(runs: Iterable[Path | Run]) -> list[str]:
    """Return the remarks of the comparisons that paths mean."""
    files = [one / _COMPARISON for one in runs if not isinstance(one, Run) and not (one / CONFIG).is_file()]
    found = [json.loads(file.read_text(encoding="utf-8")).get("remarks") for file in files if file.is_file()]
    return [str(line) for lines in found for line in lines or ()]


def _methods_of(runs: Sequence[Path | Run]) -> list[MethodRuns]:
    """Return the methods of the one comparison that is reported; of several ones, or of one method, none."""
    if len(runs) != 1 or isinstance(runs[0], Run) or (runs[0] / CONFIG).is_file():
        return []
    file = runs[0] / _COMPARISON
    named = json.loads(file.read_text(encoding="utf-8")).get("methods", ()) if file.is_file() else ()
    return [MethodRuns(*(_find_again(Path(one[key]), runs[0]) for key in MethodRuns._fields)) for one in named]


def _kinds_of_methods(groups: Sequence[Group], methods: Sequence[MethodRuns], teachers: set[Path]) -> list[str]:
    """Return the kind of each group of an experiment of several methods; that of the best one's baseline is alone."""
    contest, bases = hold_contest(groups, methods, figure_of(groups)), find_bases(groups, methods)
    best = contest.methods[0] if contest.best is None else contest.best
    kinds = [
        "teacher" if any(run.folder.resolve() in teachers for run in group.runs.values()) else "" for group in groups
    ]
    for number in contest.methods:
        kinds[number] = "method"
    if (alone := bases[best]) is not None:
        kinds[alone] = "alone"
    return kinds


def _find_again(folder: Path, comparison: Path) -> Path:
    """Return the folder of a run that a comparison names, also from another working folder."""
    beside = comparison.parent / folder.parent.name / folder.name
    found = next((path for path in (folder, beside) if (path / CONFIG).is_file()), None)
    if found is None:
        raise InputError(f"{comparison / _COMPARISON} names the run {folder}, which is gone")
    return found


def _by_folder(runs: Iterable[Run]) -> dict[Path, Run]:
    return {run.folder.resolve(): run for run in runs}


def _kinds_of(groups: Sequence[Group], teachers: set[Path]) -> list[str]:
    """Return the kind of each group; empty for groups that are none of the three."""
    kinds = []
    for group in groups:
        if any(run.folder.resolve() in teachers for run in group.runs.values()):
            kinds.append("teacher")
        else:
            kinds.append("method" if method_of(_config(group)) else "")
    methods = [group for group, kind in zip(groups, kinds, strict=True) if kind == "method"]
    students = [_student(_config(group)) for group in methods]
    for number, group in enumerate(groups):
        if not kinds[number] and methods and _student(_config(group)) in students and "alone" not in kinds:
            kinds[number] = "alone"
    return kinds


def _config(group: Group) -> dict[str, Any]:
    return next(iter(group.runs.values())).config


def method_of(config: dict[str, Any]) -> str:
    """Return what teaches a student beside labels: ``"teacher"``, ``"pseudo-labels"``, ``"method"``, or ``""``."""
    model = config["model"]
    arguments = model.get("init_args") or {}
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    names = [str(model.get("class_path")), *(str(one.get("class_path")) for one in callbacks if isinstance(one, dict))]
    last = {name.rpartition(".")[2] for name in names}
    if arguments.get("teacher") or arguments.get("teachers"):
        return "teacher"
    if last & {"ABCModule", "PseudoLabelModule", "PseudoLabelRefresh"}:
        return "pseudo-labels"
    return "method" if "CoTeachingModule" in last else ""


def _student(config: dict[str, Any]) -> Any:
    arguments = config["model"].get("init_args") or {}
    return arguments.get("student") or arguments.get("module") or config["model"]


def _take_costs(groups: Sequence[Group], comparison: Comparison | None) -> None:
    """Take the costs of groups from a comparison of the same runs, and measure the others."""
    known = (
        {} if comparison is None else {run: one for one in comparison.groups for run in _by_folder(one.runs.values())}
    )
    for group in groups:
        same = next((known[run] for run in _by_folder(group.runs.values()) if run in known), None)
        group.costs = {} if same is None else same.costs
    if lacking := [group for group in groups if not group.costs]:
        measure_costs(lacking)


def _roles(groups: Sequence[Group], kinds: Sequence[str], comparison: Comparison) -> list[Role]:
    roles: list[Role] = []
    others = 0
    for group, kind, found in zip(groups, kinds, comparison.differences, strict=True):
        taken = {role.kind for role in roles}
        if not kind or kind in taken:
            name = OTHERS[others % len(OTHERS)]
            others += 1
            roles.append(Role(name, group.name, group, found))
            continue
        label = {"alone": "student alone", "teacher": "teacher"}.get(kind, group.name)
        if kind == "alone" and len({*comparison.bases} - {None}) > 1:  # there are other students alone
            label = group.name
        if kind == "method" and kinds.count("method") == 1:
            label = _LABELS[method_of(_config(group))]
        roles.append(Role(kind, label, group, found))
    return roles
