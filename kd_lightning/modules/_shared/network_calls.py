"""The calls of a module's network in a training step, each with the teacher's output for the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.capture import find_layer
from kd_lightning.features.outputs import logits_of
from kd_lightning.inputs import Inputs, arguments_of, tensors_of
from kd_lightning.modules._shared.checks import check_two_networks
from kd_lightning.teachers.teacher import Teacher

Output = str | int | Callable[[Any], Tensor]


class Call(NamedTuple):
    """A call of the network.

    Attributes:
        logits: The network's logits.
        target: The teacher's logits.
        nodes: Nodes of the graph that the network's output comes from.
    """

    logits: Tensor
    target: Tensor
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
        batch: The batch of the step.
    """

    def __init__(self, module: nn.Module, path: str, teacher: Teacher | None, output: Output | None) -> None:
        self.module = module
        self.path = path
        self.teacher: Any = teacher  # or None
        self.output = output
        self.recorded: list[Call] = []
        self.batch: Any = None
        self._is_watching = False
        self._targets: list[Tensor] = []  # the teacher's logits for calls that have begun
        self._network: nn.Module | None = None
        self._handles: list[Any] = []
        self.find_network(required=False)

    @property
    def name(self) -> str:
        """The network's name in messages."""
        return self.path or "the module itself"

    def find_network(self, required: bool = True) -> None:
        """Find the network, which the module may build late or replace, and hook it.

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
        for handle in self._handles:
            handle.remove()
        self._handles = [
            network.register_forward_pre_hook(self._before_call, with_kwargs=True),
            network.register_forward_hook(self._after_call),
        ]
        self._network = network
        check_two_networks("teacher", self.teacher, network)
        if self.teacher is not None:  # as it is for test and predict
            self.teacher.share_layers(network)

    @contextmanager
    def watch(self, batch: Any) -> Iterator[None]:
        """Record the calls in the block. What was recorded is dropped at its end."""
        self.find_network()
        self.batch, self.recorded, self._targets, self._is_watching = batch, [], [], True
        try:
            yield
        finally:
            self.batch, self.recorded, self._targets, self._is_watching = None, [], [], False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing in the block."""
        before, self._is_watching = self._is_watching, False
        try:
            yield
        finally:
            self._is_watching = before

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_call(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the teacher what the network is called with: now, since the network may change it in place."""
        if self._is_watching and torch.is_grad_enabled():
            with self.pause():  # the teacher may hold layers of the network
                self._targets.append(self._teach(args, kwargs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_call(self, _network: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._is_watching and torch.is_grad_enabled():
            logits = self._pick(output, "the network")
            parts = [*tensors_of(output)] if isinstance(output, Tensor | Mapping | tuple) else []
            nodes = frozenset(part.grad_fn for part in (logits, *parts) if part.grad_fn is not None)
            self.recorded.append(Call(logits, self._targets.pop(), nodes))

    def _teach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits for a call."""
        batch, inputs = self.batch, None
        if isinstance(batch, Batch) and _is_call_of(batch.x, args, kwargs):
            stored: Tensor | None = self.teacher.stored(batch)
            if stored is not None:
                return stored
            inputs = batch.teacher_inputs
        elif isinstance(batch, Mapping):
            inputs = batch.get("teacher_inputs")
        if inputs is not None:
            if self.recorded or self._targets:
                raise InputError("teacher_inputs of a batch are for one call of the network in a step, got several")
            args, kwargs = arguments_of(inputs)
        return self._pick(self.teacher.run(*args, **kwargs), "the teacher")

    def _pick(self, output: Any, owner: str) -> Tensor:
        """Pick the logits out of an output."""
        pick = self.output
        if pick is None:
            return logits_of(output, owner)
        try:
            if callable(pick):
                found = pick(output)
            elif isinstance(output, Tensor):
                found = output
            else:
                found = output[pick] if isinstance(pick, int) or isinstance(output, Mapping) else getattr(output, pick)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise InputError(
                f"output: {pick!r} picks nothing out of what {owner} returns, {type(output).__name__}"
            ) from error
        if not isinstance(found, Tensor):
            raise InputError(f"output must pick a tensor, got {type(found).__name__} from {owner}")
        return found


def _is_call_of(x: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a call are these very inputs."""
    own_args, own_kwargs = arguments_of(x)
    return (
        len(own_args) == len(args)
        and own_kwargs.keys() == kwargs.keys()
        and all(own is given for own, given in zip(own_args, args, strict=True))
        and all(own is kwargs[name] for name, own in own_kwargs.items())
    )
