"""Objects from their class path, as configs describe them."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch.cli import LightningArgumentParser

from kd_lightning.errors import InputError
from kd_lightning.runs.argument_types import ArgumentTypes
from kd_lightning.runs.parser_errors import explain_error, explain_parser_error

T = TypeVar("T")
_ROOT = "object"


class ObjectParser(ArgumentTypes, LightningArgumentParser):
    """A parser that raises InputError with a message of one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage and exiting."""
        known = [action.dest for action in self._actions]
        raise explain_parser_error(message, ex, known=known, root=_ROOT) from ex


def build(base: type[T], config: dict[str, Any]) -> T:
    """Build an object from its ``class_path`` and ``init_args``, as the command line does.

    Args:
        base: The class of which the object must be an instance.
        config: ``class_path``, and if needed ``init_args`` and ``dict_kwargs``.

    Raises:
        InputError: If it cannot be built.
    """
    parser = ObjectParser()
    parser.add_subclass_arguments(base, _ROOT, fail_untyped=False)
    try:
        built = parser.instantiate_classes(parser.parse_object({_ROOT: config}))[_ROOT]
    except InputError:
        raise
    except (TypeError, ValueError, ImportError, OSError, RuntimeError, LookupError) as error:
        raise InputError(explain_error(error)) from error
    assert isinstance(built, base)
    return built
