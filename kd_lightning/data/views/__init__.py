"""Views: replayable augmentations of samples, their order, and the loader that serves them."""

from kd_lightning.data.views.dataset import ViewDataset, collate
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.samplers import ShareSampler, TwoStreamSampler, ViewSampler
from kd_lightning.data.views.table import ViewTable

__all__ = [
    "ViewDataset",
    "collate",
    "ViewLoader",
    "ViewSampler",
    "TwoStreamSampler",
    "ShareSampler",
    "ViewTable",
]
