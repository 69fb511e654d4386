"""Compare finished runs: figures of one part, differences, and what the students cost."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kd_lightning.runs.figures.comparison_picture import draw_comparison
from kd_lightning.runs.figures.costs import measure_costs
from kd_lightning.runs.figures.run_groups import Group, LeftOut, find_groups
from kd_lightning.runs.figures.several_methods import MethodRuns, find_bases, headline, hold_contest
from kd_lightning.runs.figures.statistics import (
    LEAST_SAMPLES,
    Difference,
    Interval,
    describe_other_samples,
    difference,
)
from kd_lightning.runs.run import CONFIG, Run

_FIGURES = ("accuracy", "mae", "knn_accuracy")  # the first that is known is compared
_OF_FEATURES = ("probe_accuracy", "rankme", "neighbor_agreement")
_PERCENT = ("accuracy", "mean_iou", "agreement", "calibration_error", "knn_accuracy", *_OF_FEATURES[::2])
_TITLES = {"accuracy": "accuracy %", "mae": "MAE", "mean_iou": "mean IoU %", "agreement": "agreement %"}
_TITLES |= {"calibration_error": "calib. error %", "rmse": "RMSE", "r2": "R2", "teacher_difference": "to teacher"}
_TITLES |= {"knn_accuracy": "k-NN accuracy %", "probe_accuracy": "probe %", "rankme": "RankMe"}
_TITLES |= {"neighbor_agreement": "neighbours %"}
_LESS = ": less is better"
_FOLDED = ("run", "method", "verdict")  # columns whose cells may be folded
_COSTS = {"parameters": ",.0f", "macs": ",.0f", "precision": "", "size_kb": ",.1f", "latency_ms": ".3f"}


@dataclass
class Comparison:
    """Groups of runs on one part of the data.

    Attributes:
        part: ``"test"`` or ``"val"``.
        groups: The groups. Differences are to the first, or of each method to its baseline.
        left_out: Folders that are not compared.
        remarks: Lines about how the runs came about, such as a search for their settings.
        methods: The methods of an experiment of several ones. Then intervals are corrected for their number.
        bases: For each group the number of the group that it is compared with; None if it is compared with none.
        differences: For each group its difference to that group.
        contest: The methods among each other.
    """

    part: str
    groups: list[Group]
    left_out: list[LeftOut]
    remarks: list[str] = field(default_factory=list)
    methods: Sequence[MethodRuns] = ()

    def __post_init__(self) -> None:
        self.bases = find_bases(self.groups, self.methods)
        self.differences: list[Difference | None] = []
        for group, base in zip(self.groups, self.bases, strict=True):
            other = {} if base is None else self.groups[base].results
            pair = (group.results, other, self.figure_name, max(1, len(self.methods)))
            self.differences.append(difference(*pair) if group.results and other else None)
        self.contest = hold_contest(self.groups, self.methods, self.figure_name)
        self._other_samples = self._find_other_samples() if self.part == "test" else {}

    def _find_other_samples(self) -> dict[str, str]:
        """Return {group: text} of groups with runs that were measured on other test samples than the first run.

        The validation part of each seed has samples of its own, so it is compared within a seed alone.
        """
        results = [(group.name, result) for group in self.groups for result in group.results.values()]
        found: dict[str, str] = {}
        for name, result in results:
            if name not in found and (text := describe_other_samples(result, results[0][1])):
                found[name] = f"{result.folder} was measured on {text.partition('; ')[0]}"
        return found

    def tables(self) -> list[list[list[str]]]:
        """Return the table of figures, of costs, and of methods against the best, as rows of texts, the header first.

        Only an experiment of several methods has the last one.
        """
        sizes = sorted({n for group in self.groups for n in group.samples})
        n = f", n = {sizes[0]}" if len(sizes) == 1 else ""
        figure, more = self.figure_name, self._more_figures
        title = f"{_TITLES[figure]} ({self.part}{n})"
        header = ["run", "seeds", title, "difference", "95 % over seeds", "95 % over samples"]
        figures = [[*header, "verdict", *(_TITLES[name] for name in more)]]
        costs = [["run", "parameters", "MACs", "precision", "size KB", "latency ms"]]
        for group, found in zip(self.groups, self.differences, strict=True):
            count = len(group.runs)
            row = [group.name + self._part_of(group) + " *" * bool(self._reasons(group, found))]
            row += [str(count) if len(group.results) == count else f"{len(group.results)} of {count}"]
            row += [_mean_sd(group.values(figure), figure)]
            found = found or Difference()
            row += ["-" if found.mean is None else _format(found.mean, figure, "+")]
            row += [_interval(found.over_seeds, figure), _interval(found.over_samples, figure), found.verdict or "-"]
            figures.append([*row, *(_mean_sd(group.values(name), name) for name in more)])
            values = group.costs
            costs.append([group.name, *(format(values[key], f) if key in values else "-" for key, f in _COSTS.items())])
        if len(sizes) > 1:
            _insert(figures, 3, "n", [" to ".join(map(str, _ends(group.samples))) or "-" for group in self.groups])
        if self.methods:
            self._add_what_differs(figures)
        return [figures, costs] + ([self._contest_table()] if self.contest.to_best else [])

    def _add_what_differs(self, figures: list[list[str]]) -> None:
        """Add columns of what is not the same for all methods: parameters and steps."""
        shown = {*self.contest.methods, *(base for base in self.bases if base is not None)}
        parameters = [group.costs.get("parameters") for group in self.groups]
        columns = {
            "parameters": ["-" if count is None else f"{count:,}" for count in parameters],
            "steps": [_steps(group) for group in self.groups],
        }
        for name, cells in columns.items():
            if len({cells[number] for number in shown}) > 1:
                _insert(figures, 2, name, cells)

    def _contest_table(self) -> list[list[str]]:
        assert self.contest.best is not None
        title = f"difference to {self.groups[self.contest.best].name}"
        rows = [["method", title, "95 % over seeds", "95 % over samples", "verdict"]]
        for number, found in self.contest.to_best.items():
            mean = "-" if found.mean is None else _format(found.mean, self.figure_name, "+")
            ends = [_interval(one, self.figure_name) for one in (found.over_seeds, found.over_samples)]
            rows.append([self.groups[number].name, mean, *ends, found.verdict or "-"])
        return rows

    @property
    def figure_name(self) -> str:
        """The figure that is compared: ``accuracy``, ``mae`` of the regression task, ``knn_accuracy`` of features."""
        return figure_of(self.groups)

    @property
    def _more_figures(self) -> tuple[str, ...]:
        """The figures beside it."""
        if self.figure_name == "mae":
            return "rmse", "r2", "teacher_difference"
        if self.figure_name == "knn_accuracy":
            return _OF_FEATURES
        dense = any(group.values("mean_iou") for group in self.groups)
        return (*["mean_iou"] * dense, "agreement", "calibration_error")

    def _part_of(self, group: Group) -> str:
        return "" if group.part in (self.part, None) else f" [{group.part}]"

    def _reasons(self, group: Group, found: Difference | None) -> list[str]:
        """Return why there is no verdict about a group; of the first one only that it has few samples."""
        if found is not None:
            return found.reasons
        few = group.samples and group.samples[0] < LEAST_SAMPLES
        return [f"{group.samples[0]} samples; a verdict needs {LEAST_SAMPLES}"] if few else []

    def notes(self) -> list[str]:
        """Return the lines under the tables: remarks, missing verdicts, missing figures, runs that are left out."""
        lines = [*self.remarks]
        for group, found in zip(self.groups, self.differences, strict=True):
            if reasons := self._reasons(group, found):
                lines.append(f"* {group.name}: no verdict: {'; '.join(reasons)}.")
            said = found is not None and any(reason.startswith("other samples") for reason in found.reasons)
            if group.name in self._other_samples and not said:
                lines.append(f"{group.name}: {self._other_samples[group.name]}; these figures are not comparable.")
            for seeds, run in group.runs.items():
                if seeds not in group.results:
                    command = _command(run, self.part)
                    lines.append(f"{run.folder} has no {self.part} figures of its deployed weights: {command}")
                elif not (figures := group.results[seeds].figures).keys() & {*_FIGURES}:
                    lines.append(
                        f"{run.folder}: compared is one of {', '.join(_FIGURES)}, and its module logs "
                        f"{', '.join(sorted(figures))}; log {self.part}/accuracy, a fraction, in its {self.part} step."
                    )
        lines += self._fitted_on_other_data()
        return lines + [f"left out: {one.folder}: {one.reason}." for one in self.left_out]

    def _fitted_on_other_data(self) -> list[str]:
        """Return a line for each source of data whose training samples have changed between the fits of two runs."""
        hashes: dict[str, dict[str, Run]] = defaultdict(dict)
        for run in (run for group in self.groups for run in group.runs.values()):
            data = run.config.get("data")
            source = (data.get("init_args") or {}).get("source") if isinstance(data, dict) else None
            if source is not None and (samples := run.state.get("samples")) is not None:
                hashes[json.dumps(source, sort_keys=True, default=str)].setdefault(samples, run)
        return [
            f"{' and '.join(str(run.folder) for run in runs.values())} were fitted on different samples of one source."
            for runs in hashes.values()
            if len(runs) > 1
        ]

    def explanation(self) -> str:
        """Return the explanation of the tables' figures."""
        text = "Mean ± sample standard deviation over seeds. Difference: to "
        text += f"{'the baseline above it' if self.methods else 'the first row'}, paired by seed. Its 95 % intervals"
        if count := len(self.methods):
            text += f", corrected (Bonferroni) for {count} methods"
            text += f" and for {self.contest.pairs} pairs of methods" if self.contest.pairs > 1 else ""
        text += ": over seeds (Student's t), which holds for other seeds on these samples; over samples "
        text += (
            "(bootstrap), which holds for other samples with these seeds. Verdict: better or worse if both intervals "
        )
        text += f"lie on one side of zero{_LESS if self.figure_name == 'mae' else ''}. "
        text += "Size: weights of the newest run, each at its own number of bits, not the file."
        if any(self._part_of(group) for group in self.groups):
            text += " [transductive/test]: the method trained on these samples, without their labels."
        coded = [
            f"{group.name} {group.costs['coded_kb']:,.1f} KB" for group in self.groups if "coded_kb" in group.costs
        ]
        if coded:
            text += " Precision: bits of activations (A) and weights (W) of the quantised layers; a ternary weight "
            text += "takes 2 bits; scales, biases, normalisation and float layers take 32. Size with entropy-coded "
            text += f"quantised weights: {', '.join(coded)}. A quantised student has no latency: its rounding is "
            text += "simulated in float, which takes another time than on a device."
        return text

    def print(self, console: Console) -> None:
        """Print the tables and the notes."""
        figures, costs, *contest = self.tables()
        tables = [("Comparison", figures), *(("Methods against the best", table) for table in contest), ("Cost", costs)]
        for title, (header, *rows) in tables:
            view = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            for name in header:  # long names are folded, figures are whole
                view.add_column(name.replace("% (", "%\n("), no_wrap=name not in _FOLDED, overflow="fold")
            for row in rows:
                view.add_row(*(cell.replace("[", "\\[") for cell in row))
            console.print(view)
        for line in self.notes():  # not folded, so that commands can be copied
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(self.explanation(), markup=False)

    def write(self, out: Path) -> None:
        """Write ``comparison.json``, ``comparison.md`` and ``comparison.png`` to a folder."""
        out.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for header, *rows in self.tables():
            lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            lines += [*("| " + " | ".join(row) + " |" for row in rows), ""]
        text = "\n\n".join([*self.notes(), self.explanation()])
        (out / "comparison.md").write_text("\n".join([*lines, text, ""]), encoding="utf-8")
        (out / "comparison.json").write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        self.figure().savefig(out / "comparison.png", bbox_inches="tight", pad_inches=0.15)

    def as_json(self) -> dict[str, Any]:
        """Return all that the tables hold."""
        groups = []
        for number, (group, found) in enumerate(zip(self.groups, self.differences, strict=True)):
            runs = []
            for seeds, run in group.runs.items():
                entry: dict[str, Any] = {"folder": str(run.folder), "seed": run.seed}
                if result := group.results.get(seeds):
                    entry |= {"part": result.part, "samples": result.samples, **result.figures}
                runs.append(entry)
            content: dict[str, Any] = {"name": group.name, "part": group.part, **group.costs, "runs": runs}
            if found is not None and (base := self.bases[number]) is not None:
                content["difference"] = self._difference_as_json(found, base)
            if (found := self.contest.to_best.get(number)) is not None and (best := self.contest.best) is not None:
                content["difference_to_best"] = self._difference_as_json(found, best)
            groups.append(content)
        left_out = [{"folder": str(one.folder), "reason": one.reason} for one in self.left_out]
        content = {"part": self.part, "groups": groups, "left_out": left_out}
        if self.methods:
            content["methods"] = [{"run": str(one.run), "baseline": str(one.baseline)} for one in self.methods]
        return content | ({"remarks": self.remarks} if self.remarks else {})

    def _difference_as_json(self, found: Difference, base: int) -> dict[str, Any]:
        return {
            "to": self.groups[base].name,
            "mean": found.mean,
            "pairs": found.seeds,
            "interval_95_over_seeds": found.over_seeds,
            "interval_95_over_samples": found.over_samples,
            "verdict": found.verdict,
            "reasons": found.reasons,
        }

    def figure(self) -> Figure:
        """Draw the figure of each seed, what the students cost, and the learning curves; the title is the message."""
        message = headline(self.groups, self.differences, self.contest) if self.methods else None
        return draw_comparison(self.groups, self.differences, self.figure_name, self.part, message)


