"""Fine-tune from pretrained weights: the head first, then all layers, deeper ones with lower learning rates."""

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
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import STUDENT, find_network


class LayerwiseFinetuning(Callback):
    """Train the head alone for some epochs, then all layers, each with a lower learning rate than the one above it.

    The epoch alone decides what is frozen. So a resumed run continues exactly, and all parameters stay in the
    optimiser and in DDP's reducer. (Lightning's ``BackboneFinetuning`` freezes again on resume, issue 21901 of its
    repository. Under DDP it does not reduce the gradients of unfrozen layers, issue 20340.) On one process, frozen
    layers have no gradients, which saves their backward pass. Under DDP, their gradients are removed before each step.

    :func:`~kd_lightning.features.heads.layers_of` defines the layers. A layer has its own learning rate during the
    optimiser's step only. Schedulers, logs and checkpoints see the parameter groups as they are without the callback,
    with the head's rate. Logs ``frozen``: 1 or 0.

    Args:
        frozen_epochs: Number of epochs, at least 0, in which only the head and the parts outside the network train.
        lr_decay: Factor in (0, 1] between the learning rate of a layer and that of the layer above it. The head has
            the optimiser's rate.
        batch_norm: When BatchNorm and InstanceNorm layers below the head update their running statistics.
            ``"thaw"``: not while the layers are frozen. ``"freeze"``: never. ``"adapt"``: always. In all three modes
            their weights train with their layer.
        head: Dotted name of the head in the network. Default: None, which means the last linear or convolutional
            layer that the network calls.
        network: Dotted path of the network in the module; "" for the module itself.

    Raises:
        InputError: If a value is out of range, the module does not have the network, the network has no layer below
            its head, its number of logits is not that of the head, or the optimiser is LBFGS and ``lr_decay`` is
            below 1.
    """

    def __init__(
        self,
        frozen_epochs: int = 1,
        lr_decay: float = 1.0,
        batch_norm: Literal["thaw", "freeze", "adapt"] = "thaw",
        head: str | None = None,
        network: str = STUDENT,
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
        self._depth: dict[nn.Parameter, int] = {}  # of parameters below the head; the head's depth is 0
        self._requires_grad: dict[nn.Parameter, bool] = {}  # before the fit
        self._training: dict[nn.Module, bool] = {}  # mode of each BatchNorm before the fit
        self._frozen = False
        self._hooks: dict[Any, list[RemovableHandle]] = {}
        self._groups: dict[Optimizer, list[Any]] = {}  # during a step: its own groups, each with one of its parts
        self._nested: Counter[Optimizer] = Counter()  # hooks run twice if a step calls the step of a parent class

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the strategy leaves the weights whole."""
        require_whole_weights(trainer, "LayerwiseFinetuning")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit, after ``configure_model`` and the conversion to SyncBatchNorm. Finds layers."""
        self._reset()
        network = find_network(pl_module, self.network, "LayerwiseFinetuning")
        name = find_head(network, self.head)
        head = network.get_submodule(name)
        layers = layers_of(network, head)
        if not layers:
            raise InputError(f"LayerwiseFinetuning: {type(network).__name__} has nothing below its head")
        self._depth = {p: depth for depth, layer in enumerate(reversed(layers), 1) for p in layer}
        self._requires_grad = {p: p.requires_grad for p in self._depth}
        self._training = {m: m.training for m in network.modules() if isinstance(m, _NormBase)}
        if self.head is None:
            self._hooks[network] = [network.register_forward_hook(partial(_check_head, name, logits_from(head)))]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Freezes or unfreezes the layers, and hooks new optimisers.

        A run resumed within an epoch calls no earlier hook before its first step.
        """
        epoch, was_frozen = trainer.current_epoch, self._frozen
        self._frozen = epoch < self.frozen_epochs
        if self._frozen != was_frozen:
            rank_zero_info(f"epoch {epoch}: " + ("the head alone learns" if self._frozen else "all layers learn"))
        if self._frozen and not isinstance(trainer.strategy, DDPStrategy):  # DDP's reducer waits for all gradients
            for parameter in self._depth:
                parameter.requires_grad_(False)
        fixed_statistics = self.batch_norm == "freeze" or (self.batch_norm == "thaw" and self._frozen)
        for norm, training in self._training.items():
            if fixed_statistics:
                norm.eval()
            elif was_frozen and not self._frozen:
                norm.train(training)
        for optimizer in trainer.optimizers if self.lr_decay < 1.0 else ():  # other callbacks may replace them
            for part in getattr(optimizer, "pair", (optimizer,)):  # PairedOptimizer steps a pair of optimisers
                if part not in self._hooks:
                    self._hook_optimizer(part)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Runs before each optimiser step. Removes the gradients of frozen layers.

        Without a gradient, weight decay, momentum and gradient clipping skip a parameter, too.
        """
        if self._frozen:
            for parameter in self._depth:
                parameter.grad = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of each training epoch. Logs ``frozen``."""
        pl_module.log("frozen", float(trainer.current_epoch < self.frozen_epochs), sync_dist=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of each training epoch. Unfreezes the layers.

        A new optimiser made between epochs takes the parameters that require a gradient.
        """
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Restores the network and the optimisers."""
        self._reset()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when training fails, before a checkpoint is saved. Restores the network and the optimisers."""
        self._reset()

    def _reset(self) -> None:
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        for norm, training in self._training.items():
            norm.train(training)
        for optimizer in [*self._groups]:
            self._restore_groups(optimizer)
        for handle in [handle for handles in self._hooks.values() for handle in handles]:
            handle.remove()
        for state in (self._depth, self._requires_grad, self._training, self._hooks, self._nested):
            state.clear()
        self._frozen = False

    def _hook_optimizer(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise InputError(f"LayerwiseFinetuning: LBFGS has one rate, lr_decay must be 1, got {self.lr_decay}")
        before = optimizer.register_step_pre_hook(self._split_groups)
        after = optimizer.register_step_post_hook(self._join_groups)
        # another callback of this class splits the parts further and must join first; torch has no argument for that
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._hooks[optimizer] = [before, after]

    def _split_groups(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step, replace each group by one group for each layer, with the layer's rate."""
        self._nested[optimizer] += 1
        if self._nested[optimizer] > 1:
            return
        parts, groups = [], []
        for group in optimizer.param_groups:
            by_depth: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_depth.setdefault(self._depth.get(parameter, 0), []).append(parameter)
            for depth, parameters in sorted(by_depth.items()):
                parts.append(group | {"params": parameters, "lr": group["lr"] * self.lr_decay**depth})
            groups.append((group, parts[-1] if group["params"] else {}))
        self._groups[optimizer] = groups
        optimizer.param_groups[:] = parts  # in place, since a wrapper may share the list

    def _join_groups(self, optimizer: Optimizer, *_: Any) -> None:
        self._nested[optimizer] -= 1
        if not self._nested[optimizer]:
            self._restore_groups(optimizer)

    def _restore_groups(self, optimizer: Optimizer) -> None:
        """Restore the groups, with the values that the step has stored in them, such as a step count."""
        for group, part in self._groups[optimizer]:
            group.update({name: value for name, value in part.items() if name not in ("params", "lr")})
        optimizer.param_groups[:] = [group for group, _ in self._groups.pop(optimizer)]


def _check_head(name: str, head_outputs: int, network: nn.Module, inputs: Any, output: Any) -> None:
    """Raise InputError if the network's logits do not have the size of the head's output."""
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] != head_outputs:
        reason = f"the network has {output.shape[1]} logits, but its last layer {name!r} has {head_outputs} outputs"
        raise InputError(f"LayerwiseFinetuning: head must be named: {reason}")
