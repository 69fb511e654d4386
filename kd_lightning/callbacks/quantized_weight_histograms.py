"""What quantised weights look like."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import nn

from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import weight_levels


class QuantizedWeightHistograms(Callback):
    """Show TensorBoard the weights of a quantised student's layers, in units of their levels.

    After every epoch a histogram of each layer (``weight_levels/<layer>``: a level is an integer), and at the end of
    a fit one figure with the levels drawn in. Nothing is done for a float student. Works on any LightningModule with
    a ``student``; the command line adds it by itself.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the histograms."""
        for board in _boards(trainer):
            for name, layer in quantized_layers(_student(pl_module)).items():
                weights, _ = weight_levels(layer)
                board.experiment.add_histogram(f"weight_levels/{name}", weights.flatten(), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the figure."""
        if quantized_layers(_student(pl_module)):
            for board in _boards(trainer):
                board.experiment.add_figure("weight_levels", draw_levels(_student(pl_module)), trainer.global_step)


def draw_levels(network: nn.Module) -> Figure:
    """A panel for each quantised layer: float weights in units of their channel's scale, and their levels."""
    layers = quantized_layers(network)
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    picture = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False).flat
    for (name, layer), panel in zip(layers.items(), panels, strict=False):  # in this order no panel is lost
        weights, levels = (tensor.flatten().float().cpu().numpy() for tensor in weight_levels(layer))
        low, high = int(levels.min()), int(levels.max())
        panel.hist(weights, bins=60, color="C0")
        if high - low < 20:  # those of 8 bits would hide the histogram
            for level in range(low, high + 1):
                panel.axvline(level, color="C3", linewidth=0.8)
        panel.set_title(f"{name}: {high - low + 1} levels, {100 * (levels == 0).mean():.0f} % zero", fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in list(panels):
        panel.set_axis_off()
    return picture


def _student(module: LightningModule) -> nn.Module:
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else nn.Identity()


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
