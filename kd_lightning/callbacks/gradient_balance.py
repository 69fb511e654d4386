"""Log the gradient of each term of the objective, once an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import find_student
from kd_lightning.teachers.training_checks import gradient_norms

Terms = Mapping[str, tuple[float, Tensor]]


class GradientBalance(Callback):
    """Log the norm of the gradient of each weighted term on the student, in the first step of an epoch.

    If one of them is many times the others, these hardly count. The names are ``gradient/<term>``. The report draws the
    course, and ``doctor`` judges it once the run is finished.

    The norms are those of the step itself: nothing is computed forward a second time, and no random number is drawn, so
    that training is the same to the bit with and without the callback. It costs one backward pass for each term in an
    epoch. Of several processes, each with its share of the batch, the mean of the norms is logged. A norm that cannot
    be computed, as with ``torch.compile`` or reentrant checkpointing, is left out with a warning.

    Works on the modules of this package, and on any LightningModule that :class:`~kd_lightning.teach` has changed.

    Raises:
        InputError: At the start of a fit, for another module, without a student, or if the strategy shards weights.
    """

    def __init__(self) -> None:
        self._terms: dict[str, tuple[float, Tensor]] = {}
        self._stop: Callable[[], None] | None = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks the module and the strategy before a fit."""
        if stage != "fit":
            return
        self._end_watch()
        require_whole_weights(trainer, "GradientBalance")
        if _owner_of_terms(pl_module) is None:
            raise InputError(
                "GradientBalance needs a module of kd_lightning, or one that teach has changed, got "
                f"{type(pl_module).__name__}"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. From the first one of an epoch, notes the terms that its step computes."""
        if batch_idx == 0:
            self._watch(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Runs before the backward pass. Measures and logs the terms of an epoch's first step."""
        if self._stop is None or not self._terms:
            return
        terms = self._terms
        self._end_watch()
        student = find_student(pl_module)
        if student is None:
            raise InputError(f"GradientBalance: {type(pl_module).__name__} has no student")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        try:
            norms = gradient_norms(terms, parameters, scale)
        except (RuntimeError, InputError) as error:
            norms = dict.fromkeys(terms, math.nan)  # other processes wait for this one
            if not self._warned:
                rank_zero_warn(f"GradientBalance: no gradient of a single term: {str(error).partition(chr(10))[0]}")
            self._warned = True
        values = torch.tensor([*norms.values()], dtype=torch.float32, device=loss.device)
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        found = {f"gradient/{name}": v for name, v in zip(norms, values.tolist(), strict=True) if not math.isnan(v)}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of Lightning's own metrics
        for logger in trainer.loggers if found and trainer.is_global_zero else ():
            logger.log_metrics(found, step=step)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Runs after each training batch. Ends the watch of a step without a backward pass."""
        self._end_watch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Runs when a fit fails or is stopped. Leaves the module as it was."""
        self._end_watch()

    def _watch(self, module: LightningModule) -> None:
        """Note the terms of the module's next step."""
        self._end_watch()
        owner = _owner_of_terms(module)
        assert owner is not None
        place, name = owner
        own = getattr(place, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            self._terms |= {term: (float(weight), value) for term, (weight, value) in found.items()}
            return found

        setattr(place, name, noted)
        self._stop = lambda: place.__dict__.pop(name)

    def _end_watch(self) -> None:
        if self._stop is not None:
            self._stop()
        self._stop, self._terms = None, {}


def _owner_of_terms(module: Any) -> tuple[Any, str] | None:
    """Return the object and the name of its method that returns a step's terms; None if there is none."""
    for place, name in ((module, "step_terms"), (getattr(module, "teaching", None), "terms")):
        if callable(getattr(place, name, None)):
            return place, name
    return None
