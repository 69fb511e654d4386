"""Calibrate the ranges of quantised activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.inputs import Inputs, call, map_inputs
from kd_lightning.quantization.layers import INITIAL_RANGE, quantized_layers

_RANGE_KEY = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"


def calibrate(model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Inputs], Any] = call) -> nn.Module:
    """Set the range of each quantised activation to its largest magnitude on the given batches.

    The network runs in its current mode. In training mode BatchNorm uses the statistics of the batch, which is right
    for a network that is not trained yet. The network's buffers and the random generators do not change. A network
    without quantised activations does not change at all.

    Args:
        model: From :func:`~kd_lightning.quantization.quantize`; changed in place.
        batches: Inputs (B, ...), or batches as :meth:`~kd_lightning.Batch.from_any` takes them: ``(x, y)``, mappings, a
            ``Batch``. A few hundred samples are enough.
        run: Function that calls the network with inputs, such as ``call`` of a module.

    Returns:
        The same network.

    Raises:
        InputError: If there is no sample, or an activation is not finite.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.input_quant.is_quant_enabled}
    if not layers:
        return model
    largest: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        found = x.detach().abs().amax().float()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    device = next(iter(layers.values())).weight.device
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(_restored_buffers(model))
        for name, layer in layers.items():
            layer.input_quant.disable_quant = True
            stack.callback(setattr, layer.input_quant, "disable_quant", False)
            hook = layer.register_forward_pre_hook(
                lambda _, args, named, name=name: record(name, args[0] if args else named["input"]), with_kwargs=True
            )
            stack.callback(hook.remove)
        for batch in batches:
            run(model, map_inputs(lambda tensor: tensor.to(device), Batch.from_any(batch).x))
    if not largest:
        raise InputError("batches: calibration needs at least one sample, got none")
    for name, value in largest.items():
        if not value.isfinite():
            raise InputError(f"the input of {name} holds numbers that are not finite; its range cannot be calibrated")
        with torch.no_grad():
            _range_parameter(layers[name]).fill_(max(float(value), 1e-6))
    return model


def is_calibrated(model: nn.Module) -> bool:
    """Whether any activation range differs from its initial value; True for a network without activation ranges."""
    ranges = activation_ranges(model)
    return not ranges or any(float(value.detach()) != INITIAL_RANGE for value in ranges.values())


def activation_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the learned range (largest magnitude) of each quantised layer's input, by the layer's name."""
    layers = quantized_layers(model)
    return {name: _range_parameter(layer) for name, layer in layers.items() if layer.input_quant.is_quant_enabled}


def is_range_key(key: str) -> bool:
    """Whether a key of a state dict is an activation's range, which float checkpoints lack."""
    return key.endswith(_RANGE_KEY)


def _range_parameter(layer: Any) -> nn.Parameter:
    value: nn.Parameter = layer.get_parameter(_RANGE_KEY)
    return value


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a network at the end of the block."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
