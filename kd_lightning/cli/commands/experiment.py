"""``experiment CONFIG --seeds N``: train a student with a method and without it, over seeds, and compare.

With ``--tune N`` the settings of both are searched on validation samples before.
"""

from __future__ import annotations

from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import LightningDataModule, Trainer
from rich.console import Console

from kd_lightning.cli.baseline import baseline_of, describe_baseline, with_seed
from kd_lightning.cli.fit_once import config_file, find_fits, fit_once
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.cli.tuning.chosen import write_chosen
from kd_lightning.cli.tuning.locks import waits_for_others
from kd_lightning.cli.tuning.tune import tune
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.report.write import write_report
from kd_lightning.runs.build import build
from kd_lightning.runs.figures.comparison import Comparison, compare_runs
from kd_lightning.runs.figures.log_figure import only_warn
from kd_lightning.runs.run import Run
from kd_lightning.runs.teacher_runs import teacher_runs


class Experiment(NamedTuple):
    """The runs of an experiment.

    Attributes:
        alone: Runs of the baseline, by seed.
        method: Runs of the method, by seed.
        teachers: Runs that left the teachers' weights.
        out: Folder of the comparison.
        comparison: The comparison.
    """

    alone: list[Run]
    method: list[Run]
    teachers: list[Run]
    out: Path
    comparison: Comparison


class Tuning(NamedTuple):
    """A search for settings before an experiment.

    Attributes:
        trials: Number of trials of the method, and of its baseline.
        space: YAML file of the search space. None means the default space.
    """

    trials: int
    space: Path | None = None


def main(options: Namespace) -> None:
    """Run the fits that are missing, compare all, and write the report."""
    tuning = None if options.tune is None else Tuning(options.tune, options.space)
    done = run_experiment(options.overrides, options.seeds, options.out, tuning)
    with only_warn("the report"):
        print(f"report: {write_report([done.out], comparison=done.comparison)}")


def run_experiment(
    args: list[str], seeds: int, out: str | Path | None = None, tuning: Tuning | None = None
) -> Experiment:
    """Train a method and its baseline over seeds, test and compare them. Finished fits are not repeated.

    Args:
        args: Arguments of ``fit``.
        seeds: Number of seeds, at least 1.
        out: Folder of the comparison. Default: None, which means ``<root>/<name>_comparison``, or
            ``<root>/<name>_tuned_comparison`` after a search.
        tuning: The search for settings. Default: None, which means those of the config.

    Raises:
        InputError: If the config has no SemiSupervisedDataModule or no student, or takes several processes, and as of
            :func:`~kd_lightning.cli.tuning.tune.tune`.
    """
    config = parse_config(args, "experiment")
    machine = {name: config["trainer"][name] for name in ("accelerator", "devices", "num_nodes")}
    processes = Trainer(**machine, logger=False).world_size
    if processes > 1:
        raise InputError(f"experiment runs on one process, got {processes}; set --trainer.devices 1")
    config["trainer"]["enable_model_summary"] = False
    config["checkpoint"]["dirpath"] = None  # each run has checkpoints of its own
    root, name = Path(config["trainer"]["default_root_dir"]), config["name"]
    out = Path(out) if out else root / f"{name}{'' if tuning is None else '_tuned'}_comparison"
    if tuning is None:
        return _run_plan(_plan(config, config, seeds), config, out, [])
    tuned = tune(with_seed(config, 0), _datamodule(config), tuning.trials, tuning.space, out)
    method, alone = (deepcopy(one) for one in (tuned.method, tuned.alone))
    plan = _plan(method | {"name": f"{name}_tuned"}, alone, seeds, f"{name}_alone_tuned")
    with waits_for_others(out / "tuning" / "final.lock"):
        for run_config, before in ((plan[seeds], name), (plan[0], f"{name}_alone")):
            print(f"tune: written to {write_chosen(run_config, before, out, tuned.remarks)}")
        return _run_plan(plan, plan[seeds], out, tuned.remarks)


def _plan(method: Config, alone: Config, seeds: int, name: str | None = None) -> list[Config]:
    """Return the configs of all fits: the baseline's by seed, then the method's.

    Args:
        method: Config of the method.
        alone: Config of the method from which that of the baseline is made.
        seeds: Number of seeds.
        name: Name of the baseline. Default: None, which means the method's with ``_alone``.
    """
    # parsed, too, so that a baseline's config is the one that its run saves
    baselines = [parse_config(baseline_of(with_seed(alone, seed)), "experiment") for seed in range(seeds)]
    named = [one if name is None else one | {"name": name} for one in baselines]
    return named + [with_seed(method, seed) for seed in range(seeds)]


def _datamodule(config: Config) -> SemiSupervisedDataModule:
    data = build(LightningDataModule, with_seed(config, 0)["data"])
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"experiment needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    return data


def _run_plan(plan: list[Config], config: Config, out: Path, remarks: list[str]) -> Experiment:
    """Run the fits of a plan that are missing, and compare all.

    Args:
        plan: The configs: the baseline's by seed, then the method's.
        config: Config of the method.
        out: Folder of the comparison.
        remarks: Lines for the comparison.
    """
    data, seeds = _datamodule(config), len(plan) // 2
    console = Console()
    if about := describe_baseline(config["model"]):
        console.print(f"baseline: {about}")
    folders = []
    for number, run_config in enumerate(plan, 1):
        name, seed = run_config["name"], run_config["seed_everything"]
        console.print(f"[bold]\\[{number}/{len(plan)}] {name}, seed {seed}[/bold]")
        folders.append(fit_and_test(run_config, data))
    teachers = teacher_runs(config)
    comparison = compare_runs([*folders, *(run.folder for run in teachers)], out, remarks=remarks)
    runs = [*map(Run, folders)]
    return Experiment(runs[:seeds], runs[seeds:], teachers, out, comparison)


def fit_and_test(config: Config, data: SemiSupervisedDataModule) -> Path:
    """Return the folder of a finished run of a config whose deployed weights were tested; do what is missing.

    A run counts if it was fitted and tested on the samples that the data have now.
    """
    samples = data.samples.hashes
    tested = [run for run in find_fits(config, samples) if run.finished and _is_tested(run, data)]
    run = tested[0] if tested else fit_once(config, samples)
    if tested:
        print(f"is done: {run.folder}")
    elif not _is_tested(run, data):
        weights = ["--ckpt_path", str(run.weights)] if run.weights.is_file() else []
        with config_file(config) as path:
            DistillCLI(["test", "--config", path, "--verbose", "false", *weights])
    return run.folder


def _is_tested(run: Run, data: SemiSupervisedDataModule) -> bool:
    """Return whether the deployed weights were tested, on samples that are all in the test part now and no fewer."""
    result = run.result("test") or run.result("transductive/test")
    if result is None:
        return False
    rows, now = result.predictions(), data.identities("test")
    if not all(row.content for row in rows):  # by an older version, or the dataset returns other items each time
        return True
    tested = {(row.path, row.content) for row in rows}
    limit = (run.config.get("trainer") or {}).get("limit_test_batches")
    return tested <= {*zip(now.paths, now.contents, strict=True)} and (limit is not None or len(rows) == len(now))
