"""Losses, in torch.nn's convention.

Those between a student's and a teacher's logits are called as ``loss(student_logits, teacher_logits, target=None)``.
Hard losses, on labels, are called as ``loss(logits, target)``: torch's own, and those for labels that may be wrong.
"""

from kd_lightning.losses.by_kind import LossByKind
from kd_lightning.losses.coarse import CoarseLoss
from kd_lightning.losses.correlation import CorrelationLoss
from kd_lightning.losses.decoupled import DecoupledLoss
from kd_lightning.losses.early_learning import EarlyLearningLoss
from kd_lightning.losses.forward_correction import ForwardCorrectionLoss, estimate_transition
from kd_lightning.losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from kd_lightning.losses.hint import HintLoss
from kd_lightning.losses.soft_target import SoftTargetLoss
from kd_lightning.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss

__all__ = [
    "SoftTargetLoss",
    "DecoupledLoss",
    "CorrelationLoss",
    "HintLoss",
    "GeneralizedCrossEntropyLoss",
    "SymmetricCrossEntropyLoss",
    "ForwardCorrectionLoss",
    "estimate_transition",
    "EarlyLearningLoss",
    "CoarseLoss",
    "LossByKind",
]
