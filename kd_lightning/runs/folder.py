"""Where a run's files lie."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from kd_lightning.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows; runs are not locked there
    fcntl = None  # type: ignore[assignment]


_evaluated: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()
"""The folder of the run that a trainer evaluates."""


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a trainer's run, whatever its loggers.

    It is ``save_dir/name/version`` of the first logger, as for ModelCheckpoint, so that runs that share a folder of
    logs (Weights & Biases, MLflow) do not share this one. Without a logger it is ``default_root_dir``. That of an
    evaluated run is its own, see :func:`evaluate_in`. Every process must call this function, since rank 0 decides.
    """
    return Path(trainer.strategy.broadcast(str(folder_on_rank_zero(trainer)) if trainer.is_global_zero else ""))


def evaluate_in(trainer: Trainer, folder: Path) -> None:
    """Let a trainer's results lie in the folder of the run that it evaluates.

    Loggers of other packages begin a run of their own in each command, whose folder is another one.
    """
    _evaluated[trainer] = folder


def writes_files(trainer: Trainer) -> bool:
    """Return whether this process writes the run's files: rank 0 does, if the run has loggers or checkpoints."""
    has_folder = bool(trainer.loggers or trainer.checkpoint_callbacks)
    return trainer.is_global_zero and has_folder and not getattr(trainer, "fast_dev_run", False)


def folder_on_rank_zero(trainer: Trainer) -> Path:
    """Return the folder as this process finds it, which is right on rank 0; it needs no other process."""
    if trainer in _evaluated:
        return _evaluated[trainer]
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger: Any = trainer.loggers[0]
    if logger.version is None:
        _ = logger.experiment  # Weights & Biases has no version before
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return Path(root, str(logger.name), version)


def claim_folder(runs: Path) -> Path:
    """Create the folder of a new run, ``version_k``, with the first k above those of all other runs.

    Creation is atomic: of several processes that claim at the same time each gets a folder of its own.

    Args:
        runs: The folder of all runs of a name. It is created if needed.

    Raises:
        InputError: If the folder cannot be created.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = next_version(runs)
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                continue
            return folder
    except OSError as error:
        raise InputError(f"trainer.default_root_dir: cannot write to {runs}: {error.strerror}") from error


def next_version(runs: Path) -> Path:
    """Return the folder that :func:`claim_folder` creates next."""
    found = (re.fullmatch(r"version_(\d+)", path.name) for path in (runs.iterdir() if runs.is_dir() else ()))
    return runs / f"version_{max((int(match[1]) for match in found if match), default=-1) + 1}"


def lock_folder(folder: Path) -> IO[str]:
    """Lock a run's folder for a fit of this process, until the returned file is closed or the process ends.

    Worker processes do not inherit the lock, so a killed run can be resumed at once.

    Raises:
        InputError: If another process fits in the folder.
    """
    file = (folder / ".lock").open("a", encoding="utf-8")
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"{folder} is in use: another process is training this run") from error
            raise
    return file


def release_folder(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step, and the folder of its name if it is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.rmdir()
    except OSError:  # it holds other runs
        return
