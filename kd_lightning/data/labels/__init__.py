"""Labels of training samples: from the source, from a file, noisy, coarse, and pseudo-labels."""

from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_file import LabelRow, read_label_file
from kd_lightning.data.labels.label_noise import LabelNoise, PairNoise, SymmetricNoise, TransitionNoise
from kd_lightning.data.labels.table import LabelTable

__all__ = [
    "LabelTable",
    "LabelRow",
    "read_label_file",
    "CoarseLabels",
    "LabelNoise",
    "SymmetricNoise",
    "PairNoise",
    "TransitionNoise",
]
