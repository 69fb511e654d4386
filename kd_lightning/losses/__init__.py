"""Losses, in torch.nn's convention.

- Soft losses compare logits: ``loss(student_logits, teacher_logits, target=None)``.
- Hard losses compare logits with labels: ``loss(logits, target)``. torch's own losses are hard losses, too.
- Feature losses compare features: ``loss(student_feature, teacher_feature, batch)``.

:mod:`kd_lightning.losses.protocols` holds what a loss may declare about itself.
"""

from kd_lightning.losses.coarse import CoarseLoss
from kd_lightning.losses.conditional import ConditionalLoss
from kd_lightning.losses.dist import DISTLoss
from kd_lightning.losses.dkd import DKDLoss
from kd_lightning.losses.early_learning import EarlyLearningLoss
from kd_lightning.losses.features import (
    AttentionTransferLoss,
    ChannelWiseLoss,
    CosineLoss,
    CRDLoss,
    HintLoss,
    MSEFeatureLoss,
    OFDLoss,
    PKTLoss,
    QueueSimilarityLoss,
    ReviewLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    SimKDLoss,
    SmoothL1FeatureLoss,
    TokenSimilarityLoss,
    VIDLoss,
)
from kd_lightning.losses.forward_correction import ForwardCorrectionLoss, estimate_transition
from kd_lightning.losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from kd_lightning.losses.hard_distillation import HardDistillationLoss
from kd_lightning.losses.js import JSDLoss
from kd_lightning.losses.kd import KDLoss
from kd_lightning.losses.label_kind import LabelKindLoss
from kd_lightning.losses.logit_adjustment import LogitAdjustmentLoss
from kd_lightning.losses.mlkd import MLKDLoss
from kd_lightning.losses.nkd import NKDLoss
from kd_lightning.losses.reverse_kl import ReverseKLLoss
from kd_lightning.losses.rld import RLDLoss
from kd_lightning.losses.symmetric_cross_entropy import SymmetricCrossEntropyLoss
from kd_lightning.losses.ttm import TTMLoss, WTTMLoss

__all__ = [
    "AttentionTransferLoss",
    "CRDLoss",
    "ChannelWiseLoss",
    "CoarseLoss",
    "ConditionalLoss",
    "CosineLoss",
    "DISTLoss",
    "DKDLoss",
    "EarlyLearningLoss",
    "ForwardCorrectionLoss",
    "GeneralizedCrossEntropyLoss",
    "HardDistillationLoss",
    "HintLoss",
    "JSDLoss",
    "KDLoss",
    "LabelKindLoss",
    "LogitAdjustmentLoss",
    "MLKDLoss",
    "MSEFeatureLoss",
    "NKDLoss",
    "OFDLoss",
    "PKTLoss",
    "QueueSimilarityLoss",
    "RKDLoss",
    "RLDLoss",
    "ReverseKLLoss",
    "ReviewLoss",
    "SimKDLoss",
    "SimilarityPreservingLoss",
    "SmoothL1FeatureLoss",
    "SymmetricCrossEntropyLoss",
    "TTMLoss",
    "TokenSimilarityLoss",
    "VIDLoss",
    "WTTMLoss",
    "estimate_transition",
]
