"""Objects from their class path, as configs describe them."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch.cli import LightningArgumentParser

from kd_lightning.errors import InputError
from kd_lightning.runs.parser_errors import one_line

T = TypeVar("T")


class ObjectParser(LightningArgumentParser):
    """A parser that raises InputError with one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage and exiting."""
        raise InputError(one_line(message)) from ex


def build(base: type[T], config: dict[str, Any]) -> T:
    """An object from its ``class_path`` and ``init_args``, as the CLI would build it.

    Raises:
        InputError: If it cannot be built.
    """
    parser = ObjectParser()
    parser.add_subclass_arguments(base, "object", fail_untyped=False)
    try:
        built = parser.instantiate_classes(parser.parse_object({"object": config}))["object"]
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise InputError(one_line(str(error))) from error
    assert isinstance(built, base)
    return built
