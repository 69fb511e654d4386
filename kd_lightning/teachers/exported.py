"""Programs of ``torch.export`` as networks of teachers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only, tree_unflatten

from kd_lightning.errors import InputError
from kd_lightning.inputs import describe


def is_exported(value: object) -> bool:
    """Whether it is an ``ExportedProgram``, or the module that its ``module()`` returns."""
    if isinstance(value, ExportedProgram):
        return True
    return isinstance(value, fx.GraphModule) and any(k.__name__ == "_StatefulGraphModule" for k in type(value).__mro__)


class ExportedNetwork(nn.Module):
    """A program of ``torch.export`` as a network.

    It accepts ``train()`` and ``eval()``, which change nothing: the program computes what it was exported for. It moves
    to another device, with its constants and the devices that its graph names. It is cast to another type of numbers
    unless its graph names a type. It shares its weights with the program. A file is read with ``torch.export.load``,
    which may run code: use files of trusted sources alone.

    Args:
        program: A program, the module that its ``module()`` returns, or the path of a ``.pt2`` file.

    Shapes:
        Inputs and outputs are those of the program: a tensor, a tuple, a mapping. Inputs have the types of numbers and
        the lengths that it was exported for.

    Raises:
        InputError: If the file cannot be read, or if the network was in training mode when it was exported: it drops
            outputs at random, normalises by the statistics of the batch, or changes its buffers. In a pass: if the
            inputs are not those that the program was exported for. In a cast or move that the graph does not allow.
    """

    def __init__(self, program: str | Path | ExportedProgram | nn.Module) -> None:
        super().__init__()
        if isinstance(program, str | Path):
            program = _load(Path(program))
        if not is_exported(program):
            allowed = "an ExportedProgram, the module that its module() returns, or the path of a .pt2 file"
            raise InputError(f"program must be {allowed}, got {type(program).__name__}")
        module: Any = program.module() if isinstance(program, ExportedProgram) else program
        graph, info = copy.deepcopy(module.graph), module.graph._codegen.pytree_info
        self._names, self._specs = _arguments(info.orig_args, info.in_spec)
        self._positional: int = _children(info.in_spec)[0].num_children
        self._out_spec: TreeSpec = info.out_spec
        self._guards: Callable[..., Any] | None = None
        for node in graph.find_nodes(op="call_module", target="_guards_fn"):
            self._guards = _of_torch(module._guards_fn.forward)
            graph.erase_node(node)
        placeholders = graph.find_nodes(op="placeholder")
        is_flat = all(spec.is_leaf() for spec in self._specs)
        names = self._names if is_flat else [node.name for node in placeholders]
        self._inputs = [_input(name, node.meta.get("val")) for name, node in zip(names, placeholders, strict=True)]
        ranges = dict(getattr(module, "range_constraints", {}))  # a deep copy of a module has none
        limits = {str(symbol): _range(values) for symbol, values in ranges.items()}
        self._ranges = {symbol: found for symbol, found in limits.items() if found != (0, None)}
        graph.set_codegen(CodeGen())  # it takes the flat inputs
        self.program = _Steps(module, graph)
        for inner in self.modules():
            inner.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the program returns for these inputs."""
        flat = self._flatten(args, kwargs)
        self._check(flat)
        return tree_unflatten(self.program(*flat), self._out_spec)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Set ``training``. The program computes the same in both modes."""
        self.training = mode  # that of its parts stays False
        return self

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        count = len(args) + len(kwargs)
        if len(args) > self._positional or count != len(given) or given.keys() != {*self._names}:
            allowed = ", ".join(f"{name}{'=' * (n >= self._positional)}" for n, name in enumerate(self._names))
            came = describe(args) + (f" and {describe(kwargs)}" if kwargs else "")
            raise InputError(f"program: it was exported for the arguments ({allowed}), got {came}")
        flat: list[Any] = []
        for name, spec in zip(self._names, self._specs, strict=True):
            try:
                flat += spec.flatten_up_to(given[name])
            except (TypeError, ValueError) as error:
                forms = f"{_line(spec)}, got {describe(given[name])}"
                raise InputError(f"program: {name} must have the form {forms}") from error
        return flat

    def _check(self, flat: list[Any]) -> None:
        """Raise InputError unless the program was exported for such inputs."""
        lengths: dict[str, tuple[int, str]] = {}
        for value, wanted in zip(flat, self._inputs, strict=True):
            if wanted.dtype is None:
                if wanted.fixed and value != wanted.fixed[0]:
                    raise InputError(f"program: {wanted.name} must be {wanted.fixed[0]!r}, as exported, got {value!r}")
                continue
            found = _input(wanted.name, value)
            if not wanted.allows(found):
                came = found if found.dtype else describe(value)
                advice = self._advice(wanted.shape[0]) if wanted.allows(found, any_rows=True) else ""
                raise InputError(f"program: {wanted.name} must be {wanted}, as exported, got {came}{advice}")
            for number, (symbol, length) in enumerate(zip(wanted.shape, value.shape, strict=True)):
                if isinstance(symbol, int):
                    continue
                place = f"dimension {number} of {wanted.name}"
                known, owner = lengths.setdefault(symbol, (length, place))
                if known != length:
                    raise InputError(f"program: {place} must be as long as {owner}, {known}, as exported, got {length}")
                least, most = self._ranges.get(symbol, (0, None))
                if length < least or (most is not None and length > most):
                    text = f"at least {least}" if most is None else f"from {least} to {most}"
                    raise InputError(f"program: {place} must be {text}, as exported, got {length}")
        if self._guards is not None:
            try:
                self._guards(*flat)
            except AssertionError as error:
                shapes = ", ".join(map(describe, flat))
                raise InputError(f"program: it was not exported for inputs of {shapes}: {_line(error)}") from error

    def _advice(self, rows: int | str) -> str:
        names = ", ".join(part.name for part in self._inputs if part.shape[:1] == (rows,))
        example = " and an example batch of at least 2 rows" if rows == 1 else ""
        shapes = "dynamic_shapes that have {0: torch.export.Dim.DYNAMIC} for " + names
        return f"; for any number of rows, export it with {shapes}{example}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedNetwork:
        steps = [part for part in self.modules() if isinstance(part, _Steps)]
        tensors = [*self.parameters(), *self.buffers()]
        devices = {tensor.device for tensor in tensors} | {device for part in steps for device in part.devices()}
        dtypes = {tensor.dtype for tensor in tensors} | {part.dtype for part in self._inputs if part.dtype}
        cast = {one: fn(torch.empty(0, dtype=one)).dtype for one in dtypes if one.is_floating_point}
        moved = {one: fn(torch.empty(0, device=one)).device for one in devices}
        new = {
            "type of numbers": next((other for one, other in cast.items() if other != one), None),
            "type of device": next((other for one, other in moved.items() if other.type != one.type), None),
        }
        for part in steps:
            for kind, node in part.needs.items():
                if new[kind]:
                    reason = f"since its node {node} names a {kind}"
                    raise InputError(f"program: it cannot change to {new[kind]}, {reason}; export it for {new[kind]}")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._inputs = [replace(part, dtype=cast.get(part.dtype, part.dtype)) for part in self._inputs]  # type: ignore[arg-type]
        return self


class _Steps(nn.Module):
    """The steps of a graph, with its tensors and without the graph. A fingerprint hashes their text.

    Args:
        module: The module that has the graph's tensors.
        graph: The graph, which is changed.
        place: Name of the module before the names of its nodes in error messages.

    Attributes:
        content: What the steps use: parameters, buffers, constants (which are buffers, too), and devices.
        text: The steps, one a line.
        needs: What the graph names and cannot change ("type of numbers", "type of device"), to a node that names it.

    Raises:
        InputError: If a node computes as in training mode.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, place: str = "") -> None:
        super().__init__()
        _check_mode(graph, place)
        self.needs: dict[str, str] = {}
        for node in graph.nodes:
            if any(isinstance(part, torch.dtype) and part.is_floating_point for part in _leaves(node)):
                self.needs.setdefault("type of numbers", _name_of(node.target))
            if "autocast" in _name_of(node.target):  # for one type of device
                self.needs.setdefault("type of device", _name_of(node.target))
        values: dict[str, Any] = _take_devices(graph)
        self._devices = [*values]
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target not in values:
                value = attrgetter(node.target)(module)
                if isinstance(value, fx.GraphModule):
                    value = _Steps(value, copy.deepcopy(value.graph), f"{place}{node.target}.")
                values[node.target] = value
        self.text = _describe(graph)
        program = fx.GraphModule(values, graph)  # it makes buffers of constants
        self._function = _of_torch(type(program).forward)
        self.content = nn.Module()
        for name in ("_parameters", "_buffers", "_modules", *self._devices):
            setattr(self.content, name, getattr(program, name))

    def forward(self, *flat: Any) -> Any:
        """Run the steps."""
        return self._function(self.content, *flat)

    def devices(self) -> list[torch.device]:
        """The devices that the graph names."""
        return [getattr(self.content, name) for name in self._devices]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Steps:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, device in zip(self._devices, self.devices(), strict=True):
            setattr(self.content, name, fn(torch.empty(0, device=device)).device)
        return self


