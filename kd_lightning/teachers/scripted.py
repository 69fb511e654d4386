"""TorchScript programs as networks of teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kd_lightning.errors import InputError

_MODES = ("train", "training", "use_input_stats")
_CHANCES = ("p", "dropout", "dropout_p")


def check_scripts(network: nn.Module) -> None:
    """Raise InputError if a TorchScript program in a network computes as in training mode, whatever its mode is.

    A trace holds the mode in which it was made as a constant. Its dropout then draws random numbers also in eval mode.
    """
    programs: list[str] = []
    for name, module in network.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or any(name.startswith(program) for program in programs):
            continue
        programs.append(f"{name}." if name else "")  # its graph has the layers inside it
        for node in _nodes(module.inlined_graph) if hasattr(module, "forward") else ():
            if reason := _problem(node):
                place = f"its TorchScript module {name}" if name else "its TorchScript program"
                raise InputError(
                    f"teacher: {place} {reason} ({node.kind()}), as in training mode; call model.eval() before "
                    "torch.jit.trace, and give training=self.training to functions"
                )


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        if node.kind() == "prim::If" and _depends_on_mode(node):
            continue
        for inner in node.blocks():
            yield from _nodes(inner)


def _depends_on_mode(node: Any) -> bool:
    """Whether what goes into a node comes from ``self.training``."""
    todo, seen = [node], set()
    while todo:
        for source in [value.node() for value in todo.pop().inputs()]:
            if source.kind() == "prim::GetAttr" and source.s("name") == "training":
                return True
            if id(source) not in seen and source.kind() != "prim::Param":
                seen.add(id(source))
                todo.append(source)
    return False


def _problem(node: Any) -> str:
    """Describe how a node's output depends on chance or on the batch; empty if it does not."""
    if not node.kind().startswith("aten::") or node.schema() == "(no schema)":
        return ""
    names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
    values = dict(zip(names, [_constant(value) for value in node.inputs()], strict=False))
    modes = [values[name] for name in _MODES if name in values]
    chances = [values[name] for name in _CHANCES if name in values]
    if "running_mean" in values:  # an InstanceNorm without statistics has none
        has_statistics = values["running_mean"] is not None
        return "normalises by the statistics of the batch" if modes == [True] and has_statistics else ""
    is_training = modes == [True] or (not modes and "dropout_p" in values)
    is_random = is_training and any(isinstance(chance, float) and chance > 0 for chance in chances)
    is_random = is_random or (is_training and "rrelu" in node.kind())
    return "draws random numbers" if is_random else ""


def _constant(value: Any) -> Any:
    """Return a constant; an object of its own for a value that is computed, or read from an attribute."""
    node = value.node()
    if value.type().kind() == "NoneType":
        return None
    return value.toIValue() if node.kind() == "prim::Constant" else node
