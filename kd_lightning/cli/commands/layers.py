"""``layers --config ...``: print the layers of student and teacher side by side. Takes the arguments of fit."""

from __future__ import annotations

from argparse import Namespace
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kd_lightning.batch import Batch, unpack
from kd_lightning.cli.main import InspectCLI
from kd_lightning.data.batch_transfer import own_hooks, read_by, transfer
from kd_lightning.errors import InputError
from kd_lightning.features.layers import Layer, list_layers
from kd_lightning.inputs import call
from kd_lightning.runs.student import find_network, inputs_of_step, student_path
from kd_lightning.teachers.teacher import Teacher


def main(options: Namespace) -> None:
    """Print a table with one column of layers for each network."""
    networks = LayersCLI(["fit", *options.overrides]).networks
    table = Table(title="Outputs for one sample; the figures of an outer layer include its inner layers")
    for name in networks:
        table.add_column(f"{name}'s layer", overflow="fold")
        table.add_column("output")
        table.add_column("MACs", justify="right")
        table.add_column("parameters", justify="right")
    for row in zip_longest(*networks.values()):
        table.add_row(*(cell for layer in row for cell in _cells(layer)))
    console = Console()
    if console.width < 150:  # in a narrow terminal lines are folded and names are whole
        console = Console(width=150)
    console.print(table)


class LayersCLI(InspectCLI):
    """Builds what ``fit`` builds, and lists the layers of its networks."""

    networks: dict[str, list[Layer]]

    def fit(self, model: nn.Module, datamodule: Any = None, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Run in place of ``Trainer.fit``."""
        data: Any = model if datamodule is None else datamodule
        data.prepare_data()
        data.setup("fit")
        source = read_by(data, own_hooks(model), Batch.from_any)
        loaded = transfer(source, next(iter(data.train_dataloader())), torch.device("cpu"), training=True)
        path = student_path(model)
        if path is None:
            raise InputError(f"model: layers needs a module with a student, {type(model).__name__} has none")
        student = find_network(model, path, "model")
        run = call
        if callable(getattr(model, "unpack", None)):
            batch = unpack(model, loaded)
            x, teacher_x = batch.x, batch.teacher_x
            run = getattr(model, "call", call)
        else:
            x = teacher_x = inputs_of_step(model, loaded)
        self.networks = {"student": list_layers(student, x, run)}
        teacher = getattr(model, "teacher", getattr(getattr(model, "teaching", None), "teacher", None))
        if isinstance(teacher, Teacher):
            with teacher.evaluating():
                self.networks["teacher"] = list_layers(teacher.network, teacher.prepare(teacher_x))


def _cells(layer: Layer | None) -> list[str]:
    if layer is None:
        return [""] * 4
    shape = "-" if layer.shape is None else " x ".join(map(str, layer.shape))
    return [f"{layer.name} ({layer.kind})", shape, f"{layer.macs:,}", f"{layer.parameters:,}"]
