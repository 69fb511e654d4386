"""Run folders: objects from configs, checkpoints, weights, logs and reports."""

from kd_lightning.runs.build import build
from kd_lightning.runs.weights import load_weights

__all__ = [
    "build",
    "load_weights",
]
