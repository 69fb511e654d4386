"""Frozen teachers, ensembles of them, and checks of how good they are on the data."""

from kd_lightning.teachers.cross_fitted import CrossFittedTeacher
from kd_lightning.teachers.ensemble import Ensemble
from kd_lightning.teachers.exported import ExportedNetwork
from kd_lightning.teachers.teacher import Teacher

__all__ = [
    "CrossFittedTeacher",
    "Teacher",
    "Ensemble",
    "ExportedNetwork",
]
