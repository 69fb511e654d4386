"""The arguments of ``layers``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import command, with_configs


@command("Print the layers of a config's networks: output shapes, multiply-accumulates, parameters.")
def layers(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    return with_configs(parser, args)
