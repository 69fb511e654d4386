"""Forward correction: a loss for labels with known noise, and the transition matrix of the noise."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, check_reduction, check_transition, log_probabilities, reduce_rows


class ForwardCorrectionLoss(nn.Module):
    r"""Cross-entropy of the observed label, whose probability follows from the true class by a transition matrix.

    .. math:: -\log \sum_i p_i T_{i \tilde y}, \qquad T_{ij} = P(\tilde y = j \mid y = i)

    If T is right, the classifier of the true labels minimises the loss. If T is the identity, it is cross-entropy.

    Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (2017),
    https://arxiv.org/abs/1609.03683.

    Args:
        matrix: T, C rows that each sum to 1, or a path to a CSV file of it. :func:`estimate_transition` estimates T,
            and ``python -m kd_lightning clean`` writes such a file.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If the matrix is not a transition matrix, or has another number of classes than the logits; if
            shapes or labels do not fit; if the probability of a label is 0 for every true class.

    >>> import torch
    >>> loss = ForwardCorrectionLoss([[0.5, 0.5], [0.0, 1.0]])
    >>> round(loss(torch.tensor([0.5, 0.5]).log().unsqueeze(0), torch.tensor([0])).exp().item(), 3)
    4.0
    """

    def __init__(self, matrix: list[list[float]] | str | Path, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        if isinstance(matrix, str | Path):
            checked = check_transition(read_transition(Path(matrix)), f"matrix {matrix}")
        else:
            checked = check_transition(matrix)
        # No buffer: it would be rounded with a network in bfloat16. float32, since some devices have no float64.
        self.matrix = checked.float()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = log_probabilities(logits, target)
        if len(self.matrix) != log_p.shape[1]:
            raise InputError(f"matrix must have {log_p.shape[1]} classes, as the logits, got {len(self.matrix)}")
        self.matrix = self.matrix.to(log_p.device)
        columns = self.matrix.index_select(1, target.long())  # (C, B): no (C, C) matrix is computed in a step
        # Only on the CPU: on other devices the check would synchronise.
        if target.device.type == "cpu" and (never := columns.sum(dim=0) == 0).any():
            raise InputError(f"matrix: column {int(target[never][0])} is all 0, but a label has this class")
        # A finite number in place of log 0, since the gradient at -inf is NaN.
        log_t = columns.to(log_p.dtype).log().clamp_min(-1e30)
        rows = -(log_p + log_t.t()).logsumexp(dim=1)
        return reduce_rows(rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"classes={len(self.matrix)}, reduction={self.reduction!r}"


def estimate_transition(probabilities: Tensor, quantile: float = 0.97) -> Tensor:
    """Estimate a transition matrix from anchor points: samples that almost surely belong to a class.

    The anchor point of class i is the sample at a quantile of the probabilities of i. Its predicted probabilities are
    row i of T. The sample with the largest probability may be an outlier, so the default quantile is below 1.

    Source: Patrini et al. (2017), see :class:`ForwardCorrectionLoss`.

    Args:
        probabilities: (N, C), from a network that was trained on noisy labels, for samples outside its training set.
        quantile: In (0, 1]. 1 takes the sample with the largest probability.

    Returns:
        T, (C, C); each row sums to 1.

    Raises:
        InputError: If there are no samples, a value is no probability, or the quantile is out of range.
    """
    if probabilities.ndim != 2 or not len(probabilities):
        raise InputError(f"probabilities must be (N, C) of at least one sample, got {[*probabilities.shape]}")
    if not (probabilities >= 0).all() or not probabilities.sum(dim=1).isfinite().all():
        raise InputError("probabilities must be finite and at least 0")
    if not 0.0 < quantile <= 1.0:
        raise InputError(f"quantile must lie in (0, 1], got {quantile}")
    count = len(probabilities)
    position = min(count - 1, round(quantile * (count - 1)))
    anchors = probabilities.argsort(dim=0, stable=True)[position]
    matrix = probabilities[anchors].double()
    return matrix / matrix.sum(dim=1, keepdim=True)


def read_transition(path: Path) -> list[list[float]]:
    """Read a matrix from a CSV file without a header.

    Raises:
        InputError: If the file cannot be read or an entry is no number; the message has the row, counted from 0.
    """
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            rows.extend([float(cell) for cell in row] for row in csv.reader(file) if row)
    except OSError as error:
        raise InputError(f"matrix: {path} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"matrix: {path}, row {len(rows)}: {error}") from error
    return rows


def write_transition(path: Path, matrix: Sequence[Sequence[float]]) -> None:
    """Write a matrix to a CSV file that :class:`ForwardCorrectionLoss` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(matrix)