def compare_runs(
    folders: Sequence[Path],
    out: Path | None = None,
    part: str = "test",
    remarks: Sequence[str] = (),
    methods: Sequence[MethodRuns] = (),
) -> Comparison:
    """Compare runs, print the tables, and write them to a folder if one is given.

    Args:
        folders: Folders of runs, or of all runs of a name.
        out: Folder for ``comparison.json``, ``comparison.md`` and ``comparison.png``. Default: None are written.
        part: The part of the data: ``"test"`` or ``"val"``. It is the same for all runs.
        remarks: Lines about how the runs came about.
        methods: The methods of an experiment of several ones.

    Raises:
        InputError: For a folder that is no run, or if no run is finished.
    """
    comparison = Comparison(part, *find_groups(folders, part), [*remarks], methods)
    measure_costs(comparison.groups)
    console = Console()
    if console.width < 150:  # in a narrow terminal lines are folded and figures are whole
        console = Console(width=150)
    comparison.print(console)
    if out is not None:
        comparison.write(out)
        console.print(f"written to {out}")
    return comparison


def _command(run: Run, part: str) -> str:
    """Return the command that measures the deployed weights of a run."""
    command = "validate" if part == "val" else "test"
    weights = ["--ckpt_path", str(run.weights)] if run.weights.is_file() else []
    return shlex.join(["kd-lightning", command, "--config", str(run.folder / CONFIG), *weights])


