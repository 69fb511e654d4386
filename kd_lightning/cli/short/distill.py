"""From a folder of pictures to a distilled student, its proof and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from kd_lightning.cli.commands.experiment import run_experiment
from kd_lightning.cli.short.networks import Network, find_network
from kd_lightning.cli.short.plan import FolderPlan, plan_folder
from kd_lightning.cli.short.pretrained import Start, find_start
from kd_lightning.cli.short.recipe import distill_yaml, teacher_yaml
from kd_lightning.cli.short.steps import (
    check_teacher,
    deploy,
    fit_config,
    keep_recipe,
    missing_for_onnx,
    report,
    write_config,
)
from kd_lightning.cli.short.students import Candidate, choose, write_students
from kd_lightning.errors import InputError
from kd_lightning.report.numbers import count_text
from kd_lightning.runs.figures.statistics import LEAST_SAMPLES, LEAST_SEEDS
from kd_lightning.runs.folder import next_version
from kd_lightning.runs.run import SPLIT, WEIGHTS, Run

CANDIDATES = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/resnet18",
)
"""The students of ``--max-size`` and ``--max-latency`` without ``--students``."""
_MOST_STUDENTS = 3  # of CANDIDATES
_FIT_OVERHEAD = 8.0  # seconds of a fit, and a test


@dataclass(frozen=True)
class Distillation:
    """What :func:`distill` does.

    Attributes:
        plan: The folder, and the settings.
        teacher: The teacher.
        students: The students that are trained, by the name of their runs.
        start: The teacher's weights before it is trained.
        seeds: Number of seeds.
        limits: Largest size in MB and latency in ms of the student to deploy; None for no limit.
        left_out: Names of students above the limits.
    """

    plan: FolderPlan
    teacher: Network
    students: dict[str, Network]
    start: Start
    seeds: int
    limits: tuple[float | None, float | None]
    left_out: list[str]

    @property
    def teacher_name(self) -> str:
        """Name of the teacher's runs."""
        return f"teacher_{self.teacher.slug}"

    @property
    def lines(self) -> list[str]:
        """What to print about it."""
        lines, costs, name = [*self.plan.lines], self.plan.costs, self.teacher.name
        if self.left_out:
            lines.append(f"above the limit, and not trained: {', '.join(self.left_out)}")
        lines.append(self.start.line)
        for student in self.students.values():
            one, times = costs[student.name], costs[name].parameters / costs[student.name].parameters
            size = (
                f"{one.parameters:,} parameters, {one.megabytes:.2f} MB, {one.macs / 1e6:,.0f} million multiplications"
            )
            lines.append(f"{student.name}: {size}; the teacher {name} has {times:.1f} times as many parameters")
            if times <= 1:
                lines.append(f"warning: the student {student.name} is not smaller than the teacher {name}")
        lines += [line for line in [missing_for_onnx()] if line]
        fits = (0 if self.start.ready else 1) + 2 * self.seeds * len(self.students)
        time = "" if torch.cuda.is_available() else f", about {_minutes(self.seconds)} on this CPU"
        return [*lines, f"{count_text(fits, 'fit')}{time}; everything lies in {self.plan.recipe.root}"]

    @property
    def seconds(self) -> float:
        """Estimated time of all fits on one CPU."""
        recipe, costs = self.plan.recipe, self.plan.costs
        pictures = recipe.pictures * recipe.epochs
        teacher = costs[self.teacher.name]
        total = 0.0 if self.start.ready else pictures * teacher.step + _FIT_OVERHEAD
        for student in self.students.values():
            each = 2 * costs[student.name].step + teacher.forward  # alone, and distilled
            total += self.seeds * (pictures * each + 2 * _FIT_OVERHEAD)
        return total

    def configs(self) -> dict[str, str]:
        """The configs, by name. The teacher's weights are those of its next run, which may already be there."""
        recipe, found = self.plan.recipe, {}
        folder = None
        if not self.start.ready:
            found[self.teacher_name] = self._teacher_yaml()
            folder = next_version(recipe.root / self.teacher_name)
        return found | {name: self._student_yaml(name, folder) for name in self.students}

    def _teacher_yaml(self) -> str:
        return teacher_yaml(self.plan.recipe, self.teacher, self.teacher_name, self.start.path, self.start.classes)

    def _student_yaml(self, name: str, teacher: Path | None) -> str:
        """Return the config of a student, whose teacher was trained in a run's folder, or elsewhere (None)."""
        weights, split = (self.start.path, None) if teacher is None else (teacher / WEIGHTS, teacher / SPLIT)
        assert weights is not None
        return distill_yaml(self.plan.recipe, self.students[name], self.teacher, name, weights, split)

    def run(self) -> Run:
        """Train, test, compare and deploy. What is finished is not repeated; what was stopped goes on.

        Returns:
            The run of the student to deploy; of several seeds the first one.

        Raises:
            InputError: If the teacher or a file is no good.
        """
        self.plan.write()
        root = self.plan.recipe.root
        folder = None
        if not self.start.ready:
            path = root / f"{self.teacher_name}.yaml"
            write_config(path, self._teacher_yaml())
            print(f"teacher: {self.teacher.name}")
            folder = fit_config(path, test=True).folder
        candidates = []
        for name, student in self.students.items():
            path = root / f"{name}.yaml"
            write_config(path, self._student_yaml(name, folder))
            print(f"student: {student.name}")
            check_teacher(path)
            result = run_experiment(["--config", str(path)], self.seeds)
            keep_recipe(path, result.method)
            candidates.append(Candidate(student.name, self.plan.costs[student.name], result))
        chosen = choose(candidates, *self.limits)
        files = write_students(candidates, chosen, root / "students") if len(candidates) > 1 else []
        run = chosen.result.method[0]
        files += [file for file in [deploy(run, root / "student.onnx")] if file is not None]
        files.append(
            report([*chosen.result.alone, *chosen.result.method, *chosen.result.teachers], root / "report.html")
        )
        print("\n".join(self._summary(chosen, files)))
        return run

    def _summary(self, chosen: Candidate, files: Sequence[Path]) -> list[str]:
        root, run = self.plan.recipe.root, chosen.result.method[0]
        count = chosen.samples
        lines = [
            f"{chosen.name}: {100 * chosen.accuracy:.1f} % of {count} test pictures distilled, "
            f"{100 * chosen.alone:.1f} % alone"
        ]
        if count < LEAST_SAMPLES:
            few = count_text(count, "test picture")
            lines.append(f"does the teacher help? {few} cannot tell: a verdict needs {LEAST_SAMPLES}")
        elif self.seeds < LEAST_SEEDS:
            few = count_text(self.seeds, "seed")
            lines.append(f"does the teacher help? {few} cannot tell: --seeds {LEAST_SEEDS} fits the others")
        lines += [f"run      {run.folder}", f"config   {root / run.name}.yaml", f"compared {chosen.result.out}"]
        return lines + [f"file     {file}" for file in files]


