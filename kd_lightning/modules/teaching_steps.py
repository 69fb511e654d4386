"""What a training step of a taught module does with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from kd_lightning.batch import LABEL_KEYS, Batch, is_labeled, unpack
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import Output, pick_logits
from kd_lightning.inputs import arguments_of
from kd_lightning.losses import ConditionalLoss, DKDLoss, KDLoss, NKDLoss, RLDLoss
from kd_lightning.losses.rows import to_rows
from kd_lightning.modules._shared.checks import check_same_teacher, check_soft_weight
from kd_lightning.modules._shared.finite_check import FiniteCheck
from kd_lightning.modules._shared.network_calls import Call, Mask, NetworkCalls, nodes_of
from kd_lightning.modules._shared.soft_loss import call_soft_loss, check_takes_logits, check_top_k
from kd_lightning.ranks import compute_metrics_together, sum_over_ranks
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.teacher import Teacher

_NEED_LABELS = (ConditionalLoss, DKDLoss, NKDLoss, RLDLoss)


class Teaching(nn.Module):
    """The teacher of a taught module, and what a training step does with it."""

    def __init__(
        self,
        module: nn.Module,
        teacher: Teacher | None,
        network: str,
        soft_loss: nn.Module | None,
        class_dim: int | None,
        mask: Mask | None,
        output: Output | None,
        unlabeled: bool,
    ) -> None:
        super().__init__()
        if isinstance(mask, str) and "padding" in mask:
            raise InputError(
                f"mask must name positions that count, but {mask!r} seems to name padding; use a function of the "
                f"batch, such as lambda batch: ~batch[{mask!r}]"
            )
        if isinstance(mask, str) and mask in LABEL_KEYS:
            raise InputError(
                f"mask must name positions that count, but {mask!r} names labels; use a function of the batch, such as "
                f"lambda batch: batch[{mask!r}] != -100"
            )
        self.teacher: Any = teacher  # or None
        self.network = network
        self.soft_loss = KDLoss() if soft_loss is None else soft_loss
        check_takes_logits(self.soft_loss)
        check_top_k(self.soft_loss, [teacher])
        self._soft_buffers = _hide_state(self.soft_loss)
        self.class_dim = class_dim
        self.mask = mask
        self.output = output
        self.unlabeled = unlabeled
        self._calls = NetworkCalls(module, network, teacher, output)
        # in this epoch: training steps, losses with a soft term, and with a hard one
        self._steps = self._soft_losses = self._hard_losses = 0
        self._soft_rows = 0
        self._warned = self._warned_of_labels = False
        self._finite_check = FiniteCheck("teach/")

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """Return what replaces methods of the module, by name. Each gets the module's own method first."""
        if self.teacher is None:
            return {"setup": self._setup}
        return {
            "training_step": self._training_step,
            "setup": self._setup,
            "on_fit_start": self._on_fit_start,
            "on_fit_end": self._on_fit_end,
            "manual_backward": self._manual_backward,
            "on_train_epoch_end": self._on_train_epoch_end,
            "on_save_checkpoint": self._on_save_checkpoint,
            "on_load_checkpoint": self._on_load_checkpoint,
        }

    def teacher_logits(self, batch: Batch) -> Tensor:
        """Return the teacher's logits for a batch outside of a training step, in the student's class order."""
        if self.output is None:
            found: Tensor = self.teacher(batch)
            return found
        logits: Tensor = self.teacher.arrange(self.pick_teacher_logits(batch))
        return logits

    def pick_teacher_logits(self, batch: Batch) -> Tensor:
        """Compute the part of the teacher's output that the logits are, (B, M), in its own class order."""
        args, kwargs = arguments_of(batch.teacher_x)
        return pick_logits(self.teacher.run(*args, **kwargs), self.output, "the teacher").to(batch.device)

    @property
    def _owner(self) -> Any:
        return self._calls.module

    # The loss.

    def _soft_term(self, calls: list[Call]) -> tuple[Tensor, int]:
        """Return the mean soft loss over the rows of some calls, and the number of these rows."""
        mask = None if self.mask is None else self._calls.find_mask(self.mask)
        parts, counts = [], []
        for call in calls:
            if call.logits._version != call.version:
                raise InputError(
                    "network: training_step changes its outputs in place after the call, so that they are no longer "
                    "what the teacher's are compared with; write z = z / 2 in place of z /= 2"
                )
            rows = to_rows(call.logits, self.class_dim, mask)
            if not rows.requires_grad:
                raise InputError(
                    f"network: the outputs of {self._calls.name} have no gradient, so that it cannot learn "
                    "from a teacher; does its forward pass detach them, or is it frozen?"
                )
            target = to_rows(call.target.to(rows.device), self.class_dim, mask)
            target = self.teacher.arrange(target)
            self._check_shapes(rows, target)
            counts.append(len(rows) if rows.ndim else 1)
            parts.append(self._compare(rows, target, call.labels) if counts[-1] else rows.sum())
        total = sum(counts)
        value = torch.stack([part * count for part, count in zip(parts, counts, strict=True)]).sum() / max(total, 1)
        mean = self._mean_over_processes(total, value) if mask is not None else total
        return value if mean == total else value * (total / mean), total

    def _compare(self, rows: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        if self.class_dim is not None or rows.ndim > 2:
            labels = None  # those of positions may be shifted
        if labels is None and isinstance(self.soft_loss, _NEED_LABELS):
            raise InputError(
                f"soft_loss: {type(self.soft_loss).__name__} needs labels; teach finds them where {self._calls.name} "
                "is called with the inputs of the batch as they are, and the batch has one class index (B,) for each "
                "row; a method unpack(batch) of the module, which returns Batch(inputs, labels), names both"
            )
        loss = call_soft_loss(self.soft_loss, rows, target, labels)
        if loss.ndim:
            raise InputError(f"soft_loss must give one number, got {[*loss.shape]}; its reduction must be mean")
        return loss

    def _check_shapes(self, rows: Tensor, target: Tensor) -> None:
        if self.class_dim is None and rows.ndim > 2 and hasattr(self.soft_loss, "task"):
            raise InputError(
                f"class_dim must be set, since the network gives outputs {[*rows.shape]}: -1 for tokens (B, T, C), 1 "
                "for maps (B, C, H, W)"
            )
        if rows.shape != target.shape:
            raise InputError(
                f"teacher and network must give outputs of one shape, got {[*target.shape]} from the teacher and "
                f"{[*rows.shape]} from the network; Teacher(classes=...) maps another class order, and output a part"
            )

    def _mean_over_processes(self, count: int, like: Tensor) -> float:
        """Return the mean of a count over all processes, so that one process and two give the same gradient."""
        trainer = getattr(self._owner, "_trainer", None)
        if trainer is None or trainer.world_size == 1:
            return count
        return max(
            float(trainer.strategy.reduce(torch.tensor(float(count), device=like.device), reduce_op="mean")), 1e-9
        )

    # What replaces the module's methods.

    def _training_step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module's own training step, and add the soft loss to what it returns."""
        if not torch.is_grad_enabled():  # a step of validation calls it
            return own(*args, **kwargs)
        batch = args[0] if args else next(iter(kwargs.values()), None)
        self._steps += 1
        with self._calls.watch(batch):
            returned, problem = self._run_own(own, *args, **kwargs)
            if not self._owner.automatic_optimization:
                return returned
            if returned is None and not problem and not self._calls.recorded:
                return None  # it skips the batch
            if not self._calls.recorded:
                raise InputError(
                    f"network: training_step never called {self._calls.name} with a gradient; network must be the "
                    "dotted path of what it calls (forward() and reentrant checkpointing hide a call)"
                )
            with self._calls.pause():
                return self._add_soft(returned, problem, batch)

    def _run_own(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
        """Return what the module's step returns; or None and the reason why it has no loss, if that is allowed."""
        try:
            return own(*args, **kwargs), ""
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of their step, for a batch without labels
            if not self.unlabeled or not self._calls.recorded or not self._owner.automatic_optimization:
                raise
            return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _add_soft(self, returned: Any, problem: str, batch: Any) -> Any:
        hard = returned.get("loss") if isinstance(returned, Mapping) else returned
        if hard is None and not self.unlabeled:
            self._warn_once("training_step returned no loss, so its batch is left out; unlabeled: true trains on it")
            return returned
        soft, rows = self._soft_term(self._calls.recorded)
        has_hard = hard is not None and (not self.unlabeled or bool(torch.isfinite(hard).all()))
        if not has_hard:
            problem = problem or "it is missing or not finite"
            self._warn_once(f"a batch has no hard loss ({problem}): soft loss alone")
            self._warn_of_lost_labels(batch, problem)
        loss = self._weighted(hard if has_hard else None, soft, rows)
        return {**returned, "loss": loss} if isinstance(returned, Mapping) else loss

    def _weighted(self, hard: Tensor | None, soft: Tensor, rows: int) -> Tensor:
        """Return the weighted sum, and log its parts."""
        owner = self._owner
        self._soft_losses += 1
        self._soft_rows += rows
        self._hard_losses += hard is not None
        weight: float = owner.soft_weight
        check_soft_weight(weight)  # a callback may have set it
        trainer = getattr(owner, "_trainer", None)
        self._finite_check.record({"soft": soft}, 0 if trainer is None else trainer.global_step)
        if trainer is not None:
            values = {"soft": soft} if hard is None else {"soft": soft, "hard": hard}
            values |= {"unlabeled": soft.new_tensor(float(hard is None))} if self.unlabeled else {}
            for name, value in values.items():
                size = 1 if name == "unlabeled" else max(rows, 1)
                # of all processes, where each step of each of them has the value: else they would wait for one another
                sync = owner.automatic_optimization and not (name == "hard" and self.unlabeled)
                options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": size, "sync_dist": sync}
                owner.log(f"teach/{name}", value.detach(), **options)
        weighted = [factor * value for factor, value in self.terms(hard, soft, weight).values()]
        return weighted[0] if hard is None else weighted[0] + weighted[1]

    @staticmethod
    def terms(hard: Tensor | None, soft: Tensor, weight: float) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of each term of a step, by name."""
        return ({} if hard is None else {"hard": (1.0 - weight, hard)}) | {"soft": (weight, soft)}

    def _manual_backward(self, own: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the soft loss of the calls that this loss depends on, with manual optimisation."""
        calls = self._calls.recorded
        if calls:
            reached = nodes_of(loss)
            mine = [call for call in calls if call.nodes & reached]
            self._calls.recorded = [call for call in calls if not call.nodes & reached]
            if mine:
                loss = self._weighted(loss, *self._soft_term(mine))
        with self._calls.pause():  # a checkpointed network runs again in the backward pass
            own(loss, *args, **kwargs)

    def _setup(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        self._finite_check = FiniteCheck("teach/")
        if self._is_fitting:
            if self.teacher is None:
                raise InputError("training needs the teacher; teacher=None is for test and predict alone")
            require_whole_weights(self._owner.trainer, "teach")
            self.teacher.fingerprint(anew=True)  # before a plugin casts its weights

    def _on_fit_start(self, own: Callable[..., Any]) -> None:
        own()
        self._calls.start_fit()
        fill_caches(self.teacher, self._owner.trainer)

    def _on_fit_end(self, own: Callable[..., Any]) -> None:
        self._calls.end_fit()
        own()

    def _on_train_epoch_end(self, own: Callable[..., Any]) -> None:
        self._finite_check.check()
        counts = [self._steps, self._soft_losses, self._hard_losses, self._soft_rows]
        compute_metrics_together(self._owner)
        steps, soft, hard, rows = sum_over_ranks(torch.tensor(counts, device=self._owner.device)).tolist()
        self._steps = self._soft_losses = self._hard_losses = self._soft_rows = 0
        if steps and not soft and not self._owner.automatic_optimization:
            raise InputError(
                f"network: no manual_backward of this epoch had a loss that depends on {self._calls.name}; "
                "network must be the dotted path of what learns, and the step must call self.manual_backward"
            )
        if soft and not hard:
            rank_zero_warn("teach: no batch of this epoch had a hard loss; the soft loss alone trained the network")
        if soft and not rows:
            rank_zero_warn("teach: no position of this epoch counts, so that the teacher teaches nothing; check mask")
        own()

    def _on_save_checkpoint(self, own: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        self._finite_check.check()
        own(checkpoint)
        checkpoint["teacher_fingerprint"] = self.teacher.fingerprint()
        if self._soft_buffers:
            checkpoint["soft_loss"] = {name: buffer.cpu() for name, buffer in self.soft_loss.named_buffers()}

    def _on_load_checkpoint(self, own: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        fingerprint = checkpoint.get("teacher_fingerprint")
        if self._is_fitting and fingerprint:
            check_same_teacher("teacher", self.teacher, fingerprint)
        if self._is_fitting:
            buffers = dict(self.soft_loss.named_buffers())
            for name, value in checkpoint.get("soft_loss", {}).items():
                if name in buffers and buffers[name].shape == value.shape:
                    buffers[name].copy_(value)

    @property
    def _is_fitting(self) -> bool:
        trainer = getattr(self._owner, "_trainer", None)
        return trainer is not None and trainer.state.fn == "fit"

    def _warn_of_lost_labels(self, batch: Any, problem: str) -> None:
        """Warn once if a batch that the step has no loss for has labels, which then teach nothing."""
        if self._warned_of_labels:
            return
        try:
            y = unpack(self._owner, batch).y
        except InputError:  # its labels are not known
            return
        if (
            y is not None
            and y.numel()
            and y.ndim
            and (labeled := int(is_labeled(y).reshape(len(y), -1).any(dim=1).sum()))
        ):
            self._warned_of_labels = True
            rank_zero_warn(
                f"teach: a batch of {len(y)} rows has {labeled} labels, but no hard loss ({problem}), so that they are "
                "lost; let training_step leave out rows whose label is -100, or put these in batches of their own"
            )

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            rank_zero_warn(f"teach: {text}")
        self._warned = True


def _hide_state(loss: nn.Module) -> bool:
    """Let a soft loss stay out of the module's checkpoints, which are its own. Return whether it has buffers.

    Raises:
        InputError: If it has parameters.
    """
    if any(True for _ in loss.parameters()):
        raise InputError(f"soft_loss: {type(loss).__name__} has parameters, which would be in the module's checkpoints")
    for part in loss.modules():
        part._non_persistent_buffers_set.update(part._buffers)
    return any(True for _ in loss.buffers())
