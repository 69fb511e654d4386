"""Figures about runs."""

from kd_lightning.runs.report.contact_sheet import contact_sheet, write_contact_sheet

__all__ = [
    "contact_sheet",
    "write_contact_sheet",
]
