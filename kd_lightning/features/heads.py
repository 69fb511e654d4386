"""The head of a network (the layer that gives the logits): find it, replace it, and list the layers below it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture
from kd_lightning.inputs import Inputs, call, rows_of

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def find_head(network: nn.Module, head: str | None = None) -> str:
    """Find the layer that gives the logits: the last linear or convolutional layer that the network calls.

    The order in which the network holds its layers does not count. The head is, in this order:

    1. the layer named by ``head``;
    2. the layer that timm's ``pretrained_cfg`` names as the classifier;
    3. the only linear or convolutional layer, where there is one alone;
    4. the layer that is used last in a symbolic trace (``torch.fx``) of the network in eval mode, which needs no
       inputs. A part that cannot be traced, for example because its forward pass branches on its inputs, is one step of
       the trace. If it is the last step, the head is searched inside it in the same way.

    Where the trace fails, the head must be named. Where inputs are at hand, see :func:`input_of_head`.

    Args:
        network: Any network.
        head: Dotted name of the layer. Default: None, which means that the head is searched.

    Returns:
        The dotted name of the layer; empty if the network is the layer itself.

    Raises:
        InputError: If there is no such layer. Without ``head`` also if the trace fails, if timm names several
            classifiers, or if the network's ``num_classes`` is not the number of outputs of the layer found.
    """
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in network.named_modules(remove_duplicate=False) if isinstance(layer, _LAYERS)
    }
    if head is not None and head not in layers:
        raise InputError(f"head must name a linear or convolutional layer, such as {[*layers][-3:]}, got {head!r}")
    if head is not None:
        return head
    if isinstance(original := getattr(network, "_orig_mod", None), nn.Module):  # under torch.compile
        return f"_orig_mod.{find_head(original)}".removesuffix(".")
    kind = type(network).__name__
    if not layers:
        raise InputError(f"{kind} has no linear or convolutional layer to be its head")
    config = getattr(network, "pretrained_cfg", None)  # of timm's networks
    named = config.get("classifier") if isinstance(config, Mapping) else None
    names = [named] if isinstance(named, str) else [*(named or ())]
    if len(names) > 1:
        raise InputError(f"head must be named: {kind} has several, {', '.join(names)}")
    classes = getattr(network, "num_classes", None)
    declared = f"head must be named: {kind} has num_classes {classes}, but"
    if isinstance(classes, int) and classes not in map(logits_from, layers.values()):
        raise InputError(f"{declared} no layer with so many outputs")
    if names and names[0] in layers:
        name = names[0]
    elif len({*layers.values()}) == 1:
        name = [*layers][-1]
    else:
        name = _last_used(network, layers)
    if isinstance(classes, int) and classes != logits_from(layers[name]):
        raise InputError(f"{declared} its last layer, {name!r}, has {logits_from(layers[name])} outputs")
    return name


def _last_used(network: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """The name of the layer that a symbolic trace uses last."""
    kind = type(network).__name__
    try:
        used = _trace(network)
    except Exception as error:  # the network's own code runs, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"head must be named: the order in which {kind} calls its layers cannot be traced without inputs ({reason})"
        ) from error
    if not used:
        raise InputError(f"head must be named: {kind} calls none of its linear or convolutional layers")
    last = network.get_submodule(used[-1])
    if not isinstance(last, _LAYERS):
        return f"{used[-1]}.{find_head(last)}"
    return [name for name, layer in layers.items() if layer is last][-1]


def _trace(network: nn.Module) -> list[str]:
    """Names of the layers, and of the parts that cannot be traced, in the order in which the network uses them."""
    replaced: dict[int, Any] = {}  # the copy has no weights and no hooks, so tracing costs and changes nothing
    for module in network.modules():
        replaced |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
        for tensor in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(tensor, Tensor) and not is_lazy(tensor):
                meta = tensor.detach().to("meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    copied = deepcopy(network, replaced).eval()
    tracer = _Tracer(copied)
    arguments = [*inspect.signature(copied.forward).parameters.values()]
    defaults = {a.name: a.default for a in arguments[1:] if a.default is not a.empty}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        tracer.trace(copied, defaults)
    called = {name for name, is_call in tracer.used if is_call}
    # the weight of a layer may be used without a call, as in a cosine classifier
    return [name for name, is_call in tracer.used if is_call or name not in called]


class _Tracer(fx.Tracer):
    """Records which layers are used; the graph itself is thrown away."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.used: list[tuple[str, bool]] = []  # names, and whether the layer is called
        layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _LAYERS)]
        self._owner = {id(p): name for name, layer in layers for p in layer.parameters(recurse=False)}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.submodule_paths.get(m) if self.submodule_paths else None
        if name is None:  # made in the forward pass, such as a slice of a sequence
            return forward(*args, **kwargs)
        count = len(self.used)
        if not isinstance(m, _LAYERS) and not self.is_leaf_module(m, name):
            try:
                return forward(*args, **kwargs)
            except Exception:  # the part is one step
                del self.used[count:]
        if any(isinstance(part, _LAYERS) for part in m.modules()):
            self.used.append((name, True))
        return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if id(attr_val) in self._owner:
            self.used.append((self._owner[id(attr_val)], False))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError:  # for outputs of a class of one's own
            return None


