"""Similarities between the positions of one sample."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_temperature, kl_divergence
from kd_lightning.losses.features.base import (
    counted_positions,
    mean_of_positions,
    pair_rows,
    unit_vectors,
    without_padding,
)
from kd_lightning.losses.products import products

_MODES = {2: "bilinear", 3: "trilinear"}


class TokenSimilarityLoss(nn.Module):
    r"""Compare how similar the positions of a sample are to one another, in the student and in the teacher.

    .. math:: \frac{1}{N} \sum_i \operatorname{KL}\left(p^t_i \,\Vert\, p^s_i\right), \qquad
              p_i = \operatorname{softmax}_j \frac{\langle f_i, f_j \rangle}{\tau \lVert f_i \rVert \lVert f_j \rVert}

    for the features f at N tokens or positions of a map, averaged over the samples. Student and teacher may have other
    numbers of channels. If both are maps of other sizes, the student's is resized to the teacher's by linear
    interpolation. Positions that do not count are left out.

    Sources: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation" (2020),
    https://arxiv.org/abs/2012.15828, compares such relations of tokens by KL, there of queries, keys and values;
    cosines over a temperature are those of contrastive losses. The usual weight is 1, beside a term of pooled features
    such as :class:`QueueSimilarityLoss`.

    The matrices have N x N entries for each sample: a map of 56 x 56 has 10 million.

    Args:
        temperature: tau, above 0.

    Shape:
        - student_feature: (B, C, N), or a map (B, C, ...).
        - teacher_feature: (B, D, ...), with as many sides; tokens must agree in number. Half precision is computed in
          float32.
        - output: scalar.

    Raises:
        InputError: If the temperature is not above 0, or the shapes do not fit.

    >>> import torch
    >>> tokens = torch.randn(2, 8, 5)
    >>> TokenSimilarityLoss()(3 * tokens, tokens).abs() < 1e-6
    tensor(True)
    """

    needs_projector: ClassVar[bool] = False

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = float(temperature)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = (without_padding(f, batch) for f in pair_rows(student_feature, teacher_feature))
        size = teacher.shape[2:]
        if not size or student.ndim != teacher.ndim or (student.shape[2:] != size and len(size) not in _MODES):
            raise InputError(
                "token similarities compare tokens (B, C, N) of one number, or maps of as many sides, got "
                f"{[*student.shape]} and {[*teacher.shape]}"
            )
        if student.shape[2:] != size:
            student = F.interpolate(student, size, mode=_MODES[len(size)])
        counted = counted_positions(teacher, batch)
        student_log, teacher_log = (self._log_similarities(feature, counted) for feature in (student, teacher))
        return mean_of_positions(kl_divergence(student_log, teacher_log), counted)

    def _log_similarities(self, feature: Tensor, counted: Tensor | None) -> Tensor:
        """Return the logarithms of p, (B, N, N), of features (B, C, ...)."""
        similarities = products(unit_vectors(feature.flatten(2), dim=1).transpose(1, 2)) / self.temperature
        if counted is not None:
            similarities = similarities.masked_fill(~counted.unsqueeze(1), -1e9)  # -inf has no gradient in a full row
        return similarities.log_softmax(dim=2)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"temperature={self.temperature}"
