"""Forward correction: learning through the way in which labels go wrong."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import Reduction, check_reduction, check_transition, log_probabilities, reduce_rows


class ForwardCorrectionLoss(nn.Module):
    r"""Cross-entropy of the *observed* label, predicted from the true class by a transition matrix.

    .. math:: -\log \sum_i p_i T_{i \tilde y}, \qquad T_{ij} = P(\tilde y = j \mid y = i)

    Its minimum is the classifier of the true labels, if T is right. With the identity it is cross-entropy.

    Source: Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach" (2017).

    Args:
        matrix: T, C rows that each sum to 1; or a CSV file of it, as ``python -m kd_lightning clean`` leaves one.
            :func:`estimate_transition` guesses it.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - logits: (B, C). Half precision is computed in float32.
        - target: (B,) class indices.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: A matrix that is none, or of other classes than the logits; shapes or labels that do not fit, or a
            label that no class becomes.

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
        # no buffer, which would be rounded with a network in bfloat16; float32, since some devices have no float64
        self.matrix = checked.float()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss; see the class for shapes."""
        log_p = log_probabilities(logits, target)
        if len(self.matrix) != log_p.shape[1]:
            raise InputError(f"matrix is of {len(self.matrix)} classes, but there are {log_p.shape[1]} logits")
        self.matrix = self.matrix.to(log_p.device)
        # elsewhere than on the CPU to look would be to wait for the device
        if target.device.type == "cpu" and (never := (self.matrix.sum(dim=0) == 0)[target.long()]).any():
            raise InputError(f"matrix: no class becomes {int(target[never][0])} by it, but that is a label")
        # where a class never becomes the label, a finite number: the gradient of -inf is not-a-number
        log_t = self.matrix.to(log_p.dtype).log().clamp_min(-1e30)
        rows = -(log_p + log_t.index_select(1, target.long()).t()).logsumexp(dim=1)
        return reduce_rows(rows, self.reduction)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"classes={len(self.matrix)}, reduction={self.reduction!r}"


def estimate_transition(probabilities: Tensor, quantile: float = 0.97) -> Tensor:
    """Guess a transition matrix from anchor points: samples that are almost surely of a class (Patrini et al. 2017).

    Of class i it is the sample with the largest probability of i, or, since that may be an outlier, the one at a
    quantile; what else is predicted there is how its label goes wrong.

    Args:
        probabilities: (N, C), of a network that was trained on the noisy labels, for samples that it has not seen.
        quantile: In (0, 1]; 1 for the largest.

    Returns:
        T, (C, C); each row sums to 1.

    Raises:
        InputError: For no samples, what are no probabilities, and a quantile out of range.
    """
    if probabilities.ndim != 2 or not len(probabilities):
        raise InputError(f"probabilities must be (N, C) of at least one sample, got {[*probabilities.shape]}")
    if not (probabilities >= 0).all() or not probabilities.sum(dim=1).isfinite().all():
        raise InputError("probabilities must be finite and at least 0")
    if not 0.0 < quantile <= 1.0:
        raise InputError(f"quantile must lie in (0, 1], got {quantile}")
    count = len(probabilities)
    place = min(count - 1, round(quantile * (count - 1)))
    anchors = probabilities.argsort(dim=0, stable=True)[place]
    matrix = probabilities[anchors].double()
    return matrix / matrix.sum(dim=1, keepdim=True)


def read_transition(path: Path) -> list[list[float]]:
    """Read a matrix from a CSV file without a header.

    Raises:
        InputError: If it is missing, or holds no numbers; the message names the row, from 0 on.
    """
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet may begin it with a mark
            rows.extend([float(cell) for cell in row] for row in csv.reader(file) if row)
    except OSError as error:
        raise InputError(f"matrix: {path} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"matrix: {path}, row {len(rows)}: {error}") from error
    return rows


def write_transition(path: Path, matrix: Sequence[Sequence[float]]) -> None:
    """Write a matrix as a CSV file that :class:`ForwardCorrectionLoss` takes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(matrix)
