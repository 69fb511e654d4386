"""Shapes, multiply-accumulates and parameters of each layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.features.capture import evaluating


class Layer(NamedTuple):
    """A layer as one forward pass has seen it.

    Attributes:
        name: Its dotted path.
        kind: Its class.
        shape: Of its output for one sample, without the batch; None where the output is no tensor, or there was none.
        parameters: Their number, those of inner layers included.
        macs: Multiply-accumulates for one sample, inner layers included.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int


def list_layers(network: nn.Module, x: Tensor) -> list[Layer]:
    """All layers in the order of their names, from one forward pass in eval mode.

    Random generators, modes and BatchNorm's statistics are left as they were.

    Args:
        network: The network.
        x: Inputs (B, ...), of which the first is used.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in network.named_modules()]
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know attention's fused kernels
        with evaluating(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(x[:1])
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
