"""The lines that introduce a run: what is trained on what, by which teacher, and where it lies."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.parameter import UninitializedParameter

from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.evaluation_batches import batches_of
from kd_lightning.features.layers import count_macs
from kd_lightning.inputs import Inputs
from kd_lightning.modules.seams import Seams
from kd_lightning.runs.class_paths import walk_config
from kd_lightning.runs.folder import folder_on_rank_zero
from kd_lightning.runs.run import run_of
from kd_lightning.runs.student import find_student
from kd_lightning.teachers import CrossFittedTeacher, Ensemble, Teacher

_PARTS = ("labeled", "unlabeled", "validation", "test")
_TEACHERS = ("teacher", "teachers")


class Introduction(Callback):
    """Print about five lines when a fit starts.

    Args:
        config: The whole config of the run.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage, once the data are set up. Prints the lines on rank 0 before a fit."""
        if stage == "fit" and trainer.is_global_zero:
            for name, text in self._lines(trainer, pl_module):
                print(_wrap(name, text))

    def _lines(self, trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, str]]:
        folder = folder_on_rank_zero(trainer)
        epochs = trainer.max_epochs
        length = f", {epochs} epoch{'s' * (epochs != 1)}" if epochs not in (None, -1) else ""
        devices = f"{trainer.num_devices * trainer.num_nodes} x " if trainer.world_size > 1 else ""
        device = trainer.strategy.root_device.type
        seed = self.config.get("seed_everything")
        yield "fit", f"{self.config['name']}: {type(module).__name__}{length}, seed {seed}, on {devices}{device}"
        data = getattr(trainer, "datamodule", None)
        if text := _describe_data(data, folder):
            yield "data", text
        x = _sample(data, module)
        if (student := find_student(module)) is not None:
            yield "student", describe_network(student, x, getattr(module, "call", None))
        teachers = teachers_of(module)
        files = [*_teacher_files(self.config.get("model") or {})]
        for number, teacher in enumerate(teachers):
            networks = [*teacher.network.children()] if isinstance(teacher, CrossFittedTeacher) else [teacher.network]
            text = describe_network(networks[0], None if x is None else teacher.prepare(x), None)
            known = known_accuracy(files[number]) if len(files) == len(teachers) else ""
            yield "teacher", f"{len(networks)} networks, each {text}" if len(networks) > 1 else f"{text}{known}"
        if trainer.loggers:
            yield "folder", str(folder)


def describe_network(network: nn.Module, x: Inputs | None, run: Any = None) -> str:
    """Return class, parameters and, for an input, multiply-accumulates of a network, in one line."""
    inner = getattr(network, "_orig_mod", network)  # of torch.compile
    text = type(inner).__name__
    if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
        return text
    text = f"{text}: {_short(sum(p.numel() for p in network.parameters()))} parameters"
    if x is None or inner is not network or getattr(network, "_compiled_call_impl", None) is not None:
        return text
    try:
        macs = count_macs(network, x, *([] if run is None else [run]))
    except Exception:  # a network that does not run alone, such as a quantised one, has no figure
        return text
    return f"{text}, {_short(macs)} MACs a sample" if macs else text


def known_accuracy(weights: str) -> str:
    """Return what the run of a file of weights has measured, as the end of a line; empty if that is not known."""
    run = run_of(Path(weights))
    for part in ("test", "transductive/test", "val"):
        result = None if run is None else run.result(part)
        if result is not None and "accuracy" in result.figures:
            return f", {part} accuracy {result.figures['accuracy']:.3f} on {result.samples} samples ({result.folder})"
    return "" if run is None else f" ({run.folder}, not tested)"


def _describe_data(data: Any, folder: Path) -> str:
    """Return the source of the data and the counts of each part and class, in one line."""
    if data is None:
        return ""
    source = type(getattr(data, "source", data)).__name__
    try:
        counts = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of another datamodule
        return source
    classes, samples = counts["classes"], counts["samples"]
    parts = []
    for part in _PARTS:
        if not samples.get(part):
            continue
        each = [row[part] for row in classes if row.get(part) is not None]
        parts.append(f"{samples[part]} {part}{_span(each)}")
    kinds = f"{len(classes)} classes; " if classes else ""
    return f"{source}: {kinds}{', '.join(parts)}"


def _span(counts: Sequence[int]) -> str:
    """Return the numbers of samples of the classes, as the end of a text.

    >>> _span([9, 12]), _span([10, 10]), _span([])
    (' (9 to 12 each)', ' (10 each)', '')
    """
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f" ({low} each)" if low == high else f" ({low} to {high} each)"


def _sample(data: Any, module: LightningModule) -> Inputs | None:
    """Return the inputs of a validation sample. Random generators stay unchanged."""
    if not isinstance(data, SemiSupervisedDataModule):
        return None
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with isolate_rng():
            batch = next(iter(batches_of(data.val_dataloader(), Seams.of(module).read(data), device)), None)
    except Exception:  # the fit itself meets what is wrong, and names it
        return None
    return None if batch is None else batch.x


def teachers_of(module: LightningModule) -> list[Teacher]:
    """Return the teachers of a module, empty if it has none."""
    ensemble = getattr(module, "ensemble", getattr(module, "teachers", None))
    if isinstance(ensemble, Ensemble | nn.ModuleList):
        return [one for one in ensemble if isinstance(one, Teacher)]
    teacher = getattr(module, "teacher", getattr(getattr(module, "teaching", None), "teacher", None))
    return [teacher] if isinstance(teacher, Teacher) else []


def _teacher_files(model: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files of weights of the teachers of a config."""
    for path, key, value, _ in walk_config(dict(model)):
        if key == "path" and isinstance(value, str) and any(f"init_args.{name}" in path for name in _TEACHERS):
            yield value


def _short(count: int) -> str:
    """Return a count with three digits.

    >>> [_short(n) for n in (999, 6346, 11_181_642, 4_089_184_256)]
    ['999', '6.35 k', '11.2 M', '4.09 G']
    """
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {letter}"
    return str(count)


def _wrap(name: str, text: str) -> str:
    width = max(60, min(100, shutil.get_terminal_size().columns))
    indent = " " * 9
    return textwrap.fill(
        text,
        width,
        initial_indent=f"{name:<9}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
