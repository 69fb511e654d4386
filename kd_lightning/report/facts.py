"""What the parts of a report share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kd_lightning.report.cast import Cast, Role
from kd_lightning.report.outputs import TestOutputs, teacher_costs, test_outputs
from kd_lightning.report.verdict import Verdict, verdict_of


@dataclass(frozen=True)
class FileTeacher:
    """A teacher that is no run, such as a pretrained file.

    Attributes:
        accuracy: Share of right predictions.
        samples: Number of test samples that it was run on.
        costs: Parameters, size and MACs; empty if they are not known.
    """

    accuracy: float
    samples: int
    costs: dict[str, Any]


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

    @cached_property
    def file_teacher(self) -> FileTeacher | None:
        """The teacher of the method, if it is no run of this report; None if it cannot be run, or there is none."""
        if self.cast.find("teacher") is not None or self.cast.main.method != "teacher":
            return None
        try:
            outputs = self.outputs
        except Exception:  # the parts that need these outputs say what failed
            return None
        if "teacher" not in outputs.probabilities:
            return None
        return FileTeacher(outputs.accuracy("teacher"), len(outputs.labels), teacher_costs(outputs.network))

    @property
    def figure(self) -> str:
        """The figure that is compared."""
        return self.cast.comparison.figure_name

    def label_of(self, kind: str) -> str:
        """Return the name of a role, also of a teacher that is no run."""
        role: Role | None = self.cast.find(kind)
        return kind if role is None else role.label
