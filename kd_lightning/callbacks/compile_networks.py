"""Compile networks with torch.compile, and set the memory format of their weights."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import STUDENT, find_network
from kd_lightning.teachers.teacher import Teacher

_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_SHAPES = 64  # that torch compiles for one class of networks


class CompileNetworks(Callback):
    """Compile a module's network and its teachers with ``torch.compile``, in place. Weight names do not change.

    Compilation pays in fits of thousands of steps of one shape: the first step of each shape takes up to minutes. Each
    shape has code of its own, whichever came first, so that a resumed run computes what an unbroken one does. Networks
    run uncompiled while layers are captured for hints. Outputs differ from uncompiled ones by rounding, and dropout
    draws other numbers. After the fit or test the networks run uncompiled again; the memory format of their weights
    stays.

    Args:
        mode: The mode of ``torch.compile``, such as ``"reduce-overhead"`` or ``"max-autotune"``. Default: None, which
            means torch's default mode.
        backend: The backend of ``torch.compile``. If None, networks are not compiled; use it to set ``channels_last``
            alone.
        channels_last: Also store the weights of convolutions in channels-last format. This is faster on GPUs in half
            precision, and on many CPUs.
        network: Dotted path of the network in the module; "" for the module itself, whose ``forward`` is compiled.

    Raises:
        InputError: If torch does not have the mode or the backend, or the module does not have the network.
    """

    def __init__(
        self,
        mode: str | None = None,
        backend: str | None = "inductor",
        channels_last: bool = False,
        network: str = STUDENT,
    ) -> None:
        if mode not in _MODES:
            raise InputError(f"mode must be one of {', '.join(map(str, _MODES))}, got {mode!r}")
        if backend not in (None, "inductor") and backend not in torch.compiler.list_backends(()):
            raise InputError(f"backend must be one of {', '.join(torch.compiler.list_backends(()))}, got {backend!r}")
        self.mode = mode
        self.backend = backend
        self.channels_last = channels_last
        self.network = network
        self._compiled: list[nn.Module] = []
        self._limit: int | None = None  # of torch, before this callback raised it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Compiles the networks that are not compiled yet."""
        require_whole_weights(trainer, "CompileNetworks")
        for network in find_networks(pl_module, self.network):
            if self.channels_last:
                network.to(memory_format=torch.channels_last)
            is_compiled = network._compiled_call_impl is not None or hasattr(network, "_orig_mod")
            if self.backend is not None and not is_compiled:
                network.compile(mode=self.mode, backend=self.backend, dynamic=False)
                self._compiled.append(network)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self._compiled and self._limit is None and self.backend == "inductor" and on_cpu:
            rank_zero_info(
                "CompileNetworks: the first steps compile the networks, which takes a minute or more on a CPU"
            )
        if self._compiled and self._limit is None:
            # Beyond the limit networks run uncompiled. All networks of one class share it.
            self._limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(self._limit, _SHAPES)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the end of each stage. Removes the compiled forward passes."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when a stage fails, after which Lightning does not call ``teardown``. Removes them, too."""
        self._restore()

    def _restore(self) -> None:
        for network in self._compiled:
            network._compiled_call_impl = None
        self._compiled.clear()
        if self._limit is not None:
            torch._dynamo.config.recompile_limit = self._limit
            self._limit = None


def find_networks(module: nn.Module, path: str = STUDENT) -> list[nn.Module]:
    """Return a module's network, its teacher if that one is trained, and the networks of its frozen teachers.

    Raises:
        InputError: If the module does not have the network.
    """
    networks = [find_network(module, path, "CompileNetworks")]
    teacher = getattr(module, "teacher", None)
    if isinstance(teacher, nn.Module) and not isinstance(teacher, Teacher):
        networks.append(teacher)
    return networks + [part.network for part in module.modules() if isinstance(part, Teacher)]
