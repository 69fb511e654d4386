"""``compare RUN...``: compare finished runs."""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from scipy.stats import t as student_t
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.errors import InputError
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class
from kd_lightning.runs.weights import load_weights

FIGURES = ("accuracy", "agreement", "calibration_error")


@dataclass
class Run:
    """The content of a run's folder."""

    folder: Path
    group: str
    seed: int | None
    stages: dict[str, dict[str, float]]
    curve: list[tuple[int, float]]
    stage: str = "test"
    student: dict[str, Any] | None = None
    input_shape: list[int] | None = None

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures of the part that is compared."""
        return self.stages.get(self.stage, {})


@dataclass
class Group:
    """Runs of one name: one method over seeds."""

    name: str
    runs: list[Run]
    costs: dict[str, Any] = field(default_factory=dict)

    def values(self, figure: str) -> list[float]:
        """Return a figure of all runs that have it."""
        return [run.figures[figure] for run in self.runs if figure in run.figures]


def main(args: list[str]) -> None:
    """Parse the command line, and print the table."""
    parser = argparse.ArgumentParser(prog="kd_lightning compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or the folder of all versions of one")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for comparison.json, .md and .png (default: none are written)"
    )
    options = parser.parse_args(args)
    report([Path(run) for run in options.runs], None if options.out is None else Path(options.out))


def report(folders: Sequence[Path], out: Path | None) -> list[Group]:
    """Compare runs, print the table, and write it to a folder if one is given.

    Runs of one name form a group of seeds. Differences are to the first group, paired by seed.

    Args:
        folders: Folders of runs, or of all versions of a run.
        out: Folder for ``comparison.json``, ``comparison.md`` and ``comparison.png``. If None, they are not written.

    Raises:
        InputError: For a folder that is no run.
    """
    by_name: dict[str, list[Run]] = defaultdict(list)
    for folder in folders:
        versions = sorted(folder.glob("version_*"), key=lambda p: (len(p.name), p.name)) or [folder]
        for version in versions:
            run = read_run(version)
            by_name[run.group].append(run)
    groups = [Group(name, runs) for name, runs in by_name.items()]
    select_stage([run for group in groups for run in group.runs])
    measure_costs(groups)
    header, rows = table(groups)
    console = Console()
    if console.width < 150:  # in a narrow terminal lines are folded and figures are whole
        console = Console(width=150)
    view = Table(title="Comparison", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in header:
        view.add_column(name, no_wrap=name != "run", overflow="fold")  # long names are whole, too
    for row in rows:
        view.add_row(*row)
    console.print(view)
    explanation = explain(groups)
    console.print(explanation)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        (out / "comparison.md").write_text("\n".join([*lines, "", explanation, ""]), encoding="utf-8")
        (out / "comparison.json").write_text(json.dumps(_as_json(groups), indent=1) + "\n", encoding="utf-8")
        figure(groups).savefig(out / "comparison.png", dpi=120)
        console.print(f"written to {out}")
    return groups


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: If it holds no figures.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise InputError(f"{folder} is no finished run: it has no metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    curve = []
    for row in rows:
        for key, value in row.items():
            if value and key is not None and "/" in key:
                stage, _, name = key.rpartition("/")
                figures[stage][name] = float(value)  # the last row counts
        if row.get("val/accuracy"):
            curve.append((int(row["step"]), float(row["val/accuracy"])))
    run = Run(folder, folder.parent.name, None, dict(figures), curve)
    if (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        run.seed = config.get("seed_everything")
        run.student = config["model"].get("init_args", {}).get("student")
    weights = folder / "student.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as content:
            run.input_shape = json.loads((content.metadata() or {}).get("input_shape", "null"))
    return run


def select_stage(runs: Sequence[Run]) -> None:
    """Select the part on which runs are compared: test if all runs were tested, else validation.

    Raises:
        InputError: If no part has an accuracy in all runs.
    """
    for stage in ("test", "transductive/test", "val"):
        if all("accuracy" in run.stages.get(stage, {}) for run in runs):
            for run in runs:
                run.stage = stage
            return
    untested = next(run for run in runs if "accuracy" not in run.stages.get("test", {}))
    raise InputError(f"no part was measured in all runs: {untested.folder} has no test accuracy; run test on it first")


def measure_costs(groups: Sequence[Group], rounds: int = 5) -> None:
    """Measure each group's student: parameters, MACs, precision, KB of weights, CPU latency (ms, batch 1, one thread).

    Groups take turns in each round, and a group's latency is the median over the rounds. A quantised student has no
    latency, since its rounding is simulated in float; it has ``coded_kb``, the size of its entropy-coded weights.
    """
    timers: list[tuple[Group, Timer, list[float]]] = []
    for group in groups:
        run = group.runs[0]
        if run.student is None or run.input_shape is None:
            continue
        student = load_weights(build_student(run.student), run.folder / "student.safetensors").eval()
        student.requires_grad_(False)  # with no_grad alone the counter fails on quantised weights
        x = torch.zeros(1, *run.input_shape)
        with FlopCounterMode(display=False) as counter:
            student(x)
        size = size_of(student)
        group.costs = {
            "parameters": sum(p.numel() for p in student.parameters()),
            "macs": counter.get_total_flops() / 2,
            "precision": precision_of(student),
            "size_kb": size.stored / 1000,
        }
        if quantized_layers(student):
            group.costs["coded_kb"] = size.coded / 1000
            continue
        timers.append(
            (group, Timer("with no_grad(): net(x)", globals={"net": student, "x": x, "no_grad": torch.no_grad}), [])
        )
    for _ in range(rounds):
        for _, timer, times in timers:
            times.append(timer.blocked_autorange(min_run_time=0.05).median * 1000)
    for group, _, times in timers:
        group.costs["latency_ms"] = statistics.median(times)


def build_student(config: dict[str, Any]) -> nn.Module:
    """Build the network of a run's ``model.init_args.student``, without weights.

    The file of a ``load_weights`` in the config may be gone. It is not read: the network inside is built.

    Raises:
        InputError: If it cannot be built.
    """
    return build(nn.Module, _without_weights(config))


def _without_weights(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_weights(child) for child in node]
    if not isinstance(node, dict):
        return node
    if find_class(node.get("class_path")) is load_weights:
        return _without_weights(node["init_args"]["model"])
    return {key: _without_weights(child) for key, child in node.items()}


def paired_difference(group: Group, base: Group, figure: str = "accuracy") -> tuple[float, float, int] | None:
    """Return mean paired difference, half of its 95 % interval and number of pairs; None for fewer than two pairs.

    The mean of all runs of one seed is one observation.
    """
    after, before = (_by_seed(some, figure) for some in (group, base))
    differences = [after[seed] - before[seed] for seed in sorted(after.keys() & before.keys())]
    if len(differences) < 2:
        return None
    count = len(differences)
    half = student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return statistics.mean(differences), float(half), count


def _by_seed(group: Group, figure: str) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for run in group.runs:
        if run.seed is not None and figure in run.figures:
            values[run.seed].append(run.figures[figure])
    return {seed: statistics.mean(found) for seed, found in values.items()}


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table."""
    header = ["run", "seeds", "accuracy %", "difference [95 %]", "agreement %", "calib. error %"]
    header += ["parameters", "MACs", "precision", "size KB", "latency ms"]
    forms = {"parameters": ",.0f", "macs": ",.0f", "precision": "", "size_kb": ",.1f", "latency_ms": ".3f"}
    rows = []
    for group in groups:
        difference = None if group is groups[0] else paired_difference(group, groups[0])
        row = [group.name, str(len(group.runs)), _mean_sd(group.values("accuracy"))]
        if difference is not None:
            mean, half, _ = difference
            row.append(f"{100 * mean:+.2f} [{100 * (mean - half):+.2f}, {100 * (mean + half):+.2f}]")
        else:
            row.append("-")
        row += [_mean_sd(group.values(name)) for name in FIGURES[1:]]
        for name, form in forms.items():
            row.append(format(group.costs[name], form) if name in group.costs else "-")
        rows.append(row)
    return header, rows


