"""Programs of ``torch.export`` as networks of teachers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx._pytree import tree_flatten_spec
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from kd_lightning.errors import InputError
from kd_lightning.inputs import describe

_DYNAMIC = "{0: torch.export.Dim.DYNAMIC}"
_DEVICES = {"cpu", "cuda", "mps", "xpu", "hpu", "mtia"}


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
        for name, part in module.named_modules():
            if isinstance(part, fx.GraphModule):
                _check_mode(part.graph, f"{name}." if name else "")
        graph, info = copy.deepcopy(module.graph), module.graph._codegen.pytree_info
        self._names, self._specs = _arguments(info.orig_args, info.in_spec)
        self._positional: int = _children(info.in_spec)[0].num_children
        self._out_spec: TreeSpec = info.out_spec
        self._guards: Callable[..., Any] | None = None
        for node in graph.find_nodes(op="call_module", target="_guards_fn"):
            self._guards = _of_torch(module._guards_fn.forward)
            graph.erase_node(node)
        is_flat = all(spec.is_leaf() for spec in self._specs)
        placeholders = graph.find_nodes(op="placeholder")
        names = self._names if is_flat and len(placeholders) == len(self._names) else [n.name for n in placeholders]
        self._inputs = [_input(name, node.meta.get("val")) for name, node in zip(names, placeholders, strict=True)]
        constraints = dict(getattr(module, "range_constraints", {}))  # a deep copy of a module has none
        self._ranges = {str(k): limits for k, v in constraints.items() if (limits := _range(v)) != (0, None)}
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
            keywords = "".join(f", {name}=" for name in self._names[self._positional :])
            allowed = (", ".join(self._names[: self._positional]) + keywords).removeprefix(", ")
            came = ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])
            raise InputError(f"program: it was exported for the arguments ({allowed}), got ({came})")
        flat: list[Any] = []
        for name, spec in zip(self._names, self._specs, strict=True):
            if spec.is_leaf():
                flat.append(given[name])
                continue
            try:
                leaves = tree_flatten_spec(given[name], spec)
                fits = len(leaves) == len(tree_leaves(given[name])) and not isinstance(given[name], Tensor)
            except Exception:  # errors are of any class
                fits = False
            if not fits:
                raise InputError(f"program: {name} must have the form {_line(spec)}, got {describe(given[name])}")
            flat += leaves
        return flat

    def _check(self, flat: list[Any]) -> None:
        """Raise InputError unless the program was exported for such inputs."""
        lengths: dict[str, tuple[int, str]] = {}
        for value, wanted in zip(flat, self._inputs, strict=True):
            if not wanted.is_tensor:
                if wanted.is_fixed and value != wanted.value:
                    raise InputError(f"program: {wanted.name} must be {wanted.value!r}, as exported, got {value!r}")
                continue
            if not isinstance(value, Tensor):
                raise InputError(f"program: {wanted.name} must be a tensor of shape {wanted}, got {describe(value)}")
            shape, allowed = [*value.shape], wanted.shape
            if len(shape) != len(allowed) or any(
                isinstance(size, int) and size != length for size, length in zip(allowed[1:], shape[1:], strict=True)
            ):
                raise InputError(f"program: {wanted.name} must have the shape {wanted}, as exported, got {shape}")
            if shape and isinstance(allowed[0], int) and allowed[0] != shape[0]:
                raise InputError(self._batch_message(wanted, allowed[0], shape))
            if value.dtype != wanted.dtype:
                raise InputError(f"program: {wanted.name} must be of {wanted.dtype}, as exported, got {value.dtype}")
            for number, (symbol, length) in enumerate(zip(allowed, shape, strict=True)):
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

    def _batch_message(self, wanted: _Input, size: int, shape: list[int]) -> str:
        fixed = [part.name for part in self._inputs if part.shape and part.shape[0] == size]
        shapes = "{" + ", ".join(f'"{name}": {_DYNAMIC}' for name in fixed) + "}"
        if not {*fixed} <= {*self._names}:  # the argument is a mapping or tuple
            shapes = f"..., which must have {_DYNAMIC} for {', '.join(fixed)}"
        example = " and an example batch of at least 2 rows" if size == 1 else ""
        rows = f"batches of {size} row{'s' * (size != 1)}, got {wanted.name} of shape {shape}"
        advice = f"for any number of rows, export it with dynamic_shapes={shapes}{example}"
        return f"program: it was exported for {rows}; {advice}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedNetwork:
        tensors = [*chain(self.parameters(), self.buffers())]
        steps = [part for part in self.program.modules() if isinstance(part, _Steps)]
        devices = {tensor.device for tensor in tensors} | {
            getattr(s.content, name) for s in steps for name in s.devices
        }
        dtypes = {tensor.dtype for tensor in tensors} | {part.dtype for part in self._inputs if part.dtype}
        new = {kind: fn(torch.empty(0, dtype=kind)).dtype for kind in dtypes if kind.is_floating_point}
        casts = next((other for kind, other in new.items() if kind != other), None)
        moves = [(one, other) for one in devices if (other := fn(torch.empty(0, device=one)).device).type != one.type]
        for part in steps:
            if casts and part.dtype_node:
                reason = f"its node {part.dtype_node} names a type of numbers"
                raise InputError(f"program: it cannot be cast to {casts}, since {reason}; export the cast model")
            if moves and part.device_node:
                reason = f"its node {part.device_node} is for {moves[0][0].type} alone"
                raise InputError(f"program: it cannot be moved to {moves[0][1]}, since {reason}; export it there")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._inputs = [replace(part, dtype=new.get(part.dtype, part.dtype)) for part in self._inputs]  # type: ignore[arg-type]
        return self


class _Steps(nn.Module):
    """The steps of a graph, with its tensors and without the graph. A fingerprint hashes their text.

    Attributes:
        content: What the steps use: parameters, buffers, and constants, which are buffers, too.
        text: The steps, one a line.
        devices: Names of the attributes of the content that hold the devices of the steps.
        dtype_node: Name of a node that names a floating type, or empty.
        device_node: Name of a node that works on one type of device alone, or empty.
    """

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__()
        self.content = nn.Module()
        self.dtype_node = self.device_node = ""
        values: dict[str, Any] = {name: torch.device(device) for device, name in _take_devices(graph).items()}
        self.devices = [*values]
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target not in values:
                value = attrgetter(node.target)(module)
                is_graph = isinstance(value, fx.GraphModule)
                values[node.target] = _Steps(value, copy.deepcopy(value.graph)) if is_graph else value
            if any(isinstance(part, torch.dtype) and part.is_floating_point for part in _literals(node)):
                self.dtype_node = self.dtype_node or node.name
            names = {part.partition(":")[0] for part in _literals(node) if isinstance(part, str)}
            if isinstance(node.target, torch._ops.HigherOrderOperator) and names & _DEVICES:
                self.device_node = self.device_node or node.name
        for name, value in values.items():
            _place(self.content, name, value)
        self.text = _describe(graph)
        self._function = _of_torch(type(fx.GraphModule(values, graph)).forward)

    def forward(self, *flat: Any) -> Any:
        """Run the steps."""
        return self._function(self.content, *flat)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Steps:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self.devices:
            setattr(self.content, name, fn(torch.empty(0, device=getattr(self.content, name))).device)
        return self


@dataclass(frozen=True)
class _Input:
    """What a program was exported for: one tensor, or a value.

    Args:
        name: Name of the input.
        is_tensor: Whether it is a tensor.
        shape: A number for a fixed length, a text for any length. Equal texts are equal lengths.
        dtype: Type of the tensor's numbers.
        is_fixed: Whether it is a value that the program was exported for.
        value: That value.
    """

    name: str
    is_tensor: bool = True
    shape: tuple[int | str, ...] = ()
    dtype: torch.dtype | None = None
    is_fixed: bool = False
    value: Any = None

    def __str__(self) -> str:
        return "[" + ", ".join(str(size) if isinstance(size, int) else "any" for size in self.shape) + "]"


def _of_torch(function: Any) -> Callable[..., Any]:
    """Name torch as the module of a function that it has made, which has none. Then a fingerprint skips its globals."""
    function.__module__ = "torch"
    return function  # type: ignore[no-any-return]


def _input(name: str, value: Any) -> _Input:
    if isinstance(value, Tensor):
        return _Input(name, True, tuple(s if isinstance(s, int) else str(s) for s in value.shape), value.dtype)
    is_fixed = isinstance(value, bool | int | float | str | None)
    return _Input(name, False, is_fixed=is_fixed, value=value if is_fixed else None)


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
        arguments = _arguments_of(node)
        reason = _randomness(node.target, {argument.name: value for argument, value in arguments})
        for argument, value in arguments:
            name = owned.get(value, "") if isinstance(value, fx.Node) else ""
            if name and node.target.is_view:
                owned[node] = name
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if name and is_written and "detach_" not in str(node.target):
                reason = reason or f"changes {name} in each pass"
        if reason:
            name, advice = f"{place}{node.name} ({node.target})", "call model.eval() before torch.export.export"
            raise InputError(f"program: its node {name} {reason}, as in training mode; {advice}")


def _arguments_of(node: fx.Node) -> list[tuple[Any, Any]]:
    """The arguments of a node's operator, with their values."""
    target: Any = node.target
    values = [*node.args, *(argument.default_value for argument in target._schema.arguments[len(node.args) :])]
    return [(one, node.kwargs.get(one.name, v)) for one, v in zip(target._schema.arguments, values, strict=True)]


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


