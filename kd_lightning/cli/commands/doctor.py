"""``doctor CONFIG``: check a teacher on the data before training. Takes the arguments of ``fit``."""

from __future__ import annotations

import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from kd_lightning.cli.main import InspectCLI
from kd_lightning.cli.outcome import as_written, print_steps
from kd_lightning.cli.past_runs import past_runs
from kd_lightning.cli.record_run import dump_config
from kd_lightning.errors import InputError
from kd_lightning.modules import FeatureDistillModule, SupervisedModule
from kd_lightning.modules.teaching_steps import Teaching
from kd_lightning.report.examination import examine
from kd_lightning.runs.yaml_file import load_dumped
from kd_lightning.teachers.findings import Finding

_KINDS = (SupervisedModule, FeatureDistillModule)
MARKS = {"info": "ok", "warning": "warn", "error": "STOP"}


def main(options: Namespace) -> None:
    """Print a line for each check. Exit with status 1 if a finding is an error."""
    findings = DoctorCLI(["fit", *options.overrides]).findings
    print_findings(findings)
    if any(finding.severity == "error" for finding in findings):
        sys.exit(1)
    print_steps([(f"fit {as_written(options.overrides)}", "")])


def print_findings(findings: Iterable[Finding]) -> None:
    """Print a line for each finding, its hint, and the lines of YAML that follow it."""
    for finding in findings:
        print(f"{MARKS[finding.severity]:<6}{finding.name}: {finding.text}")
        if finding.hint:
            print(f"      -> {finding.hint}")
        if finding.lines:
            print(textwrap.indent(finding.lines.rstrip(), "         "))


class DoctorCLI(InspectCLI):
    """Builds what ``fit`` builds, and checks it instead of training it."""

    findings: list[Finding]

    def fit(self, model: nn.Module, datamodule: Any = None, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Called in place of ``Trainer.fit``. Runs the checks."""
        taught = isinstance(getattr(model, "teaching", None), Teaching)
        if not isinstance(model, LightningModule) or not (taught or isinstance(model, _KINDS)):
            raise InputError(
                f"model: doctor needs a SupervisedModule, a FeatureDistillModule, or teach, got {type(model).__name__}"
            )
        if ckpt_path is not None:
            raise InputError(f"ckpt_path: doctor checks the start of a run, so it must be left out, got {ckpt_path}")
        if is_overridden("configure_model", model):
            model.configure_model()
        model.to(self.trainer.strategy.root_device)
        config = load_dumped(dump_config(self._parser(self.subcommand), self._own_config))
        history = past_runs(config, datamodule)
        self.findings = list(examine(model, model if datamodule is None else datamodule, history))
