"""Pseudo-labels: a round of them, labels that spread over a graph, selection rules, and the report of a round."""

from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.pseudo_labels.report import rounds_figure
from kd_lightning.pseudo_labels.selection import (
    AdaMatch,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    LabelThresholds,
    OpenSetFilter,
    Selection,
    Sharpen,
    SoftMatch,
    TopKPerClass,
    UncertaintyThreshold,
)
from kd_lightning.pseudo_labels.table import (
    PoolLabels,
    PseudoLabels,
    PseudoLabelStore,
    PseudoValues,
    make_pseudo_labels,
)

__all__ = [
    "PoolLabels",
    "PseudoLabels",
    "PseudoValues",
    "PseudoLabelStore",
    "make_pseudo_labels",
    "rounds_figure",
    "GraphPseudoLabels",
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
