"""What pseudo-labels are in each task: one kind a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.tasks.base import PseudoLabelTask
from kd_lightning.pseudo_labels.tasks.binary_labels import BinaryLabelsTask
from kd_lightning.pseudo_labels.tasks.multiclass import MulticlassTask
from kd_lightning.pseudo_labels.tasks.values import ValuesTask

__all__ = ["BinaryLabelsTask", "MulticlassTask", "PseudoLabelTask", "ValuesTask", "pseudo_label_task"]


def pseudo_label_task(name: str, owner: str) -> PseudoLabelTask:
    """Return what pseudo-labels are in a task.

    Args:
        name: The task.
        owner: Name of the caller, for the message.

    Raises:
        InputError: If the task has no pseudo-labels.
    """
    tasks: dict[str, Callable[[], PseudoLabelTask]] = {
        "multiclass": MulticlassTask,
        "binary": partial(BinaryLabelsTask, "binary"),
        "multilabel": partial(BinaryLabelsTask, "multilabel"),
        "regression": ValuesTask,
    }
    if name not in tasks:
        raise InputError(f"{owner}: task must be {', '.join([*tasks][:-1])} or {[*tasks][-1]}, got {name!r}")
    return tasks[name]()
