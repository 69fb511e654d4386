"""The arguments of ``experiment``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import check_range, command, with_configs


@command("Train a method and its baseline without a teacher over several seeds, and compare them.")
def experiment(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N - 1 (default 3)")
    parser.add_argument("--out", metavar="DIR", help="folder of the comparison (default: <root>/<name>_comparison)")
    options = with_configs(parser, args)
    check_range(options, "seeds", 1)
    return options
