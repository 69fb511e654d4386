"""One pass of a network, to find the shapes of its layers, where their channels are, and what lies below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.features.capture import capture, evaluating, find_layer
from kd_lightning.features.channels import ChannelTrace, Layout
from kd_lightning.inputs import Inputs, call, device_of, rows_of


@dataclass(frozen=True)
class TracedLayers:
    """What a pass found, by dotted path of the layer.

    Attributes:
        outputs: Outputs (B, ...), without a graph.
        layouts: Where the outputs have their channels; None where no operation shows it.
        parameters: Names of the network's parameters that any of the outputs depends on. Of a teacher it is empty.
    """

    outputs: Mapping[str, Tensor]
    layouts: Mapping[str, Layout | None]
    parameters: frozenset[str] = frozenset()

    def shape(self, name: str) -> list[int]:
        """Return the shape of a layer's output for one sample."""
        return [*self.outputs[name].shape[1:]]


def trace_student(
    student: nn.Module, x: Inputs, names: Iterable[str], run: Callable[[nn.Module, Inputs], Any] = call
) -> TracedLayers:
    """Run the student in eval mode. Its modes, gradients and random generators stay as they are.

    Args:
        student: The student.
        x: Its inputs: a tensor (B, ...), or a mapping or tuple of such tensors.
        names: Dotted paths of layers; "" is the network's own output.
        run: Function that calls the student with inputs, such as ``call`` of a module.

    Raises:
        InputError: If there is no such layer; if it is not called; if its output does not have a row for each sample,
            or has no gradient.
    """
    names = [*dict.fromkeys(names)]
    for name in names:
        find_layer(student, name)
    parameters = dict(student.named_parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    try:
        for parameter in parameters.values():  # what lies below includes frozen ones
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with evaluating(student), torch.enable_grad(), torch.autocast(device_of(x).type, enabled=False):
            with capture(student, names) as outputs, ChannelTrace() as trace:
                run(student, x)
            check_rows("student", outputs, names, rows_of(x))
            check_gradients(outputs.items())
            below = _parameters_below([*outputs.values()], parameters)
            layouts = {name: trace.layout_of(output) for name, output in outputs.items()}
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
    return TracedLayers({name: output.detach() for name, output in outputs.items()}, layouts, below)


@torch.no_grad()
def trace_teacher(
    network: nn.Module, x: Inputs, names: Iterable[str], run: Callable[[nn.Module, Inputs], Any] = call
) -> TracedLayers:
    """Run a teacher's network, which is in eval mode.

    Args:
        network: The network.
        x: Its inputs.
        names: Dotted paths of layers; "" is the network's own output.
        run: Function that calls the network with inputs.

    Raises:
        InputError: If there is no such layer; if it is not called; if its output does not have a row for each sample.
    """
    names = [*dict.fromkeys(names)]
    for name in names:
        find_layer(network, name)
    with torch.autocast(device_of(x).type, enabled=False):
        with capture(network, names) as outputs, ChannelTrace() as trace:
            run(network, x)
        check_rows("teacher", outputs, names, rows_of(x))
        return TracedLayers(outputs, {name: trace.layout_of(output) for name, output in outputs.items()})


def check_rows(who: str, outputs: Mapping[str, Tensor], names: Iterable[str], rows: int) -> None:
    """Raise InputError unless each layer was called, and its output has a row for each sample.

    Args:
        who: "student" or "teacher".
        outputs: The captured outputs.
        names: Dotted paths of the layers.
        rows: Number of samples.
    """
    for name in names:
        if name not in outputs:
            raise InputError(f"the {who}'s {shown(name)} is never called in its forward pass")
        output = outputs[name]
        if not output.ndim or len(output) != rows:
            raise InputError(
                f"the {who}'s {shown(name)} must return a row for each of {rows} samples, got {[*output.shape]}; "
                "use another layer (one with batch_first=True)"
            )


def check_gradients(outputs: Iterable[tuple[str, Tensor]], are_frozen: Callable[[], bool] = lambda: False) -> None:
    """Raise InputError if the output of a student's layer has no gradient.

    Args:
        outputs: Names of layers, and their outputs in a pass with gradients.
        are_frozen: Whether all parameters below are frozen at present, as a callback does for some epochs. Then there
            is no error.
    """
    for name, output in outputs:
        if not output.requires_grad and not are_frozen():
            of = f"output of the student's layer {name}" if name else "student's output"
            raise InputError(
                f"the {of} has no gradient, so that nothing below it learns; "
                "all parameters below it are frozen, it is detached, or it lies in gradient checkpointing with "
                "use_reentrant=True (use_reentrant=False works)"
            )


def shown(name: str) -> str:
    """Return how messages name a layer; "" is the network's own output."""
    return f"layer {name}" if name else "output"


def are_frozen(network: nn.Module, names: frozenset[str]) -> bool:
    """Whether none of the named parameters of a network requires a gradient."""
    return not any(p.requires_grad for name, p in network.named_parameters() if name in names)


def _parameters_below(outputs: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the names of the parameters that outputs depend on. Changes their ``grad``."""
    for parameter in parameters.values():
        parameter.grad = None
    # not torch.autograd.grad, which reentrant gradient checkpointing refuses
    torch.stack([output.float().sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return frozenset(name for name, parameter in parameters.items() if parameter.grad is not None)
