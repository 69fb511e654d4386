"""Losses, in torch.nn's convention.

Those between a student's and a teacher's logits are called as ``loss(student_logits, teacher_logits, target=None)``.
Hard losses, on labels, are called as ``loss(logits, target)``: torch's own, and those for labels that may be wrong.
"""

from kd_lightning.losses.coarse import CoarseLoss
from kd_lightning.losses.dist import DISTLoss
from kd_lightning.losses.dkd import DKDLoss
from kd_lightning.losses.early_learning import EarlyLearningLoss
from kd_lightning.losses.forward_correction import ForwardCorrectionLoss, estimate_transition
from kd_lightning.losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from kd_lightning.losses.hint import HintLoss
from kd_lightning.losses.kd import KDLoss
from kd_lightning.losses.label_kind import LabelKindLoss
from kd_lightning.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss

__all__ = [
    "KDLoss",
    "DKDLoss",
    "DISTLoss",
    "HintLoss",
    "GeneralizedCrossEntropyLoss",
    "SymmetricCrossEntropyLoss",
    "ForwardCorrectionLoss",
    "estimate_transition",
    "EarlyLearningLoss",
    "CoarseLoss",
    "LabelKindLoss",
]
