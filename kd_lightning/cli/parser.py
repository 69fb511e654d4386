"""The parser of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from kd_lightning.cli.config_check import known_keys
from kd_lightning.errors import InputError
from kd_lightning.runs.parser_errors import explain_parser_error


class Parser(LightningArgumentParser):
    """A parser whose errors are InputErrors of one line.

    Attributes:
        config: The content of the command line's config files, in which errors look up the place of a key. It belongs
            to the class, since jsonargparse builds a parser of the same class for the arguments of each object.
    """

    config: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviated key is a misspelt one
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse a command line.

        Raises:
            InputError: If it cannot be parsed.
        """
        try:
            return super().parse_args(*args, **kwargs)
        except RecursionError as error:
            raise InputError("a value of the command line or of a config nests too deeply, or holds itself") from error

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage and exiting."""
        raise explain_parser_error(message, ex, Parser.config, known_keys(self)) from ex
