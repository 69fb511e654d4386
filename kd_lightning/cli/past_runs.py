"""Finished runs of a config, and of the same student without its teacher, as ``experiment`` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_lightning.cli.baseline import baseline_of
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.report.why import History
from kd_lightning.runs.config_identity import hash_files, identity_of, seeds_of
from kd_lightning.runs.run import Run, find_runs


def past_runs(config: Config, data: Any) -> History:
    """Return the config, and the newest finished runs that were fitted on the same samples and split.

    Args:
        config: The config, as ``fit`` saves it.
        data: Its datamodule, set up for a fit. Other data than a SemiSupervisedDataModule have no runs to compare.
    """
    if not isinstance(data, SemiSupervisedDataModule):
        return History(config, comparable=False)
    root, name = Path(config["trainer"]["default_root_dir"] or "."), config["name"]
    taught = _newest(config, data)
    alone = None
    if find_runs(root, f"{name}_alone"):
        try:
            alone = _newest(parse_config(baseline_of(config), "doctor"), data)
        except InputError:  # of a module without labels, which has no baseline
            alone = None
    return History(config, taught, alone)


def _newest(config: Config, data: SemiSupervisedDataModule) -> Run | None:
    """Return the newest finished run of a config on the same samples and split; its weights may have another seed."""
    identity, seed = identity_of(config, hash_files(config)), seeds_of(config)[1]
    hashes = data.samples.hashes
    for run in find_runs(Path(config["trainer"]["default_root_dir"] or "."), config["name"]):
        same = run.seeds[1] == seed and all(run.state.get(name) == value for name, value in hashes.items())
        if same and run.finished and run.weights.is_file() and run.identity == identity:
            return run
    return None
