"""BatchNorm layers whose running statistics stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms_without(network: nn.Module, parameters: Collection[str]) -> list[nn.Module]:
    """Return the BatchNorm layers that have parameters, none of them among the given dotted names."""
    norms: list[nn.Module] = []
    for name, layer in network.named_modules():
        own = [f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, _BatchNorm) and own and not any(key in parameters for key in own):
            norms.append(layer)
    return norms


@contextmanager
def frozen_statistics(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Put BatchNorm layers in eval mode while inside, so that their running statistics stay as they are."""
    training = [layer for layer in norms if layer.training]
    try:
        for layer in training:
            layer.eval()
        yield
    finally:
        for layer in training:
            layer.train()
