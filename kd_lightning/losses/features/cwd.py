"""Channel-wise distillation (CWD)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.losses.base import check_temperature, kl_divergence
from kd_lightning.losses.features.base import pair_positions


class ChannelWiseLoss(nn.Module):
    r"""The KL divergence between the student's and the teacher's distributions of each channel over the positions.

    .. math:: \frac{T^2}{C} \sum_{c,i} p^t_{c,i} \log \frac{p^t_{c,i}}{p^s_{c,i}}, \qquad
              p_{c,i} = \frac{\exp(a_{c,i} / T)}{\sum_{i'} \exp(a_{c,i'} / T)}

    for features a of C channels at positions i that count, averaged over the samples. The loss compares where in a
    sample a channel is active. It is in nats, and ignores a constant that is added to a channel. It is meant for dense
    tasks: for features, and for the logits of each position.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV 2021),
    https://arxiv.org/abs/2011.13256. The authors use T = 4, and the weight 50 for features and 3 for
    logits.

    Args:
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.

    Shape:
        - student_feature, teacher_feature: (B, C, ...), the same shape, with 2 positions at least. Half precision is
          computed in float32.
        - output: scalar.

    Raises:
        InputError: If the temperature is out of range, or the shapes do not fit.

    >>> import torch
    >>> loss = ChannelWiseLoss(temperature=1.0)
    >>> loss(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
    tensor(0.3278)
    """

    needs_projector: ClassVar[bool] = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = float(temperature)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher, counted = pair_positions(student_feature, teacher_feature, batch)
        if student.shape[2] < 2:
            raise InputError(f"channel-wise distributions need 2 positions or more, got {[*student_feature.shape]}")
        student, teacher = student / self.temperature, teacher / self.temperature
        if counted is not None:
            # Not minus infinity, which gives NaN where no position of a sample counts.
            student, teacher = (logits.masked_fill(~counted.unsqueeze(1), -1e9) for logits in (student, teacher))
        channels = kl_divergence(student.log_softmax(dim=2), teacher.log_softmax(dim=2))
        return self.temperature**2 * channels.sum() / max(channels.numel(), 1)

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"temperature={self.temperature}"
