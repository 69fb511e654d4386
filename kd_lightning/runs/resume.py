"""Exact resumption of a fit: what Lightning's checkpoints lack, and the part of an epoch that it would leave out.

A checkpoint is written within a step or an epoch: after an optimiser step, at the end of a validation, or at the end of
an epoch. An unbroken run then goes on with the rest of that step and epoch: the validation that is due, the hooks at
the epoch's end, and the step of ReduceLROnPlateau. Lightning 2.6 leaves these out on a resume. After a resume from an
epoch's last batch its counters are wrong, too, and a second resume trains too long.

Loaders without a state, such as PyTorch's own, begin an epoch anew. They resume between epochs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.runs.checkpoints import follow_move
from kd_lightning.runs.resume_metrics import finish_sums, restore_sums, training_sums

KEY = "exact_resume"
# callbacks of Lightning that do not resume exactly, and what to use instead
_INSTEAD = {StochasticWeightAveraging: "WeightAveraging or EMAWeightAveraging", BaseFinetuning: "LayerwiseFinetuning"}


def store_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint what an exact resume needs and Lightning does not save. All processes must call this.

    These are the metrics that callbacks and schedulers monitor, the sums of the epoch's training metrics, the sums of
    gradients within a window of accumulated batches, the number of these batches, and of each checkpoint callback the
    last step that it saved, and whether it waits for the next validation.
    """
    if trainer.state.fn != TrainerFn.FITTING or KEY in checkpoint:
        return
    savers = {c.state_key: (c._last_global_step_saved, c._defer_save_until_validation) for c in _savers(trainer)}
    checkpoint[KEY] = {
        "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
        "sums": training_sums(trainer.fit_loop.epoch_loop._results),
        "accumulate_grad_batches": _accumulation(trainer),
        "gradients": _gradients(trainer),
        "savers": savers,
    }


