"""What the command line does before it loads torch and Lightning: help, version, a wrong command, the first line."""

from __future__ import annotations

import contextlib
import difflib
import gc
import sys
from collections.abc import Iterator, Sequence

from kd_lightning.cli.arguments import COMMANDS, VERBS, check_configs_exist, configs_of
from kd_lightning.cli.quiet import rank_of_environment
from kd_lightning.errors import InputError

GROUPS = {
    "start": ("distill", "label", "clean"),
    "train": ("fit", "test", "experiment", "crossfit", "validate", "predict"),
    "check": ("doctor", "layers", "duplicates"),
    "look": ("compare", "report", "labels", "query"),
    "deploy": ("export", "push"),
    "other": ("cache", "completion"),
}
"""The commands by what people want, in the order of the help."""
_SUMMARIES = {
    "distill": "FOLDER: train a teacher and a small student, report, export",
    "label": "FOLDER: train on few labels, and label the rest",
    "clean": "CONFIG or FOLDER: find labels that are probably wrong",
    "fit": "CONFIG: train",
    "test": "CONFIG: evaluate the newest run on the test part",
    "experiment": "CONFIG: with and without the teacher, over seeds",
    "crossfit": "CONFIG: train teachers that each lack a fold of the labels",
    "validate": "CONFIG: evaluate the newest run on the validation part",
    "predict": "RUN SOURCE ...: predict any pictures; CONFIG: the test part",
    "doctor": "CONFIG: check teacher, student and labels before training",
    "layers": "CONFIG: the layers of the networks, with sizes and cost",
    "duplicates": "RUN or CONFIG: samples that are equal or alike",
    "compare": "RUN ...: accuracy, size and cost of runs",
    "report": "RUN ...: one HTML page",
    "labels": "RUN: pseudo-labels, and the least confident of them",
    "query": "RUN ...: select the samples to label next",
    "export": "RUN: write files to deploy (ONNX, int8, ExecuTorch ...)",
    "push": "RUN: a model card and files for Hugging Face",
    "cache": "CONFIG: fill the caches of the teachers before training",
    "completion": "bash, zsh or tcsh: print a script that completes commands",
}
"""The line of each command on the first screen; the help of a command has more."""


def overview() -> str:
    """Return the help of the whole command line, which fits a screen of 24 lines and 80 columns."""
    present = [*VERBS, *COMMANDS]
    grouped = {group: [name for name in names if name in present] for group, names in GROUPS.items()}
    grouped["other"] += sorted({*present} - {name for names in grouped.values() for name in names})
    lines = ["kd-lightning COMMAND ...: small networks from big ones, models from few labels"]
    for group, names in grouped.items():
        for number, name in enumerate(names):
            text = _SUMMARIES.get(name) or COMMANDS[name].summary
            lines.append(f"{'' if number else group:<8}{name:<12}{text}")
    lines.append("CONFIG is a YAML file, RUN the folder of a run. 'COMMAND --help': its arguments.")
    lines.append("Options: -h, --help; --version; --verbose (also print what libraries print).")
    return "\n".join(lines)


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
    allowed = list(dict.fromkeys([*VERBS, *COMMANDS]))
    if not args[0].startswith("-") and args[0] not in allowed:
        close = difflib.get_close_matches(args[0], allowed, n=1, cutoff=0.5)
        if args[0].endswith((".yaml", ".yml")):
            close = [f"fit {args[0]}"]
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{args[0]}: no such command{hint}; allowed: {', '.join(allowed)}")
    check_configs_exist(args)


def print_first_line(args: Sequence[str]) -> None:
    """Print on rank 0 to stderr that the libraries are loaded now, which takes seconds; not if the help comes.

    The line has the configs, or without one the first argument, such as a run or a folder.
    """
    quiet = any(argument.partition("=")[0] in ("-h", "--help", "--print_config") for argument in args)
    if rank_of_environment() == "0" and not quiet and not _is_loaded() and sys.stderr is not None:
        named = [] if len(args) < 2 or args[1].startswith("-") else [args[1]]  # a run, or a folder of pictures
        words = [args[0], *([*configs_of(args)] or named)]
        print(f"{' '.join(words)}: loading PyTorch and Lightning", file=sys.stderr, flush=True)


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
