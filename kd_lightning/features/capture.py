"""Outputs of layers named by their dotted path, and what each layer costs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError


class _Reached(Exception):  # noqa: N818  (not an error: it ends a forward pass)
    """All layers that were asked for have been computed."""


@contextmanager
def capture(network: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of layers while inside; no hook stays behind.

    A layer that is not called is absent. A network under ``torch.compile`` runs uncompiled inside.

    Args:
        network: Whose layers they are.
        names: Their dotted paths, as in ``named_modules``.
        stop: End the network's forward pass once each of them has been computed, so that what lies above is not. The
            pass then returns nothing: leave it as the last statement inside.

    Yields:
        Their outputs by name, in the graph.

    Raises:
        InputError: For a name that the network does not have, with the nearest ones; for an output that is no tensor,
            or that a later layer changes in place; for a layer that is called more than once (with ``stop`` the pass
            may have ended before that is seen).

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with capture(network, ["1"], stop=True) as outputs:
    ...     _ = network(torch.zeros(5, 4))
    >>> outputs["1"].shape
    torch.Size([5, 3])
    """
    names = [*dict.fromkeys(names)]
    layers = [find_layer(network, name) for name in names]
    outputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}  # rise with each change in place
    handles = []

    def keep(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise InputError(f"layer {name} gives no tensor, but {kind}; choose a layer inside it or after it")
            if name in outputs:
                raise InputError(f"layer {name} is called more than once in a pass; choose a layer around it")
            outputs[name] = output
            if not output.is_inference():  # those have no version
                versions[name] = output._version
            if stop and len(outputs) == len(names):
                raise _Reached

        return hook

    with ExitStack() as stack:
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules()):
            # compiled code does not see hooks that come and go
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for name, layer in zip(names, layers, strict=True):
                handles.append(layer.register_forward_hook(keep(name)))
            yield outputs
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
    for name, version in versions.items():
        if outputs[name]._version != version:
            raise InputError(f"layer {name}: its output is changed in place by a later layer; choose that one instead")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Forward passes in eval mode that leave random generators, modes and BatchNorm's statistics as they were."""
    modes = {layer: layer.training for layer in network.modules()}
    try:
        network.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """A layer by its dotted path.

    Raises:
        InputError: If there is none of that name; the message lists the nearest.
    """
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    layers = dict(network.named_modules())
    if name in layers and name:
        layer: nn.Module = layers[name]
        return layer
    near = difflib.get_close_matches(name, [n for n in layers if n], n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else f"; it has {', '.join([n for n in layers if n][:5])}, ..."
    raise InputError(f"layer {name!r}: {type(network).__name__} has none of that name{hint}")
