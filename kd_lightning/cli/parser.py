"""The parser of the command line."""

from __future__ import annotations

from argparse import Action
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim.lr_scheduler import CosineAnnealingLR

from kd_lightning.cli.config_check import known_keys
from kd_lightning.errors import InputError
from kd_lightning.modules import FeatureDistillModule, SupervisedModule
from kd_lightning.runs.argument_types import ArgumentTypes
from kd_lightning.runs.class_paths import find_class, name_of
from kd_lightning.runs.parser_errors import explain_parser_error

_WRITTEN: ContextVar[str | None] = ContextVar("written", default=None)  # text of the option that is being parsed
_OPTION: ContextVar[str] = ContextVar("option", default="")  # given to a parser for the arguments of an object
_GIVEN: ContextVar[tuple[str, ...]] = ContextVar("given", default=())  # all options of the command line
_COMPLETING = (SupervisedModule, FeatureDistillModule)
_COMPLETED = ("lr_scheduler", "hint_lr_scheduler")  # arguments of this package's modules, see schedules.takes_length


class Parser(ArgumentTypes, LightningArgumentParser):
    """A parser whose errors are InputErrors of one line.

    Attributes:
        config: The content of the command line's config files, in which errors look up the place of a key. It belongs
            to the class, since jsonargparse builds a parser of the same class for the arguments of each object.
    """

    config: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviated key is a misspelt one
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parse a command line.

        Raises:
            InputError: If it cannot be parsed.
        """
        args = _as_written(args, _WRITTEN.get())
        token = _WRITTEN.set(None)
        single = str(args[0]) if args is not None and len(args) == 1 else ""
        option = _OPTION.set(single.partition("=")[0].lstrip("-"))
        names = tuple(str(arg).partition("=")[0][2:] for arg in args or () if str(arg).startswith("--"))
        given = _GIVEN.set(_GIVEN.get() or names)
        try:
            return super().parse_args(args, *more, **kwargs)
        except RecursionError as error:
            raise InputError("a value of the command line or of a config nests too deeply, or holds itself") from error
        finally:
            _WRITTEN.reset(token)
            _OPTION.reset(option)
            _GIVEN.reset(given)

    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        """Note the text of a value before the option's action parses it."""
        _WRITTEN.set(arg_strings[0] if len(arg_strings) == 1 else None)
        return super()._get_values(action, arg_strings)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of printing the usage and exiting."""
        known, option, given = known_keys(self), _OPTION.get(), _GIVEN.get()
        raise explain_parser_error(message, ex, Parser.config, known, option=option, given=given) from ex


def _as_written(args: Sequence[str] | None, written: Any) -> Sequence[str] | None:
    """Return the arguments of a nested parser with the value as the command line has it.

    For an argument of an argument, jsonargparse parses the text, and gives the nested parser what Python prints for the
    value: for null the word None, for [null] the word in a list.

    Args:
        args: The arguments, such as ``["--T_max=None"]``.
        written: The text of the option that is being parsed, such as ``"null"``. Anything else if there is none.
    """
    if not isinstance(written, str) or args is None or len(args) != 1:
        return args
    name, equals, _ = args[0].partition("=")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        return args
    return [f"{name}={written}"] if equals and (value is None or isinstance(value, list | dict)) else args


def check_length(place: str, key: str, value: Any, owner: Any) -> None:
    """Raise InputError for a schedule without its length, unless the module that has it completes the length.

    Args:
        place: The path of a key.
        key: Its last part.
        value: Its value.
        owner: The class path of the object whose argument it is.
    """
    kind = find_class(value.get("class_path")) if isinstance(value, dict) else None
    if not isinstance(kind, type) or not issubclass(kind, CosineAnnealingLR):
        return
    arguments, module = value.get("init_args") or {}, find_class(owner)
    completes = isinstance(module, type) and issubclass(module, _COMPLETING) and key in _COMPLETED
    if not completes and arguments.get("T_max", 0) is None:
        raise InputError(f"{place}.init_args.T_max: missing, but {name_of(kind)} needs it")
