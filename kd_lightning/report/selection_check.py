"""Check of the validation samples that select the weights which a run deploys."""

from __future__ import annotations

from collections.abc import Sequence

from kd_lightning.errors import InputError
from kd_lightning.runs.checkpoints import read_checkpoint
from kd_lightning.runs.run import Run
from kd_lightning.runs.yaml_file import dump_yaml
from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.intervals import share_interval
from kd_lightning.teachers.regression_checks import FEW


def selection(count: int, monitor: str, runs: Sequence[Run], *, stops: bool = False) -> Finding:
    """Count the validation samples by which the deployed weights are selected.

    There is a warning for fewer than 100: then chance decides which weights are the best ones, and often they are those
    of the first epochs.

    Args:
        count: Number of validation samples.
        monitor: The figure that selects, ``checkpoint.monitor``.
        runs: Finished runs, whose deployed weights are named.
        stops: Whether ``early_stopping`` needs the figure, so that the last weights are no choice.
    """
    name = "selection"
    low, high = share_interval(0.5, count)
    text = f"{count} validation samples select the deployed weights by {monitor} (half of them right: 95% interval "
    text += f"{low:.1%} to {high:.1%})"
    text += "".join(f"; {found}" for found in map(_deployed, runs) if found)
    if count >= FEW:
        return Finding(name, text)
    hint = "so few select by chance: "
    if stops:
        return Finding(name, text, f"{hint}validate with more samples")
    lines = dump_yaml({"checkpoint": {"monitor": None}}, default_flow_style=None, width=200)
    return Finding(name, text, f"{hint}deploy the last weights, or validate with more samples", lines=lines)


def _deployed(run: Run) -> str | None:
    """Return after how many steps of a run its deployed weights were saved; None if its checkpoints are gone."""
    try:
        deployed = run.deployed_checkpoint()
        if deployed is None:
            return None
        steps, total = (read_checkpoint(path)["global_step"] for path in (deployed, run.last_checkpoint()))
    except (InputError, KeyError):
        return None
    return f"those of {run.folder.as_posix()} are of step {steps} of {total}"
