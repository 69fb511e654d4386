"""The baselines of several methods: one for each distinct config, shared by the methods that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kd_lightning.cli.baseline import baseline_of, with_seed
from kd_lightning.cli.fit_once import find_fits
from kd_lightning.cli.methods.read import MethodConfig, naming
from kd_lightning.cli.methods.same import join, short_list
from kd_lightning.cli.parse import Config, parse_config
from kd_lightning.runs.config_identity import differing_keys, hash_files, identity_of

_DERIVED = ("data.views_per_epoch", "trainer.limit_train_batches")  # baseline_of sets them from other keys


class Baseline(NamedTuple):
    """The student alone, with the settings of some methods.

    Attributes:
        configs: Its config by seed.
        methods: Numbers of these methods.
    """

    configs: list[Config]
    methods: list[int]


def find_baselines(methods: Sequence[MethodConfig], seeds: int) -> list[Baseline]:
    """Return the distinct baselines of methods, in the order of the methods.

    A shared one has the name of the method whose baseline has most finished fits, as of an earlier experiment; else
    that of the first.
    """
    found: dict[tuple[str, ...], list[tuple[int, list[Config]]]] = {}
    for number, method in enumerate(methods):
        with naming(method.source):
            configs = [parse_config(baseline_of(with_seed(method.config, seed)), "experiment") for seed in range(seeds)]
        key = tuple(identity_of(config, hash_files(config)) for config in configs)
        found.setdefault(key, []).append((number, configs))
    return [Baseline(_most_finished([one for _, one in same]), [n for n, _ in same]) for same in found.values()]


def _most_finished(same: Sequence[list[Config]]) -> list[Config]:
    """Return those of several configs that differ in name alone of which most fits are finished; else the first."""
    return max(same, key=lambda configs: sum(any(run.finished for run in find_fits(one)) for one in configs))


def describe_baselines(baselines: Sequence[Baseline], methods: Sequence[MethodConfig]) -> list[str]:
    """Return a line for each baseline: of which methods it is, and what differs from the first one."""
    first = baselines[0].configs[0]
    if len(baselines) == 1:
        return [f"One baseline for all methods, {first['name']}: the student alone has the same settings in each."]
    lines = []
    for baseline in baselines:
        config = baseline.configs[0]
        names = join([methods[number].config["name"] for number in baseline.methods])
        whose = "its" if len(baseline.methods) == 1 else "their"
        line = f"{config['name']} is the baseline of {names}: the student alone with {whose} settings"
        keys = [key.replace(".init_args", "") for key in differing_keys(config, first)]
        own = [key for key in keys if not key.startswith(_DERIVED)] or keys
        lines.append(f"{line} ({short_list(own)})." if own else f"{line}.")
    return lines
