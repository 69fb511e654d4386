"""The arguments of ``experiment``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import check_config, check_range, command, with_overrides


@command("Train a method and its baseline without a teacher over several seeds, and compare them.")
def experiment(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("config", help="YAML of the method, on a SemiSupervisedDataModule")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N - 1 (default 3)")
    parser.add_argument("--out", metavar="DIR", help="folder of the comparison (default: <root>/<name>_comparison)")
    options = with_overrides(parser, args)
    check_range(options, "seeds", 1)
    check_config(options.config)
    return options
