"""Complete the parsed config of a command line, and refuse what the parser cannot."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.runs.metric_direction import check_direction, direction_of


def check_name(name: Any, root: Path) -> None:
    """Raise InputError unless a run's folder would lie below the folder of all runs."""
    if not name or not isinstance(name, str):
        raise InputError(f"name must be the name of the run's folder, got {name!r}")
    folder, top = (Path(os.path.normpath(path.absolute())) for path in (root / name, root))
    if ".." in Path(name).parts or folder == top or not folder.is_relative_to(top):
        raise InputError(f"name must be a folder below {root}, without .., got {name!r}")


def term_names(model: Any) -> set[str]:
    """Return the names of the feature terms and soft losses in the config of a module."""
    arguments = (model and model.get("init_args")) or {}
    given = [arguments.get(name) for name in ("features", "soft_loss")]
    return {name for terms in given if isinstance(terms, dict) and "class_path" not in terms for name in terms}


def set_direction(checkpoint: Any, terms: Collection[str] = ()) -> None:
    """Set the mode of the checkpoint by the name of its monitor, or check it.

    Args:
        checkpoint: The config of the checkpoint.
        terms: Names of the objective's terms, see :func:`term_names`.
    """
    if checkpoint.monitor is None:
        checkpoint.mode = checkpoint.mode or "max"  # without effect
    elif checkpoint.mode is not None:
        check_direction("checkpoint", checkpoint.monitor, checkpoint.mode, terms)
    else:
        checkpoint.mode = direction_of(checkpoint.monitor, terms)
    if checkpoint.mode is None:
        raise InputError(
            f"checkpoint.mode is missing: the name {checkpoint.monitor} does not show whether more is better; allowed: "
            "max, min"
        )


def drop_missing_teacher(config: Any) -> None:
    """Leave out the teachers and first weights whose files are gone; a trained student needs neither."""
    arguments = config.model.get("init_args") or {}
    if isinstance(start := arguments.get("initial_weights"), str | Path) and not Path(start).is_file():
        arguments["initial_weights"] = None
    for role in ("teacher", "teachers"):
        given = arguments.get(role)
        for spec in given if isinstance(given, list) else [given] if given is not None else ():
            paths = [v for k, v in spec.items() if k.rsplit(".", 1)[-1] == "path" and isinstance(v, str)]
            if any(not Path(path).is_file() for path in paths):
                arguments[role] = None
