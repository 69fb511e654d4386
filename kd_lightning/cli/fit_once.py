"""Fit a config unless a finished run of it exists."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import Config
from kd_lightning.runs.config_identity import hash_files, identity_of, seeds_of
from kd_lightning.runs.run import Run, find_runs
from kd_lightning.runs.yaml_file import dump_yaml


def find_fits(config: Config, samples: Mapping[str, str] | None = None) -> list[Run]:
    """Return the runs of a config, its seeds and the content of the files that it names: finished ones first.

    Args:
        config: The config.
        samples: Hashes of the samples of its data by name; runs that were fitted on others are left out. Default: None,
            which means that they are not compared.
    """
    identity, seeds = identity_of(config, hash_files(config)), seeds_of(config)
    found = find_runs(Path(config["trainer"]["default_root_dir"]), config["name"])
    same = [run for run in found if run.identity == identity and run.seeds == seeds]
    for name, value in (samples or {}).items():
        same = [run for run in same if run.state.get(name, value) == value]
    return sorted(same, key=lambda run: not run.finished)


def fit_once(config: Config, samples: Mapping[str, str] | None = None) -> Run:
    """Return a finished run of a config; fit it if there is none. A fit that was stopped is resumed.

    The arguments are those of :func:`find_fits`.
    """
    found = find_fits(config, samples)
    if found and found[0].finished:
        print(f"is done: {found[0].folder}")
        return found[0]
    resume: list[str] = []
    if stopped := next((run for run in found if run.checkpoints()), None):
        print(f"was stopped, and is resumed: {stopped.folder}")
        resume = ["--ckpt_path", str(stopped.last_checkpoint())]
    with config_file(config) as path:
        fitted = DistillCLI(["fit", "--config", path, *resume]).run_folder
    assert fitted is not None  # there is one process
    return Run(fitted)


@contextmanager
def config_file(config: Config) -> Iterator[str]:
    """Write a config to a temporary file, and return its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        yield str(path)
