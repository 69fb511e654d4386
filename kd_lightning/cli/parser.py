"""The parser of the command line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from kd_lightning.cli.config_check import known_keys, read_configs
from kd_lightning.errors import InputError
from kd_lightning.runs.parser_errors import one_line


class Parser(LightningArgumentParser):
    """A parser whose complaints are InputErrors of one line."""

    command_line: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage and exiting."""
        raise InputError(one_line(message, read_configs(Parser.command_line), known_keys(self))) from ex
