"""Losses, in torch.nn's convention.

- Soft losses compare logits: ``loss(student_logits, teacher_logits, target=None)``.
- Hard losses compare logits with labels: ``loss(logits, target)``. torch's own losses are hard losses, too.
- Feature losses compare features: ``loss(student_feature, teacher_feature, batch)``.

:mod:`kd_lightning.losses.protocols` holds what a loss may declare about itself.
"""

from kd_lightning.losses.coarse import CoarseLoss
from kd_lightning.losses.dist import DISTLoss
from kd_lightning.losses.dkd import DKDLoss
from kd_lightning.losses.early_learning import EarlyLearningLoss
from kd_lightning.losses.features import (
    AttentionTransferLoss,
    CosineLoss,
    HintLoss,
    MSEFeatureLoss,
    SmoothL1FeatureLoss,
)
from kd_lightning.losses.forward_correction import ForwardCorrectionLoss, estimate_transition
from kd_lightning.losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from kd_lightning.losses.kd import KDLoss
from kd_lightning.losses.label_kind import LabelKindLoss
from kd_lightning.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss

__all__ = [
    "AttentionTransferLoss",
    "CoarseLoss",
    "CosineLoss",
    "DISTLoss",
    "DKDLoss",
    "EarlyLearningLoss",
    "ForwardCorrectionLoss",
    "GeneralizedCrossEntropyLoss",
    "HintLoss",
    "KDLoss",
    "LabelKindLoss",
    "MSEFeatureLoss",
    "SmoothL1FeatureLoss",
    "SymmetricCrossEntropyLoss",
    "estimate_transition",
]
