"""What the command line prints at the end of a command: a short table of figures, and how to go on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_lightning.cli.arguments import COMMANDS
from kd_lightning.cli.introduction import teachers_of
from kd_lightning.data import SemiSupervisedDataModule, StreamDataModule
from kd_lightning.errors import InputError
from kd_lightning.modules.feature_distill import FeatureDistillModule
from kd_lightning.runs.folder import writes_files
from kd_lightning.runs.results import read_result
from kd_lightning.runs.student import find_student

_RECALL = re.compile(r"recall_(.+)")
_FIRST = ("accuracy", "balanced_accuracy", "f1", "miou", "loss")


def print_figures(part: str, metrics: Mapping[str, Any], folder: Path | None) -> None:
    """Print the metrics of a part of the data, recalls of classes in one line.

    Args:
        part: ``"val"`` or ``"test"``.
        metrics: Values by name, such as ``test/accuracy``, numbers or tensors; those of other parts are left out. If
            none has the part's name, as of a module of another project, all are printed.
        folder: The run's folder, None if there is none.
    """
    own = {name: value for name, value in metrics.items() if f"{part}/" in name}
    found = {name: float(value) for name, value in (own or metrics).items()}
    prefix = next((name.partition(f"{part}/")[0] for name in own), "") + f"{part}/"
    figures = {name.removeprefix(prefix): value for name, value in found.items()}
    recalls = {match[1]: figures.pop(name) for name in [*figures] if (match := _RECALL.fullmatch(name))}
    rows = [(name, _text(figures[name])) for name in sorted(figures, key=_order)]
    if recalls:
        worst, best = min(recalls, key=lambda name: recalls[name]), max(recalls, key=lambda name: recalls[name])
        rows.append(("recall", f"{_text(recalls[worst])} ({worst}) to {_text(recalls[best])} ({best})"))
    result = None if folder is None else read_result(folder, prefix.removesuffix("/"))
    of = "" if folder is None else f" of {folder}"
    samples = "" if result is None else f", {result.samples} samples"
    print(f"{prefix.removesuffix('/')}{of}{samples}")
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


def print_next_steps(args: Sequence[str], cli: Any) -> None:
    """Print, on rank 0, the commands that usually follow a command of LightningCLI.

    Args:
        args: The command line.
        cli: The DistillCLI that has run it.
    """
    folder, steps = cli.run_folder, []
    if folder is None or not writes_files(cli.trainer):
        return
    run, same = shlex.quote(str(folder)), as_written(args[1:])
    if args[0] == "fit" and _has_test_part(cli.datamodule):
        steps.append((f"test {same}", ""))
    if args[0] in ("fit", "test"):
        learns_features = isinstance(cli.model, FeatureDistillModule)  # it has no student without a teacher
        if teachers_of(cli.model) and not learns_features and isinstance(cli.datamodule, SemiSupervisedDataModule):
            steps.append((f"experiment {same}", "does the teacher help?"))
        if args[0] == "test" and "report" in COMMANDS:
            steps.append((f"report {run}", ""))
        if find_student(cli.model) is not None:
            steps.append((f"export {run}", ""))
    print_steps(steps)


def print_steps(steps: Sequence[tuple[str, str]]) -> None:
    """Print commands, each with the reason for it, which may be empty."""
    for number, (step, why) in enumerate(steps):
        print(f"{'' if number else 'next:':<6}kd-lightning {step}" + (f"   # {why}" if why else ""))


def as_written(args: Sequence[str]) -> str:
    """Return arguments of ``fit`` for a shell, without ``--ckpt_path``, and configs as plain arguments.

    >>> as_written(["--config=a.yaml", "--ckpt_path", "last", "--name", "my run"])
    "a.yaml --name 'my run'"
    """
    kept, is_value = [], False
    for argument in args:
        name, equals, value = argument.partition("=")
        if is_value:
            is_value = False
        elif name == "--ckpt_path":
            is_value = not equals
        else:
            kept.append(value if name == "--config" and value.endswith((".yaml", ".yml")) else argument)
    return shlex.join(kept)


def _has_test_part(datamodule: Any) -> bool:
    """Whether ``test`` can run on a datamodule of this package; True for any other."""
    if isinstance(datamodule, SemiSupervisedDataModule | StreamDataModule):
        try:
            datamodule.test_dataloader()
        except InputError:
            return False
    return True


def _order(name: str) -> tuple[int, str]:
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)


def _text(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
