"""Claim the folder of a run before its command starts."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kd_lightning.cli.record_run import unversioned_loggers
from kd_lightning.errors import InputError
from kd_lightning.runs.folder import claim_folder, folder_on_rank_zero, writes_files
from kd_lightning.runs.run import CONFIG, Run


def claim_folder_of_run(trainer: Trainer, name: str, run: Run | None, command: str | None) -> Path | None:
    """Create the folder of a new run, on rank 0; other ranks get it from there. Return None if none is needed.

    Without a logger the run's folder becomes the trainer's root.

    Args:
        trainer: The trainer of the command.
        name: The run's name.
        run: The run that goes on, or is evaluated. None means a new run.
        command: The command, such as ``fit``.

    Raises:
        InputError: If the version of a logger leads a new fit into the folder of another run.
    """
    unversioned = unversioned_loggers(trainer)
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return None
    if trainer.loggers and not unversioned:
        if command == "fit":
            _check_version(trainer, run)
        return None
    if not trainer.loggers and run is not None:
        trainer._default_root_dir = str(run.folder)  # type: ignore[attr-defined]
        return None
    if command != "fit" and not writes_files(trainer):
        return None
    root = unversioned[0].root_dir if unversioned else Path(trainer.default_root_dir, name)
    folder = claim_folder(Path(root))
    for logger in unversioned:
        logger._version = folder.name
    if not trainer.loggers:
        trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]
    return folder


def _check_version(trainer: Trainer, run: Run | None) -> None:
    if not isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return
    folder = folder_on_rank_zero(trainer)
    if (folder / CONFIG).is_file() and (run is None or run.folder.resolve() != folder.resolve()):
        raise InputError(
            f"trainer.logger: {folder} holds a run already; leave out version, or resume that run with --ckpt_path last"
        )
