"""The last layer of a network: found, and replaced for other classes."""

from __future__ import annotations

from torch import nn

from kd_lightning.errors import InputError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def find_head(network: nn.Module, head: str | None = None) -> str:
    """The dotted name of the layer that gives the logits.

    Args:
        network: Any network.
        head: Its name, where it is known. None: the last linear or convolutional layer, in the order in which the
            network holds them.

    Raises:
        InputError: If there is no such layer.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, _LAYERS)}
    if head is not None and head not in layers:
        raise InputError(f"head must name a linear or convolutional layer, such as {[*layers][-3:]}, got {head!r}")
    if not layers:
        raise InputError(f"{type(network).__name__} has no linear or convolutional layer to be its head")
    return [*layers][-1] if head is None else head


def replace_head(network: nn.Module, num_classes: int, head: str | None = None) -> nn.Module:
    """Give a trained network a new last layer, for other classes.

    Args:
        network: The network; changed in place. In YAML, often what ``kd_lightning.load_weights`` or a factory of
            torchvision or timm returns.
        num_classes: Number of logits, at least 1.
        head: The layer's dotted name. None: the last linear or convolutional layer that the network holds.

    Returns:
        The same network, its head initialised as torch does.

    Raises:
        InputError: If there is no such layer, or no class.

    >>> replace_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)), num_classes=3)[2]
    Linear(in_features=8, out_features=3, bias=True)
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    name = find_head(network, head)
    old = network.get_submodule(name)
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=bias)
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d)
        if old.groups != 1:
            raise InputError(f"head: {name} is a convolution in groups, which gives no logits; name another layer")
        arguments = (old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, old.dilation)
        new = type(old)(*arguments, bias=bias)  # type: ignore[arg-type]
    parent, _, key = name.rpartition(".")
    if not key:
        return new
    setattr(network.get_submodule(parent), key, new.to(old.weight))
    for attribute in ("num_classes", "out_features"):  # what torchvision's and timm's networks say of themselves
        if isinstance(getattr(network, attribute, None), int):
            setattr(network, attribute, num_classes)
    return network
