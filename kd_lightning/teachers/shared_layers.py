"""Layers that a teacher and its student share, as a frozen base with adapters does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.errors import InputError


class _Buffer(NamedTuple):
    """A buffer of a shared layer, with its value and its version at the last look."""

    name: str
    layer: nn.Module
    key: str
    value: Tensor
    version: int


class SharedLayers:
    """The layers that the student has, too. Outside the teacher's passes they have the student's mode.

    Make it before the teacher's networks are put in eval mode.

    Args:
        networks: The teacher's networks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._first_modes = {layer: is_training(layer) for network in networks for layer in network.modules()}
        self._layers: dict[nn.Module, None] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._buffers: dict[str, _Buffer] = {}

    def __bool__(self) -> bool:
        return bool(self._layers or self._parameters)

    def mode_of(self, layer: nn.Module) -> bool:
        """Whether a layer is in training mode outside the teacher."""
        return is_training(layer) or self._first_modes.get(layer, False)

    def find(self, networks: Sequence[nn.Module], student: nn.Module) -> None:
        """Find the shared layers, parameters and buffers, and give the layers the mode that they had before."""
        own = {id(parameter) for network in networks for parameter in network.parameters()}
        self._parameters |= {name: p for name, p in student.named_parameters() if id(p) in own}
        for name, layer in student.named_modules():
            if layer not in self._first_modes:
                continue
            set_training(layer, self.mode_of(layer))
            self._layers[layer] = None
            for key, value in layer._buffers.items():
                if value is not None:
                    full = f"{name}.{key}".lstrip(".")
                    self._buffers[full] = _Buffer(full, layer, key, value.detach().clone(), _version(value))

    @contextmanager
    def keep_modes(self) -> Iterator[None]:
        """Restore the layers' modes after the block, which is a pass of the teacher.

        Raises:
            InputError: If the student has trained a shared parameter, or changed a shared buffer.
        """
        self._check()
        modes = [is_training(layer) for layer in self._layers]
        try:
            yield
        finally:
            for layer, training in zip(self._layers, modes, strict=True):
                set_training(layer, training)

    def _check(self) -> None:
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        changed = [name for name, buffer in self._buffers.items() if self._is_changed(buffer)]
        for what, names in (("trains", trained), ("changes", changed)):
            if names:
                raise InputError(
                    f"teacher and student share {', '.join(names[:3])}, which the student {what}; give one of them a "
                    "copy (copy.deepcopy)"
                )

    def _is_changed(self, held: _Buffer) -> bool:
        now: Any = held.layer._buffers.get(held.key)
        if now is None or _version(now) == held.version:
            return False
        if not torch.equal(held.value.to(now), now):  # loading equal values is no change
            return True
        self._buffers[held.name] = held._replace(version=_version(now))
        return False


def is_training(layer: nn.Module) -> bool:
    """Whether a layer is in training mode. TorchScript that was frozen (``torch.jit.freeze``) has no mode."""
    return getattr(layer, "training", False)


def set_training(layer: nn.Module, training: bool) -> None:
    """Set the mode of a layer alone, if that changes it."""
    if is_training(layer) != training:
        layer.training = training


def _version(tensor: Tensor) -> int:
    """Return a number that increases with each change in place; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version
