"""Several students: their accuracy against size and latency, and which one to deploy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from kd_lightning.cli.commands.experiment import Experiment
from kd_lightning.cli.short.costs import Costs
from kd_lightning.errors import InputError
from kd_lightning.runs.results import Result
from kd_lightning.runs.run import Run
from kd_lightning.runs.spreadsheet import SafeWriter

_COLUMNS = [
    "student",
    "accuracy_percent",
    "alone_percent",
    "size_mb",
    "latency_ms",
    "macs",
    "parameters",
    "front",
    "chosen",
]


@dataclass(frozen=True)
class Candidate:
    """A student that was trained.

    Attributes:
        name: Its name.
        costs: What it costs.
        result: Its runs.
    """

    name: str
    costs: Costs
    result: Experiment

    @property
    def accuracy(self) -> float:
        """Accuracy on the test part in [0, 1], mean over the seeds."""
        return mean(_tested(run).figures["accuracy"] for run in self.result.method)

    @property
    def alone(self) -> float:
        """Accuracy of the same student without a teacher."""
        return mean(_tested(run).figures["accuracy"] for run in self.result.alone)

    @property
    def samples(self) -> int:
        """Number of test pictures."""
        return _tested(self.result.method[0]).samples

    def is_dominated(self, others: Sequence[Candidate]) -> bool:
        """Return whether another one is better in size, latency or accuracy, and no worse in the others."""

        def figures(one: Candidate) -> tuple[float, float, float]:
            return one.costs.megabytes, one.costs.latency, -one.accuracy

        mine = figures(self)
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in map(figures, others)
        )


def choose(candidates: Sequence[Candidate], max_size: float | None, max_latency: float | None) -> Candidate:
    """Return the most accurate student within the limits, of equal ones the smallest.

    Args:
        candidates: The students.
        max_size: Largest size in MB; None for no limit.
        max_latency: Largest latency in ms; None for no limit.

    Raises:
        InputError: If none is within the limits.
    """
    allowed = [
        one
        for one in candidates
        if (max_size is None or one.costs.megabytes <= max_size)
        and (max_latency is None or one.costs.latency <= max_latency)
    ]
    if not allowed:
        raise InputError("--max-size, --max-latency: no student is within the limits")
    return min(allowed, key=lambda one: (-one.accuracy, one.costs.megabytes))


def write_students(candidates: Sequence[Candidate], chosen: Candidate, out: Path) -> list[Path]:
    """Print the table of the students, and write it as CSV with a figure.

    Args:
        candidates: The students.
        chosen: The one to deploy.
        out: Path of the files without their endings.

    Returns:
        The files.
    """
    ordered = sorted(candidates, key=lambda one: one.costs.megabytes)
    view = Table(
        Column("student", overflow="fold"), "accuracy %", "alone %", "size MB", "latency ms", "front", box=SIMPLE_HEAD
    )
    rows = []
    for one in ordered:
        front = not one.is_dominated(candidates)
        figures = [
            f"{100 * one.accuracy:.1f}",
            f"{100 * one.alone:.1f}",
            f"{one.costs.megabytes:.3g}",
            f"{one.costs.latency:.3g}",
        ]
        view.add_row(one.name + " *" * (one is chosen), *figures, "yes" if front else "no")
        rows.append([one.name, *figures, f"{one.costs.macs:.0f}", one.costs.parameters, int(front), int(one is chosen)])
    Console().print(view)
    print(f"* {chosen.name} is the most accurate within the limits, and the one to deploy")
    print("front: no other student is as small, as quick and as accurate, and better in one of these")
    table, picture = out.with_suffix(".csv"), out.with_suffix(".png")
    with table.open("w", newline="", encoding="utf-8") as file:
        SafeWriter(file, "\n").writerows([_COLUMNS, *rows])
    draw_students(ordered, chosen).savefig(picture, dpi=150)
    return [table, picture]


def draw_students(candidates: Sequence[Candidate], chosen: Candidate) -> Figure:
    """Draw accuracy against size and against latency, each with its front."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, title, key in ((axes[0], "size, MB", "megabytes"), (axes[1], "latency, ms", "latency")):
        points = sorted(((getattr(one.costs, key), 100 * one.accuracy, one) for one in candidates), key=lambda p: p[0])
        lowest, highest = points[0][0] / 1.5, points[-1][0] * 1.5
        best = [max(y for x, y, _ in points if x <= here) for here, _, _ in points]
        ax.step([x for x, _, _ in points] + [highest], [*best, best[-1]], where="post", color="tab:blue", alpha=0.4)
        for x, y, one in points:
            colour = "tab:orange" if one is chosen else "tab:blue"
            ax.scatter([x], [y], s=90 if one is chosen else 40, color=colour, zorder=3)
            right = x > math.sqrt(lowest * highest)
            place = {"xytext": (-6 if right else 6, -14), "ha": "right" if right else "left"}
            ax.annotate(one.name.rpartition("/")[2], (x, y), textcoords="offset points", fontsize=8, **place)
        ax.set_xscale("log")
        ax.set_xlim(lowest, highest)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(title)
        ax.margins(y=0.15)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"accuracy % of {chosen.samples} test pictures")
    figure.suptitle(f"{chosen.name.rpartition('/')[2]} (orange) is chosen; the line is the best accuracy up to there")
    return figure


def _tested(run: Run) -> Result:
    result = run.result("test") or run.result("transductive/test")
    if result is None:
        raise InputError(f"{run.folder} has no test figures")
    return result
