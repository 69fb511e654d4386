"""Whether methods may be compared: samples that must be the same, and settings whose differences are named."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kd_lightning.cli.methods.read import MethodConfig, naming
from kd_lightning.cli.parse import Config
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import differing_keys
from kd_lightning.runs.run import Run
from kd_lightning.runs.student import build_student

_SPLIT_KEYS = {"source", "labeled", "labeled_at_most", "val_size", "label_file", "duplicates", "correct_val", "group"}
_LABEL_KEYS = {"noisy", "label_noise", "coarse"}
_MOST_KEYS = 3
_PARTS = {"labeled": "labeled", "val": "validation", "test": "test"}


def check_same_samples(methods: Sequence[MethodConfig], data: Sequence[SemiSupervisedDataModule]) -> None:
    """Check before training that all methods have the same labeled, validation and test samples, and the same labels.

    Samples are compared by content, and not by index.

    Args:
        methods: The methods, all with the same seed.
        data: The datamodule of each.

    Raises:
        InputError: If samples or labels differ; the message names the key. Also if the tasks differ.
    """
    found = []
    for method, one in zip(methods, data, strict=True):
        with naming(method.source):
            found.append(_samples_of(one))
    first = methods[0]
    for method, mine in zip(methods[1:], found[1:], strict=True):
        for part, text in _PARTS.items():
            if mine[part] != found[0][part]:
                counts = [len(one[part]) for one in (mine, found[0])]
                counted = f" ({counts[0]}, not {counts[1]})" if counts[0] != counts[1] else ""
                raise InputError(
                    f"{method.source} has other {text} samples or labels than {first.source}{counted}: "
                    f"{_split_keys(method.config, first.config)}; experiment compares methods on one split"
                )
        tasks = [(one.config["model"].get("init_args") or {}).get("task") for one in (method, first)]
        if tasks[0] != tasks[1] and None not in tasks:
            raise InputError(
                f"{method.source} has another metric than {first.source}: model.task: {tasks[0]}, not {tasks[1]}"
            )


def _samples_of(data: SemiSupervisedDataModule) -> dict[str, list[Any]]:
    """Return name and label of the samples of each part, sorted."""
    data.prepare_data()
    data.setup("fit")
    split, samples = data.split, data.samples
    assert split is not None
    if samples.dense:
        visible = validation = samples.label_contents or []
    else:
        visible, validation = data.visible_labels().tolist(), data.validation_labels().tolist()
    contents = samples.all_identities.contents

    def named(indices: Sequence[int], labels: Sequence[Any]) -> list[Any]:
        return sorted((contents[n] or str(n), str(labels[n])) for n in indices)

    test = samples.parts.test
    rows = [] if test is None else [(name, samples.test_hash) for name in samples.test_identities.contents]
    return {"labeled": named(split.labeled, visible), "val": named(split.val, validation), "test": rows}


def _split_keys(mine: Config, theirs: Config) -> str:
    """Return the keys of the data that decide which samples and labels a method has, where they differ."""
    found = differing_keys({"data": mine["data"]}, {"data": theirs["data"]})
    texts = [text.replace(".init_args", "") for text in found]
    keys = {text: re.split(r"[.:\[]", text)[1] for text in texts}
    decisive = [text for text, key in keys.items() if key in _SPLIT_KEYS | _LABEL_KEYS]
    return short_list(decisive or texts) or "their sources hold other samples"


def short_list(texts: Sequence[str]) -> str:
    """Join texts, and count those past the third."""
    more = len(texts) - _MOST_KEYS
    return ", ".join([*texts[:_MOST_KEYS], f"{more} more"] if more > 0 else texts)


def check_same_splits(runs: Sequence[Run]) -> None:
    """Check after training that the runs of one seed were split alike, by the ``split.json`` that each has written.

    Raises:
        InputError: If the labeled or the validation samples of two runs differ.
    """
    first: dict[str, Any] = {}
    for run in runs:
        mine = _split_of(run)
        first = first or mine
        if other := [text for part, text in _PARTS.items() if part in mine and mine[part] != first[part]]:
            raise InputError(
                f"{run.folder} was trained with other {' and '.join(other)} samples than {runs[0].folder}, by their "
                "split.json; delete the older one, and call experiment again"
            )


def _split_of(run: Run) -> dict[str, Any]:
    """Return the samples of the parts that a run's ``split.json`` names, with the rows of label files."""
    path = run.split_file
    try:
        split = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        names = [name for part in ("samples", "pool") for name in (split.get(part) or {}).get("contents", ())]
        rows = {row[0]: row[1:] for row in split.get("label_rows", ())}
        return {
            part: sorted(json.dumps([names[n] if names else n, rows.get(n)]) for n in split[part])
            for part in ("labeled", "val")
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{run.folder} has no readable split.json, so its samples cannot be compared") from error


def describe_differences(methods: Sequence[MethodConfig]) -> list[str]:
    """Return a line for each method with another student than the first, and one if weights are selected otherwise."""
    lines = []
    first = methods[0]
    for method in methods[1:]:
        mine, theirs = (_student_of(one.config) for one in (method, first))
        if keys := differing_keys({"student": mine}, {"student": theirs}):
            text = short_list([key.replace(".init_args", "") for key in keys])
            counts = [_trainable(one.config) for one in (method, first)]
            if None not in counts:
                text += "; {:,} trainable parameters, not {:,}".format(*counts)
            name = method.config["name"]
            lines.append(f"{name} has another student than {first.config['name']}: {text}.")
    monitors: dict[str, list[str]] = defaultdict(list)
    for method in methods:
        monitor = method.config["checkpoint"]["monitor"]
        text = "the last weights" if monitor is None else f"the weights with the best {monitor}"
        monitors[text].append(method.config["name"])
    if len(monitors) > 1:
        lines.append(f"Deployed are {', '.join(f'{text} of {join(names)}' for text, names in monitors.items())}.")
    return lines


def describe_steps(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Return a line with the number of optimiser steps of each method, if they differ."""
    steps = [run.state.get("step") for run in runs]
    if len({*steps}) == 1:
        return []
    texts = [
        f"{name} {'unknown' if step is None else format(step, ',')}" for name, step in zip(names, steps, strict=True)
    ]
    return [f"The methods have other numbers of steps: {', '.join(texts)}."]


def join(names: Sequence[str]) -> str:
    """Join names for a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _student_of(config: Config) -> Any:
    arguments: Mapping[str, Any] = config["model"].get("init_args") or {}
    return arguments.get("student") or arguments.get("module") or config["model"]


def _trainable(config: Config) -> int | None:
    """Return the number of parameters of a student that require a gradient; None if it cannot be built."""
    try:
        student = build_student(config["model"])
    except InputError:
        return None
    return sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
