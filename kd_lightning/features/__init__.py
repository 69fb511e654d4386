"""Features: outputs of layers by dotted path, projectors, shapes and costs of layers, and heads."""

from kd_lightning.features.adjust_head import adjust_head
from kd_lightning.features.capture import capture, evaluating, find_layer
from kd_lightning.features.heads import find_head, input_of_head, reset_classifier
from kd_lightning.features.layers import list_layers
from kd_lightning.features.margin_relu import MarginReLU
from kd_lightning.features.mlp_projector import MLPProjector
from kd_lightning.features.outputs import logits_of
from kd_lightning.features.regressors import build_projector
from kd_lightning.features.review_fusion import ReviewFusion
from kd_lightning.features.simkd import SimKDStudent
from kd_lightning.features.standardization import ChannelStandardization, PHIStandardization

__all__ = [
    "capture",
    "evaluating",
    "find_layer",
    "find_head",
    "input_of_head",
    "reset_classifier",
    "adjust_head",
    "list_layers",
    "logits_of",
    "build_projector",
    "SimKDStudent",
    "ChannelStandardization",
    "MLPProjector",
    "MarginReLU",
    "PHIStandardization",
    "ReviewFusion",
]