@dataclass(frozen=True)
class _Input:
    """What a program was exported for: one tensor, or a value.

    Args:
        name: Name of the input.
        dtype: Type of a tensor's numbers. None for a value.
        shape: Shape of a tensor: a number for a fixed length, a text for any length. Equal texts are equal lengths.
        fixed: The value alone, if it is one that the program was exported for, or empty.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    fixed: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(str(size) if isinstance(size, int) else 'any' for size in self.shape)}]"

    def allows(self, other: _Input, any_rows: bool = False) -> bool:
        """Whether another tensor has this type and shape; with any number of rows on demand."""
        if (self.dtype, len(self.shape)) != (other.dtype, len(other.shape)):
            return False
        sizes = [*zip(self.shape, other.shape, strict=True)][any_rows:]
        return all(isinstance(size, str) or size == length for size, length in sizes)


def _of_torch(function: Any) -> Callable[..., Any]:
    """Name torch as the module of a function that it has made, which has none. Then a fingerprint skips its globals."""
    function.__module__ = "torch"
    return function  # type: ignore[no-any-return]


def _input(name: str, value: Any) -> _Input:
    if isinstance(value, Tensor):
        return _Input(name, value.dtype, tuple(s if isinstance(s, int) else str(s) for s in value.shape))
    return _Input(name, fixed=(value,) if isinstance(value, bool | int | float | str | None) else ())


def _range(values: Any) -> tuple[int, int | None]:
    """Least and greatest length. torch exports for lengths from 2 on, which holds for 0 and 1, too."""
    least = int(values.lower) if values.lower.is_Integer and values.lower > 2 else 0
    return least, int(values.upper) if values.upper.is_Integer else None


def _children(spec: TreeSpec) -> list[TreeSpec]:
    return spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs


def _arguments(names: list[str], in_spec: TreeSpec) -> tuple[list[str], list[TreeSpec]]:
    """Names and forms of the arguments, those by position first."""
    by_position, by_name = _children(in_spec)
    keywords = [*by_name.context] if by_name.num_children else []
    count = by_position.num_children
    if len(names) != count + len(keywords):
        names = [f"arg_{number}" for number in range(count)]
    return [*names[:count], *keywords], [*_children(by_position), *_children(by_name)]


def _load(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise InputError(f"program: there is no file {path}")
    log = logging.getLogger("torch.export")  # it prints the traceback of an error
    was_disabled, log.disabled = log.disabled, True
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged file can raise any exception
        reason = _line(error).partition(" Please check")[0]
        raise InputError(f"program: {path} cannot be read as a program of torch.export: {reason}") from error
    finally:
        log.disabled = was_disabled


def _line(thing: object) -> str:
    """An error or another object as one line of text."""
    return " ".join(f"{type(thing).__name__ * isinstance(thing, KeyError)} {thing}".split()) or type(thing).__name__


def _check_mode(graph: fx.Graph, place: str) -> None:
    """Raise InputError if a node computes as in training mode."""
    owned: dict[fx.Node, str] = {}  # weights, buffers, and views of them
    for node in graph.nodes:
        if node.op == "get_attr":
            owned[node] = node.target
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema.arguments
        given = [*node.args, *(argument.default_value for argument in schema[len(node.args) :])]
        values = {one.name: node.kwargs.get(one.name, value) for one, value in zip(schema, given, strict=True)}
        reason = _randomness(node.target, values)
        for argument in schema:
            value = values[argument.name]
            name = owned.get(value, "") if isinstance(value, fx.Node) else ""
            if name and node.target.is_view:
                owned[node] = name
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if name and is_written and "detach_" not in str(node.target):
                reason = reason or f"changes {name} in each pass"
        if reason:
            name, advice = f"{place}{node.name} ({node.target})", "call model.eval() before torch.export.export"
            raise InputError(f"program: its node {name} {reason}, as in training mode; {advice}")


def _randomness(target: Any, values: dict[str, Any]) -> str:
    """Describe how an output depends on chance, or on the batch instead of the running statistics."""
    modes = [values[name] for name in ("train", "training", "use_input_stats") if name in values]
    is_training = all(mode is not False for mode in modes)
    if "running_mean" in values:
        by_batch = is_training and (modes or "batch_norm_with_update" in str(target))
        by_batch = by_batch and values["running_mean"] is not None
        return "normalises by the statistics of the batch" if by_batch else ""
    chances = [values[name] for name in ("dropout_p", "dropout") if name in values]
    if modes and "p" in values:
        chances.append(values["p"])
    is_random = torch.Tag.nondeterministic_seeded in target.tags or bool(modes and chances)
    return "draws random numbers" if is_random and is_training and 0 not in chances else ""


def _take_devices(graph: fx.Graph) -> dict[str, torch.device]:
    """Let the graph read its devices from attributes. Return these by name."""
    devices = dict.fromkeys(p for node in graph.nodes for p in _leaves(node) if isinstance(p, torch.device))
    with graph.inserting_before(next(iter(graph.nodes))):
        read = {device: graph.create_node("get_attr", f"_device_{n}") for n, device in enumerate(devices)}
    for node in graph.nodes:
        node.args, node.kwargs = tree_map_only(torch.device, read.__getitem__, (node.args, node.kwargs))
    return {str(node.target): device for device, node in read.items()}


def _leaves(node: fx.Node) -> list[Any]:
    """All that a node's arguments hold."""
    return tree_leaves((node.args, node.kwargs))


def _name_of(target: Any) -> str:
    """What a node calls, as text that is the same in every process."""
    is_text = isinstance(target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator)
    return str(target) if is_text else f"{target.__module__}.{target.__qualname__}"


def _describe(graph: fx.Graph) -> str:
    """A graph as text that is the same in every process, whatever the names of its nodes."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args, kwargs = tree_map_only(fx.Node, numbers.__getitem__, (node.args, node.kwargs))
        lines.append(f"{numbers[node]} = {node.op} {_name_of(node.target)} {args} {dict(kwargs)}")
    return "\n".join(lines)
