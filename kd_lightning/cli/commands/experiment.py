"""``experiment CONFIG --seeds N``: train a student with a method and without it, over seeds, and compare."""

from __future__ import annotations

import inspect
import math
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from kd_lightning.cli.fit_once import config_file, find_fits, fit_once
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.features.simkd import SimKDStudent
from kd_lightning.modules import DistillationTokenModule, FeatureDistillModule, SimKDModule, SupervisedModule
from kd_lightning.report.write import write_report
from kd_lightning.runs.build import build
from kd_lightning.runs.class_paths import find_class
from kd_lightning.runs.figures.comparison import Comparison, compare_runs
from kd_lightning.runs.figures.log_figure import only_warn
from kd_lightning.runs.run import Run
from kd_lightning.runs.student import build_student, has_student, is_taught
from kd_lightning.runs.teacher_runs import teacher_runs

_METHOD_CALLBACKS = ("SoftWeightAnnealing", "PseudoLabelRefresh", "BaselineMonitor")
"""Callbacks that the baseline does without: it learns from labels alone."""


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


def main(options: Namespace) -> None:
    """Run the fits that are missing, compare all, and write the report."""
    done = run_experiment(options.overrides, options.seeds, options.out)
    with only_warn("the report"):
        print(f"report: {write_report([done.out], comparison=done.comparison)}")


def run_experiment(args: list[str], seeds: int, out: str | Path | None = None) -> Experiment:
    """Train a method and its baseline over seeds, test and compare them. Finished fits are not repeated.

    Args:
        args: Arguments of ``fit``.
        seeds: Number of seeds, at least 1.
        out: Folder of the comparison. Default: None, which means ``<root>/<name>_comparison``.

    Raises:
        InputError: If the config has no SemiSupervisedDataModule or no student, or takes several processes.
    """
    config = parse_config(args, "experiment")
    machine = {name: config["trainer"][name] for name in ("accelerator", "devices", "num_nodes")}
    processes = Trainer(**machine, logger=False).world_size
    if processes > 1:
        raise InputError(f"experiment runs on one process, got {processes}; set --trainer.devices 1")
    config["trainer"]["enable_model_summary"] = False
    config["checkpoint"]["dirpath"] = None  # each run has checkpoints of its own
    seeded = [with_seed(config, seed) for seed in range(seeds)]
    # parsed, too, so that a baseline's config is the one that its run saves
    plan = [parse_config(baseline_of(method), "experiment") for method in seeded] + seeded

    data = build(LightningDataModule, config["data"])
    assert isinstance(data, SemiSupervisedDataModule)  # the plan has checked it
    console = Console()
    if about := _describe_baseline(config["model"]):
        console.print(f"baseline: {about}")
    folders = []
    for number, run_config in enumerate(plan, 1):
        name, seed = run_config["name"], run_config["seed_everything"]
        console.print(f"[bold]\\[{number}/{len(plan)}] {name}, seed {seed}[/bold]")
        folders.append(fit_and_test(run_config, data))
    teachers = teacher_runs(config)
    root = Path(config["trainer"]["default_root_dir"])
    out = Path(out) if out else root / f"{config['name']}_comparison"
    comparison = compare_runs([*folders, *(run.folder for run in teachers)], out)
    runs = [*map(Run, folders)]
    return Experiment(runs[:seeds], runs[seeds:], teachers, out, comparison)


def with_seed(config: Config, seed: int) -> Config:
    """Return the config with this seed for weights, split, order and augmentation."""
    config = deepcopy(config)
    config["seed_everything"] = seed
    config["data"].setdefault("init_args", {})["seed"] = seed
    return config


