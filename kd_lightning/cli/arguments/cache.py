"""The arguments of ``cache``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import takewhile

from kd_lightning.cli.arguments._parsing import arguments_of_fit, check_config, command


@command("Fill the caches of a config's teachers before training, on all devices. Takes the arguments of fit.")
def cache(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.usage = "kd_lightning cache [-h] (CONFIG ... | --config CONFIG) [arguments of fit]"
    first = [*takewhile(lambda argument: not argument.startswith("-"), args)]
    for path in first:
        check_config(path)
    return arguments_of_fit(parser, [*(f"--config={path}" for path in first), *args[len(first) :]])
