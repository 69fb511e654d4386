"""``experiment CONFIG ... --seeds N``: train a student with one or several methods and without, and compare.

With ``--tune N`` the settings of a method and of its baseline are searched on validation samples before.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import LightningDataModule, Trainer
from rich.console import Console

from kd_lightning.cli.baseline import baseline_of, describe_baseline, with_seed
from kd_lightning.cli.fit_once import config_file, find_fits, fit_once
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.methods.baselines import describe_baselines, find_baselines
from kd_lightning.cli.methods.read import MethodConfig, naming, read_methods
from kd_lightning.cli.methods.same import check_same_samples, check_same_splits, describe_differences, describe_steps
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
from kd_lightning.runs.figures.several_methods import MethodRuns
from kd_lightning.runs.run import Run
from kd_lightning.runs.teacher_runs import teacher_runs

_MOST_LETTERS = 120  # of the name of a comparison's folder


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
    methods = read_methods(options.overrides)
    if not methods:
        tuning = None if options.tune is None else Tuning(options.tune, options.space)
        done = run_experiment(options.overrides, options.seeds, options.out, tuning)
        out, comparison = done.out, done.comparison
    elif options.tune is None:
        out, comparison = compare_methods(methods, options.seeds, options.out)
    else:
        raise InputError(
            f"--tune: {options.tune} takes one config, got {len(methods)}; tune each alone, and then compare the "
            "tuned_NAME.yaml that each search writes"
        )
    with only_warn("the report"):
        print(f"report: {write_report([out], comparison=comparison)}")


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
    _prepare(config)
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


def _prepare(config: Config) -> None:
    """Check that a config takes one process, and set what is the same for all fits of an experiment, in place."""
    machine = {name: config["trainer"][name] for name in ("accelerator", "devices", "num_nodes")}
    processes = Trainer(**machine, logger=False).world_size
    if processes > 1:
        raise InputError(f"experiment runs on one process, got {processes}; set --trainer.devices 1")
    config["trainer"]["enable_model_summary"] = False
    config["checkpoint"]["dirpath"] = None  # each run has checkpoints of its own


def compare_methods(
    methods: Sequence[MethodConfig], seeds: int, out: str | Path | None = None
) -> tuple[Path, Comparison]:
    """Train several methods and their baselines over seeds on one split, test and compare them.

    Each method is compared with the student alone with its own settings. Methods for which that is the same config
    share one baseline. Finished fits are not repeated.

    Args:
        methods: The methods.
        seeds: Number of seeds, at least 1.
        out: Folder of the comparison. Default: None, which means ``<root>/<names>_comparison``.

    Returns:
        The folder of the comparison, and the comparison.

    Raises:
        InputError: As of :func:`run_experiment`, and if labeled, validation or test samples, or the task, differ.
    """
    data = []
    for one in methods:
        with naming(one.source):
            _prepare(one.config)
            data.append(_datamodule(one.config))
    check_same_samples([one._replace(config=with_seed(one.config, 0)) for one in methods], data)
    names = [one.config["name"] for one in methods]
    baselines = find_baselines(methods, seeds)
    remarks = describe_baselines(baselines, methods)
    for one in methods:
        if about := describe_baseline(one.config["model"]):
            remarks.append(f"The baseline of {one.config['name']} is {about}.")
    remarks += describe_differences(methods)
    for line in remarks:
        print(line)
    plan: list[tuple[Config, SemiSupervisedDataModule]] = []
    for baseline in baselines:  # each before its methods
        plan += [(config, data[baseline.methods[0]]) for config in baseline.configs]
        plan += [(with_seed(methods[n].config, seed), data[n]) for n in baseline.methods for seed in range(seeds)]
    folders = _fit_all(plan)
    by_side = [folders[start : start + seeds] for start in range(0, len(folders), seeds)]
    for same_seed in zip(*by_side, strict=True):
        check_same_splits([Run(folder) for folder in same_seed])
    firsts = iter(same_side[0] for same_side in by_side)
    pairs: dict[int, MethodRuns] = {}
    for baseline in baselines:
        alone = next(firsts)
        pairs |= {number: MethodRuns(next(firsts), alone) for number in baseline.methods}
    remarks += describe_steps(names, [Run(pairs[number].run) for number in range(len(methods))])
    teachers = {run.folder.resolve(): run.folder for one in methods for run in teacher_runs(one.config)}
    out = Path(out) if out else Path(methods[0].config["trainer"]["default_root_dir"]) / _folder_name(names)
    return out, compare_runs(
        [*folders, *teachers.values()], out, remarks=remarks, methods=[pairs[number] for number in range(len(methods))]
    )


def _folder_name(names: Sequence[str]) -> str:
    name = "_vs_".join(names)
    return f"{name if len(name) < _MOST_LETTERS else f'{names[0]}_vs_{len(names) - 1}_others'}_comparison"


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
    if about := describe_baseline(config["model"]):
        print(f"baseline: {about}")
    folders = _fit_all([(run_config, data) for run_config in plan])
    teachers = teacher_runs(config)
    comparison = compare_runs([*folders, *(run.folder for run in teachers)], out, remarks=remarks)
    runs = [*map(Run, folders)]
    return Experiment(runs[:seeds], runs[seeds:], teachers, out, comparison)


def _fit_all(plan: Sequence[tuple[Config, SemiSupervisedDataModule]]) -> list[Path]:
    """Return the folders of the runs of all configs, each on its data; fit and test those that are missing."""
    console = Console()
    folders = []
    for number, (config, data) in enumerate(plan, 1):
        name, seed = config["name"], config["seed_everything"]
        console.print(f"[bold]\\[{number}/{len(plan)}] {name}, seed {seed}[/bold]")
        folders.append(fit_and_test(config, data))
    return folders


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
