"""Tune a method and its baseline alike: the same number of trials, on the same samples, none of them for test."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_lightning.cli.baseline import baseline_of
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.cli.tuning.default_space import default_space, with_written_loss
from kd_lightning.cli.tuning.judge import Judge, find_judge
from kd_lightning.cli.tuning.keys import value_at
from kd_lightning.cli.tuning.progress import counts_text, time_text, trial_line, value_text, values_text
from kd_lightning.cli.tuning.space import (
    Setting,
    apply_values,
    for_baseline,
    read_space,
    write_space,
)
from kd_lightning.cli.tuning.study import Ended, Search, Started, require_optuna
from kd_lightning.cli.tuning.trial import Metric, TrialFailedError, TrialPrunedError, mean_over_folds, run_trial
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import hash_files, identity_of, seeds_of

_POLL = 1.0
"""Seconds between two looks at the trials of other processes."""


class Tuned(NamedTuple):
    """The config of a method and that of its baseline, with the settings that were chosen.

    Attributes:
        method: Config of the method, with its soft loss written out.
        alone: Config of the method from which :func:`~kd_lightning.cli.baseline.baseline_of` makes the baseline.
        remarks: Lines about the search.
    """

    method: Config
    alone: Config
    remarks: list[str]


class _Side(NamedTuple):
    """The method, or its baseline."""

    search: Search
    is_alone: bool


def tune(config: Config, data: SemiSupervisedDataModule, total: int, space_file: Path | None, out: Path) -> Tuned:
    """Search for the settings of a config and of its baseline, and return both with the best ones.

    Args:
        config: The whole config of the method, with the seed of the search.
        data: Its datamodule.
        total: Number of trials of each, those of earlier calls included.
        space_file: YAML file of the search space. None means the default space.
        out: Folder of the experiment. The search lies in ``tuning/`` there.

    Raises:
        InputError: If Optuna is not installed, if the space is empty, if there are too few labels to decide, or if all
            trials fail.
    """
    require_optuna()
    config = with_written_loss(config)
    settings, notes = (read_space(space_file, config), []) if space_file else default_space(config)
    if not settings:
        raise InputError("--tune: the config has no key of the default space; name keys and values by --space FILE")
    folder = out / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    judge = find_judge(data, folder, config["trainer"].get("limit_val_batches"))
    metric = metric_of(config, data, judge)
    shared = for_baseline(settings, config)
    write_space(settings, folder / "space.yaml")
    for line in [*_space_lines(settings, shared), *notes, judge.text]:
        print(f"tune: {line}")
    sides = [
        _Side(_make_search(config, data, judge, metric, folder, total, shared, is_alone=True), True),
        _Side(_make_search(config, data, judge, metric, folder, total, settings, is_alone=False), False),
    ]
    _run(sides, config, judge, metric)
    return _choose(sides, config, judge, metric)


def metric_of(config: Config, data: SemiSupervisedDataModule, judge: Judge) -> Metric:
    """Return the metric that decides: the monitor of the checkpoints, or without one accuracy, or the loss.

    A run of a config without validation deploys its last weights.

    Raises:
        InputError: If the monitor is one of training.
    """
    checkpoint = config["checkpoint"]
    monitor = checkpoint["monitor"]
    if monitor is None:
        targets = data.samples.parts.train.targets
        is_regression = targets.is_floating_point() and not data.samples.dense
        arguments = config["model"].get("init_args") or {}
        if arguments.get("task") == "regression" or ("task" not in arguments and is_regression):
            return Metric("val/loss", "min", best=False)
        return Metric("val/accuracy", "max", best=False)
    if str(monitor).startswith("train"):
        raise InputError(f"--tune needs a metric of validation as checkpoint.monitor, got {monitor}")
    return Metric(monitor, checkpoint["mode"], best=judge.has_validation)


def _make_search(
    config: Config,
    data: SemiSupervisedDataModule,
    judge: Judge,
    metric: Metric,
    folder: Path,
    total: int,
    space: Sequence[Setting],
    *,
    is_alone: bool,
) -> Search:
    mine = parse_config(baseline_of(config), "experiment") if is_alone else config
    identity: list[Any] = [identity_of(mine, hash_files(mine)), seeds_of(mine), data.samples.hashes]
    identity += [{one.path: one.as_yaml() for one in space}, metric.name, metric.mode, metric.best]
    identity += [judge.samples, judge.sizes, [path.parent.name for path in judge.splits]]
    own = {one.path: value_at(config, one.path) for one in space}
    return Search(folder, mine["name"], identity, space, own, metric, total)


def _space_lines(settings: Sequence[Setting], shared: Sequence[Setting]) -> list[str]:
    lines = []
    for one in settings:
        values = f"one of {', '.join(map(str, one.values))}" if one.values else f"{one.low:.4g} to {one.high:.4g}"
        lines.append(f"{one.path}: {values}{', log' * one.log}" + ("" if one in shared else " (the method alone)"))
    if not shared:
        lines.append("the space has no key of the baseline, which has its own values")
    return lines


# The trials.


def _run(sides: Sequence[_Side], config: Config, judge: Judge, metric: Metric) -> None:
    """Run trials until all searches are done; then wait for those of other processes."""
    for side in sides:
        if before := side.search.ended():
            print(f"tune: {len(before)} of {side.search.total} trials of {side.search.name} are finished")
    waits, warn = False, True
    while not all(side.search.is_done for side in sides):
        begun = _start(sides)
        if begun is None:
            if not waits:
                running = sum(side.search.running() for side in sides)
                print(f"tune: waiting for {running} trial{'s' * (running != 1)} of other processes", flush=True)
            waits = True
            time.sleep(_POLL)
            continue
        ended = _run_one(*begun, config, judge, metric, warn)
        warn = False
        if ended is not None:
            search, left = begun[0].search, _time_left(sides)
            print(trial_line(search.name, search.total, metric, ended, _best_or_none(search), left), flush=True)


def _start(sides: Sequence[_Side]) -> tuple[_Side, Started] | None:
    """Begin a trial of the first search that needs one; None if none does."""
    for side in sides:
        if (started := side.search.start()) is not None:
            return side, started
    return None


def _run_one(side: _Side, started: Started, config: Config, judge: Judge, metric: Metric, warn: bool) -> Ended | None:
    """Run a trial, and return how it has ended."""
    search = side.search
    try:
        if (same := search.same_as(started)) is not None and same.value is not None:
            search.end(started, same.folds, same.value)
        else:
            method = apply_values(config, started.values)
            folds = run_trial(
                method,
                judge,
                metric,
                started.folder,
                lambda step, value: search.report(started, step, value),
                alone=side.is_alone,
                warn=warn,
            )
            search.end(started, folds, mean_over_folds(folds, judge))
    except TrialPrunedError as pruned:
        search.prune(started, str(pruned))
    except TrialFailedError as failed:
        if started.own and not failed.trained:  # the config itself is wrong
            search.stop(started)
            raise failed.__cause__ or InputError(str(failed)) from failed
        search.fail(started, str(failed))
    except BaseException as error:
        search.stop(started)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print("tune: stopped; the same command goes on", flush=True)
        raise
    finally:
        gc.collect()  # networks on the device, which a trainer and its callbacks hold in a circle
    return next((one for one in search.ended() if one.number == started.number), None)


def _best_or_none(search: Search) -> Ended | None:
    try:
        return search.best()
    except InputError:
        return None


def _time_left(sides: Sequence[_Side]) -> float | None:
    """Return the seconds until all searches are done, by the mean time of their trials."""
    ended = [[one.seconds for one in side.search.ended()] for side in sides]
    times = [seconds for part in ended for seconds in part]
    if not times:
        return None
    mean = sum(times) / len(times)
    left = sum(
        (side.search.total - len(part)) * (sum(part) / len(part) if part else mean)
        for side, part in zip(sides, ended, strict=True)
    )
    return left / max(1, sum(side.search.running() for side in sides) + 1) if left else 0.0


# What is chosen.


def _choose(sides: Sequence[_Side], config: Config, judge: Judge, metric: Metric) -> Tuned:
    """Return both configs with their best settings, and lines about them."""
    chosen: dict[bool, Config] = {}
    texts = []
    for side in sides:
        best, ended = side.search.best(), side.search.ended()
        # parsed, so that it is the config that its run saves
        chosen[side.is_alone] = parse_config(apply_values(config, best.values), "experiment")
        seconds = sum(one.seconds for one in ended)
        text = f"{side.search.name}: {value_text(best, judge, metric)} in trial {best.number} of "
        texts.append(f"{text}{counts_text(ended)}, {time_text(seconds)}: {values_text(best.values)}")
        print(f"tune: {texts[-1]}")
    numbers = " and ".join(dict.fromkeys(str(side.search.total) for side in sides))
    seed = seeds_of(config)[1]
    is_transductive = (config["data"].get("init_args") or {}).get("unlabeled") == "test"
    without = "without any label of a test sample" if is_transductive else "without any test sample"
    remarks = [
        f"Both were tuned by {numbers} trials each, at seed {seed}, {without}: {judge.text}.",
        *(f"{text}." for text in texts),
        "The best value of several trials is optimistic; the figures above are not, since they are of test samples.",
    ]
    return Tuned(chosen[False], chosen[True], remarks)
