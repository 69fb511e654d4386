"""How a module reads its batches and calls its student, for what runs the student without a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.data.batch_transfer import HOOKS, own_hooks, read_by
from kd_lightning.features.outputs import Output, pick_logits
from kd_lightning.inputs import Inputs, call
from kd_lightning.modules.supervised import SupervisedModule
from kd_lightning.runs.class_paths import find_class
from kd_lightning.runs.run import Run
from kd_lightning.runs.student import batch_of_student, build_module, is_taught

_SEAMS = ("unpack", "call", *HOOKS)


class Seams(NamedTuple):
    """How a module reads a batch that is loaded, calls its student with inputs, and what its outputs mean.

    Attributes:
        unpack: From a loaded batch to a Batch with the student's inputs.
        call: From the student and inputs to the student's output.
        task: The task.
        output: What picks the logits out of an output, see :class:`~kd_lightning.teach`.
        hooks: The module's own hooks of batch transfer, by name.
    """

    unpack: Callable[[Any], Batch] = Batch.from_any
    call: Callable[[nn.Module, Inputs], Any] = call
    task: str = "multiclass"
    output: Output | None = None
    hooks: Mapping[str, Callable[..., Any]] = {}

    @classmethod
    def of(cls, module: LightningModule) -> Seams:
        """Return those of a module.

        A module that is taught gives its student what its validation step calls it with, or without such a step its
        training step.
        """
        hooks, teaching = own_hooks(module), getattr(module, "teaching", None)
        if isinstance(teaching, nn.Module):
            output = getattr(teaching, "output", None)
            return cls(partial(batch_of_student, module), task=_task_of(module), output=output, hooks=hooks)
        return cls(partial(batch_of_student, module), getattr(module, "call", call), _task_of(module), hooks=hooks)

    @classmethod
    def of_run(cls, run: Run, device: torch.device | str = "cpu") -> Seams:
        """Return those of a run's module, which is built with new weights unless its class shows that it needs none."""
        model = run.config["model"]
        if has_plain_class(model):
            parameters = inspect.signature(find_class(model["class_path"])).parameters
            arguments, parameter = model.get("init_args") or {}, parameters.get("task")
            if "task" in arguments or parameter is not None:
                return cls(task=arguments.get("task") or str(getattr(parameter, "default", "multiclass")))
        return cls.of(build_module(model).to(device).eval())

    @property
    def is_plain(self) -> bool:
        """Whether the student gets what a batch holds, as it is."""
        return self == Seams(task=self.task)

    def read(self, data: Any) -> Any:
        """Return a datamodule, or a module with its own loaders, whose batches are read as the module reads them."""
        return read_by(data, self.hooks, self.unpack)

    def logits(self, student: nn.Module, x: Inputs) -> Tensor:
        """Call the student, and return its logits.

        Raises:
            InputError: If its output has none.
        """
        return pick_logits(self.call(student, x), self.output, "the student")


def has_plain_class(model: Mapping[str, Any]) -> bool:
    """Return whether the class of a module's config shows that its student gets what a batch holds, as it is."""
    kind = find_class(model["class_path"])
    own = [name for name in _SEAMS if getattr(kind, name, None) != getattr(SupervisedModule, name)]
    return isinstance(kind, type) and not own and not is_taught(model)


def _task_of(module: LightningModule) -> str:
    """Return the task of a module; of one that is taught and has none that of its soft loss, else multiclass."""
    for owner in (module, getattr(getattr(module, "teaching", None), "soft_loss", None)):
        if isinstance(task := getattr(owner, "task", None), str):
            return task
    return "multiclass"
