"""Figures about runs: comparison and its statistics, confusion matrix, contact sheets."""

from kd_lightning.runs.figures.contact_sheet import contact_sheet, write_contact_sheet

__all__ = [
    "contact_sheet",
    "write_contact_sheet",
]
