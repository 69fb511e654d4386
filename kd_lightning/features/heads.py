"""The last layer of a network: found, replaced for other classes, and told from the layers below it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from kd_lightning.errors import InputError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def find_head(network: nn.Module, head: str | None = None) -> str:
    """The dotted name of the layer that gives the logits.

    Args:
        network: Any network.
        head: Its name, where it is known. None: the last linear or convolutional layer, in the order in which the
            network holds them.

    Raises:
        InputError: If there is no such layer; and unless it is named, if timm says that there are several heads, or if
            the network's ``num_classes`` are not those of the layer found.
    """
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in network.named_modules(remove_duplicate=False) if isinstance(layer, _LAYERS)
    }
    if head is not None and head not in layers:
        raise InputError(f"head must name a linear or convolutional layer, such as {[*layers][-3:]}, got {head!r}")
    if head is not None:
        return head
    kind = type(network).__name__
    if not layers:
        raise InputError(f"{kind} has no linear or convolutional layer to be its head")
    config = getattr(network, "pretrained_cfg", None)  # of timm's networks
    heads = config.get("classifier") if isinstance(config, Mapping) else None
    if isinstance(heads, tuple | list) and len(heads) > 1:
        raise InputError(f"head must be named: {kind} has several, {', '.join(heads)}")
    name = [*layers][-1]
    gives = logits_from(layers[name])
    classes = getattr(network, "num_classes", None)
    if isinstance(classes, int) and classes != gives:
        reason = f"{kind} is of {classes} classes, and its last layer, {name!r}, gives {gives} numbers"
        raise InputError(f"head must be named: {reason}")
    return name


def logits_from(layer: nn.Module) -> int:
    """How many numbers a linear or convolutional layer gives for an input, or for each place of it."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def reset_classifier(network: nn.Module, num_classes: int, head: str | None = None) -> nn.Module:
    """Give a trained network a new last layer, for other classes.

    Args:
        network: The network; changed in place. In YAML, often what ``kd_lightning.load_weights`` or a factory of
            torchvision or timm returns.
        num_classes: Number of logits, at least 1.
        head: The layer's dotted name. None: the last linear or convolutional layer that the network holds.

    Returns:
        The same network, its head initialised as torch does; where it is the layer itself, a new one.

    Raises:
        InputError: If there is no such layer, it is not known which one it is (see :func:`find_head`), or no class.

    >>> reset_classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)), num_classes=3)[2]
    Linear(in_features=8, out_features=3, bias=True)
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    name = find_head(network, head)
    old = network.get_submodule(name)
    if isinstance(old, LazyModuleMixin) and old.has_uninitialized_params():
        raise InputError(f"{name or 'the network'} does not know its inputs yet; run the network once")
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=bias)
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d)
        if old.groups != 1:
            raise InputError(f"head: {name} is a convolution in groups, which gives no logits; name another layer")
        shape = (old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, old.dilation)
        new = type(old)(*shape, bias=bias, padding_mode=old.padding_mode)  # type: ignore[arg-type]
    new.to(old.weight).train(old.training)
    if not name:
        return new
    # a network may hold it under several names
    for known in [known for known, layer in network.named_modules(remove_duplicate=False) if layer is old]:
        *parents, key = known.split(".")
        for depth in range(len(parents) + 1):  # torchvision's and timm's networks say of how many classes they are
            holder = network.get_submodule(".".join(parents[:depth]))
            if getattr(holder, "num_classes", None) == logits_from(old):
                holder.num_classes = num_classes  # type: ignore[assignment]
        setattr(holder, key, new)
    return network


def layers_of(network: nn.Module, head: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer below the head, from the input on.

    Layers are the network's parts in the order in which it holds them. Opened up are sequences, whose elements are
    blocks; what contains the head; and what has more than half of the parameters but is no block, such as a backbone.
    A normalisation belongs to the layer before it, and what is in no part, such as a class token, to the first. For
    Vision Transformers and ResNets these are timm's layers.

    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    >>> [[p.numel() for p in layer] for layer in layers_of(network, network[3])]
    [[36, 4, 4, 4], [144, 4]]
    """
    taken = {*head.parameters()}
    most = sum(p.numel() for p in network.parameters() if p not in taken) / 2
    layers: list[list[nn.Parameter]] = []
    loose: list[nn.Parameter] = []  # of no part

    def take(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
        found = [p for p in module.parameters(recurse) if p not in taken]
        taken.update(found)
        return found

    def walk(module: nn.Module, of_blocks: bool = False) -> None:
        loose.extend(take(module, recurse=False))
        for child in module.children():
            sequence, above = isinstance(child, nn.Sequential | nn.ModuleList), head in child.modules()
            large = not of_blocks and sum(p.numel() for p in child.parameters() if p not in taken) > most
            if child is not head and any(child.children()) and (sequence or above or large):
                walk(child, of_blocks=sequence and not above)
            elif isinstance(child, _NORMS) and layers:
                layers[-1] += take(child)
            elif parameters := take(child):
                layers.append(parameters)

    walk(network)
    layers[:1] = [sum(layers[:1], loose)]
    return [layer for layer in layers if layer]
