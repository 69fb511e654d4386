"""Frozen teachers, ensembles of them, and checks of how good they are on the data."""

from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.exported import ExportedNetwork
from kd_lightning.teachers.teacher import Teacher

__all__ = [
    "Teacher",
    "Ensemble",
    "ExportedNetwork",
]
