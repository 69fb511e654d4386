"""Active learning: select the samples to label next."""

from kd_lightning.active.loop import ActiveLearningLoop, plot
from kd_lightning.active.strategies import STRATEGIES

__all__ = [
    "STRATEGIES",
    "ActiveLearningLoop",
    "plot",
]
