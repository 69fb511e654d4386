"""What the parts of a report share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kd_lightning.report.cast import Cast, Role
from kd_lightning.report.outputs import TestOutputs, test_outputs
from kd_lightning.report.verdict import Verdict, verdict_of


@dataclass
class Facts:
    """The runs of a report, and what is computed from them once.

    Attributes:
        cast: The runs.
    """

    cast: Cast

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict."""
        return verdict_of(self.cast)

    @cached_property
    def outputs(self) -> TestOutputs:
        """Outputs of all networks on the same test samples."""
        return test_outputs(self.cast)

    @property
    def figure(self) -> str:
        """The figure that is compared."""
        return self.cast.comparison.figure_name

    def label_of(self, kind: str) -> str:
        """Return the name of a role, also of a teacher that is no run."""
        role: Role | None = self.cast.find(kind)
        return kind if role is None else role.label