def _take_devices(graph: fx.Graph) -> dict[str, str]:
    """Let the graph read its devices from attributes. Return the names of the attributes by device."""
    names: dict[str, str] = {}
    for node in [*graph.nodes]:
        found: dict[str, fx.Node] = {}
        for device in [str(part) for part in _literals(node) if isinstance(part, torch.device)]:
            names.setdefault(device, f"_device_{len(names)}")
            with graph.inserting_before(node):  # one that is named twice is read twice
                found[device] = graph.create_node("get_attr", names[device])
        if found:
            swap = partial(lambda found, part: found[str(part)] if isinstance(part, torch.device) else part, found)
            node.args, node.kwargs = map_aggregate(node.args, swap), map_aggregate(node.kwargs, swap)
    return names


def _literals(node: fx.Node) -> list[Any]:
    """What a node's arguments hold beside other nodes."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), lambda part: found.append(part) or part)  # type: ignore[func-returns-value]
    return [part for part in found if not isinstance(part, fx.Node)]


def _place(module: nn.Module, path: str, value: Any) -> None:
    """Set an attribute by its dotted path. Tensors become buffers, which move with the module."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _describe(graph: fx.Graph) -> str:
    """A graph as text that is the same in every process, whatever the names of its nodes."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        target: Any = node.target
        if not isinstance(target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
            target = f"{target.__module__}.{target.__qualname__}"
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda part: numbers.get(part, part))
        lines.append(f"{numbers[node]} = {node.op} {target} {args} {dict(kwargs)}")
    return "\n".join(lines)
