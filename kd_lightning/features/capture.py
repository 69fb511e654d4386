"""Capture outputs of layers by their dotted path."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.outputs import feature_of_output
from kd_lightning.inputs import tensors_of


class _Reached(Exception):  # noqa: N818  (not an error: it ends a forward pass)
    """Raised when all captured layers have been computed."""


@contextmanager
def capture(network: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of layers during the forward passes inside the ``with`` block.

    A layer that is not called is absent from the result. Passes inside a backward pass, in which gradient checkpointing
    computes layers again, are not captured. Inside the block, a network under ``torch.compile`` runs uncompiled. All
    hooks are removed at the end. :func:`features_of` describes layers that return a tuple or a mapping. A nested tensor
    is padded with 0.

    Args:
        network: The network.
        names: Dotted paths of the layers, as in ``named_modules``. "" is the network's own output, see
            :func:`~kd_lightning.features.outputs.feature_of_output`.
        stop: End the forward pass as soon as all layers have been computed. The layers above them are not computed, and
            the pass returns nothing, so it must be the last statement of the block.

    Yields:
        The outputs by name, with their autograd graph.

    Raises:
        InputError: If the network has no layer of a name (the message names similar ones), if an output holds no tensor
            of features or more than one, if it is changed in place by a later layer, and if a layer is called more than
            once (with ``stop``, the pass may end before the second call).

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with capture(network, ["1"], stop=True) as outputs:
    ...     _ = network(torch.zeros(5, 4))
    >>> outputs["1"].shape
    torch.Size([5, 3])
    """
    names, owner = [*dict.fromkeys(names)], type(network).__name__
    layers = [find_layer(network, name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if isinstance(layer, torch.jit.ScriptModule):
            raise InputError(
                f"layer {name!r} is TorchScript, whose outputs cannot be captured; put the program into nn.Sequential, "
                "whose own output is layer ''"
            )
    outputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}  # a tensor's version increases with each change in place
    handles = []

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # in a backward pass: gradient checkpointing
                return
            if not isinstance(output, Tensor):
                inputs = (args, kwargs)
                output = features_of(layer, inputs, output, name) if name else feature_of_output(output, owner)
            if output.is_nested:  # nn.TransformerEncoder in eval mode, with a padding mask
                output = output.to_padded_tensor(0.0)
            if name in outputs:
                raise InputError(f"layer {name} is called more than once in a pass; use a layer around it")
            outputs[name] = output
            if not output.is_inference():  # inference tensors have no version
                versions[name] = output._version
            if stop and len(outputs) == len(names):
                raise _Reached

        return hook

    with ExitStack() as stack:
        if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in layers_of(network)):
            # compiled code ignores hooks that are added later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for name, layer in zip(names, layers, strict=True):
                handles.append(layer.register_forward_hook(record(name), with_kwargs=True))
            yield outputs
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
    for name, version in versions.items():
        if outputs[name]._version != version:
            raise InputError(f"layer {name}: its output is changed in place by a later layer; use that layer")


def features_of(layer: nn.Module, inputs: Any, output: Any, name: str) -> Tensor:
    """Take the features out of a layer's output that is a tuple, list or mapping.

    They are the first tensor. It must be the only one of floating point with as many rows as the layer's inputs; parts
    that are tuples themselves, such as a state, do not count. Recurrent layers of torch and ``nn.MultiheadAttention``
    may return further ones: these are their states and attention weights.

    Args:
        layer: The layer.
        inputs: Its inputs: the first tensor in them has the rows. With one row, any first tensor has as many.
        output: What the layer returned.
        name: Name of the layer in the error message.

    Raises:
        InputError: For any other output.
    """
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    found = [part for part in parts if isinstance(part, Tensor) and part.ndim and part.is_floating_point()]
    rows = next((len(part) for part in tensors_of(inputs) if part.ndim), None)
    same = [part for part in found if rows in (None, len(part))]
    is_known = isinstance(layer, nn.RNNBase | nn.MultiheadAttention) or (rows == 1 and same)
    if same and same[0] is found[0] and (len(same) == 1 or is_known):
        return found[0]
    held = f" with {len(found)} tensors" if found else ""
    raise InputError(
        f"layer {name} must return a tensor, or a tuple or mapping whose first tensor alone has a row for each sample, "
        f"got {type(output).__name__}{held}; use a layer inside it or after it"
    )


@contextmanager
def capture_call(network: nn.Module, name: str) -> Iterator[list[tuple[Tensor, Any]]]:
    """Capture what a layer gets and what it returns, for each of its calls inside the ``with`` block.

    As :func:`capture` does, it leaves out passes inside a backward pass, and runs a compiled network uncompiled.

    Args:
        network: The network.
        name: Dotted path of a layer that is called with one tensor.

    Yields:
        Input and output of each call.

    Raises:
        InputError: If the network has no layer of this name.
    """
    calls: list[tuple[Tensor, Any]] = []

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            calls.append((args[0] if args else next(iter(kwargs.values())), output))

    handle = find_layer(network, name).register_forward_hook(hook, with_kwargs=True)
    try:
        with capture(network, []):
            yield calls
    finally:
        handle.remove()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run the block in eval mode. Random generators, modes and BatchNorm statistics stay unchanged."""
    modes = {layer: layer.training for layer in network.modules()}
    try:
        network.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def layers_of(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the network and all its layers. ``modules()`` takes several times as long; a shared layer comes again."""
    layers = [network]
    while layers:
        layer = layers.pop()
        yield layer
        layers += [part for part in layer._modules.values() if part is not None]


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the layer of a dotted path; the network itself if it is empty.

    Raises:
        InputError: If the network has no such layer. The message names similar ones.
    """
    if compiled := _child(network, "_orig_mod"):  # under torch.compile, which may be a part of the name
        network, name = compiled, name.removeprefix("_orig_mod").removeprefix(".")
    layer: nn.Module | None = network
    for part in name.split(".") if name else ():  # not named_modules: a large network has hundreds
        layer = None if layer is None else _child(layer, part)
    if layer is not None:
        return layer
    layers = dict(network.named_modules())
    near = difflib.get_close_matches(name, [n for n in layers if n], n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else f"; it has {', '.join([n for n in layers if n][:5])}, ..."
    raise InputError(f"layer {name!r}: {type(network).__name__} has none of that name{hint}")


def _child(layer: nn.Module, name: str) -> nn.Module | None:
    return layer._modules[name] if name in layer._modules else None  # noqa: SIM401 (TorchScript's has no get)
