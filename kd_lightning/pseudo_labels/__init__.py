"""Pseudo-labels: the table of a round, labels from a graph, and how good they are."""

from kd_lightning.pseudo_labels.graph_labels import GraphPseudoLabels
from kd_lightning.pseudo_labels.table import PseudoLabels, PseudoLabelStore

__all__ = [
    "PseudoLabels",
    "PseudoLabelStore",
    "GraphPseudoLabels",
]
