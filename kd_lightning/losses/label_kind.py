"""One loss for labels that are right, another for those that may be wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_lightning.batch import LabelKind
from kd_lightning.losses.base import (
    Reduction,
    check_reducible,
    check_reduction,
    check_target,
    per_row,
    reduce_rows,
    row_fields_of,
)


class LabelKindLoss(nn.Module):
    """Send each row to the loss of its label's kind; the mean is over all rows.

    As a module's ``hard_loss`` it is told each row's :class:`~kd_lightning.batch.LabelKind`. Coarse labels have their own
    loss in every module, and do not come here.

    Args:
        noisy: Loss of rows whose label may be wrong.
        clean: Loss of the others; None: cross-entropy.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - kind: (B,) numbers of ``LabelKind``; None: all are clean.
        - index: (B,) which sample each row is, for a loss that remembers samples.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: For a loss that cannot tell its rows apart (without ``reduction``), and shapes or labels that do
            not fit.
    """

    def __init__(self, noisy: nn.Module, clean: nn.Module | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.clean = nn.CrossEntropyLoss() if clean is None else clean
        self.noisy = noisy
        for name in ("clean", "noisy"):
            check_reducible(name, getattr(self, name))
        self.reduction = reduction

    def forward(
        self, logits: Tensor, target: Tensor, kind: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_target(logits, target)
        target = target.long()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = logits.new_zeros(len(logits)) + logits[:0].sum()  # in the graph, without any row
        noisy = torch.zeros_like(target, dtype=torch.bool) if kind is None else kind == LabelKind.NOISY
        for loss, chosen in ((self.clean, ~noisy), (self.noisy, noisy)):
            if chosen.any() or "index" in row_fields_of(loss):  # all processes must come to a loss that remembers
                given = {"kind": kind, "index": index}
                told = {name: values[chosen] for name, values in given.items() if values is not None}
                rows = rows.masked_scatter(chosen, per_row(loss, logits[chosen], target[chosen], **told).to(rows))
        return reduce_rows(rows, self.reduction)


def remembers(loss: nn.Module) -> bool:
    """Whether a loss keeps something of each sample, so that it serves one network alone."""
    return any("index" in row_fields_of(part) and not isinstance(part, LabelKindLoss) for part in loss.modules())
