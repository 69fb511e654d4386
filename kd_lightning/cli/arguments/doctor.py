"""The arguments of ``doctor``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import command, with_configs


@command("Check a config's teacher, student and labels before training. Takes the arguments of fit.")
def doctor(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    return with_configs(parser, args)