def plan_distillation(
    folder: str | Path,
    teacher: str,
    students: Sequence[str] = (),
    *,
    labels_per_class: int | None = None,
    epochs: int | None = None,
    pretrained: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    max_size: float | None = None,
    max_latency: float | None = None,
    seeds: int = 1,
    name: str | None = None,
    out: str | Path = "runs",
) -> Distillation:
    """Return what :func:`distill` does. Nothing is written. The arguments are those of :func:`distill`."""
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    for option, value in (("--max-size", max_size), ("--max-latency", max_latency)):
        if value is not None and not value > 0:
            raise InputError(f"{option} must be above 0, got {value}")
    limits = max_size, max_latency
    if not students and limits == (None, None):
        raise InputError(
            "--student is missing: name one, several by --students, or a limit by --max-size or --max-latency"
        )
    one = find_network(teacher, "--teacher")
    option = "--student" if len(students) == 1 else "--students"
    several = [find_network(student, option) for student in dict.fromkeys(students or CANDIDATES)]
    networks = [*{network.name: network for network in [*several, one]}.values()]
    plan = plan_folder(
        folder,
        networks,
        out=out,
        name=name,
        test="needed",
        labels_per_class=labels_per_class,
        epochs=epochs,
        image_size=image_size,
    )
    if not students:
        several = [each for each in several if plan.costs[each.name].parameters < plan.costs[one.name].parameters]
    fitting = [each for each in several if _fits(plan, each, limits)]
    if not fitting:
        raise InputError(_too_large(plan, several, limits))
    left_out = [each.name for each in several if each not in fitting]
    if not students:
        fitting = sorted(fitting, key=lambda each: plan.costs[each.name].parameters)[-_MOST_STUDENTS:]
    start = find_start(one, pretrained, plan.pictures.classes, download=download)
    return Distillation(plan, one, _by_run_name(fitting), start, seeds, limits, left_out)


