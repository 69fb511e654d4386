"""Distillation through attention: a student with two heads (DeiT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import auxiliary_logits_of
from kd_lightning.inputs import Inputs, describe
from kd_lightning.losses import HardDistillationLoss
from kd_lightning.modules._shared.soft_loss import make_soft_loss
from kd_lightning.modules.distill import DistillModule


class DistillationTokenModule(DistillModule):
    """Train a student with two heads: one on the labels, the other on the teacher (DeiT, Touvron et al. 2021).

    A vision transformer has a distillation token beside its class token, and a head on each. The class head alone
    learns from the hard term, the distillation head alone from the soft terms:
    ``(1 - soft_weight) * hard(class head) + soft_weight * soft(distillation head)``. In evaluation, in predictions and
    in exported files the student returns the mean of both heads' logits.

    The student may be any network that returns the two logits ``(class, distillation)`` in training mode, and their
    mean in eval mode. timm's distilled models do so: ``deit_tiny_distilled_patch16_224`` and others, and
    ``VisionTransformerDistilled``. This module calls their ``set_distilled_training``.

    It takes all inputs, outputs and tasks of :class:`DistillModule`, and logs the same.

    Source: https://arxiv.org/abs/2012.12877, section 4. There the weights of both terms are 1/2, and the teacher, a
    convolutional network, sees the same augmented picture.

    Args:
        student: Network with two heads.
        teacher: As of :class:`DistillModule`.
        soft_loss: As of :class:`DistillModule`; ``KDLoss`` is the paper's soft distillation. Default: None, which means
            the paper's choice, :class:`~kd_lightning.losses.HardDistillationLoss`, or ``MSELoss`` for regression.
        soft_weight: Weight of the soft term, in [0, 1]. A callback may anneal it.
        **kwargs: The arguments of :class:`DistillModule`.

    Raises:
        InputError: As :class:`DistillModule`. In training, if the student does not return two logits of one shape; in
            evaluation, if it does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        soft_loss: nn.Module | dict[str, tuple[float, nn.Module]] | None = None,
        soft_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, soft_loss=soft_loss, soft_weight=soft_weight, **kwargs)
        if soft_loss is None and self.task != "regression":
            self.soft_loss = make_soft_loss(HardDistillationLoss(self.task), self.task, [self.teacher])
        if callable(enable := getattr(student, "set_distilled_training", None)):  # of timm's models
            enable(True)
        self._distilled: Tensor | None = None  # logits of the distillation head in this step

    def guarded_call(self, role: str, network: nn.Module, x: Inputs) -> Any:
        """Call a network, see :class:`DistillModule`. Of the student's two logits in training, return the class head's.

        Raises:
            InputError: If the student returns two logits in eval mode.
        """
        output = super().guarded_call(role, network, x)
        if role != "student":
            return output
        self._distilled, heads = None, _heads_of(output)
        if heads is None:
            return output
        if not network.training:
            raise InputError(f"student: in eval mode it must return the mean of its two heads, got {describe(output)}")
        if torch.is_grad_enabled():
            self._distilled = heads[1]
        return heads[0]

    def distilled_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the logits of the distillation head, as rows.

        Args:
            logits: Those of the class head, as rows.
            batch: The batch.

        Raises:
            InputError: If the student has not returned two logits.
        """
        distilled, self._distilled = self._distilled, None
        if distilled is None:
            raise InputError(
                "student: in training mode it must return the logits of two heads, (class, distillation), of one shape,"
                f" as timm's deit_tiny_distilled_patch16_224 does; {type(self.student).__name__} does not"
            )
        rows: Tensor = self.to_rows(batch, distilled)[1]
        return rows


def _heads_of(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the logits of two heads; None unless an output holds these, and nothing else."""
    if not isinstance(output, tuple | list) or len(output) != 2 or auxiliary_logits_of(output):
        return None
    first, second = output
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
        return None
    return first, second
