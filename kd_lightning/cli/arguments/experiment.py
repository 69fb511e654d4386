"""The arguments of ``experiment``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.cli.arguments._parsing import check_package, check_range, command, with_configs
from kd_lightning.errors import InputError


@command("Train one or several methods and their baseline without a teacher over several seeds, and compare them.")
def experiment(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.description = (
        f"{parser.description} Each config that has a model is a method; other configs and overrides apply to all."
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N - 1 (default 3)")
    text = "folder of the comparison (default: <root>/<name>_comparison, after --tune <root>/<name>_tuned_comparison, "
    text += "of several methods <root>/<name>_vs_<name>_comparison)"
    parser.add_argument("--out", metavar="DIR", help=text)
    text = "first search for the settings of the method and of its baseline, on validation samples alone, by N trials "
    text += "each; takes one method, and needs optuna"
    parser.add_argument("--tune", type=int, metavar="N", help=text)
    text = "YAML of the search space of --tune: {key: {low:, high:, log:}} or {key: [values]}"
    parser.add_argument("--space", type=Path, metavar="FILE", help=text)
    options = with_configs(parser, args)
    check_range(options, "seeds", 1)
    if options.tune is not None:
        check_range(options, "tune", 1)
        check_package("optuna", "--tune", "tune")
    elif options.space is not None:
        raise InputError(f"--space: {options.space} needs --tune N, the number of trials")
    if options.space is not None and not options.space.is_file():
        raise InputError(f"--space: no file at {options.space}")
    return options
