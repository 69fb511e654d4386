"""Fine-tuning from pretrained weights: the head first, then all layers, the deeper the slower."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from kd_lightning.errors import InputError
from kd_lightning.heads import find_head

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group; the last two are a scheduler's


class LayerwiseFinetuning(Callback):
    """Train the head alone for some epochs, then all layers, each slower than the one above it.

    What is frozen follows from the epoch, so that a resumed run goes on as it would have, and parameters stay where
    they are in optimiser and DDP's reducer. (Lightning's ``BackboneFinetuning`` freezes again on resume, issue 21901 of
    its repository, and under DDP does not reduce the gradients of what it has thawed, issue 20340.) On one process
    frozen layers have no gradients, which saves their backward pass; under DDP these are thrown away before each step.

    Layers are the network's parts in the order in which it holds them, with sequences opened up; a normalisation
    belongs to the layer before it. Charts ``frozen``, 1 or 0.

    Args:
        frozen_epochs: Epochs in which only the head learns.
        lr_decay: What the rate is multiplied by from each layer to the one below, in (0, 1]; the head has the
            optimiser's own.
        batch_norm: ``"thaw"``: while frozen, BatchNorm below the head keeps its statistics, later it updates them;
            ``"freeze"``: it keeps its statistics always; ``"adapt"``: it updates them from the start.
        head: The head's dotted name in the network. None: its last linear or convolutional layer.
        network: Where the module has the network.

    Raises:
        InputError: For values out of range, a module without the network, and a network that is only a head.
    """

    def __init__(
        self,
        frozen_epochs: int = 1,
        lr_decay: float = 1.0,
        batch_norm: Literal["thaw", "freeze", "adapt"] = "thaw",
        head: str | None = None,
        network: str = "student",
    ) -> None:
        if frozen_epochs < 0:
            raise InputError(f"frozen_epochs must be at least 0, got {frozen_epochs}")
        if not 0.0 < lr_decay <= 1.0:
            raise InputError(f"lr_decay must lie in (0, 1], got {lr_decay}")
        if batch_norm not in ("thaw", "freeze", "adapt"):
            raise InputError(f"batch_norm must be one of thaw, freeze, adapt, got {batch_norm!r}")
        self.frozen_epochs = frozen_epochs
        self.lr_decay = lr_decay
        self.batch_norm = batch_norm
        self.head = head
        self.network = network
        self._depth: dict[int, int] = {}  # of each parameter below the head, by its id
        self._below: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []
        self._trainable: list[bool] = []
        self._frozen = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers."""
        if stage != "fit":
            return
        network = getattr(pl_module, self.network, None)
        if not isinstance(network, nn.Module):
            raise InputError(f"LayerwiseFinetuning: {type(pl_module).__name__} has no network {self.network!r}")
        head = network.get_submodule(find_head(network, self.head))
        layers = layers_of(network, head)
        if not layers:
            raise InputError(f"LayerwiseFinetuning: {type(network).__name__} has nothing below its head")
        self._depth = {id(p): depth for depth, layer in enumerate(reversed(layers), 1) for p in layer}
        self._below = [p for layer in layers for p in layer]
        self._trainable = [p.requires_grad for p in self._below]
        self._norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m is not head]
        self._frozen = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each layer its rate; here, before a checkpoint's optimiser state comes in."""
        for optimizer in trainer.optimizers:
            origin = self._regroup(optimizer)
            for config in trainer.lr_scheduler_configs:
                if getattr(config.scheduler, "optimizer", None) is optimizer:
                    self._rescale(config.scheduler, origin)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze or thaw; here, since a resumed run may get no other call before its first step."""
        frozen = trainer.current_epoch < self.frozen_epochs
        if frozen != self._frozen:
            rank_zero_info(f"epoch {trainer.current_epoch}: the head alone learns" if frozen else "all layers learn")
        if not self._reduces(trainer):
            for parameter, trainable in zip(self._below, self._trainable, strict=True):
                parameter.requires_grad_(trainable and not frozen)
        self._frozen = frozen
        for norm in self._norms:
            norm.train(self.batch_norm == "adapt" or (self.batch_norm == "thaw" and not frozen))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Without a gradient a parameter is left alone, by weight decay and momentum, too."""
        if self._frozen and self._reduces(trainer):
            for parameter in self._below:
                parameter.grad = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chart it."""
        pl_module.log("frozen", float(trainer.current_epoch < self.frozen_epochs))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the network as it was found."""
        for parameter, trainable in zip(self._below, self._trainable, strict=True):
            parameter.requires_grad_(trainable)

    @staticmethod
    def _reduces(trainer: Trainer) -> bool:
        """Whether somebody waits for the gradient of every parameter."""
        return isinstance(trainer.strategy, DDPStrategy)

    def _regroup(self, optimizer: Optimizer) -> list[tuple[int, float]]:
        """Split the optimiser's groups by depth; for each new one, the number of its old one, and its factor."""
        groups, origin = [], []
        for number, group in enumerate(optimizer.param_groups):
            by_depth: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_depth.setdefault(self._depth.get(id(parameter), 0), []).append(parameter)
            for depth, parameters in sorted(by_depth.items()):
                factor = self.lr_decay**depth
                scaled = {key: group[key] * factor for key in _RATES if key in group}
                groups.append(group | scaled | {"params": parameters})
                origin.append((number, factor))
        optimizer.param_groups[:] = groups
        return origin

    def _rescale(self, scheduler: Any, origin: list[tuple[int, float]]) -> None:
        """Tell a scheduler, and those in it, of the new groups."""
        for inner in getattr(scheduler, "_schedulers", ()):
            self._rescale(inner, origin)
        for name, scales in {
            "base_lrs": True,
            "_last_lr": True,
            "min_lrs": True,
            "max_lrs": True,
            "lr_lambdas": False,
        }.items():
            if isinstance(values := getattr(scheduler, name, None), list) and values:
                new = [values[number] * factor if scales else values[number] for number, factor in origin]
                setattr(scheduler, name, new)


def layers_of(network: nn.Module, head: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer but the head, from the input on; see :class:`LayerwiseFinetuning`."""
    skipped = {id(parameter) for parameter in head.parameters()}
    layers: list[list[nn.Parameter]] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            parameters = [p for p in child.parameters() if id(p) not in skipped]
            if isinstance(child, nn.Sequential | nn.ModuleList) or (child is not head and head in child.modules()):
                walk(child)
            elif isinstance(child, _NORMS) and layers:
                layers[-1] += parameters
            elif parameters:
                layers.append(parameters)
            skipped.update(id(p) for p in parameters)

    walk(network)
    own = [p for p in network.parameters() if id(p) not in skipped]  # such as a class token
    return [own, *layers] if own else layers
