"""List the output shape, multiply-accumulates and parameters of each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating, features_of
from kd_lightning.inputs import Inputs, call, rows_of, take_rows


class Layer(NamedTuple):
    """A layer in one forward pass.

    Attributes:
        name: Dotted path.
        kind: Name of its class.
        shape: Shape of its output for one sample, without the batch dimension. Of a tuple or mapping, shape of what
            :func:`~kd_lightning.features.capture.features_of` takes. None if it takes nothing, or if the layer is not
            called.
        parameters: Number of parameters, including inner layers.
        macs: Multiply-accumulates for one sample, including inner layers.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int


def list_layers(network: nn.Module, x: Inputs, run: Callable[[nn.Module, Inputs], Any] = call) -> list[Layer]:
    """List all layers in the order of ``named_modules``, from one forward pass in eval mode.

    Random generators, modes and BatchNorm statistics stay unchanged.

    Args:
        network: The network.
        x: Inputs: a tensor (B, ...), or a mapping or tuple of such tensors. Only the first row is used; tensors without
            B rows stay as they are.
        run: Function that calls the network with inputs, such as ``call`` of a module.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                try:
                    output = features_of(layer, (args, kwargs), output, name)
                except InputError:
                    return
            shapes[name] = tuple(output.shape[1:])

        return hook

    handles = [layer.register_forward_hook(record(name), with_kwargs=True) for name, layer in network.named_modules()]
    try:
        flops = _count_flops(network, x, run)
    finally:
        for handle in handles:
            handle.remove()
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


def count_macs(network: nn.Module, x: Inputs, run: Callable[[nn.Module, Inputs], Any] = call) -> int:
    """Return the multiply-accumulates of a network for one sample; the arguments are those of :func:`list_layers`."""
    return sum(_count_flops(network, x, run)["Global"].values()) // 2


def _count_flops(network: nn.Module, x: Inputs, run: Callable[[nn.Module, Inputs], Any]) -> dict[str, dict[Any, int]]:
    """Return floating-point operations by module and kind, for the first row of the inputs."""
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not count fused attention kernels
        with evaluating(network), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run(network, take_rows(x, slice(1), rows_of(x)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_flop_counts()
