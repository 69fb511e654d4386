"""Checkpoint files that stay whole when a write fails."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from kd_lightning.errors import InputError


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a file beside its path and then renames it, so that a full disk leaves the old one whole.

    Lightning writes to the system's temporary folder first. If that lies on another disk, the file is copied, and an
    incomplete copy replaces the last good file. Remote paths (``s3://...``) are written by Lightning.

    Raises:
        InputError: If a file cannot be written; the message names it and the reason.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        part = file.with_name(f".{file.name}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())  # without it a system crash could leave an empty file
            part.replace(file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise InputError(f"checkpoint {file} cannot be written: {cause}; earlier ones are as they were") from error


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` whenever it is due; Lightning's ``save_last`` writes it only together with a best one.

    Args:
        kwargs: Arguments of ModelCheckpoint that define when to save.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(filename="last", monitor=None, save_top_k=1, enable_version_counter=False, **kwargs)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a checkpoint. No code in it is unpickled, and its tensors stay on disk.

    Raises:
        InputError: If it cannot be read; the message names the newest readable one beside it.
    """
    try:
        return _open(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"ckpt_path: {path} holds more than tensors and plain values; loading it could run code"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        whole = next((p for p in sorted(path.parent.glob("*.ckpt"), key=_age) if p != path and _is_whole(p)), None)
        hint = f"; {whole} beside it can be read" if whole else ""
        reason = str(error).split("\n", 1)[0].split(". This can happen", 1)[0]
        raise InputError(f"ckpt_path: {path} is damaged or no checkpoint ({reason}){hint}") from error


def _open(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise RuntimeError("its end is missing, or it was not written by torch.save")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise RuntimeError("it holds no state_dict")
    return content


def _is_whole(path: Path) -> bool:
    try:
        return bool(_open(path))
    except Exception:  # a damaged file can raise any exception
        return False


def _age(path: Path) -> float:
    return -path.stat().st_mtime
