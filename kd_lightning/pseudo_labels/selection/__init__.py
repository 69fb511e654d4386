"""Selection: which pseudo-labels count. One rule per file."""

from kd_lightning.pseudo_labels.selection.flexmatch import AdaptiveThresholds

__all__ = ["AdaptiveThresholds"]
