"""Ranges of quantised activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.quantization.layers import _UNCALIBRATED, quantized_layers

_RANGE = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Give the activations of a quantised network their ranges: the largest magnitude on these batches.

    The network computes in the mode that it is in: in training mode the ranges are those of BatchNorm's batch
    statistics, which is right for a network that starts from nothing. Its buffers and the random generators are left
    as they were. Without quantised activations nothing is done.

    Args:
        model: From :func:`quantize`; changed in place.
        batches: Inputs (B, ...), ``(x, y)`` or ``Batch``; a few hundred samples suffice.

    Returns:
        The same network.

    Raises:
        InputError: If there is no batch, or an activation is no finite number.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.input_quant.is_quant_enabled}
    if not layers:
        return model
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        found = x.detach().abs().amax().float()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    device = next(iter(layers.values())).weight.device
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(_kept_buffers(model))
        for name, layer in layers.items():
            layer.input_quant.disable_quant = True
            stack.callback(setattr, layer.input_quant, "disable_quant", False)
            hook = layer.register_forward_pre_hook(
                lambda _, args, named, name=name: note(name, args[0] if args else named["input"]), with_kwargs=True
            )
            stack.callback(hook.remove)
        for batch in batches:
            model((batch if isinstance(batch, Tensor) else Batch.from_any(batch).x).to(device))
    if not largest:
        raise InputError("batches: calibration needs at least one")
    for name, value in largest.items():
        if not value.isfinite():
            raise InputError(f"the input of {name} holds numbers that are not finite; its range cannot be calibrated")
        with torch.no_grad():
            _range(layers[name]).fill_(max(float(value), 1e-6))
    return model


def is_calibrated(model: nn.Module) -> bool:
    """Whether any activation range is another than a new network's; True where there is none to calibrate."""
    ranges = activation_ranges(model)
    return not ranges or any(float(value.detach()) != _UNCALIBRATED for value in ranges.values())


def activation_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned largest magnitude of each quantised layer's input, by the layer's name."""
    layers = quantized_layers(model)
    return {name: _range(layer) for name, layer in layers.items() if layer.input_quant.is_quant_enabled}


def is_range(key: str) -> bool:
    """Whether an entry of a state dict is an activation's range, which float checkpoints do not have."""
    return key.endswith(_RANGE)


def _range(layer: Any) -> nn.Parameter:
    value: nn.Parameter = layer.get_parameter(_RANGE)
    return value


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