def explain(groups: Sequence[Group]) -> str:
    """Return the explanation of the table's figures."""
    text = "Mean ± sample standard deviation over seeds; difference to the first row, paired by seed, with its 95 % "
    text += f"interval (Student's t). Figures of the {groups[0].runs[0].stage} part. Size: weights of the first run, "
    text += "each at its own number of bits, not the file."
    coded = [f"{group.name} {group.costs['coded_kb']:,.1f} KB" for group in groups if "coded_kb" in group.costs]
    if coded:
        text += " Precision: bits of activations (A) and weights (W) of the quantised layers; a ternary weight takes 2 "
        text += "bits; scales, biases, normalisation and float layers take 32. Size with entropy-coded quantised "
        text += f"weights: {', '.join(coded)}. A quantised student has no latency: its rounding is simulated in float, "
        text += "which takes another time than on a device."
    return text


def figure(groups: Sequence[Group]) -> Figure:
    """Plot accuracy against MACs (against size if precisions differ), and the learning curves."""
    by_size = len({group.costs["precision"] for group in groups if group.costs}) > 1
    key, label = ("size_kb", "KB of weights") if by_size else ("macs", "MACs for one image")
    picture = Figure(figsize=(11, 4.2), layout="constrained")
    cost, curves = picture.subplots(1, 2)
    for number, group in enumerate(groups):
        color = f"C{number}"
        values = [100 * value for value in group.values("accuracy")]
        if group.costs:
            spread = statistics.stdev(values) if len(values) > 1 else 0
            at = group.costs[key]
            cost.errorbar(at, statistics.mean(values), spread, fmt="o", color=color, capsize=4, label=group.name)
        by_step: dict[int, list[float]] = defaultdict(list)
        for run in group.runs:
            for step, value in run.curve:
                by_step[step].append(100 * value)
        steps = sorted(by_step)
        curves.plot(steps, [statistics.mean(by_step[step]) for step in steps], color=color, label=group.name)
    cost.set(xscale="log", xlabel=label, ylabel="accuracy %", title="Accuracy against cost")
    curves.set(xlabel="step", ylabel="validation accuracy %", title="Learning curves (mean over seeds)")
    for axes in (cost, curves):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    return picture


def _mean_sd(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    content = []
    for group in groups:
        difference = None if group is groups[0] else paired_difference(group, groups[0])
        runs = [{"folder": str(r.folder), "seed": r.seed, "stage": r.stage, **r.figures} for r in group.runs]
        entry: dict[str, Any] = {"name": group.name, **group.costs, "runs": runs}
        if difference is not None:
            mean, half, pairs = difference
            entry["difference"] = {"to": groups[0].name, "mean": mean, "half_interval_95": half, "pairs": pairs}
        content.append(entry)
    return content
