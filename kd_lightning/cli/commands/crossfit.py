"""``crossfit TEACHER_CONFIG``: train teachers that each lack a fold of the labels; each teaches what it lacks."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence, Set
from pathlib import Path

from kd_lightning.cli.cross_fitting import (
    build_data,
    fit_folds,
    labeled_classes,
    predict_fold,
    require_one_process,
    stratified_folds,
    weight_files,
    whole_groups,
)
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.identity import base_content
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError
from kd_lightning.runs.run import Run, run_of
from kd_lightning.runs.student import has_student
from kd_lightning.teachers.cross_fit import CROSS_FIT, CrossFit, Fold
from kd_lightning.teachers.intervals import share_interval


def main(options: Namespace) -> None:
    """Fit the teachers that are missing, write the file, and print the lines for the student's config."""
    config = parse_config(options.overrides, "crossfit")
    file = cross_fit(config, options.folds)
    print(describe(CrossFit.load(file), config))
    print(f"the model of a student's config takes them all as its teacher:\n\n{yaml_lines(file)}")


def cross_fit(config: Config, folds: int) -> Path:
    """Train a config's student once for each fold of its labels, without the labels of the fold.

    The labeled samples are split into folds: stratified by class where each has one, whole groups where the data have
    some, and copies of one content together. Finished fits are not repeated.

    Args:
        config: The config, as for ``fit``.
        folds: Number of folds, at least 2.

    Returns:
        The file, ``<root>/<name>_crossfit/crossfit.json``. :class:`~kd_lightning.CrossFittedTeacher` reads it.

    Raises:
        InputError: If there are several processes, no student, too few labels, coarse labels, a dataset that returns
            another item each time, or first weights of a run that was trained on the labels.
    """
    device = require_one_process(config, "crossfit", "--trainer.devices 1")
    if not has_student(config["model"]):
        raise InputError(f"crossfit needs a model with a student, {config['model']['class_path']} has none")
    data = build_data(config, "crossfit")
    split, task = data.split, (config["model"].get("init_args") or {}).get("task", "multiclass")
    assert split is not None  # it is set up
    if data.coarse is not None or any(row[2] == "coarse" for row in split.label_rows):
        raise InputError("crossfit: all teachers would see coarse labels; leave out coarse, and rows of that kind")
    names = data.identities("train")
    contents = [*map(base_content, names.contents)]
    if not all(contents[index] for index in split.labeled):
        raise InputError("crossfit names samples by content, but the dataset returns another item each time")
    _check_first_weights(config, data, {contents[index] for index in split.labeled})
    classes = None if data.samples.dense else labeled_classes(data)
    strata = dict.fromkeys(split.labeled, "samples with a label") if classes is None else classes
    held_out = stratified_folds(strata, folds, split.seed, "--folds", whole_groups(data, [*strata]))
    root = Path(config["trainer"]["default_root_dir"]) / f"{config['name']}_crossfit"
    found, right = [], 0 if classes is not None and task == "multiclass" else None
    fits = fit_folds(config, split, held_out, root / f"{folds}_folds", data.samples.hashes)
    class_names: list[str] | None = None
    for run, fold in zip(fits, held_out, strict=True):
        _check_unseen(run, data, contents, fold)
        if right is not None:
            predicted = predict_fold(run, data, fold, device, "crossfit").argmax(dim=1)
            right += int((predicted == data.visible_labels()[fold]).sum())
        class_names = run.class_names
        place = Path(os.path.relpath(run.folder.resolve(), root.resolve())).as_posix()
        paths, own = [names.paths[n] for n in fold], [contents[n] for n in fold]
        found.append(Fold(place, run.weights_hash or "", paths, own))
    CrossFit(task, found, right, class_names).save(root / CROSS_FIT)
    return root / CROSS_FIT


def _check_first_weights(config: Config, data: SemiSupervisedDataModule, labeled: Set[str]) -> None:
    """Raise InputError if weights that all teachers read, or learn from, are of a run that was trained on the labels.

    Weights that lie in no run cannot be checked; :func:`describe` names them.
    """
    for file in weight_files(config):
        run = run_of(Path(file))
        if run is None or run.split_file is None:
            continue
        try:
            split = Split.load(run.split_file, data.samples.parts.train.targets, data.samples.label_contents)
        except InputError:  # of other data
            continue
        names = None if split.samples is None else split.samples.contents
        seen = {base_content(names[n]) for n in split.labeled if n < len(names)} if names else set()
        if both := seen & labeled:
            raise InputError(
                f"crossfit: {file} was trained on {len(both)} of the {len(labeled)} labels, so that all teachers would "
                "have seen them; begin with other weights"
            )


def _check_unseen(run: Run, data: SemiSupervisedDataModule, contents: Sequence[str], fold: Sequence[int]) -> None:
    """Raise InputError if a run was trained on a label of its fold, by its own split."""
    if run.split_file is None or run.weights_hash is None:
        raise InputError(f"crossfit: {run.folder} has no split or no weights; delete it, and start again")
    samples = data.samples
    done = Split.load(run.split_file, samples.parts.train.targets, samples.label_contents)
    same = done.samples is not None and [*map(base_content, done.samples.contents)] == contents[: samples.training]
    seen = {contents[index] for index in done.labeled} & {contents[index] for index in fold}
    if seen or not same:
        raise InputError(f"crossfit: {run.folder} was trained on labels of its fold, or on other samples; delete it")


def describe(fitted: CrossFit, config: Config) -> str:
    """Return the out-of-fold accuracy in one line, and which weights all teachers read."""
    count, n = len(fitted.folds), fitted.samples
    if fitted.right is None:
        text = f"{count} teachers; out-of-fold accuracy is measured for task: multiclass with one class a sample alone"
    else:
        low, high = share_interval(fitted.right / n, n)
        text = (
            f"out-of-fold accuracy {fitted.right / n:.1%} of {n} labels (95% interval {low:.1%} to {high:.1%}), each "
        )
        text += f"by the one of {count} teachers that was trained without it"
    if files := ", ".join(weight_files(config)):
        text += f"\nall teachers read {files}: if these weights were trained on the labels, they have seen them"
    return text


def yaml_lines(file: Path) -> str:
    """Return the lines of YAML that give a student the teachers of a file."""
    return (
        f"  teacher:\n    class_path: kd_lightning.CrossFittedTeacher\n    init_args: {{path: {json.dumps(str(file))}}}"
    )
