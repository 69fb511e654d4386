"""The search space: keys of the config, and the values that they may take."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.cli.baseline import without_teacher
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.cli.tuning.keys import find_key, set_value, value_at
from kd_lightning.errors import InputError
from kd_lightning.runs.lengths import LENGTHS, scale_lengths
from kd_lightning.runs.yaml_file import dump_yaml, load_yaml

_FIELDS = ("low", "high", "log")
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
Values = Mapping[str, Any]
"""Values by the path of their key."""


@dataclass(frozen=True)
class Setting:
    """A key of the config, and the values that it may take: a range, or a list.

    Attributes:
        path: Full path of the key.
        low: Lowest value of a range.
        high: Highest value.
        log: Whether the logarithm of the value is sampled evenly.
        whole: Whether values of the range are whole numbers.
        values: The list. Empty for a range.
    """

    path: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        """Return whether a value lies in the range, or in the list."""
        if self.values:
            return any(value == one and type(value) is type(one) for one in self.values)
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that a check of the space tries."""
        return self.values or (self.low, self.high)

    def as_yaml(self) -> Any:
        """Return what stands in the YAML of a space."""
        return [*self.values] if self.values else {"low": self.low, "high": self.high, "log": self.log}


def apply_values(config: Config, values: Values) -> Config:
    """Return a config with other values. Lengths of schedules change with the number of epochs."""
    changed = deepcopy(config)
    for path, value in values.items():
        set_value(changed, path, value)
    for path in LENGTHS:
        before, after = value_at(config, path), values.get(path)
        if after is not None and isinstance(before, int) and before > 0 and after != before:
            scale_lengths(changed, after / before)
    return changed


def read_space(file: Path, config: Config) -> list[Setting]:
    """Read a search space: ``{key: {low:, high:, log:}}``, or ``{key: [values]}``.

    Args:
        file: The YAML file. Keys are those of overrides, such as ``model.init_args.soft_weight``.
        config: The config whose keys they are.

    Raises:
        InputError: For a file without keys, a key that the config cannot have, and values that it cannot take.
    """
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--space: {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"--space: {file} must hold keys and their values, such as model.init_args.soft_weight: "
                         f"{{low: 0.1, high: 1}}, got {_short(content)}")  # fmt: skip
    try:
        settings = [_read_setting(str(key), value, config) for key, value in content.items()]
        if twice := {one.path for one in settings if [other.path for other in settings].count(one.path) > 1}:
            raise InputError(f"{min(twice)} appears twice")
        check_space(settings, config)
    except InputError as error:
        raise InputError(f"--space: {file}: {error}") from error
    return settings


def _read_setting(key: str, value: Any, config: Config) -> Setting:
    path = find_key(config, key)
    if isinstance(value, list) and value:
        if len({json.dumps(one, sort_keys=True, default=str) for one in value}) < len(value):
            raise InputError(f"{key}: a value appears twice in {_short(value)}")
        return Setting(path, values=tuple(map(_as_number, value)))
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {*_FIELDS}:
        raise InputError(f"{key} must be {{low:, high:, log:}} or a list of values, got {_short(value)}")
    low, high, log = _as_number(value["low"]), _as_number(value["high"]), value.get("log", False)
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise InputError(f"{key}.{name} must be a number, got {_short(number)}")
    if not isinstance(log, bool):
        raise InputError(f"{key}.log must be true or false, got {_short(log)}")
    if low >= high:
        raise InputError(f"{key}: low must be below high, got {low} and {high}")
    if log and low <= 0:
        raise InputError(f"{key}: low must be above 0 with log, got {low}")
    own = value_at(config, path)
    whole = all(isinstance(number, int) for number in (low, high)) and isinstance(own, int)
    return Setting(path, low, high, log, whole)


def _as_number(value: Any) -> Any:
    """Return the number that a text such as ``1e-3`` is for the parser of ``fit``; YAML 1.1 has it as a text."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def check_space(settings: Sequence[Setting], config: Config) -> None:
    """Raise InputError for a value that the parser of ``fit`` refuses."""
    for number in range(max(len(one.ends) for one in settings)):
        values = {one.path: one.ends[min(number, len(one.ends) - 1)] for one in settings}
        parse_config(apply_values(config, values), "experiment")


def for_baseline(settings: Sequence[Setting], config: Config) -> list[Setting]:
    """Return the settings that change the baseline's config, too."""
    alone = without_teacher(config)
    return [
        one
        for one in settings
        if any(without_teacher(apply_values(config, {one.path: value})) != alone for value in one.ends)
    ]


def write_space(settings: Sequence[Setting], file: Path) -> None:
    """Write a search space as :func:`read_space` reads it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "# The search space, as --space reads it.\n"
    file.write_text(text + dump_yaml({one.path: one.as_yaml() for one in settings}), encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