def baseline_of(method: Config) -> Config:
    """Return the config of the same student, trained on the same labels without a teacher and unlabeled images.

    Steps, augmentation and schedule are the same. Its epoch has as many steps as the method's: each labeled image
    appears in several views. Of a SimKDStudent the network inside is trained, with its own classifier. A student with
    two heads (DeiT) stays as it is: their mean learns from the labels.
    """
    baseline = deepcopy(method)
    data = build(LightningDataModule, method["data"])
    if not isinstance(data, SemiSupervisedDataModule):
        raise InputError(f"experiment needs data: SemiSupervisedDataModule, got {type(data).__name__}")
    data.prepare_data()
    batches = len(data.train_dataloader())
    limit = method["trainer"].get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    arguments = method["model"]["init_args"]
    if arguments.get("hint_epochs") and arguments.get("lr_scheduler"):
        rank_zero_warn("lr_scheduler is meant for stage 2; the baseline follows it over all epochs")
    baseline["name"] = f"{method['name']}_alone"
    baseline["model"] = _model_alone(method["model"])
    baseline["data"]["init_args"] |= {"unlabeled": "none", "labeled_batch_size": None, "strong_transform": None}
    alone = build(LightningDataModule, baseline["data"])  # its samples have fine or coarse labels
    alone.prepare_data()
    samples = len(alone.train_dataloader().dataset)
    baseline["data"]["init_args"]["views_per_epoch"] = math.ceil(batches * data.batch_size / samples)
    baseline["trainer"]["limit_train_batches"] = batches
    callbacks = baseline["trainer"].get("callbacks") or []
    baseline["trainer"]["callbacks"] = [
        c for c in callbacks if c["class_path"].rsplit(".", 1)[-1] not in _METHOD_CALLBACKS
    ]
    return baseline


def _model_alone(model: Config) -> Config:
    """Return the config of a module without its teacher."""
    arguments = model["init_args"]
    if is_taught(model):
        alone: Config = deepcopy(arguments["module"])
        return alone
    if _is_a(model, FeatureDistillModule):
        name = model["class_path"].rpartition(".")[2]
        raise InputError(
            f"experiment compares a student with itself trained on labels, and {name} has none: fit "
            "it, then name a config that trains its student.safetensors on with labels"
        )
    if not has_student(model):
        raise InputError(f"experiment needs a model with a student, {model['class_path']} has none")
    shared = inspect.signature(SupervisedModule.__init__).parameters
    shared_arguments = {name: deepcopy(arguments[name]) for name in shared if name in arguments}
    student = shared_arguments["student"]
    if _is_a(student, SimKDStudent):
        shared_arguments["student"] = student["init_args"]["student"]
    elif _is_a(model, SimKDModule):
        raise InputError(
            "experiment trains the network in model.student alone, too, so this must be a SimKDStudent itself, got "
            f"{student.get('class_path')}"
        )
    if _is_a(model, DistillationTokenModule) and not hasattr(build_student(model), "set_distilled_training"):
        raise InputError(
            "experiment needs a student that returns the mean of its two heads unless set_distilled_training(True) is "
            f"called, as timm's distilled models do, got {student.get('class_path')}"
        )
    if start := arguments.get("initial_weights"):  # the first weights are no part of the method
        loaded = {"model": shared_arguments["student"], "path": start}
        shared_arguments["student"] = {"class_path": "kd_lightning.load_weights", "init_args": loaded}
    return {"class_path": "kd_lightning.SupervisedModule", "init_args": shared_arguments}


def _is_a(spec: Config, kind: type) -> bool:
    """Return whether the config of an object is that of a class, or of a subclass of it."""
    found = find_class(spec.get("class_path"))
    return isinstance(found, type) and issubclass(found, kind)


def _describe_baseline(model: Config) -> str | None:
    """Describe the baseline's network, where it is not the method's, or is trained in another way."""
    if _is_a((model.get("init_args") or {}).get("student") or {}, SimKDStudent):
        return "the network in the SimKDStudent, with its own classifier, trained on the labels"
    if _is_a(model, DistillationTokenModule):
        return "the same network with two heads; their mean is trained on the labels"
    return None


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
