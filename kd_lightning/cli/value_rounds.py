"""Tables of a run's pseudo-labels that are values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kd_lightning.pseudo_labels.values_ledger import ValueRound


def value_tables(rounds: Sequence[ValueRound], shown: ValueRound) -> list[Table]:
    """Return a table with a row for each round, and one of a round with a row for each output.

    Spreads are medians, changes roots of mean squares, both in standard deviations of the given labels.
    """
    names = ("round", "epoch", "samples", "accepted", "change", "spread", "of accepted")
    first = _table("Pseudo-labels", *names)
    for one in rounds:
        change = f"{one.change.square().mean().sqrt():.3f}" if one.number else "-"  # the first has no round before it
        row = (one.number, one.epoch, one.samples, _share(one.accepted), change, _median(one.spread))
        first.add_row(*map(str, row), _median(one.spread[one.accepted]))
    second = _table(f"Accepted values of round {shown.number}", "output", "accepted", "spread", "least", "mean", "most")
    for name in dict.fromkeys(shown.output):
        rows = torch.tensor([output == name for output in shown.output])
        taken = shown.value[rows & shown.accepted]
        ends = [f"{value:.4g}" for value in (taken.min(), taken.mean(), taken.max())] if len(taken) else ["-"] * 3
        second.add_row(escape(name), _share(shown.accepted[rows]), _median(shown.spread[rows]), *ends)
    return [first, second]


def _share(accepted: Tensor) -> str:
    return f"{int(accepted.sum())} ({100 * accepted.double().mean():.1f} %)"


def _median(values: Tensor) -> str:
    return f"{values.median():.3f}" if len(values) else "-"


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in columns:
        view.add_column(name, justify="left" if name == "output" else "right", overflow="fold")
    return view
