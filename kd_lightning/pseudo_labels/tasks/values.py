"""Pseudo-labels of the regression task: values on which the predictions of several views agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_lightning.batch import is_labeled
from kd_lightning.errors import InputError
from kd_lightning.losses.base import per_row
from kd_lightning.losses.protocols import row_fields_of
from kd_lightning.pseudo_labels.selection.base import Selection
from kd_lightning.pseudo_labels.selection.uncertainty_threshold import UncertaintyThreshold, spread_over_views
from kd_lightning.pseudo_labels.table import PoolLabels, PseudoValues
from kd_lightning.pseudo_labels.tasks.base import Select, columns
from kd_lightning.pseudo_labels.tasks.separate_labels import SeparateLabelsTask
from kd_lightning.pseudo_labels.values_ledger import write_values
from kd_lightning.pseudo_labels.values_report import spread_figure, true_values, value_figure, value_metrics

DEFAULT_VIEWS = 5
"""Number of views, as many as the passes of UCVME (Dai et al. 2023)."""


class ValuesTask(SeparateLabelsTask):
    """One value a sample, or D of them, each of which is given or not.

    Predictions are the outputs, (N, D). For a round they are those of V views of each sample, (N, V, D), of which the
    selection gets differences to the mean of the given labels in units of their standard deviation.
    """

    remedy: ClassVar[str] = "raise the limit"

    def __init__(self) -> None:
        super().__init__("regression")

    def check_online(self, owner: str) -> None:
        """Raise InputError: a step has one weak view of each sample, over which nothing varies."""
        raise InputError(
            f"{owner}: online pseudo-labels are for classes, since a batch has one weak view of a sample, and values "
            "need the spread over several; for task: regression set pseudo_labels: refreshed, and add "
            "PseudoLabelRefresh to trainer.callbacks"
        )

    def number_of_views(self, num_views: int | None) -> int:
        """Return the number of views of each sample in a round."""
        return DEFAULT_VIEWS if num_views is None else num_views

    def accept_all(self) -> Selection:
        """Return a selection that accepts each pseudo-label."""
        return UncertaintyThreshold(inf)

    def rows(self, outputs: Tensor, network: str) -> Tensor:
        """Return a network's outputs as (N, D); InputError names the network if they have another shape."""
        if outputs.ndim not in (1, 2):
            raise InputError(
                f"{network} must give values (B,) or (B, D), got {[*outputs.shape]}; dense ones need class_dim"
            )
        return columns(outputs)

    def predictions(self, outputs: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the outputs."""
        return outputs

    def confidence(self, predictions: Tensor) -> Tensor:
        """Values have no confidence."""
        raise NotImplementedError("values have a spread in place of a confidence")

    def compare(self, outputs: Tensor, target: Tensor, hard_loss: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the module's hard loss of each pseudo-label, (N, D), and the outputs."""
        if row_fields_of(hard_loss):
            fields = ", ".join(row_fields_of(hard_loss))
            name = type(hard_loss).__name__
            raise InputError(f"hard_loss: {name} needs {fields} of each row, which pseudo-labels of values do not have")
        values = per_row(hard_loss, outputs, target)
        if values.shape != outputs.shape:
            raise InputError(
                f"hard_loss: {type(hard_loss).__name__} with reduction 'none' must return one value for each output, "
                f"{[*outputs.shape]}, for pseudo-labels of values, got {[*values.shape]}"
            )
        return values, outputs

    # Rounds of the whole pool.

    def check_given(self, y: Tensor, data: Any, owner: str) -> None:
        """Raise InputError unless each output has given labels from which a standard deviation is known."""
        _mean_and_std(y, owner, getattr(data, "class_names", None))

    def check_labels(self, y: Tensor, outputs: int, data: Any, owner: str) -> None:
        """Raise InputError if the given labels are of another number than the outputs."""
        if (count := columns(y).shape[1]) != outputs:
            raise InputError(f"{owner}: samples have {count} values, but the student gives {outputs} outputs")

    def make_round(
        self,
        index: Tensor,
        y: Tensor,
        predictions: Tensor,
        select: Select,
        previous: PoolLabels | None,
        epoch: int,
    ) -> tuple[PoolLabels, Tensor]:
        """Return a round of predictions (N, V, D), and the given labels, (M,) or (M, D) with NaN where one is missing.

        Means and spreads are computed in float64.
        """
        mean, std = _mean_and_std(y, "PseudoLabelRefresh", None)
        unknown = self.unknown(y)
        if unknown.shape[1] != predictions.shape[2]:
            raise InputError(
                f"PseudoLabelRefresh: samples have {unknown.shape[1]} values, but the network gives "
                f"{predictions.shape[2]} outputs"
            )
        rows = unknown.any(dim=1)
        scaled = (predictions.double() - mean) / std
        found, asked = scaled[rows], unknown[rows]
        target, weight = select(found, scaled[~rows], index[rows])
        shape = found[:, 0].shape
        if target.shape != shape or weight.shape != shape or not ((weight == 0) | (weight == 1)).all():
            raise InputError(
                f"a selection of the regression task must return targets {[*shape]}, and weights of zeros and ones in "
                f"the same shape, got {[*target.shape]} and {[*weight.shape]}"
            )
        sample, number = asked.nonzero(as_tuple=True)
        label = (target * std + mean)[asked].to(y.dtype)
        change = torch.zeros(len(label), dtype=torch.float64)
        if previous is not None:
            change = (label.double() - previous.label.double()).abs() / std[number]
        table = PseudoValues(
            index=index[rows][sample],
            label=label,
            spread=spread_over_views(found)[asked].float(),
            weight=weight[asked].float(),
            change=change.float(),
            round=0 if previous is None else previous.round + 1,
            epoch=epoch,
            output=number if y.ndim > 1 else None,
        )
        return table, y[~unknown.all(dim=1)]

    def write(
        self,
        folder: Path,
        table: Any,
        names: Sequence[str] | None,
        path_of: Callable[[int], str | None],
        content_of: Callable[[int], str],
    ) -> None:
        """Write a round to the ledger."""
        write_values(folder, table, names, path_of, content_of)

    def metrics(self, table: Any, given: Tensor, truth_of: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """Return the metrics of a round, see :func:`~kd_lightning.pseudo_labels.values_report.value_metrics`."""
        return value_metrics(table, given, None if truth_of is None else true_values(table, truth_of))

    def figures(self, table: Any, given: Tensor, selection: Selection) -> dict[str, Callable[[], Figure]]:
        """Return functions that draw the figures of a round, by name."""
        limit = getattr(selection, "limit", None)
        return {"spread": lambda: spread_figure(table, limit), "values": lambda: value_figure(table, given)}

    def nearest(self, table: Any) -> str:
        """Return the pseudo-label that is nearest to being accepted, for a message."""
        return f"the lowest spread is {table.spread.min():.3g}"


def _mean_and_std(y: Tensor, owner: str, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
    """Return mean and sample standard deviation (D,) of the given labels of each output, in float64."""
    if not y.is_floating_point():
        raise InputError(f"{owner}: pseudo-labels of task: regression are floats, but the labels are {y.dtype}")
    stds, means = [], []
    for number, column in enumerate(columns(y).double().T):
        given = column[is_labeled(column)]
        name = "" if y.ndim == 1 else f" {names[number]!r}" if names and number < len(names) else f" {number}"
        if given.isinf().any():
            raise InputError(f"{owner}: labels must be finite, or NaN where missing, got {given[given.isinf()][0]:g}")
        if not len(given) or (given == given[0]).all():
            what = "no given label" if not len(given) else f"the label {given[0]:g} alone"
            raise InputError(
                f"{owner}: output{name} has {what}, so its standard deviation, in which spreads are measured, is not "
                "known; label samples of different values"
            )
        means.append(given.mean())
        stds.append(given.std())
    return torch.stack(means), torch.stack(stds)
