"""What the command line does before it loads torch and Lightning: help, version, a wrong command, the first line."""

from __future__ import annotations

import contextlib
import difflib
import gc
import os
import sys
from collections.abc import Iterator, Sequence

from kd_lightning.cli.arguments import COMMANDS, check_configs_exist, configs_of
from kd_lightning.errors import InputError

VERBS = {
    "fit": "Train from YAML: --config FILE, and overrides such as --trainer.max_epochs 5.",
    "validate": "Evaluate a run's deployed weights on the validation part.",
    "test": "Evaluate a run's deployed weights on the test part.",
    "predict": "Write the predictions of a run's deployed weights to a file.",
}
"""The commands of LightningCLI."""
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them


def overview() -> str:
    """Return the help of the whole command line."""

    def lines(texts: dict[str, str]) -> str:
        return "\n".join(f"  {name:<12}{text}" for name, text in texts.items())

    return f"""usage: kd_lightning COMMAND [arguments]

Knowledge distillation and learning from few labels with PyTorch Lightning.

train and evaluate, by LightningCLI:
{lines(VERBS)}

other commands:
{lines({name: command.summary for name, command in COMMANDS.items()})}

options:
  -h, --help  Print this help. 'kd_lightning COMMAND --help' prints the arguments of a command.
  --version   Print the version of this package."""


def version() -> str:
    """Return the name and the version of this package."""
    import importlib.metadata  # here: it takes as long as all else of this file

    try:
        return f"kd_lightning {importlib.metadata.version('kd-lightning')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("--version: the package is not installed: pip install -e .") from error


def check_command(args: Sequence[str]) -> None:
    """Check the part of a command line that needs neither torch nor Lightning.

    Raises:
        InputError: If there is no such command, or a config does not exist.
    """
    allowed = [*VERBS, *COMMANDS]
    if not args[0].startswith("-") and args[0] not in allowed:
        close = difflib.get_close_matches(args[0], allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{args[0]}: no such command{hint}; allowed: {', '.join(allowed)}")
    check_configs_exist(args)


def print_first_line(args: Sequence[str]) -> None:
    """Print on rank 0 to stderr that the libraries are loaded now, which takes seconds; not if the help comes."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    quiet = any(argument.partition("=")[0] in ("-h", "--help", "--print_config") for argument in args)
    if rank == "0" and not quiet and not _is_loaded() and sys.stderr is not None:
        print(f"{' '.join([args[0], *configs_of(args)])}: loading PyTorch and Lightning", file=sys.stderr, flush=True)


@contextlib.contextmanager
def libraries_loaded_quickly() -> Iterator[None]:
    """Within it, import torch and Lightning: the garbage collector never examines their objects, also not later.

    These objects live as long as the process. To examine them takes a quarter of the time of the imports, and as much
    again at the end of the process. If Lightning is loaded already, nothing changes.
    """
    if _is_loaded() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_loaded() -> bool:
    return "lightning.pytorch" in sys.modules
