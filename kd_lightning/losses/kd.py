"""Knowledge distillation with soft targets (KD)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.losses.base import (
    Reduction,
    Task,
    check_reduction,
    check_task,
    check_temperature,
    kl_terms,
    pair_logits,
    standardize_logits,
)


class KDLoss(nn.Module):
    r"""KL divergence from the teacher's softened probabilities to the student's, times T².

    Multiclass, summed over classes and averaged over the batch, in nats:

    .. math:: T^2 \, \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    Binary and multilabel: the same between Bernoulli distributions of probability sigmoid(z / T), averaged over the
    logits of a row, then over the batch. The gradient of the KL divergence shrinks as 1/T². The factor T² makes up for
    it, so T does not change the balance with the hard loss.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015),
    https://arxiv.org/abs/1503.02531. ``standardize``: Sun et al., "Logit Standardization in Knowledge Distillation"
    (2024), https://arxiv.org/abs/2403.01427.

    Args:
        temperature: T, finite and above 0. Every call reads it, so a callback may anneal it.
        task: "multiclass", "multilabel" or "binary".
        standardize: Replace both sides' logits by (z - mean) / (1e-7 + std) per sample; multiclass only. The student
            then learns the relations between the teacher's logits, not their range. Constant logits are only centred.
        reduction: "mean" (a scalar) or "none" (one value per row).

    Shape:
        - student_logits, teacher_logits: (B, C) for multiclass, C >= 2; (B, L) for multilabel; (B,) or (B, 1) for
          binary, where the two may differ. Half precision is computed in float32.
        - target: ignored.
        - output: scalar, or (B,) for reduction "none".

    Raises:
        InputError: If an argument is out of range, or the logits' shapes differ or do not fit the task.

    Example:
        >>> import torch
        >>> loss = KDLoss(temperature=2.0)
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, -2.0]])
        >>> round(loss(student, teacher).item(), 3)
        1.311
        >>> loss(teacher, teacher)
        tensor(0.)
    """

    def __init__(
        self,
        temperature: float = 4.0,
        task: Task = "multiclass",
        standardize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_task(task)
        check_reduction(reduction)
        if standardize and task != "multiclass":
            raise InputError(f"standardize must be False unless task is 'multiclass', got task {task!r}")
        self.temperature = float(temperature)
        self.task = task
        self.standardize = standardize
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; see the class for shapes."""
        check_temperature(self.temperature)
        student, teacher = pair_logits(student_logits, teacher_logits, self.task)
        if self.standardize:
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        parts = kl_terms(*(soften(logits, self.temperature, self.task) for logits in (student, teacher)))
        outputs = 1 if self.task == "multiclass" else max(student.shape[1], 1)  # each with a distribution of its own
        if self.reduction == "none":
            return parts.flatten(1).sum(dim=1) * (self.temperature**2 / outputs)
        return parts.sum() * (self.temperature**2 / max(len(parts) * outputs, 1))

    @property
    def supports_top_k(self) -> bool:
        """Whether top k logits are enough: yes for multiclass, unless all logits must be standardized."""
        return self.task == "multiclass" and not self.standardize

    def extra_repr(self) -> str:
        """Show the arguments in ``print(loss)``."""
        return (
            f"temperature={self.temperature}, task={self.task!r}, "
            f"standardize={self.standardize}, reduction={self.reduction!r}"
        )


def soften(logits: Tensor, temperature: float, task: Task) -> Tensor:
    """Return log-probabilities of logits / T: (B, C) for multiclass, else (B, L, 2) for label present and absent."""
    softened = logits / temperature
    if task == "multiclass":
        return F.log_softmax(softened, dim=-1)
    return torch.stack([F.logsigmoid(softened), F.logsigmoid(-softened)], dim=-1)
