"""Selection: which pseudo-labels count, and how much. One rule per file."""

from kd_lightning.pseudo_labels.selection.adamatch import AdaMatch
from kd_lightning.pseudo_labels.selection.alignment import DistributionAlignment
from kd_lightning.pseudo_labels.selection.base import Selection
from kd_lightning.pseudo_labels.selection.fixed_threshold import FixedThreshold
from kd_lightning.pseudo_labels.selection.flexmatch import FlexMatch
from kd_lightning.pseudo_labels.selection.freematch import FreeMatch
from kd_lightning.pseudo_labels.selection.label_thresholds import LabelThresholds
from kd_lightning.pseudo_labels.selection.open_set_filter import OpenSetFilter
from kd_lightning.pseudo_labels.selection.sharpen import Sharpen
from kd_lightning.pseudo_labels.selection.softmatch import SoftMatch
from kd_lightning.pseudo_labels.selection.top_k_per_class import TopKPerClass
from kd_lightning.pseudo_labels.selection.uncertainty_threshold import UncertaintyThreshold

__all__ = [
    "Selection",
    "FixedThreshold",
    "TopKPerClass",
    "FlexMatch",
    "FreeMatch",
    "SoftMatch",
    "AdaMatch",
    "DistributionAlignment",
    "OpenSetFilter",
    "Sharpen",
    "LabelThresholds",
    "UncertaintyThreshold",
]
