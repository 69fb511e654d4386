"""What all selections share: the contract, the form of a target, and checks of arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task


class Selection(nn.Module):
    """A rule that makes targets of the pseudo-labels of a step, and weights of them.

    ``PseudoLabelModule`` calls it in each training step, ``PseudoLabelRefresh`` once a round with the whole pool.

    - It is called on every process, also without rows, so that the processes can exchange values.
    - The state lies in persistent buffers, which are the same on every process. So a checkpoint holds it, and a resumed
      run equals an unbroken one. The state moves once for each batch: if gradients are accumulated, several times for
      each optimiser step.
    - The state is stored in float32 or more: an average that moves by a thousandth stands still in half precision.

    A rule of your own overrides :meth:`forward`, and :meth:`setup` if it has state.

    Attributes:
        tasks: The tasks that it is for. In the binary and the multilabel task, probabilities are those of a 1, (U, L),
            with targets 0 or 1 and weights in the same shape; nothing sums to 1. Labels of a row that are given have
            pseudo-labels, too, which do not count. In the regression task they are values of V views, (U, V, D), as
            differences to the mean of the given labels in their standard deviations; targets and weights are (U, D).
        needs_index: Whether :meth:`forward` needs the index of each row.
        needs_labeled: Whether :meth:`forward` uses the probabilities of labeled rows.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("multiclass",)
    needs_index: bool = False
    needs_labeled: bool = False

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state. Called at the start of each fit, before the weights of a checkpoint are loaded.

        Args:
            num_samples: Number of samples of the data: every index is below it. None if it is not known.
            num_classes: Number of classes C. None if it is not known.
            num_unlabeled: Number of unlabeled samples. None if it is not known.

        Raises:
            InputError: If a number is not known that the rule needs.
        """

    def forward(
        self, probabilities: Tensor, labeled_probabilities: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the targets of the unlabeled rows, and their weights; then move the state. Without gradient.

        Args:
            probabilities: Predictions for the unlabeled rows of this process, (U, C).
            labeled_probabilities: Predictions for its labeled rows, by the same network, (L, C).
            index: Samples of the unlabeled rows, (U,). None if they are not known.

        Returns:
            Targets (U, C), rows of which sum to 1, and weights (U,) from 0 (not accepted) to 1.

        Raises:
            InputError: If the rule needs something that is not there.
        """
        raise NotImplementedError

    def regularizer(self, strong_probabilities: Tensor, weight: Tensor) -> tuple[float, Tensor] | None:
        """Return the weight and the value of a further term of the objective. Default: None, for none.

        The value is a scalar with a gradient. The mean of the processes' gradients must be the gradient of all rows.

        Args:
            strong_probabilities: The student's predictions for the rows of the last :meth:`forward`, in the view that
                it learns from, (U, C).
            weight: The weights of these rows, (U,).
        """
        return None

    def take_sizes(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Give state that is not set up the sizes that it has in a checkpoint, as a test without a fit needs them."""
        for name, buffer in [*self.named_buffers()]:
            stored = state_dict.get(prefix + name)
            if stored is not None and not buffer.numel():
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, torch.empty_like(stored, device=buffer.device))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.take_sizes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Selection:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class SelectionAround(Selection):
    """A selection that changes what another one gets or returns.

    Args:
        selection: The other one.
    """

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection
        self.needs_index = selection.needs_index
        self.needs_labeled = selection.needs_labeled

    def setup(self, num_samples: int | None, num_classes: int | None, num_unlabeled: int | None = None) -> None:
        """Reset the state of both."""
        self.selection.setup(num_samples, num_classes, num_unlabeled)

    def regularizer(self, strong_probabilities: Tensor, weight: Tensor) -> tuple[float, Tensor] | None:
        """Return the term of the other selection."""
        return self.selection.regularizer(strong_probabilities, weight)


def most_probable(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the highest probability of each row (U,), its class (U,), and the class as a target (U, C)."""
    confidence, label = probabilities.max(dim=1)
    return confidence, label, F.one_hot(label, probabilities.shape[1]).to(probabilities.dtype)


def contains(selection: Selection, kind: type[Selection]) -> bool:
    """Whether a selection, or one inside it, is of a kind."""
    return any(isinstance(one, kind) for one in selection.modules())


def check_task(selection: Selection, task: Task) -> None:
    """Raise InputError unless a selection, and those inside it, are for a task."""
    for one in selection.modules():
        if isinstance(one, Selection) and task not in one.tasks:
            raise InputError(
                f"selection: {type(one).__name__} is for {_PREDICTIONS[one.tasks[0]]} (task {' or '.join(one.tasks)}), "
                f"got task: {task}; use {_SELECTIONS[task]}"
            )


_PREDICTIONS: dict[Task, str] = {
    "multiclass": "probabilities that sum to 1",
    "binary": "labels of 0 or 1",
    "multilabel": "labels of 0 or 1",
    "regression": "values of several views",
}
"""What a selection gets in each task."""
_SELECTIONS: dict[Task, str] = {
    "multiclass": "FixedThreshold",
    "binary": "LabelThresholds",
    "multilabel": "LabelThresholds",
    "regression": "UncertaintyThreshold",
}
"""A selection of each task, for a message."""


def one_line(selection: Selection) -> str:
    """Return a selection and its arguments, for a message."""
    return " ".join(repr(selection).split())


def check_share(name: str, value: float, *, to_1: bool = True) -> None:
    """Raise InputError unless a number lies in [0, 1]; or in [0, 1), if ``to_1`` is False."""
    if not 0.0 <= value <= 1.0 or (value == 1.0 and not to_1):
        raise InputError(f"{name} must lie in [0, {'1]' if to_1 else '1)'}, got {value}")


def known_classes(selection: Selection, num_classes: int | None) -> int:
    """Return the number of classes. Raise InputError if it is not known."""
    if num_classes is None:
        name = type(selection).__name__
        raise InputError(f"{name} needs the number of classes; set num_classes, or a datamodule with class_names")
    return num_classes
