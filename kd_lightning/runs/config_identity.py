"""What of a config makes a run the run that it is: everything but its seeds, its name, and where and how it reports."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.runs.class_paths import walk_config

Config = Mapping[str, Any]
# keys that change no weight
_NO_PART = {
    "config",
    "fast",  # what it picks is in the config
    "name",
    "seed_everything",
    "ckpt_path",
    "weights_only",
    "verbose",
    "return_predictions",
    "checkpoint.dirpath",
    "data.init_args.num_workers",
    "data.init_args.seed",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.limit_predict_batches",
    "trainer.limit_test_batches",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.profiler",
}
# keys that do not matter where a trained network is evaluated
_TRAINING_ONLY = {f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "inference_mode")}
_MISSING = object()


def seeds_of(config: Config) -> tuple[Any, Any]:
    """Return the seed of weights and training, and that of split, order and augmentation; None without one."""
    data = config.get("data")
    arguments = data.get("init_args") if isinstance(data, Mapping) else None
    seed = config.get("seed_everything")
    return None if isinstance(seed, bool) else seed, (arguments or {}).get("seed")  # False is no seed, and equals 0


def identity_of(config: Config, files: Mapping[str, str]) -> str:
    """Return a hash of a config without its seeds and folders, and of the files that it names.

    A file counts by its content, whatever its path; a folder of data by its place, however it is written.

    Args:
        config: The config of ``fit``.
        files: The hash of each file, as :func:`hash_files` returns them.
    """
    leaves = {key: _place(value) for key, value in _leaves(config, _NO_PART).items() if key not in files}
    text = json.dumps([leaves, dict(sorted(files.items()))], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_files(config: Config) -> dict[str, str]:
    """Return {key: SHA-256} of the existing files that model and data name: weights, splits, label files."""
    parts = {part: config.get(part) for part in ("model", "data")}
    found = {key: value for key, _, value, _ in walk_config(parts) if isinstance(value, str) and value}
    # os.path, since Path.is_file raises for a long text
    return {key: _digest(Path(value)) for key, value in found.items() if os.path.isfile(value)}  # noqa: PTH113


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing_keys(
    config: Config, other: Config, *, evaluation: bool = False, same_files: Collection[str] = ()
) -> list[str]:
    """Return a text for each key in which two configs are not the same run, ``KEY: VALUE, not OTHER VALUE``.

    Args:
        config: A config.
        other: The config to compare it with.
        evaluation: Whether keys of the machine, which only matter in training, are left out.
        same_files: Keys of files that have the same content in both, whatever their paths.
    """
    ignored = _NO_PART | (_TRAINING_ONLY if evaluation else set())
    mine, theirs = _leaves(config, ignored), _leaves(other, ignored)
    keys = [key for key in {**mine, **theirs} if key not in same_files and _differ(mine, theirs, key)]
    return [f"{key}: {_text(mine.get(key, _MISSING))}, not {_text(theirs.get(key, _MISSING))}" for key in keys]


def varying_values(configs: Sequence[Config]) -> list[dict[str, str]]:
    """Return for each config {key: value} of the keys in which some of them are not the same run."""
    leaves = [_leaves(config, _NO_PART) for config in configs]
    keys = dict.fromkeys(key for one in leaves for key in one)
    varying = [key for key in keys if any(_differ(one, leaves[0], key) for one in leaves)]
    return [{key: json.dumps(one.get(key), default=str) for key in varying} for one in leaves]


def _differ(mine: Config, theirs: Config, key: str) -> bool:
    """Return whether two configs differ in a key. 1 and 1.0 differ: one batch, and all batches."""
    one, other = _text(mine.get(key, _MISSING)), _text(theirs.get(key, _MISSING))
    return one != other and _place(mine.get(key)) != _place(theirs.get(key))


def _place(value: Any) -> Any:
    """Return the absolute path of a folder that exists, and any other value as text of JSON."""
    if isinstance(value, str) and os.path.isdir(value):  # noqa: PTH112  (of any text, also a long one)
        return os.path.realpath(value)
    return _text(value)


def _text(value: Any) -> str:
    return "missing" if value is _MISSING else json.dumps(value, default=str)


def _leaves(config: Config, ignored: set[str]) -> dict[str, Any]:
    """Return {key: value} of all values of a config that are no mapping, without nulls, which mean a default."""
    found: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if path in ignored or node is None:
            return
        children: list[tuple[str, Any]] = []
        if isinstance(node, Mapping):
            children = [(f"{path}.{key}" if path else str(key), child) for key, child in node.items()]
        elif isinstance(node, list | tuple) and any(isinstance(child, Mapping | list | tuple) for child in node):
            children = [(f"{path}[{number}]", child) for number, child in enumerate(node)]
        else:
            found[path] = list(node) if isinstance(node, tuple) else node
        for key, child in children:
            visit(child, key)

    visit(config, "")
    return found
