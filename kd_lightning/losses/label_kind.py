"""One loss for labels that are right, and another for labels that may be wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.batch import LabelKind
from kd_lightning.losses.base import (
    Reduction,
    at_least_float32,
    check_reducible,
    check_reduction,
    check_target,
    per_row,
    reduce_rows,
)
from kd_lightning.losses.protocols import RowField, check_row_fields, is_stateful, row_fields_of


class LabelKindLoss(nn.Module):
    r"""Send each row to the loss for its kind of label.

    .. math:: \frac{1}{B} \sum_i \ell_{k_i}(z_i, y_i)

    where :math:`\ell_k` is ``noisy`` for rows of kind ``LabelKind.NOISY``, and ``clean`` for all other kinds. As the
    ``hard_loss`` of a module it gets each row's :class:`~kd_lightning.batch.LabelKind` from the batch. It never gets
    coarse labels: every module uses :func:`~kd_lightning.losses.coarse.coarse_rows` for them. Class weights of an inner
    loss multiply its rows; the mean is over the number of rows.

    Args:
        noisy: Loss of rows whose label may be wrong.
        clean: Loss of the other rows. Default: None, which means cross-entropy.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - kind: (B,) numbers of ``LabelKind``. If None, all rows are clean.
        - index: (B,) the sample of each row, for an inner loss that takes it.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an inner loss has no ``reduction``, or does not declare the row fields that it takes; if shapes
            or labels do not fit.
    """

    def __init__(self, noisy: nn.Module, clean: nn.Module | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.clean = nn.CrossEntropyLoss() if clean is None else clean
        self.noisy = noisy
        for name in ("clean", "noisy"):
            check_reducible(name, getattr(self, name))
            check_row_fields(name, getattr(self, name))
        self.reduction = reduction

    @property
    def row_fields(self) -> tuple[RowField, ...]:
        """``kind``, and ``index`` if one of the two losses takes it."""
        index = "index" in row_fields_of(self.clean) or "index" in row_fields_of(self.noisy)
        return ("kind", "index") if index else ("kind",)

    def forward(
        self, logits: Tensor, target: Tensor, kind: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_target(logits, target)
        target = target.long()
        logits = at_least_float32(logits)
        values = logits.new_zeros(len(logits)) + logits[:0].sum()  # in the graph, also without any row
        noisy = torch.zeros_like(target, dtype=torch.bool) if kind is None else kind == LabelKind.NOISY
        for loss, rows in ((self.clean, ~noisy), (self.noisy, noisy)):
            if rows.any() or is_stateful(loss):  # a stateful loss runs on every process, also without rows
                given = {"kind": kind, "index": index}
                fields = {name: field[rows] for name, field in given.items() if field is not None}
                values = values.masked_scatter(rows, per_row(loss, logits[rows], target[rows], **fields).to(values))
        return reduce_rows(values, self.reduction)
