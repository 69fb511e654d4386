"""The arguments of ``cache``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import command, with_configs


@command("Fill the caches of a config's teachers before training, on all devices. Takes the arguments of fit.")
def cache(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    return with_configs(parser, args)
