"""Labels of training samples: from a file, noisy, coarse, pseudo."""

from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_noise import LabelNoise, PairNoise, SymmetricNoise, TransitionNoise

__all__ = [
    "CoarseLabels",
    "LabelNoise",
    "PairNoise",
    "SymmetricNoise",
    "TransitionNoise",
]
