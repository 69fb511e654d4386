"""Similarities to a queue of the teacher's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_temperature, kl_divergence
from kd_lightning.losses.features.base import pair_features, unit_vectors
from kd_lightning.losses.products import products
from kd_lightning.ranks import gather_rows

_SIZE = 8192


class QueueSimilarityLoss(nn.Module):
    r"""Compare the student's and the teacher's similarities to the teacher's features of many earlier samples.

    .. math:: \operatorname{KL}\left(p^t \,\Vert\, p^s\right), \qquad
              p = \operatorname{softmax}_k \frac{\langle f, q_k \rangle}{\lVert f \rVert \tau}

    averaged over the samples. The queue q holds the teacher's features of the last ``size`` training samples, scaled to
    length 1, those of the current batch included. It needs no labels, and no large batches.

    While it trains, the queue takes in the features of all processes in the order of their ranks, so that all have the
    same queue. It is part of ``state_dict``. In eval mode it stays as it is, and each sample's own teacher feature is
    one more entry, so that values in validation depend on no other validation sample; before the first training step
    they are 0.

    Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation" (ICLR 2021),
    https://arxiv.org/abs/2101.04731, with a queue of 65,536, and temperatures of 0.01 (teacher) and 0.2
    (student); similarly Tejankar et al., "ISD" (2020), https://arxiv.org/abs/2012.09259. The defaults here are one
    temperature of 0.07, and a queue of 8192 for large data. The usual weight is 1.

    Args:
        size: Length of the queue, at least 1, and at most the number of samples: longer ones hold old views of the same
            samples. Default: None, which means 8192, but at most half of the samples.
        temperature: tau, above 0.

    Shape:
        - student_feature, teacher_feature: (B, C). Half precision is computed in float32.
        - output: scalar.

    Raises:
        InputError: If an argument is out of range, features are no vectors of one shape, or ``build`` has not run.

    >>> loss = QueueSimilarityLoss(size=2)
    >>> loss.build((2,), (2,), samples=None)
    >>> loss(torch.eye(2), torch.eye(2))
    tensor(0.)
    """

    needs_projector: ClassVar[bool] = True
    trains_only: ClassVar[bool] = False

    queue: Tensor
    count: Tensor

    def __init__(self, size: int | None = None, temperature: float = 0.07) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise InputError(f"size must be at least 1, got {size}")
        check_temperature(temperature)
        self.size = size
        self.temperature = float(temperature)

    def build(self, student: Sequence[int], teacher: Sequence[int], samples: int | None) -> None:
        """Make the queue, see :class:`~kd_lightning.losses.protocols.FeatureLoss`.

        Raises:
            InputError: If the teacher's feature is no vector, or the queue is longer than the data.
        """
        if len(teacher) != 1:
            raise InputError(f"QueueSimilarityLoss compares vectors (C,), got {[*teacher]} of one sample; set pool")
        if self.size is not None and samples is not None and self.size > samples:
            raise InputError(f"size must be at most the number of samples, {samples}, got {self.size}")
        size = _SIZE if samples is None else max(1, min(_SIZE, samples // 2))
        self.register_buffer("queue", torch.zeros(self.size or size, teacher[0]))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # of all features that came in

    def reset(self, samples: int | None) -> None:
        """Empty the queue. Called at the start of each further fit.

        Args:
            samples: Number of samples of the data. The queue has as many places as before.
        """
        self.queue.zero_()
        self.count.zero_()

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        if not hasattr(self, "queue"):
            raise InputError(
                "QueueSimilarityLoss is not built; call build(student_shape, teacher_shape, samples) first"
            )
        student, teacher = pair_features(student_feature, teacher_feature)
        if student.shape[1:] != self.queue.shape[1:]:
            raise InputError(
                f"QueueSimilarityLoss compares vectors (B, {self.queue.shape[1]}), got {[*student.shape]}; set pool"
            )
        student, teacher = unit_vectors(student, dim=1), unit_vectors(teacher, dim=1)
        if self.training:
            self._store(teacher[:0] if batch is not None and batch.is_padding else teacher)
        logs = [self._log_similarities(feature, teacher) for feature in (student, teacher)]
        return kl_divergence(*logs).sum() / max(len(student), 1)

    def _log_similarities(self, feature: Tensor, own: Tensor) -> Tensor:
        """Return the logarithms of p, (B, K), of features of length 1.

        Args:
            feature: (B, C).
            own: The teacher's features of the same samples, (B, C).
        """
        similarities = products(feature, self.queue.to(feature.dtype))
        filled = torch.arange(len(self.queue), device=self.count.device) < self.count
        similarities = similarities.masked_fill(~filled, -1e9)
        if not self.training:
            similarities = torch.cat([similarities, (feature * own).sum(dim=1, keepdim=True)], dim=1)
        return (similarities / self.temperature).log_softmax(dim=1)

    @torch.no_grad()
    def _store(self, features: Tensor) -> None:
        """Replace the oldest features by those (B, C) of all processes."""
        features = gather_rows(features)
        numbers = self.count + torch.arange(len(features), device=self.count.device)
        self.count += len(features)
        size = len(self.queue)
        self.queue[numbers[-size:] % size] = features[-size:].to(self.queue.dtype)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"size={self.size}, temperature={self.temperature}"
