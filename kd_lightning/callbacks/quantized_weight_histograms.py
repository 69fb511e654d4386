"""Log histograms of quantised weights."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.quantization.layers import quantized_layers
from kd_lightning.quantization.sizes import weight_levels
from kd_lightning.runs.figures.log_figure import log_figure, only_warn
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import STUDENT, find_network


class QuantizedWeightHistograms(Callback):
    """Log the weights of a quantised network's layers, in units of their quantisation levels.

    Logs to TensorBoard a histogram of each layer after every epoch (``weight_levels/<layer>``; each level is an
    integer), and to each logger that takes figures one figure with the levels marked at the end of a fit
    (``weight_levels``). Does nothing for a float network. Works on any LightningModule. The command line adds this
    callback to every fit of a module with a student.

    Args:
        network: Dotted path of the network in the module; "" for the module itself.

    Raises:
        InputError: In a fit, if the module does not have the network.
    """

    def __init__(self, network: str = STUDENT) -> None:
        self.network = network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the strategy leaves the weights whole."""
        require_whole_weights(trainer, "QuantizedWeightHistograms")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit, after ``configure_model``. Checks that the module has the network."""
        self._find(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of each training epoch. Logs the histograms."""
        for logger in (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)):
            for name, layer in quantized_layers(self._find(pl_module)).items():
                with only_warn(f"histogram weight_levels/{name}"):
                    weights, _ = weight_levels(layer)
                    logger.experiment.add_histogram(f"weight_levels/{name}", weights.flatten(), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Logs the figure."""
        network = self._find(pl_module)
        if quantized_layers(network):
            log_figure(trainer, "weight_levels", lambda: plot_levels(network))

    def _find(self, module: LightningModule) -> nn.Module:
        return find_network(module, self.network, "QuantizedWeightHistograms")


def plot_levels(network: nn.Module) -> Figure:
    """Plot one panel for each quantised layer: float weights in units of their channel's scale, and their levels.

    Args:
        network: A network that :func:`~kd_lightning.quantization.quantize` has changed.

    Raises:
        InputError: If it has no quantised layer.
    """
    layers = quantized_layers(network)
    if not layers:
        raise InputError(
            f"network must have quantised layers, got {type(network).__name__} without; quantize makes them"
        )
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, layer), panel in zip(layers.items(), panels, strict=False):  # layers first: zip takes no extra panel
        weights, levels = (tensor.flatten().float().cpu().numpy() for tensor in weight_levels(layer))
        low, high = int(levels.min()), int(levels.max())
        panel.hist(weights, bins=60, color="C0")
        if high - low < 20:  # the levels of 8 bits would hide the histogram
            for level in range(low, high + 1):
                panel.axvline(level, color="C3", linewidth=0.8)
        panel.set_title(f"{name}: {high - low + 1} levels, {100 * (levels == 0).mean():.0f} % zero", fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in list(panels):  # the panels that are left
        panel.set_axis_off()
    return figure
