"""Losses between a student's and a teacher's outputs, in torch.nn's convention.

Those on logits are called as ``loss(student_logits, teacher_logits, target=None)``; hard losses are torch's own.
"""

from kd_lightning.losses.correlation import CorrelationLoss
from kd_lightning.losses.decoupled import DecoupledLoss
from kd_lightning.losses.hint import HintLoss
from kd_lightning.losses.soft_target import SoftTargetLoss

__all__ = ["SoftTargetLoss", "DecoupledLoss", "CorrelationLoss", "HintLoss"]
