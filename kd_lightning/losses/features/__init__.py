"""Losses between a layer of the student and a layer of the teacher: one file for each paper.

All of them are called as ``loss(student_feature, teacher_feature, batch)``. ``FeatureLoss`` in
:mod:`kd_lightning.losses.protocols` describes what they get, and what they may declare.
"""

from kd_lightning.losses.features.attention_transfer import AttentionTransferLoss
from kd_lightning.losses.features.cosine import CosineLoss
from kd_lightning.losses.features.crd import CRDLoss
from kd_lightning.losses.features.cwd import ChannelWiseLoss
from kd_lightning.losses.features.hint import HintLoss
from kd_lightning.losses.features.mse import MSEFeatureLoss
from kd_lightning.losses.features.ofd import OFDLoss
from kd_lightning.losses.features.pkt import PKTLoss
from kd_lightning.losses.features.queue import QueueSimilarityLoss
from kd_lightning.losses.features.review import ReviewLoss
from kd_lightning.losses.features.rkd import RKDLoss
from kd_lightning.losses.features.similarity_preserving import SimilarityPreservingLoss
from kd_lightning.losses.features.simkd import SimKDLoss
from kd_lightning.losses.features.smooth_l1 import SmoothL1FeatureLoss
from kd_lightning.losses.features.token_similarity import TokenSimilarityLoss
from kd_lightning.losses.features.vid import VIDLoss

__all__ = [
    "AttentionTransferLoss",
    "CRDLoss",
    "ChannelWiseLoss",
    "CosineLoss",
    "HintLoss",
    "MSEFeatureLoss",
    "OFDLoss",
    "PKTLoss",
    "QueueSimilarityLoss",
    "RKDLoss",
    "ReviewLoss",
    "SimKDLoss",
    "SimilarityPreservingLoss",
    "SmoothL1FeatureLoss",
    "TokenSimilarityLoss",
    "VIDLoss",
]