class DistillOptions(TypedDict, total=False):
    """The options of :func:`distill`."""

    labels_per_class: int | None
    epochs: int | None
    pretrained: str | None
    download: bool
    image_size: int | None
    max_size: float | None
    max_latency: float | None
    seeds: int
    name: str | None
    out: str | Path


def distill(
    folder: str | Path,
    student: str | Sequence[str] = (),
    teacher: str = "torchvision/resnet50",
    **options: Unpack[DistillOptions],
) -> Run:
    """Distil a teacher into a student on a folder of pictures: train, test, compare, and write the files to deploy.

    Everything lies in ``OUT/NAME``: the configs (YAML), the table of the parts, the runs, the comparison with the same
    student alone, and the ONNX file. A second call goes on where the first one has stopped.

    Args:
        folder: Class folders; ``train/`` and ``test/`` with class folders; or pictures with a table of their labels.
        student: ``timm/NAME``, ``torchvision/NAME``, a class path, or a network of this package such as ``resnet8``; or
            several, of which the most accurate one is deployed. Default: none, which needs ``max_size`` or
            ``max_latency``, and tries this package's and torchvision's.
        teacher: The teacher's name.
        **options: ``labels_per_class`` (default: all), ``epochs``, ``image_size`` in pixels (default: what the pictures
            suggest), ``pretrained`` (the teacher's weights: a file, a run's folder, or ``"cache"``), ``download``
            (whether weights may be downloaded, default False), ``max_size`` in MB, ``max_latency`` in ms, ``seeds``
            (default 1), ``name`` (default: the folder's) and ``out`` (default ``"runs"``).

    Returns:
        The run of the student; of several seeds the first one.

    Raises:
        InputError: If the folder cannot be trained on, or an option is wrong.
    """
    students = [student] if isinstance(student, str) else [*student]
    found = plan_distillation(folder, teacher, students, **options)
    print("\n".join(found.lines))
    return found.run()


def _fits(plan: FolderPlan, network: Network, limits: tuple[float | None, float | None]) -> bool:
    costs = plan.costs[network.name]
    return all(
        limit is None or value <= limit for value, limit in zip((costs.megabytes, costs.latency), limits, strict=True)
    )


def _too_large(plan: FolderPlan, networks: Sequence[Network], limits: tuple[float | None, float | None]) -> str:
    texts = [f"{limits[0]:g} MB"] if limits[0] is not None else []
    texts += [f"{limits[1]:g} ms"] if limits[1] is not None else []
    names = zip(("--max-size", "--max-latency"), limits, strict=True)
    options = ", ".join(name for name, limit in names if limit is not None)
    if not networks:
        return f"{options}: no known student is smaller than the teacher; name some by --students"
    found = ", ".join(
        f"{each.name} {plan.costs[each.name].megabytes:.2g} MB {plan.costs[each.name].latency:.2g} ms"
        for each in sorted(networks, key=lambda each: plan.costs[each.name].parameters)[:3]
    )
    return f"{options}: no student is within {' and '.join(texts)}; the smallest: {found}"


def _by_run_name(networks: Sequence[Network]) -> dict[str, Network]:
    """Return the networks by the name of their runs: the last part of their own, or the whole where two are equal."""
    slugs = [network.slug for network in networks]
    return {
        slug if slugs.count(slug) == 1 else f"{slug}_{number}": network
        for number, (slug, network) in enumerate(zip(slugs, networks, strict=True), 1)
    }


def _minutes(seconds: float) -> str:
    """Return a time as a text.

    >>> _minutes(50), _minutes(600), _minutes(20000)
    ('1 minute', '10 minutes', '5.6 hours')
    """
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return count_text(max(1, round(seconds / 60)), "minute")
