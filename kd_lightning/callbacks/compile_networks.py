"""Faster networks by torch.compile and by the order of their weights in memory."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher

_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class CompileNetworks(Callback):
    """Compile a module's student and its teachers by ``torch.compile``, in place: names of weights stay as they are.

    Pays where a fit has thousands of steps of one shape: the first steps of each kind take up to minutes. While layers
    are captured for hints, networks run uncompiled. Outputs differ by rounding from uncompiled ones. After the fit (or
    test) the networks are not compiled; weights stay laid out as they are.

    Args:
        mode: As of ``torch.compile``: None, ``"reduce-overhead"``, ``"max-autotune"``, and its other ones.
        backend: As of ``torch.compile``. None: does not compile, for ``channels_last`` alone.
        channels_last: Also keep weights of convolutions with channels last, which is faster on GPUs in half precision
            and on many CPUs.

    Raises:
        InputError: For a mode or backend that torch does not have, and a module that has neither student nor teacher.
    """

    def __init__(self, mode: str | None = None, backend: str | None = "inductor", channels_last: bool = False) -> None:
        if mode not in _MODES:
            raise InputError(f"mode must be one of {', '.join(map(str, _MODES))}, got {mode!r}")
        if backend not in (None, "inductor") and backend not in torch.compiler.list_backends(()):
            raise InputError(f"backend must be one of {', '.join(torch.compiler.list_backends(()))}, got {backend!r}")
        self.mode = mode
        self.backend = backend
        self.channels_last = channels_last
        self._compiled: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compile what is not compiled already."""
        networks = networks_of(pl_module)
        if not networks:
            raise InputError(f"CompileNetworks: {type(pl_module).__name__} has neither student nor teacher")
        for network in networks:
            if self.channels_last:
                network.to(memory_format=torch.channels_last)
            if self.backend is not None and network._compiled_call_impl is None:
                network.compile(mode=self.mode, backend=self.backend)
                self._compiled.append(network)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the networks as they were."""
        for network in self._compiled:
            network._compiled_call_impl = None
        self._compiled.clear()


def networks_of(module: nn.Module) -> list[nn.Module]:
    """A module's student, its frozen teachers' networks, and a teacher that learns."""
    learners: list[Any] = [getattr(module, name, None) for name in ("student", "teacher")]
    found = [one for one in learners if isinstance(one, nn.Module) and not isinstance(one, Teacher)]
    return found + [part.network for part in module.modules() if isinstance(part, Teacher)]
