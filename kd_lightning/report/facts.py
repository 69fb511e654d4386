"""What the parts of a report share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule

from kd_lightning.errors import InputError
from kd_lightning.report.cast import Cast, Role
from kd_lightning.report.examination import examine
from kd_lightning.report.outputs import TestOutputs, Unavailable, teacher_costs, test_outputs
from kd_lightning.report.verdict import Verdict, verdict_of
from kd_lightning.report.why import History
from kd_lightning.runs.build import build
from kd_lightning.runs.run import Run
from kd_lightning.teachers.findings import Finding


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
    def findings(self) -> list[Finding]:
        """Doctor's findings about the method, with what its finished runs add.

        Raises:
            Unavailable: If module or data cannot be built.
        """
        run, alone = self.cast.main.run, self.cast.find("alone")
        trained = run if run.weights.is_file() else None
        helps = {"better": True, "worse": False, "unclear": False}.get(self.verdict.kind)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(run.seed or 0)  # of the student's first weights
                module = build(LightningModule, run.config["model"])
                history = History(run.config, trained, same_split(alone, run), helps)
                return list(examine(module, run.datamodule(), history))
        except (InputError, OSError) as error:
            raise Unavailable(str(error)) from error

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


def same_split(role: Role | None, run: Run) -> Run | None:
    """Return the run of a role whose samples are split as those of another run, so that neither has seen validation."""
    runs = () if role is None else role.group.runs.values()
    fit = (one for one in runs if one.seeds[1] == run.seeds[1] and one.finished and one.weights.is_file())
    return next(fit, None)
