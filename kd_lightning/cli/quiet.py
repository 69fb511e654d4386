"""What the command line leaves out of what libraries print, unless ``--verbose`` is given."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest
from pathlib import Path

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables of the environment that hold the number of this process, in the order in which Lightning reads them."""

_VERBOSE: ContextVar[bool] = ContextVar("verbose", default=False)
_PRINTED: ContextVar[dict[str, logging.LogRecord] | None] = ContextVar("printed", default=None)
"""This package's messages in this command, each with its first record, which several handlers get; None outside."""
_PACKAGE = Path(__file__).parents[1]
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_OF_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
_OF_LIGHTNING = (  # what the user knows, or what the lines of a run have
    "No seed found",
    "GPU available but not used",
    "TPU available but not used",
    "The `LightningCLI` will ",
    "Checkpoint directory ",
    "Experiment logs directory ",
)
_COUNTS = "data: number of samples\n"  # the introduction of a run has these


def rank_of_environment() -> str:
    """Return the number of this process among those of a run, before Lightning is loaded."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0")


def take_verbose(args: Sequence[str]) -> tuple[list[str], bool]:
    """Return a command line without the flag ``--verbose``, and whether it was there.

    ``--verbose true`` and ``--verbose false`` are an option of LightningCLI, and stay.
    """
    flags = [a == "--verbose" and b not in ("true", "false") for a, b in zip_longest(args, args[1:])]
    return [argument for argument, is_flag in zip(args, flags, strict=False) if not is_flag], any(flags)


def is_verbose() -> bool:
    """Return whether the command line has ``--verbose``."""
    return _VERBOSE.get()


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Within it, warnings take one line each, and what libraries print about themselves is left out.

    A message of this package that comes again, such as one about the data of each fit of ``experiment``, is left out,
    too; the user's own come each time. At the end all is as before. Call :func:`silence_lightning` once Lightning is
    loaded.

    Args:
        verbose: Leave nothing out.
    """
    token, format_before = _VERBOSE.set(verbose), warnings.formatwarning
    printed = _PRINTED.set({})
    compiler = logging.getLogger("torch.utils.cpp_extension")  # it warns that there is no GPU
    level = compiler.level
    try:
        if not verbose:
            warnings.formatwarning = format_warning
            compiler.setLevel(logging.ERROR)
        yield
    finally:
        _VERBOSE.reset(token)
        _PRINTED.reset(printed)
        compiler.setLevel(level)
        if warnings.formatwarning is format_warning:
            lightning = sys.modules.get("lightning.fabric.utilities.warnings")  # loaded since then, it has its own
            own = getattr(lightning, "_custom_format_warning", format_before)
            warnings.formatwarning = format_before if format_before is not format_warning else own
        for handler in _handlers():
            handler.removeFilter(_passes)


def silence_lightning() -> None:
    """Leave out what Lightning prints about itself; nothing changes with ``--verbose``."""
    if not is_verbose():
        warnings.formatwarning = format_warning
        for handler in _handlers():
            handler.addFilter(_passes)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one line without the place in the source, empty for what is left out."""
    text = " ".join(str(message).split())
    if rank_of_environment() != "0" or _is_left_out(text, category, filename):
        return ""
    return f"warning: {text}\n"


def _is_left_out(text: str, category: type[Warning], filename: str) -> bool:
    of_library = "site-packages" in Path(filename).parts
    if issubclass(category, _OF_DEVELOPERS) or (issubclass(category, FutureWarning) and of_library):
        return True
    return category.__name__ == "PossibleUserWarning" or text.startswith(_OF_LIGHTNING)


def _passes(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning's loggers is printed: it is the user's, ours and new, or a warning."""
    if record.levelno > logging.INFO:
        return True
    lightning = Path(str(sys.modules["lightning"].__file__)).parent
    text, printed, place = record.getMessage(), _PRINTED.get(), Path(record.pathname)
    if place.is_relative_to(lightning) or text.startswith(_COUNTS):
        return False
    return printed is None or not place.is_relative_to(_PACKAGE) or printed.setdefault(text, record) is record


def _handlers() -> list[logging.Handler]:
    return [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