def figure_of(groups: Sequence[Group]) -> str:
    """Return the name of the figure that groups are compared by."""
    return next((name for name in _FIGURES if any(group.values(name) for group in groups)), "accuracy")


def _format(value: float, figure: str, sign: str = "") -> str:
    """Format a figure: as percent, or with four digits."""
    return format(100 * value, f"{sign}.2f") if figure in _PERCENT else format(value, f"{sign}.4g")


def _mean_sd(values: list[float], figure: str) -> str:
    if not values:
        return "-"
    mean = _format(statistics.mean(values), figure)
    return f"{mean} ± {_format(statistics.stdev(values), figure)}" if len(values) > 1 else mean


def _interval(interval: Interval | None, figure: str) -> str:
    return "-" if interval is None else f"[{', '.join(_format(end, figure, '+') for end in interval)}]"


def _steps(group: Group) -> str:
    """Return the number of optimiser steps of a group's runs."""
    steps = sorted({step for run in group.runs.values() if isinstance(step := run.state.get("step"), int)})
    return " to ".join(f"{step:,}" for step in _ends(steps)) or "-"


def _insert(rows: list[list[str]], place: int, name: str, cells: Sequence[str]) -> None:
    """Insert a column into a table."""
    for row, cell in zip(rows, (name, *cells), strict=True):
        row.insert(place, cell)


def _ends(values: list[int]) -> list[int]:
    return sorted({values[0], values[-1]}) if values else []
