"""The arguments of ``completion``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import command

SHELLS = ("bash", "zsh", "tcsh")
"""Shells whose scripts shtab writes."""


@command("Print a script that completes commands, options and files in a shell.")
def completion(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Read the arguments."""
    parser.add_argument("shell", choices=SHELLS, help='such as: eval "$(kd-lightning completion bash)"')
    return parser.parse_args(args)