def input_of_head(network: nn.Module, x: Inputs, run: Callable[[nn.Module, Inputs], Any] = call) -> Tensor:
    """Features (B, D) that go into the last linear or convolutional layer that the network calls.

    Takes one forward pass in the network's present mode. Features with tokens or positions are averaged over them.

    Args:
        network: Any network.
        x: Inputs: a tensor (B, ...), or a mapping or tuple of such tensors.
        run: Function that calls the network with inputs, such as ``call`` of a module.

    Raises:
        InputError: If the network calls no such layer, or the last one does not get a row for each input.
    """
    found: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[:] = [args[0] if args else kwargs["input"]]
        if found[0].ndim == 2:
            found[0] = found[0].clone()  # a later layer may change it in place
        elif found[0].ndim > 2:
            linear = isinstance(layer, nn.Linear)  # channels come last
            found[0] = found[0].flatten(1, -2).mean(dim=1) if linear else found[0].flatten(2).mean(dim=2)

    handles = []
    try:
        for layer in network.modules():
            if isinstance(layer, _LAYERS):
                handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
        with capture(network, []):  # runs a compiled network uncompiled, so that hooks are called
            run(network, x)
    finally:
        for handle in handles:
            handle.remove()
    kind = type(network).__name__
    if not found:
        raise InputError(
            f"{kind} calls no linear or convolutional layer to take features from; give layer, a dotted path"
        )
    if found[0].ndim != 2 or len(found[0]) != rows_of(x):
        raise InputError(
            f"the last layer of {kind} gets {tuple(found[0].shape)}, no row for each of {rows_of(x)} inputs; "
            "give layer, a dotted path"
        )
    return found[0]


def logits_from(layer: nn.Module) -> int:
    """Number of outputs of a linear or convolutional layer, for each input or each position of it."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def reset_classifier(network: nn.Module, num_classes: int, head: str | None = None) -> nn.Module:
    """Replace the head of a trained network by a new one, for other classes.

    A backbone of timm without a head (``num_classes=0``) gets one by timm's own method.

    Args:
        network: The network, changed in place. In YAML it is often the result of ``kd_lightning.load_weights`` or of a
            factory of torchvision or timm.
        num_classes: Number of logits, at least 1.
        head: Dotted name of the layer to replace. Default: None, which means that :func:`find_head` finds it: the last
            linear or convolutional layer that the network calls.

    Returns:
        The same network, with a new head in torch's initialisation. If the network is the layer itself, the new layer.

    Raises:
        InputError: If ``num_classes`` is below 1, or if :func:`find_head` finds no head.

    >>> reset_classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)), num_classes=3)[2]
    Linear(in_features=8, out_features=3, bias=True)
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    add: Any = getattr(network, "reset_classifier", None)  # of timm's networks
    if head is None and getattr(network, "num_classes", None) == 0 and callable(add):
        add(num_classes)
        return network.to(next(network.parameters()))
    name = find_head(network, head)
    old = network.get_submodule(name)
    if isinstance(old, LazyModuleMixin) and old.has_uninitialized_params():
        raise InputError(f"head: {name or 'the network'} has no weights yet; run the network once")
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=bias)
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d)
        if old.groups != 1:
            raise InputError(f"head: {name} must be a convolution with groups 1, got groups {old.groups}")
        shape = (old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, old.dilation)
        new = type(old)(*shape, bias=bias, padding_mode=old.padding_mode)  # type: ignore[arg-type]
    new.to(old.weight).train(old.training)
    if not name:
        return new
    # a network may hold the layer under several names
    for path in [path for path, layer in network.named_modules(remove_duplicate=False) if layer is old]:
        *parents, key = path.split(".")
        for depth in range(len(parents) + 1):  # networks of torchvision and timm have the attribute num_classes
            holder = network.get_submodule(".".join(parents[:depth]))
            if getattr(holder, "num_classes", None) == logits_from(old):
                holder.num_classes = num_classes  # type: ignore[assignment]
        setattr(holder, key, new)
    return network


def layers_of(network: nn.Module, head: nn.Module) -> list[list[nn.Parameter]]:
    """List the parameters of each layer below the head, from the input on.

    Layers are the parts of the network, in the order in which it holds them. Three kinds of parts are split into their
    own parts: sequences (each element is a block), parts that contain the head, and parts that have more than half of
    the parameters but are no block, such as a backbone. A normalisation belongs to the layer before it. Parameters of
    no part, such as a class token, belong to the first layer. For Vision Transformers and ResNets the result equals
    timm's layers.

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
