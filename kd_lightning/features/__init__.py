"""Features: outputs of layers by dotted path, projectors that join them, and what each layer costs."""

from kd_lightning.features.capture import capture
from kd_lightning.features.heads import find_head, reset_classifier
from kd_lightning.features.layers import list_layers
from kd_lightning.features.projectors import build_projector

__all__ = [
    "capture",
    "find_head",
    "reset_classifier",
    "list_layers",
    "build_projector",
]
