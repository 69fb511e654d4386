"""Parse a config as ``fit`` does, and build nothing."""

from __future__ import annotations

from typing import Any

import yaml

from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.record_run import dump_config
from kd_lightning.errors import InputError

Config = dict[str, Any]


class _ParsedCLI(DistillCLI):
    """Parses a config and builds nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing."""


def parse_config(args: list[str] | Config, command: str) -> Config:
    """Return the whole config that ``fit`` would save, with all defaults.

    Args:
        args: Arguments of ``fit``, or a config.
        command: The name of the command, for the message.

    Raises:
        InputError: If it has no data.
    """
    cli = _ParsedCLI(args, run=False)
    config: Config = yaml.safe_load(dump_config(cli.parser, cli.config))
    if not config.get("data"):
        raise InputError(f"{command} needs data in the config: a SemiSupervisedDataModule")
    return config
