"""List the output shape, multiply-accumulates and parameters of each layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.features.capture import evaluating
from kd_lightning.inputs import Inputs, call, map_inputs


class Layer(NamedTuple):
    """A layer in one forward pass.

    Attributes:
        name: Dotted path.
        kind: Name of its class.
        shape: Shape of its output for one sample, without the batch dimension. None if the layer is not called, or
            returns no tensor.
        parameters: Number of parameters, including inner layers.
        macs: Multiply-accumulates for one sample, including inner layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int


def list_layers(network: nn.Module, x: Inputs) -> list[Layer]:
    """List all layers in the order of ``named_modules``, from one forward pass in eval mode.

    Random generators, modes and BatchNorm statistics stay unchanged.

    Args:
        network: The network.
        x: Inputs: a tensor (B, ...), or a mapping or tuple of such tensors. Only the first row is used.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in network.named_modules()]
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not count fused attention kernels
        with evaluating(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call(network, map_inputs(lambda tensor: tensor[:1], x))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    flops = counter.get_flop_counts()
    root = type(network).__name__
    return [
        Layer(
            name,
            type(layer).__name__,
            shapes.get(name),
            sum(p.numel() for p in layer.parameters()),
            sum(flops.get(f"{root}.{name}", {}).values()) // 2,
        )
        for name, layer in network.named_modules()
        if name
    ]
