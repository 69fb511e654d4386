"""The runs whose weights a config's teachers have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.runs.run import Run, run_of


def teacher_runs(config: Mapping[str, Any]) -> list[Run]:
    """Return the finished runs that left the weights of a config's teachers, each once."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    given = arguments.get("teachers") or [arguments.get("teacher")]
    runs = [run_of(Path(path)) for teacher in given if (path := _weights_of(teacher))]
    return [*{run.folder: run for run in runs if run is not None and run.finished}.values()]


def _weights_of(teacher: Any) -> str | None:
    """Return the file from which a network, or the network in a ``Teacher``, is loaded."""
    if not isinstance(teacher, Mapping):
        return None
    arguments = teacher.get("init_args") or {}
    path = arguments.get("path")
    return path if isinstance(path, str) and path else _weights_of(arguments.get("network"))
