"""Parse a config as ``fit`` does, and build nothing."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.record_run import dump_config
from kd_lightning.errors import InputError
from kd_lightning.runs.yaml_file import load_dumped

Config = dict[str, Any]
_OF_FIT = ("ckpt_path", "weights_only")


class _ParsedCLI(DistillCLI):
    """Parses a config and builds nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of ``fit`` that the saved config of a run has, too."""
        super().add_arguments_to_parser(parser)
        for name in _OF_FIT:
            parser.add_argument(f"--{name}", type=str | bool | None, default=None)

    def instantiate_classes(self) -> None:
        """Do nothing."""


def parse_config(args: list[str] | Config, command: str) -> Config:
    """Return the whole config that ``fit`` would save, with all defaults.

    Args:
        args: Arguments of ``fit``, or a config.
        command: The name of the command, for the message.

    Raises:
        InputError: If it has no data, or resumes a run.
    """
    cli = _ParsedCLI(args, run=False)
    config: Config = load_dumped(dump_config(cli.parser, cli.config))
    for name in _OF_FIT:
        if (value := config.pop(name, None)) is not None:
            raise InputError(f"{name}: {value} is for fit; leave it out for {command}")
    if not config.get("data"):
        raise InputError(f"{command} needs data in the config: a SemiSupervisedDataModule")
    return config
