"""The calls of a module's network in a training step, each with the teacher's output for the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch, unpack
from kd_lightning.errors import InputError
from kd_lightning.features.capture import find_layer
from kd_lightning.features.outputs import Output, pick_logits
from kd_lightning.inputs import Inputs, arguments_of, tensors_of
from kd_lightning.modules._shared.checks import check_two_networks
from kd_lightning.teachers.teacher import Teacher

Mask = str | Callable[[Any], Tensor]
_TEACHER_INPUTS = "teacher_inputs"


class Call(NamedTuple):
    """A call of the network.

    Attributes:
        logits: The network's logits.
        version: Number of changes in place that they had when the network returned them.
        target: The teacher's logits.
        labels: The batch's labels (B,), if the network was called with the batch's inputs, as they are, and they are
            class indices; else None.
        nodes: Nodes of the graph that the network's output comes from.
    """

    logits: Tensor
    version: int
    target: Tensor
    labels: Tensor | None
    nodes: frozenset[Any]


class NetworkCalls:
    """Records what a network returns, and gives the teacher what the network is called with.

    Args:
        module: The module that holds the network.
        path: Dotted path of the network; "" for the module itself.
        teacher: The teacher.
        output: What picks the logits out of an output, see :class:`~kd_lightning.teach`.

    Attributes:
        recorded: The calls with a gradient since :meth:`watch` began.
        batch: The batch of the step, as it was when the step began.
    """

    def __init__(self, module: nn.Module, path: str, teacher: Teacher | None, output: Output | None) -> None:
        self.module = module
        self.path = path
        self.teacher: Any = teacher  # or None
        self.output = output
        self.recorded: list[Call] = []
        self.batch: Any = None
        self._is_watching = False
        self._targets: list[tuple[Tensor, Tensor | None]] = []  # teacher's logits and labels of calls that have begun
        self._network: nn.Module | None = None
        self._handles: list[Any] = []
        self._is_fitting = False
        self.mask_is_checked = False
        self.find_network(required=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkCalls:
        """Return a copy that watches nothing. Of a network alone, as a step may copy it, a copy without the module."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        state = vars(self) | {"recorded": [], "batch": None, "_is_watching": False, "_targets": []}
        if id(self.module) not in memo:
            state |= {"module": None, "teacher": None, "_network": None, "_handles": []}
        vars(copied).update({name: deepcopy(value, memo) for name, value in state.items()})
        return copied

    @property
    def name(self) -> str:
        """The network's name in messages."""
        return self.path or "the module itself"

    def find_network(self, required: bool = True) -> None:
        """Find the network, which the module may build late or replace.

        Raises:
            InputError: If there is none and it is required, or if it shares parameters with the teacher.
        """
        try:
            network = find_layer(self.module, self.path) if self.path else self.module
        except InputError as error:
            if not required:
                return
            raise InputError(f"network: {error}") from error
        if network is self._network:
            return
        self._unhook()
        self._network = network
        check_two_networks("teacher", self.teacher, network)
        if self.teacher is not None:  # as it is for test and predict
            self.teacher.share_layers(network)

    def start_fit(self) -> None:
        """Find the network, and hook it until :meth:`end_fit`.

        A network may be compiled at its first call, which may be one of validation: its hooks must be there by then.
        """
        self.find_network()
        self._is_fitting, self.mask_is_checked = True, False
        self._hook()

    def end_fit(self) -> None:
        """Leave the network without hooks, as scripts, exports and files of it need it."""
        self._is_fitting = False
        self._unhook()

    def _hook(self) -> None:
        if self._network is not None and not self._handles:
            self._handles = [
                self._network.register_forward_pre_hook(self._before_call, with_kwargs=True),
                self._network.register_forward_hook(self._after_call),
            ]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def watch(self, batch: Any) -> Iterator[None]:
        """Record the calls in the block. What was recorded is dropped at its end."""
        self.find_network()
        self._hook()
        batch = copy(batch) if isinstance(batch, Mapping | Batch) else batch  # a step may take entries out of it
        self.batch, self.recorded, self._targets, self._is_watching = batch, [], [], True
        try:
            yield
        finally:
            self.batch, self.recorded, self._targets, self._is_watching = None, [], [], False
            if not self._is_fitting:
                self._unhook()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing in the block."""
        before, self._is_watching = self._is_watching, False
        try:
            yield
        finally:
            self._is_watching = before

    def find_mask(self, mask: Mask) -> Tensor:
        """Return which positions of the step's batch count.

        Raises:
            InputError: If the batch has no such key, or if it is no mask.
        """
        if callable(mask):
            found = mask(self.batch)
        else:
            batch = self.batch
            if isinstance(batch, Batch):
                batch = {**(batch.x if isinstance(batch.x, Mapping) else {}), "mask": batch.position_mask}
            held = batch if isinstance(batch, Mapping) else {}
            if mask not in held:
                raise InputError(f"mask: the batch has no {mask!r}, got {[*held] or type(batch).__name__}")
            found = held[mask]
        if not isinstance(found, Tensor):
            raise InputError(f"mask must be a tensor, got {type(found).__name__}")
        if not self.mask_is_checked and found.numel() and not found.is_floating_point() and int(found.min()) < 0:
            raise InputError(f"mask must be at least 0 everywhere, got {int(found.min())}; is it a tensor of labels?")
        self.mask_is_checked = True
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_call(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the teacher what the network is called with: now, since the network may change it in place."""
        if self._is_watching and torch.is_grad_enabled():
            with self.pause():  # the teacher may hold layers of the network
                self._targets.append((self._teach(args, kwargs), self._labels_of(args, kwargs)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_call(self, _network: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._is_watching and torch.is_grad_enabled():
            logits = self._pick(output, "the network")
            parts = [*tensors_of(output)] if isinstance(output, Tensor | Mapping | tuple) else []
            nodes = frozenset(part.grad_fn for part in (logits, *parts) if part.grad_fn is not None)
            self.recorded.append(Call(logits, logits._version, *self._targets.pop(), nodes))

    def _teach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits for a call."""
        batch = self.batch
        if isinstance(batch, Batch) and _is_call_of(batch.x, args, kwargs):
            stored: Tensor | None = self.teacher.stored(batch)
            if stored is not None:
                return stored
        inputs = _teacher_inputs_of(batch)
        if inputs is not None:
            if self.recorded or self._targets:
                raise InputError("teacher_inputs of a batch are for one call of the network in a step, got several")
            args, kwargs = arguments_of(inputs)
        return self._pick(self.teacher.run(*args, **kwargs), "the teacher")

    def _labels_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the batch's class indices (B,) if the arguments of a call are its very inputs; None otherwise."""
        try:
            read = unpack(self.module, self.batch)
        except InputError:
            return None
        known = read.y is not None and read.y.ndim == 1 and not read.y.is_floating_point()
        return read.y if known and _is_call_of(read.x, args, kwargs) else None

    def _pick(self, output: Any, owner: str) -> Tensor:
        """Pick the logits out of an output."""
        try:
            return pick_logits(output, self.output, owner)
        except InputError as error:
            if self.output is not None:
                raise
            raise InputError(f"{error}; teach(output=...) names the part") from None


def _teacher_inputs_of(batch: Any) -> Any:
    """Return the ``teacher_inputs`` of a batch: a Batch, a mapping, or ``(mapping, ...)``; None if it has none."""
    if isinstance(batch, Batch):
        return batch.teacher_inputs
    if isinstance(batch, Mapping) and _TEACHER_INPUTS in batch:
        return batch[_TEACHER_INPUTS]
    parts = [*batch.values()] if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else []
    held = [isinstance(part, Mapping | Batch) and _teacher_inputs_of(part) is not None for part in parts]
    if not any(held):
        return None
    if isinstance(batch, Mapping) or held != [True, *[False] * (len(held) - 1)]:
        raise InputError(
            "teacher_inputs are for one batch of a step, got them in a part of several; give each loader a step of its "
            "own, or return a Batch or a mapping that has them"
        )
    return _teacher_inputs_of(parts[0])


def _is_call_of(x: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a call are these very inputs."""
    own_args, own_kwargs = arguments_of(x)
    return (
        len(own_args) == len(args)
        and own_kwargs.keys() == kwargs.keys()
        and all(own is given for own, given in zip(own_args, args, strict=True))
        and all(own is kwargs[name] for name, own in own_kwargs.items())
    )


def nodes_of(loss: Tensor) -> set[Any]:
    """Return all nodes of a loss's graph."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen
