"""Which lengths of a config follow the length of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kd_lightning.runs.class_paths import walk_config

Config = dict[str, Any]
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
"""Keys that may hold the length of a run."""
_OF_SCHEDULES = {"T_max", "T_0", "epochs", "total_steps", "length", "total_iters", "step_size", "milestones"}
_OF_MODULES = {"hint_epochs", "warmup_epochs"}
_OF_CALLBACKS = {"begin_epoch", "end_epoch", "warmup_epochs"}
_DIVISORS = (4, 2, 1)


def length_of(config: Config) -> tuple[str, int] | None:
    """Return the key and the value of the length of a run; None if it has none, or two."""
    trainer = config["trainer"]
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    has_epochs, has_steps = (isinstance(value, int) and value > 0 for value in (epochs, steps))
    if has_epochs == has_steps:
        return None
    return (LENGTHS[0], epochs) if has_epochs else (LENGTHS[1], steps)


def shorter_lengths(config: Config) -> tuple[int, ...]:
    """Return a quarter, half and all of the length of a run, in whole periods of validation; empty if all are one."""
    found = length_of(config)
    if found is None:
        return ()
    path, length = found
    every = config["trainer"].get("check_val_every_n_epoch") or 1
    period = every if path == LENGTHS[0] and length % every == 0 else 1
    lengths = {min(length, math.ceil(length / part / period) * period) for part in _DIVISORS}
    return tuple(sorted(lengths)) if len(lengths) > 1 else ()


def scale_lengths(config: Config, factor: float) -> None:
    """Scale what is written in epochs or steps of the run, in place, so that schedules keep their shape."""
    for arguments, names in _holders(config):
        for name in names:
            arguments[name] = _scaled(arguments[name], factor)


def following_keys(config: Config) -> list[str]:
    """Return the names of the arguments that :func:`scale_lengths` changes."""
    return sorted({name for arguments, names in _holders(config) for name in names if arguments[name]})


def _holders(config: Config) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Yield the arguments of the module, its schedules and the callbacks, each with the names of those in epochs."""
    parts = {"model": config["model"], "callbacks": config["trainer"].get("callbacks")}
    for path, key, value, _ in walk_config(parts):
        if key != "init_args" or not isinstance(value, dict):
            continue
        if path in ("model.init_args", "model.init_args.module.init_args"):
            names = _OF_MODULES
        elif path.startswith("callbacks"):
            names = _OF_CALLBACKS
        else:
            names = _OF_SCHEDULES if "scheduler" in path else set()
        yield value, names & value.keys()


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        grown: list[int] = []
        for one in value:
            grown.append(max(_scaled(one, factor), grown[-1] + 1 if grown else 1))
        return grown
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    return max(1, round(value * factor))
