"""Run folders: what a training leaves, and how it is built again."""

from kd_lightning.runs.build import build
from kd_lightning.runs.weights import load_weights

__all__ = [
    "build",
    "load_weights",
]
