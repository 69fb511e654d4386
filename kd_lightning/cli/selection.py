"""Which run and which weights a command line means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import hash_files, identity_of, seeds_of
from kd_lightning.runs.run import Run, find_runs, run_of

Config = Mapping[str, Any]
_SPLIT_KEYS = {"class_path", "source", "labeled", "labeled_at_most", "val_size", "seed", "label_file", "duplicates"}
_SPLIT_KEYS |= {"correct_val", "group"}


@dataclass(frozen=True)
class Selection:
    """The weights of a command.

    Attributes:
        run: The run that goes on, or is evaluated. None means a new run.
        checkpoint: The checkpoint to load. None means no checkpoint.
        weights: The file of a student's weights to load, if there is no checkpoint of them.
        origin: The run that trained the evaluated weights, also if its config is another one. None means that they lie
            outside of any run.
        own_split: Whether the split of that run decides which samples are evaluated. If not, the config does.
    """

    run: Run | None = None
    checkpoint: Path | None = None
    weights: Path | None = None
    origin: Run | None = None
    own_split: bool = True


def select_for_fit(given: str | None, root: Path, config: Config) -> Selection:
    """Select the checkpoint from which a fit resumes.

    Args:
        given: ``ckpt_path``: a checkpoint's path, or ``last`` or ``best`` of the newest run of this config and seed;
            the newest run of this name must have this config, with any seed. None means a new run.
        root: The folder of all runs.
        config: The config, with the run's name.

    Raises:
        InputError: If there is no such run or checkpoint, or the newest run of this name has another config.
    """
    if given in (None, "hpc", "registry"):
        return Selection()
    files = hash_files(config)
    if given in ("last", "best"):
        runs = find_runs(root, config["name"])
        if not runs:
            raise InputError(f"ckpt_path: {given}, but there is no run {config['name']!r} below {root}")
        differing = runs[0].differing_keys(config, files)
        same_but_seeds = runs[0].identity == identity_of(config, files)
        found = next((run for run in runs if same_but_seeds and not run.differing_keys(config, files)), runs[0])
        if differing and found is runs[0]:
            raise InputError(
                f"ckpt_path: {given}, but {runs[0].folder}, the newest run of this name, has another config: "
                f"{'; '.join(differing)}; correct the config, or name a checkpoint's file to begin a new run with it"
            )
        return Selection(found, found.last_checkpoint() if given == "last" else found.best_checkpoint())
    path = _existing(str(given))
    run = run_of(path)
    if run is not None and (differing := run.differing_keys(config, files)):
        rank_zero_info(f"a new run starts with {path}, since {run.folder} has another config: {'; '.join(differing)}")
        run = None
    return Selection(run, path)


def select_for_evaluation(given: str | None, root: Path, config: Config, *, both_seeds: bool = False) -> Selection:
    """Select the weights that are validated, tested or used for predictions.

    Args:
        given: ``ckpt_path``: ``last`` or ``best`` of the newest run of this config and its seeds, or the path of a
            checkpoint or of deployed weights. None means the deployed weights of the newest run of this config and its
            seeds, or if no run has this name, the weights that the config itself builds.
        root: The folder of all runs.
        config: The config, with the run's name.
        both_seeds: Whether the run must have both seeds of the config. Default: False, which means that if none has,
            the newest one counts that has ``seed_everything`` as both, as ``experiment`` sets them.

    Raises:
        InputError: If there is no such run or checkpoint.
    """
    if given not in (None, "last", "best"):
        path = _existing(str(given))
        run = run_of(path)
        if path.suffix == ".safetensors":
            selection = Selection(weights=path) if run is None else _deployed(run)
        else:
            selection = Selection(run, path)
        if run is not None and (differing := run.differing_keys(config)):
            rank_zero_info(f"no result is written to {run.folder}, which has another config: {'; '.join(differing)}")
            own_split = not any(map(_decides_split, differing))
            return Selection(None, selection.checkpoint, selection.weights, run, own_split)
        return replace(selection, origin=run)
    runs = find_runs(root, config["name"])
    same = [run for run in runs if not run.differing_keys(config)]
    if not same and not both_seeds:
        same = _of_experiment(runs, config)
    what = "the deployed weights" if given is None else f"ckpt_path: {given}"
    if runs and not same:
        nearest = min(runs, key=lambda run: len(run.differing_keys(config)))  # the newest of several
        raise InputError(
            f"{what}: no run below {root} has this config; {nearest.folder}, the nearest of its name, has another: "
            f"{'; '.join(nearest.differing_keys(config))}; correct the config, or name a file with --ckpt_path"
        )
    if given is None and not same:
        rank_zero_info(f"no run {config['name']!r} lies below {root}: the weights are those that the config builds")
        return Selection()
    if given is None:
        run = next((run for run in same if run.weights.is_file() or not run.has_student), same[0])
        return replace(_deployed(run), origin=run)
    if not same:
        raise InputError(f"{what}, but there is no run {config['name']!r} below {root}")
    run = next((run for run in same if run.checkpoints()), same[0])
    return Selection(run, run.last_checkpoint() if given == "last" else run.best_checkpoint(), origin=run)


def _of_experiment(runs: Sequence[Run], config: Config) -> list[Run]:
    """Return the runs of a config that differ from it in the seed of the data alone, which is that of training."""
    seed, seed_of_data = seeds_of(config)
    if not isinstance(seed, int):
        return []
    found = [run for run in runs if run.seeds == (seed, seed) and len(run.differing_keys(config)) == 1]
    if found:
        rank_zero_info(f"data.init_args.seed: {seed}, as experiment sets it: no run has {seed} and {seed_of_data}")
    return found


def _decides_split(difference: str) -> bool:
    """Return whether the key of a difference decides which samples are labeled and for validation."""
    key = difference.partition(":")[0].removeprefix("data.").removeprefix("init_args.")
    return difference.startswith("data.") and re.split(r"[.\[]", key)[0] in _SPLIT_KEYS


def _deployed(run: Run) -> Selection:
    """Return the deployed weights of a run, with the checkpoint that holds them if it is still there."""
    if not run.has_student:  # any LightningModule: what its checkpoint callback selected
        selected = run.selected_checkpoint()
        rank_zero_info(f"the weights are those of {selected}")
        return Selection(run, selected)
    if not run.weights.is_file():
        text = "--ckpt_path last in fit resumes it" if run.checkpoints() else "it ended before its first checkpoint"
        raise InputError(f"the deployed weights: {run.folder} is not finished, so it has no {run.weights.name}; {text}")
    checkpoint = run.deployed_checkpoint()
    rank_zero_info(f"the weights are the deployed ones, {run.weights} ({run.metadata.get('weights')})")
    return Selection(run, checkpoint, run.weights if checkpoint is None else None)


def _existing(given: str) -> Path:
    path = Path(given)
    if not path.is_file():
        raise InputError(f"ckpt_path: no checkpoint at {given}; allowed: a file, last, best")
    return path
