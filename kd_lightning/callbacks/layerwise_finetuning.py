"""Fine-tuning from pretrained weights: the head first, then all layers, the deeper the slower."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from kd_lightning.errors import InputError
from kd_lightning.features.heads import find_head, layers_of, logits_from


class LayerwiseFinetuning(Callback):
    """Train the head alone for some epochs, then all layers, each slower than the one above it.

    What is frozen follows from the epoch, so that a resumed run goes on as it would have, and parameters stay where
    they are in optimiser and DDP's reducer. (Lightning's ``BackboneFinetuning`` freezes again on resume, issue 21901 of
    its repository, and under DDP does not reduce the gradients of what it has thawed, issue 20340.) On one process
    frozen layers have no gradients, which saves their backward pass; under DDP these are thrown away before each step.

    :func:`~kd_lightning.features.heads.layers_of` tells what a layer is. Each has its rate during an optimiser's step alone;
    schedulers, charts and checkpoints know the groups as they are without the callback, that is, the head's rate.
    Charts ``frozen``, 1 or 0.

    Args:
        frozen_epochs: Epochs in which only the head learns, and what is not in the network.
        lr_decay: What the rate is multiplied by from each layer to the one below, in (0, 1]; the head has the
            optimiser's own.
        batch_norm: ``"thaw"``: while frozen, BatchNorm below the head keeps its statistics, later it updates them;
            ``"freeze"``: it keeps its statistics always; ``"adapt"``: it updates them from the start. Its weights are
            those of the layer in any case. So does InstanceNorm, where it has statistics.
        head: The head's dotted name in the network. None: its last linear or convolutional layer.
        network: Where the module has the network; dotted paths work.

    Raises:
        InputError: For values out of range, a module without the network, a network that is only a head or gives
            another number of logits than what was taken for its head, and for LBFGS with ``lr_decay`` below 1.
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
        self._depth: dict[nn.Parameter, int] = {}  # of what is below the head, where it is 0
        self._trainable: dict[nn.Parameter, bool] = {}  # as found
        self._training: dict[nn.Module, bool] = {}  # the mode of each BatchNorm, as found
        self._frozen = False
        self._hooks: dict[Any, list[RemovableHandle]] = {}
        self._whole: dict[Optimizer, list[Any]] = {}  # within a step, its groups, each with a part of it
        self._nested: Counter[Optimizer] = Counter()  # hooks run twice where a step calls the one of a parent class

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; here, after ``configure_model`` and the exchange of BatchNorm for SyncBatchNorm."""
        self._leave()
        try:
            network = pl_module.get_submodule(self.network)
        except AttributeError as error:
            name = type(pl_module).__name__
            raise InputError(f"LayerwiseFinetuning: {name} has no network {self.network!r}") from error
        name = find_head(network, self.head)
        head = network.get_submodule(name)
        layers = layers_of(network, head)
        if not layers:
            raise InputError(f"LayerwiseFinetuning: {type(network).__name__} has nothing below its head")
        self._depth = {p: depth for depth, layer in enumerate(reversed(layers), 1) for p in layer}
        self._trainable = {p: p.requires_grad for p in self._depth}
        self._training = {m: m.training for m in network.modules() if isinstance(m, _NormBase)}
        if self.head is None:
            self._hooks[network] = [network.register_forward_hook(partial(_check, name, logits_from(head)))]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze or thaw; here, since a resumed run may get no other call before its first step."""
        epoch, before = trainer.current_epoch, self._frozen
        self._frozen = epoch < self.frozen_epochs
        if self._frozen != before:
            rank_zero_info(f"epoch {epoch}: " + ("the head alone learns" if self._frozen else "all layers learn"))
        if self._frozen and not isinstance(trainer.strategy, DDPStrategy):  # whose reducer waits for all gradients
            for parameter in self._depth:
                parameter.requires_grad_(False)
        keeps = self.batch_norm == "freeze" or (self.batch_norm == "thaw" and self._frozen)
        for norm, training in self._training.items():
            if keeps:
                norm.eval()
            elif before and not self._frozen:
                norm.train(training)
        for optimizer in trainer.optimizers if self.lr_decay < 1.0 else ():  # new ones may come between epochs
            for one in getattr(optimizer, "pair", (optimizer,)):  # those that PairedOptimizer steps
                if one not in self._hooks:
                    self._watch(one)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Without a gradient a parameter is left alone, by weight decay, momentum and the norm of all, too."""
        if self._frozen:
            for parameter in self._depth:
                parameter.grad = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Chart it."""
        pl_module.log("frozen", float(trainer.current_epoch < self.frozen_epochs), sync_dist=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw: who makes a new optimiser between epochs takes what requires a gradient."""
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the network as it was found."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same; before a checkpoint is made of what is left."""
        self._leave()

    def _leave(self) -> None:
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        for norm, training in self._training.items():
            norm.train(training)
        for optimizer in [*self._whole]:
            self._restore(optimizer)
        for handle in [handle for handles in self._hooks.values() for handle in handles]:
            handle.remove()
        for kept in (self._depth, self._trainable, self._training, self._hooks, self._nested):
            kept.clear()
        self._frozen = False

    def _watch(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise InputError(f"LayerwiseFinetuning: LBFGS has one rate, lr_decay must be 1, got {self.lr_decay}")
        before, after = optimizer.register_step_pre_hook(self._split), optimizer.register_step_post_hook(self._join)
        # another callback of this kind, which splits the parts further, must join first; torch has no argument for it
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._hooks[optimizer] = [before, after]

    def _split(self, optimizer: Optimizer, *_: Any) -> None:
        """For a step, give each layer a group with its rate."""
        self._nested[optimizer] += 1
        if self._nested[optimizer] > 1:
            return
        parts, whole = [], []
        for group in optimizer.param_groups:
            by_depth: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_depth.setdefault(self._depth.get(parameter, 0), []).append(parameter)
            for depth, parameters in sorted(by_depth.items()):
                parts.append(group | {"params": parameters, "lr": group["lr"] * self.lr_decay**depth})
            whole.append((group, parts[-1] if group["params"] else {}))
        self._whole[optimizer] = whole
        optimizer.param_groups[:] = parts  # in place, since a wrapper may share the list

    def _join(self, optimizer: Optimizer, *_: Any) -> None:
        self._nested[optimizer] -= 1
        if not self._nested[optimizer]:
            self._restore(optimizer)

    def _restore(self, optimizer: Optimizer) -> None:
        """Give back the groups, with what the optimiser has noted in them, such as a count of steps."""
        for group, part in self._whole[optimizer]:
            group.update({name: value for name, value in part.items() if name not in ("params", "lr")})
        optimizer.param_groups[:] = [group for group, _ in self._whole.pop(optimizer)]


def _check(name: str, gives: int, network: nn.Module, inputs: Any, output: Any) -> None:
    """Complain where what gives the logits cannot be the layer of that name."""
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] != gives:
        reason = f"the network gives {output.shape[1]} logits, and its last layer, {name!r}, {gives} numbers"
        raise InputError(f"LayerwiseFinetuning: head must be named: {reason}")
