"""QuantizedWeightHistograms: what lies in the event file, and the figure."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning import ActivationCalibration, QuantizedWeightHistograms, SupervisedModule
from kd_lightning.callbacks.quantized_weight_histograms import plot_levels
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import calibrate
from kd_lightning.quantization.layers import quantize, quantized_layers
from kd_lightning.quantization.sizes import weight_levels


def fit(quiet_trainer, loader, tmp_path, student, **kwargs):
    """Two epochs of three steps; gives what TensorBoard reads."""
    defaults = {"logger": TensorBoardLogger(tmp_path, "", ""), "log_every_n_steps": 1}
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[ActivationCalibration(), QuantizedWeightHistograms()], **(defaults | kwargs)
    )
    trainer.fit(SupervisedModule(student), loader())
    return EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0}).Reload()


@pytest.mark.parametrize("bits", [8, 4, 2, "ternary"])
def test_histograms_and_figure(quiet_trainer, loader, tmp_path, student, bits):
    lowered = quantize(student, bits)
    events = fit(quiet_trainer, loader, tmp_path, lowered)
    names = {f"weight_levels/{name}" for name in quantized_layers(lowered)}
    assert names == {"weight_levels/3", "weight_levels/7"}
    assert set(events.Tags()["histograms"]) == names
    for name, layer in quantized_layers(lowered).items():
        found = events.Histograms(f"weight_levels/{name}")
        assert [event.step for event in found] == [3, 6]
        scale = layer.quant_weight().scale.detach()
        expected = layer.weight.detach() / scale  # the fit is over: these are the last
        last = found[-1].histogram_value
        assert last.num == layer.weight.numel()
        assert (last.min, last.max) == pytest.approx((expected.min().item(), expected.max().item()), rel=1e-5)
        assert last.sum == pytest.approx(expected.sum().item(), rel=1e-4, abs=1e-3)
        assert (found[0].histogram_value.min, found[0].histogram_value.max) != (last.min, last.max)
    (picture,) = events.Images("weight_levels")
    assert picture.step == 6
    assert picture.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize(("bits", "levels"), [(8, 0), (4, 15), (2, 4), ("ternary", 3)])
def test_levels_are_plotted(student, bits, levels):
    lowered = quantize(student, bits)
    panels = plot_levels(lowered).axes
    layers = quantized_layers(lowered)
    assert len(panels) == len(layers)
    for panel, (name, layer) in zip(panels, layers.items(), strict=True):
        _, rounded = weight_levels(layer)
        lines = sorted(line.get_xdata()[0] for line in panel.lines)
        low, high = int(rounded.min()), int(rounded.max())
        if levels:
            assert lines == [*range(low, high + 1)]
            assert len(lines) <= levels
        else:
            assert not lines
        zeros = 100 * np.mean(rounded.numpy() == 0)
        assert panel.get_title() == f"{name}: {high - low + 1} levels, {zeros:.0f} % zero"
        assert sum(bar.get_height() for bar in panel.patches) == layer.weight.numel()  # every weight is in


def test_panels_left_over_are_empty():
    layers = [torch.nn.Linear(4, 4) for _ in range(7)]
    panels = plot_levels(quantize(torch.nn.Sequential(*layers), 4)).axes
    assert [panel.axison for panel in panels] == [True] * 5 + [False] * 3


def test_a_network_without_quantised_layers_is_refused(student):
    with pytest.raises(InputError, match="network must have quantised layers, got "):
        plot_levels(student)


def test_channels_without_weights(student):
    """A channel of zeros has a scale of its own, and nothing becomes NaN."""
    lowered = quantize(student, "ternary")
    for layer in quantized_layers(lowered).values():
        layer.weight.data[0] = 0
        assert all(part.isfinite().all() for part in weight_levels(layer))
    plot_levels(lowered)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(quiet_trainer, loader, tmp_path, student, precision):
    events = fit(quiet_trainer, loader, tmp_path, quantize(student, 4), precision=precision)
    assert len(events.Tags()["histograms"]) == 2
    assert len(events.Images("weight_levels")) == 1


def test_float_students(quiet_trainer, loader, tmp_path, student):
    events = fit(quiet_trainer, loader, tmp_path, student)
    assert not events.Tags()["histograms"]
    assert not events.Tags()["images"]
    assert "train/loss" in events.Tags()["scalars"]


def test_other_loggers(quiet_trainer, loader, tmp_path, student):
    lowered = calibrate(quantize(student, 4), [torch.randn(8, 1, 8, 8)])
    for logger in (False, CSVLogger(tmp_path, "", "")):
        events = fit(quiet_trainer, loader, tmp_path, lowered, logger=logger)
        assert not events.Tags()["histograms"]
    assert (tmp_path / "metrics.csv").is_file()
    boards = [TensorBoardLogger(tmp_path, name, "") for name in ("one", "two")]
    fit(quiet_trainer, loader, tmp_path, lowered, logger=[*boards, CSVLogger(tmp_path, "three", "")])
    for name in ("one", "two"):
        assert len(EventAccumulator(str(tmp_path / name)).Reload().Tags()["histograms"]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_left_out(student, tmp_path, value):
    """A drawing never ends a training."""
    lowered, board = quantize(student, 4), TensorBoardLogger(tmp_path, "", "")
    next(iter(quantized_layers(lowered).values())).weight.data.fill_(value)
    trainer = SimpleNamespace(loggers=[board], global_step=0, is_global_zero=True)
    module = SupervisedModule(lowered)
    with pytest.warns(UserWarning, match=r"histogram weight_levels/3 is left out, and the run goes on"):
        QuantizedWeightHistograms().on_train_epoch_end(trainer, module)
    board.save()
    assert set(EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"]) == {"weight_levels/7"}


def test_a_float_network_has_none(tmp_path):
    board = TensorBoardLogger(tmp_path, "", "")
    trainer = SimpleNamespace(loggers=[board], global_step=0)
    for module, path in ((SupervisedModule(DigitsCNN(4)), "student"), (DigitsCNN(4), "")):
        QuantizedWeightHistograms(path).on_train_epoch_end(trainer, module)
        QuantizedWeightHistograms(path).on_train_end(trainer, module)
    board.save()
    assert not EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"]