def prepare_resume(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a fit resume exactly. Call it in ``on_load_checkpoint``; a second call changes nothing.

    Args:
        trainer: The trainer. Nothing happens unless it fits.
        checkpoint: The whole checkpoint. Its counters are corrected if a resume of Lightning has left wrong ones.

    Raises:
        InputError: If the accumulation of batches has changed, or a callback cannot resume.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    callbacks = _callbacks(trainer)
    if (reason := cannot_resume(trainer)) is not None:
        raise InputError(f"trainer.callbacks: {reason}, or start a new run")
    saved = checkpoint.get(KEY, {})
    now = _accumulation(trainer)
    before = saved.get("accumulate_grad_batches", now)
    if before != now:
        raise InputError(
            f"accumulate_grad_batches: the checkpoint was trained with {_text(before)}, got {_text(now)}; resume with "
            "the same value"
        )
    for callback in callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            state["patience"] = callback.patience  # the configured one counts
        if isinstance(callback, ModelCheckpoint) and state is not None:
            follow_move(state, callback.dirpath)
    _convert_to_double(trainer, checkpoint)
    if "loops" in checkpoint:
        correct_counters(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.run = partial(_run, trainer.fit_loop, saved)  # type: ignore[method-assign]


def cannot_resume(trainer: Trainer) -> str | None:
    """Return which callback of a trainer cannot resume and what to use instead; None if all can."""
    for callback in _callbacks(trainer):
        for kind, other in _INSTEAD.items():
            if isinstance(callback, kind):
                return f"{type(callback).__name__} does not resume exactly; use {other}"
    return None


def saves_within_epochs(trainer: Trainer) -> str | None:
    """Return what is wrong if checkpoints are due within epochs, where a training loader cannot resume; else None."""
    plain, batches = _plain_loaders(trainer.fit_loop), trainer.num_training_batches
    for saver in _savers(trainer) if plain else ():
        steps = saver._every_n_train_steps * trainer.accumulate_grad_batches
        validated = bool(saver._every_n_epochs) and not saver._should_save_on_train_epoch_end(trainer)
        if saver._train_time_interval is not None or steps % batches or (validated and _validates_within(trainer)):
            return (
                f"checkpoints within epochs: a run cannot resume from them, since a {type(plain[0]).__name__} has no "
                "load_state_dict; write them at the ends of epochs (every_n_epochs, save_on_train_epoch_end), or use "
                "torchdata's StatefulDataLoader"
            )
    return None


def _validates_within(trainer: Trainer) -> bool:
    """Return whether validations are due within epochs."""
    if not sum(trainer.num_val_batches):
        return False
    batches = trainer.val_check_batch  # None if the interval is a time, infinite at the end of an epoch of no length
    return batches is None or (batches != math.inf and batches % trainer.num_training_batches != 0)


def correct_counters(fit_loop: dict[str, Any]) -> None:
    """Correct the epoch counters in a checkpoint that Lightning wrote after a resume from an epoch's last batch.

    Args:
        fit_loop: The state of the fit loop in the checkpoint. It is changed in place.
    """
    epochs, batches = fit_loop.get("epoch_progress"), fit_loop.get("epoch_loop.batch_progress")
    if epochs is None or batches is None:
        return
    epoch, batch = epochs["current"], batches["current"]
    behind = epoch["processed"] > epoch["started"]  # an epoch has ended that was not counted as started
    closed = epoch["ready"] == epoch["started"] == epoch["processed"] == epoch["completed"]
    within = batch["processed"] != batch["completed"]
    whole = batch["completed"] * epoch["processed"]
    after_validation = batches["is_last_batch"] and batches["total"]["completed"] > whole
    under_way = closed and (within or after_validation)
    if behind or under_way:
        for counts in (epochs["total"], epochs["current"]):
            counts["ready"] = counts["started"] = counts["processed"] + under_way


def _run(loop: _FitLoop, saved: dict[str, Any]) -> None:
    """Replace ``_FitLoop.run`` of a resumed fit: finish what the checkpoint interrupted, then train as usual."""
    vars(loop).pop("run", None)  # the trainer's next fit
    if not loop.is_resuming:  # the fit for which this was prepared has failed
        loop.run()
        return
    trainer, steps = loop.trainer, loop.epoch_loop
    loop.setup_data()
    if loop.max_batches == 0 or trainer.limit_train_batches == 0:
        return
    torch.set_grad_enabled(True)
    for part in (loop, steps, steps.val_loop, steps.automatic_optimization, steps.manual_optimization):
        part._restarting = False
    _restore(trainer, saved)
    epoch: Any = loop.epoch_progress.current
    if epoch.started > epoch.processed:
        resume_step = _prepare_epoch(loop, saved)
        _check_loaders(loop)
        loop.on_run_start()
        _finish_epoch(loop, saved, resume_step)
    else:
        if epoch.processed > epoch.completed:  # the checkpoint was written at the end of an epoch
            if saved and steps._num_ready_batches_reached():
                steps.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            loop.epoch_progress.increment_completed()
        for counts in (loop.epoch_progress.total, epoch):
            counts.reset_on_restart()
        loop.on_run_start()
        if plain := _plain_loaders(loop):
            _warn_of_own_state(plain)
            loop._resuming_from_checkpoint = False  # their order is drawn anew, after the hooks of the epoch's start
    _train(loop)
    loop._restarting = False
    loop.on_run_end()


def _plain_loaders(loop: _FitLoop) -> list[Any]:
    """Return the training loaders that cannot be set to a place within an epoch."""
    assert loop._combined_loader is not None
    loaders: list[Any] = loop._combined_loader.flattened
    return [loader for loader in loaders if not callable(getattr(loader, "load_state_dict", None))]


def _check_loaders(loop: _FitLoop) -> None:
    """Raise InputError if a loader cannot be set to the place within an epoch, so that it would repeat batches."""
    progress: Any = loop.epoch_loop.batch_progress
    done, plain = progress.current.ready, _plain_loaders(loop)
    if plain and done < loop.max_batches and not progress.is_last_batch:
        of = "" if loop.max_batches == float("inf") else f" of {loop.max_batches}"
        raise InputError(
            f"ckpt_path: the checkpoint was written after {done}{of} batches of an epoch, where a "
            f"{type(plain[0]).__name__} without load_state_dict cannot resume; resume from one of the end of an epoch "
            "(checkpoint.every_n_epochs); loaders of SemiSupervisedDataModule and torchdata's StatefulDataLoader can"
        )


def _warn_of_own_state(loaders: list[Any]) -> None:
    """Warn of loaders with random numbers that neither a checkpoint nor a seed repeats."""
    for name in ("generator", "persistent_workers"):
        if any(getattr(loader, name, None) for loader in loaders):
            rank_zero_warn(
                f"resume: {name} of the DataLoader has a state that no checkpoint holds, so that the order or the "
                "augmentation may differ from that of an unbroken run; leave it out if runs may be interrupted"
            )


def _prepare_epoch(loop: _FitLoop, saved: dict[str, Any]) -> Callable[[], None] | None:
    """Set the counters within an epoch to the batches that are done.

    Returns:
        What is left of the step in which the checkpoint was written; None if it was not written within a step.
    """
    steps = loop.epoch_loop
    batch: Any = steps.batch_progress.current
    within_step = 0 < batch.ready == batch.started == batch.processed
    validated = bool(saved) and batch.completed == batch.processed
    if within_step and batch.completed < batch.processed:
        steps.batch_progress.increment_completed()
    steps.batch_progress.total.reset_on_restart()
    for progress in (steps.batch_progress, steps.scheduler_progress, steps.automatic_optimization.optim_progress):
        progress.reset_on_restart()

    def resume_step() -> None:
        assert loop._data_fetcher is not None
        steps._skip_next_val = validated
        steps.on_advance_end(loop._data_fetcher)

    return resume_step if within_step else None


def _finish_epoch(loop: _FitLoop, saved: dict[str, Any], resume_step: Callable[[], None] | None) -> None:
    """Run the rest of an epoch, without the hooks of its start."""
    trainer, epoch = loop.trainer, cast(Any, loop.epoch_progress.current)
    assert loop._combined_loader is not None
    assert loop._data_fetcher is not None
    for loader in loop._combined_loader.flattened:
        _set_sampler_epoch(loader, epoch.processed)
    for callback in _callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):  # it sets the accumulation at the start of an epoch
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
    gradients = saved.get("gradients", {})
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
    results, added = loop.epoch_loop._results, []
    restore_sums(results, saved.get("sums", {}))
    try:
        loop.epoch_loop.on_run_start(loop._data_fetcher)
        if resume_step is not None:
            resume_step()
        _train(loop.epoch_loop, loop._data_fetcher)
        added = finish_sums(results)
        loop.on_advance_end()
    finally:
        for key in [*finish_sums(results), *added]:
            results.pop(key, None)
        loop.on_iteration_done()


def _train(loop: Any, *arguments: Any) -> None:
    """Run a loop until it is done, as its own ``run`` does."""
    while not loop.done:
        try:
            if isinstance(loop, _FitLoop):
                loop.on_advance_start()
            loop.advance(*arguments)
            loop.on_advance_end(*arguments)
        except StopIteration:
            break
        finally:
            loop.on_iteration_done()


def _restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Restore the monitored metrics, and what callbacks would have decided by them."""
    device = trainer.lightning_module.device
    metrics = {name: value.to(device) for name, value in saved.get("metrics", {}).items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    for saver in _savers(trainer):
        if (state := saved.get("savers", {}).get(saver.state_key)) is not None:
            saver._last_global_step_saved, saver._defer_save_until_validation = state
        written = (saver.best_model_path, saver.last_model_path, *saver.best_k_models)
        if Path(str(trainer.ckpt_path)).name in {Path(path).name for path in written}:
            saver._last_global_step_saved = trainer.global_step  # this one wrote the checkpoint
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping) and _has_stopped(callback):
            trainer.should_stop = True


def _has_stopped(callback: EarlyStopping) -> bool:
    if callback.wait_count >= callback.patience:
        return True
    by_patience = (EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED)
    return callback.stopping_reason not in by_patience  # a higher patience lets the run go on


def _convert_to_double(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Under 64-true, load the weights into double: Lightning loads them into float32 and converts them later."""
    module = trainer.lightning_module
    tensors = [*module.parameters(), *module.buffers()]
    is_float = any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors)
    if isinstance(trainer.precision_plugin, DoublePrecision) and is_float:
        trainer.precision_plugin.convert_module(module)
        # WeightAveraging stores the weights that train under this key
        state = checkpoint.get("current_model_state", checkpoint["state_dict"])
        module.load_state_dict(state, strict=module.strict_loading)


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Return the gradients of the current window of accumulated batches, means over the processes."""
    module, strategy = trainer.lightning_module, trainer.strategy
    is_training = module.automatic_optimization and (trainer.training or trainer.validating)
    if not is_training or not trainer.fit_loop._should_accumulate():
        return {}
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):  # others split or own the gradients
        return {}
    found = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
    return {name: strategy.reduce(grad.clone(), reduce_op="mean").cpu() for name, grad in found.items()}


def _accumulation(trainer: Trainer) -> dict[int, int]:
    """Return the number of batches of an optimiser step, by the epoch from which it holds."""
    for callback in _callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            return dict(callback.scheduling)
    return {0: trainer.accumulate_grad_batches}


def _text(accumulation: dict[int, int]) -> str:
    return str(accumulation[0] if len(accumulation) == 1 else accumulation)


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
