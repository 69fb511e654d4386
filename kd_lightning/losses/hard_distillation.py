"""Hard-label distillation: the teacher's decision as the target."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.losses.base import Reduction, Task, check_reduction, check_task, pair_logits, reduce_rows


class HardDistillationLoss(nn.Module):
    r"""Cross-entropy with the teacher's most likely class as the label.

    Multiclass, with p = softmax(z):

    .. math:: -\log p^s_{y_t}, \qquad y_t = \mathrm{argmax}_k \, z^t_k

    in nats, averaged over the batch. Binary and multilabel: the binary cross-entropy of each logit, where a label is
    present if the teacher's probability is above 1/2, averaged over the logits of a row. There is no temperature.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021),
    https://arxiv.org/abs/2012.12877, equation 3. It adds this loss to the cross-entropy of the label, each with weight
    1/2: a soft_weight of 0.5.

    In an ensemble, the label is the decision of the teachers' average probabilities.

    Args:
        task: "multiclass", "multilabel" or "binary".
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C) for multiclass, C >= 2; (B, L) for multilabel; (B,) or (B, 1) for
          binary, where the two may differ. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is unknown, or the logits' shapes differ or do not fit the task.

    Example:
        >>> import torch
        >>> loss = HardDistillationLoss()
        >>> round(loss(torch.zeros(1, 2), torch.tensor([[0.1, -0.1]])).item(), 3)  # log 2
        0.693
    """

    temperature: ClassVar[float] = 1.0
    standardize: ClassVar[bool] = False

    def __init__(self, task: Task = "multiclass", reduction: Reduction = "mean") -> None:
        super().__init__()
        check_task(task)
        check_reduction(reduction)
        self.task = task
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        if self.task == "multiclass":
            rows = F.cross_entropy(student, teacher.argmax(dim=1), reduction="none")
        else:
            present = (teacher > 0).to(student.dtype)
            rows = F.binary_cross_entropy_with_logits(student, present, reduction="none").mean(dim=1)
        return reduce_rows(rows, self.reduction)

    @property
    def supports_top_k(self) -> bool:
        """Whether top k logits are enough: yes for multiclass, where the most likely class is among them."""
        return self.task == "multiclass"

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return f"task={self.task!r}, reduction={self.reduction!r}"
