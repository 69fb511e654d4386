"""The steps of the short commands: write a config, fit it once, check it, deploy the student."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import LightningDataModule

from kd_lightning.cli.commands.doctor import DoctorCLI, print_findings
from kd_lightning.cli.commands.experiment import fit_and_test
from kd_lightning.cli.commands.export import export
from kd_lightning.cli.fit_once import fit_once
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.packages import is_installed
from kd_lightning.report.write import write_report
from kd_lightning.runs.build import build
from kd_lightning.runs.run import Run

_LONG = 1800.0  # seconds of fits that are worth a question
RECIPE = "recipe.yaml"
"""The commented config in the folder of a run; ``config.yaml`` has all settings, without comments."""


class Plan(Protocol):
    """What a short command does."""

    @property
    def lines(self) -> list[str]:
        """What to print about it."""

    @property
    def seconds(self) -> float:
        """Estimated time of all fits on one CPU."""

    def configs(self) -> dict[str, str]:
        """The configs, by name."""

    def run(self) -> Run:
        """Do it."""


def carry_out(plan: Plan, *, dry_run: bool, yes: bool) -> None:
    """Print a plan, and carry it out. On a terminal a question comes before fits that take long on this CPU.

    Args:
        plan: The plan.
        dry_run: Whether the configs are printed, and nothing is done.
        yes: Whether the answer to the question is yes.

    Raises:
        InputError: If the answer is no.
    """
    print("\n".join(plan.lines), file=sys.stderr if dry_run else sys.stdout)
    if dry_run:
        print("---\n".join(plan.configs().values()).rstrip("\n"))
        return
    asks = not yes and plan.seconds >= _LONG and not torch.cuda.is_available() and sys.stdin.isatty()
    if asks and input("go on? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        raise InputError("nothing was done")
    plan.run()


def write_config(path: Path, text: str) -> None:
    """Write a config. One that is there with other settings gets another name, so that no edit is lost."""
    if path.is_file() and (before := path.read_text(encoding="utf-8")) != text:
        number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.stem}.{n}.yaml").exists())
        other = path.with_name(f"{path.stem}.{number}.yaml")
        other.write_text(before, encoding="utf-8")
        print(f"{path} had other settings; they are in {other}")
    path.write_text(text, encoding="utf-8")


def fit_config(path: Path, *, test: bool) -> Run:
    """Return a finished run of a config, tested if ``test``. A stopped one goes on; finished ones are not repeated."""
    config = read_config(path)
    data = data_of(config)
    run = Run(fit_and_test(config, data)) if test else fit_once(config, data.samples.hashes)
    keep_recipe(path, [run])
    return run


def read_config(path: Path) -> Config:
    """Return the whole config of a file, with the settings that ``experiment`` has, too."""
    config = parse_config(["--config", str(path)], "this command")
    config["trainer"]["enable_model_summary"] = False
    return config


def data_of(config: Config) -> SemiSupervisedDataModule:
    """Build the datamodule of a config."""
    data = build(LightningDataModule, config["data"])
    assert isinstance(data, SemiSupervisedDataModule)  # the config is this package's
    data.prepare_data()
    return data


def keep_recipe(path: Path, runs: list[Run]) -> None:
    """Copy a commented config into the folders of its runs."""
    for run in runs:
        if not (run.folder / RECIPE).is_file():
            (run.folder / RECIPE).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def check_teacher(path: Path) -> None:
    """Print what doctor finds.

    Raises:
        InputError: If a finding means that the run would be pointless.
    """
    findings = DoctorCLI(["fit", "--config", str(path)]).findings
    print_findings(findings)
    for finding in findings:
        if finding.severity == "error":
            hint = f"; {finding.hint}" if finding.hint else ""
            raise InputError(f"doctor: {finding.name}: {finding.text}{hint}")


def report(runs: Sequence[Run], out: Path) -> Path:
    """Write the report about runs, and return its file."""
    return write_report([run.folder for run in runs], out)


def missing_for_onnx() -> str:
    """Return in one line which packages the ONNX file needs; empty if they are there."""
    missing = [name for name in ("onnx", "onnxruntime") if not is_installed(name)]
    return f"no ONNX file: {' and '.join(missing)} not installed: pip install 'kd-lightning[export]'" if missing else ""


def deploy(run: Run, out: Path) -> Path | None:
    """Write a run's student as ONNX if the packages are there; return the file, None without them.

    Raises:
        InputError: If the file differs from PyTorch.
    """
    if line := missing_for_onnx():
        print(line)
        return None
    if not export(run.folder, out):
        raise InputError(f"{out}: the file differs from PyTorch; the weights are {run.weights}")
    return out
