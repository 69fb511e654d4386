"""What the students of a comparison cost: parameters, multiply-accumulates, size and latency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.errors import InputError
from kd_lightning.inputs import arguments_of, call
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.figures.run_groups import Group
from kd_lightning.runs.student import example_inputs


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
