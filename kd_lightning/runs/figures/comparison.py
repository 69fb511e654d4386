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

import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.errors import InputError
from kd_lightning.inputs import arguments_of, call
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.figures.comparison_picture import draw_comparison
from kd_lightning.runs.figures.run_groups import Group, LeftOut, find_groups
from kd_lightning.runs.figures.statistics import (
    LEAST_SAMPLES,
    Difference,
    Interval,
    describe_other_samples,
    difference,
)
from kd_lightning.runs.run import CONFIG, Run
from kd_lightning.runs.student import example_inputs

_FIGURES = ("accuracy", "mae", "knn_accuracy")  # the first that is known is compared
_OF_FEATURES = ("probe_accuracy", "rankme", "neighbor_agreement")
_PERCENT = ("accuracy", "mean_iou", "agreement", "calibration_error", "knn_accuracy", *_OF_FEATURES[::2])
_TITLES = {"accuracy": "accuracy %", "mae": "MAE", "mean_iou": "mean IoU %", "agreement": "agreement %"}
_TITLES |= {"calibration_error": "calib. error %", "rmse": "RMSE", "r2": "R2", "teacher_difference": "to teacher"}
_TITLES |= {"knn_accuracy": "k-NN accuracy %", "probe_accuracy": "probe %", "rankme": "RankMe"}
_TITLES |= {"neighbor_agreement": "neighbours %"}
_LESS = ": less is better"
_COSTS = {"parameters": ",.0f", "macs": ",.0f", "precision": "", "size_kb": ",.1f", "latency_ms": ".3f"}


@dataclass
class Comparison:
    """Groups of runs on one part of the data.

    Attributes:
        part: ``"test"`` or ``"val"``.
        groups: The groups. Differences are to the first.
        left_out: Folders that are not compared.
        remarks: Lines about how the runs came about, such as a search for their settings.
        differences: For each group its difference to the first, which itself has none.
    """

    part: str
    groups: list[Group]
    left_out: list[LeftOut]
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        base = self.groups[0].results
        self.differences: list[Difference | None] = [
            None if number == 0 or not (group.results and base) else difference(group.results, base, self.figure_name)
            for number, group in enumerate(self.groups)
        ]
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
        """Return the table of figures and that of costs, each as rows of texts, the header first."""
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
            cells = ["n", *(" to ".join(map(str, _ends(group.samples))) or "-" for group in self.groups)]
            for row, cell in zip(figures, cells, strict=True):
                row.insert(3, cell)
        return [figures, costs]

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
        text = "Mean ± sample standard deviation over seeds. Difference: to the first row, paired by seed. Its 95 % "
        text += "intervals: over seeds (Student's t), which holds for other seeds on these samples; over samples "
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
        for title, (header, *rows) in zip(("Comparison", "Cost"), self.tables(), strict=True):
            view = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
            for name in header:  # long names are folded, figures are whole
                view.add_column(name.replace("% (", "%\n("), no_wrap=name != "run", overflow="fold")
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
        for group, found in zip(self.groups, self.differences, strict=True):
            runs = []
            for seeds, run in group.runs.items():
                entry: dict[str, Any] = {"folder": str(run.folder), "seed": run.seed}
                if result := group.results.get(seeds):
                    entry |= {"part": result.part, "samples": result.samples, **result.figures}
                runs.append(entry)
            content: dict[str, Any] = {"name": group.name, "part": group.part, **group.costs, "runs": runs}
            if found is not None:
                content["difference"] = {
                    "to": self.groups[0].name,
                    "mean": found.mean,
                    "pairs": found.seeds,
                    "interval_95_over_seeds": found.over_seeds,
                    "interval_95_over_samples": found.over_samples,
                    "verdict": found.verdict,
                    "reasons": found.reasons,
                }
            groups.append(content)
        left_out = [{"folder": str(one.folder), "reason": one.reason} for one in self.left_out]
        content = {"part": self.part, "groups": groups, "left_out": left_out}
        return content | ({"remarks": self.remarks} if self.remarks else {})

    def figure(self) -> Figure:
        """Draw the figure of each seed, what the students cost, and the learning curves; the title is the message."""
        return draw_comparison(self.groups, self.differences, self.figure_name, self.part)


def compare_runs(
    folders: Sequence[Path], out: Path | None = None, part: str = "test", remarks: Sequence[str] = ()
) -> Comparison:
    """Compare runs, print the tables, and write them to a folder if one is given.

    Args:
        folders: Folders of runs, or of all runs of a name.
        out: Folder for ``comparison.json``, ``comparison.md`` and ``comparison.png``. Default: None are written.
        part: The part of the data: ``"test"`` or ``"val"``. It is the same for all runs.
        remarks: Lines about how the runs came about.

    Raises:
        InputError: For a folder that is no run, or if no run is finished.
    """
    comparison = Comparison(part, *find_groups(folders, part), [*remarks])
    measure_costs(comparison.groups)
    console = Console()
    if console.width < 150:  # in a narrow terminal lines are folded and figures are whole
        console = Console(width=150)
    comparison.print(console)
    if out is not None:
        comparison.write(out)
        console.print(f"written to {out}")
    return comparison


def measure_costs(groups: Sequence[Group], rounds: int = 5) -> None:
    """Measure each group's student: parameters, MACs, precision, KB of weights, CPU latency (ms, batch 1, one thread).

    Groups take turns in each round, and a group's latency is the median over the rounds. A quantised student has no
    latency, since its rounding is simulated in float; it has ``coded_kb``, the size of its entropy-coded weights.
    """
    timers: list[tuple[Group, Timer, list[float]]] = []
    for group in groups:
        runs = [run for run in group.runs.values() if run.has_student and run.weights.is_file()]
        if not runs:
            continue
        run = max(runs, key=lambda run: run.started)
        try:
            student = run.student().eval()
        except InputError as error:  # as of a taught module that builds its network from its data
            rank_zero_warn(f"the cost of {run.folder} is unknown: {error}")
            continue
        student.requires_grad_(False)  # with no_grad alone the counter fails on quantised weights
        size = size_of(student)
        group.costs = {
            "parameters": sum(p.numel() for p in student.parameters()),
            "precision": precision_of(student),
            "size_kb": size.stored / 1000,
        }
        if quantized_layers(student):
            group.costs["coded_kb"] = size.coded / 1000
        x = example_inputs(run.metadata)
        if x is None:
            continue
        try:
            with FlopCounterMode(display=False) as counter:
                call(student, x)
        except Exception as error:  # of a network that does not run on zeros, or in eval mode, can be anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            rank_zero_warn(f"MACs and latency of {run.folder} are unknown: its student fails on zeros: {reason}")
            continue
        group.costs["macs"] = counter.get_total_flops() / 2
        if quantized_layers(student):
            continue
        args, kwargs = arguments_of(x)
        names = {"net": student, "args": args, "kwargs": kwargs, "no_grad": torch.no_grad}
        timers.append((group, Timer("with no_grad(): net(*args, **kwargs)", globals=names), []))
    for _ in range(rounds):
        for _, timer, times in timers:
            times.append(timer.blocked_autorange(min_run_time=0.05).median * 1000)
    for group, _, times in timers:
        group.costs["latency_ms"] = statistics.median(times)


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


def _ends(values: list[int]) -> list[int]:
    return sorted({values[0], values[-1]}) if values else []
