"""Names of the terms of an objective, which are those of charts."""

from __future__ import annotations

from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.runs.metric_direction import direction_of

_TAKEN = {  # terms and metrics of the modules
    *("accuracy", "agreement", "balanced_accuracy", "calibration_error", "disagreement", "f1", "hard", "hint", "loss"),
    *("knn_accuracy", "loss_step", "mae", "mean_iou", "neighbor_agreement", "probe_accuracy", "r2", "rankme", "rmse"),
    *("soft", "stage"),
}
_TAKEN_STARTS = ("auxiliary_", "recall_", "teacher_")


def check_name(key: str, name: str) -> None:
    """Raise InputError unless a term's name can be that of a chart, and of no other one.

    Args:
        key: Key of the terms in the message.
        name: Name of the term.
    """
    is_word = isinstance(name, str) and name.isidentifier()
    if not is_word or name in _TAKEN or name.startswith(_TAKEN_STARTS) or hasattr(nn.ModuleDict(), name):
        raise InputError(f"{key}: a term's name must be a word that no other term or metric has, got {name!r}")
    if direction_of(f"val/{name}") == "max":  # a checkpoint that follows it would be the worst one
        raise InputError(f"{key}: {name!r} reads as a metric of which more is better; give the term another name")
