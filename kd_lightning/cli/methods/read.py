"""Which methods a command line names: each config that has a model is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import yaml

from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import hash_files, identity_of
from kd_lightning.runs.yaml_file import load_yaml


class MethodConfig(NamedTuple):
    """A method of an experiment.

    Attributes:
        source: Its file, as the command line names it.
        config: Its whole config, overrides included.
    """

    source: str
    config: Config


class _Place(NamedTuple):
    """Where a command line names a config, as a range of its arguments."""

    start: int
    stop: int
    value: str


def read_methods(args: Sequence[str]) -> list[MethodConfig]:
    """Return the methods of a command line that names several ones, in its order; an empty list if it names one.

    Of several configs, each one with a model is a method. Configs without a model and overrides apply to all methods.

    Args:
        args: Arguments of ``fit``, with each config as ``--config=FILE`` or ``--config FILE``.

    Raises:
        InputError: If a config cannot be parsed, or an override does not fit one; if two configs have the same name, or
            differ in no key.
    """
    places = [*_find_configs(args)]
    of_methods = [place for place in places if len(places) > 1 and _has_model(place.value)]
    if len(of_methods) < 2:
        return []
    methods = []
    for one in of_methods:
        others = {n for other in of_methods if other is not one for n in range(other.start, other.stop)}
        with naming(one.value):
            config = parse_config([arg for n, arg in enumerate(args) if n not in others], "experiment")
        methods.append(MethodConfig(one.value, config))
    _check_distinct(methods)
    return methods


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Within it, an InputError names the config that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if source in str(error) else f"{source}: {error}") from error


def _find_configs(args: Sequence[str]) -> Iterator[_Place]:
    for number, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c") and (equals or number + 1 < len(args)):
            yield _Place(number, number + (1 if equals else 2), value if equals else args[number + 1])


def _has_model(value: str) -> bool:
    """Return whether a config, a file or text of YAML, names a model. One that cannot be read counts as a method."""
    try:
        content = load_yaml(value if ": " in value else Path(value).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return True
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)


def _check_distinct(methods: Sequence[MethodConfig]) -> None:
    """Raise InputError for two methods of one name, or that are the same."""
    identities = [identity_of(one.config, hash_files(one.config)) for one in methods]
    for (one, mine), (other, its) in combinations(zip(methods, identities, strict=True), 2):
        if mine == its:
            both = f"{one.source} is named twice" if one.source == other.source else f"{other.source}: as {one.source}"
            raise InputError(f"{both}; experiment needs configs that differ in more than their name")
        if one.config["name"] == other.config["name"]:
            raise InputError(
                f"name: {one.config['name']} in {one.source} and in {other.source}; experiment needs a name of its own "
                "in each config"
            )
