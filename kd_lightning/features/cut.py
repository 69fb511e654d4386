"""Cut a network at a layer: the part up to its output, and the part after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from kd_lightning.errors import InputError
from kd_lightning.features.capture import find_layer


def cut_below(network: nn.Module, layer: str) -> nn.Module:
    """Return the part of a network from its input to the output of a layer.

    The part holds only the layers that it needs, under their own names. They are those of the network, no copies.

    Args:
        network: A network that takes one tensor. Its forward pass, and those of the parts that contain the layer, are
            traced (``torch.fx``), so they must not branch on their inputs. Other parts are called as they are.
        layer: Dotted path of the layer. It must be called once.

    Raises:
        InputError: If there is no such layer, if it is not called once, if the network cannot be traced, or if it
            computes something else below the layer in training than in evaluation.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [*cut_below(network, "1").state_dict()]
    ['0.weight', '0.bias']
    """
    graphs = []
    for training in (True, False):
        tracer = _trace(network, layer, training)
        graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in tracer.below:
            # values of defaults are part of the trace by now; only assertions of them are left
            if node not in tracer.defaults and all(other in made for other in node.all_input_nodes):
                made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(made[tracer.output])
        graphs.append(graph)
    if str(graphs[0]) != str(graphs[1]):
        kind = type(_plain(network)).__name__
        raise InputError(
            f"layer {layer}: {kind} computes something else below it in training than in evaluation, such as F.dropout "
            "or auxiliary heads; build it without, or use a lower layer"
        )
    return fx.GraphModule(_plain(network), graphs[1])


def cut_above(network: nn.Module, layer: str) -> nn.Module:
    """Return the part of a network from the output of a layer to the network's output, as in evaluation.

    Args:
        network: As of :func:`cut_below`.
        layer: Dotted path of the layer. It must be called once.

    Raises:
        InputError: If there is no such layer, if it is not called once, if the network cannot be traced, or if the part
            uses something else than the layer's output, as a shortcut around the layer.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [*cut_above(network, "1").state_dict()]
    ['2.weight', '2.bias']
    """
    tracer = _trace(network, layer, training=False)
    graph = fx.Graph()
    made = {tracer.output: graph.placeholder("x")}
    for node in tracer.above:
        if others := [other.name for other in node.all_input_nodes if other not in made]:
            kind = type(_plain(network)).__name__
            raise InputError(f"layer {layer}: above it, {kind} uses more than its output: {others[0]}")
        made[node] = graph.node_copy(node, made.__getitem__)
    return fx.GraphModule(_plain(network), graph)


class _Tracer(fx.Tracer):
    """Traces a network and the parts around one of its layers. All other parts are called."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.layer = find_layer(network, name)
        parts = name.split(".")
        self.around = [network.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        self.outputs: list[fx.Node] = []
        self.defaults: set[fx.Node] = set()

    @property
    def output(self) -> fx.Node:
        """The layer's output."""
        return self.outputs[0]

    @property
    def below(self) -> list[fx.Node]:
        """The nodes up to the layer's output."""
        nodes = [*self.graph.nodes]
        return nodes[: nodes.index(self.output) + 1]

    @property
    def above(self) -> list[fx.Node]:
        """The nodes after the layer's output."""
        nodes = [*self.graph.nodes]
        return nodes[nodes.index(self.output) + 1 :]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.around

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.submodule_paths is not None and m not in self.submodule_paths:  # made in the forward pass
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        if m is self.layer:
            self.outputs.append(output.node)
        return output


def _trace(network: nn.Module, name: str, training: bool) -> _Tracer:
    """Trace a network in training or evaluation. Its own modes stay as they are."""
    network = _plain(network)
    kind = type(network).__name__
    tracer = _Tracer(network, name)
    arguments = [*inspect.signature(network.forward).parameters.values()]
    defaults = {a.name: a.default for a in arguments[1:] if a.default is not a.empty}
    modes = [module.training for module in tracer.around]
    try:
        for module in tracer.around:
            module.training = training
        tracer.trace(network, defaults)
    except Exception as error:  # the network's own code runs, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"layer {name}: {kind} cannot be cut there, since it cannot be traced: {reason}") from error
    finally:
        for module, mode in zip(tracer.around, modes, strict=True):
            module.training = mode
    if len(tracer.outputs) != 1:
        raise InputError(f"layer {name}: {kind} must call it once in its forward pass, got {len(tracer.outputs)} calls")
    given = {argument.name for argument in arguments[:1]}
    tracer.defaults = {n for n in tracer.graph.nodes if n.op == "placeholder" and n.target not in given}
    return tracer


def _plain(network: nn.Module) -> nn.Module:
    """Return the network as it is without ``torch.compile``."""
    return network._modules.get("_orig_mod") or network
