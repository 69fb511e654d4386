"""Checkpoint files: written so that they stay whole when a write fails, and read so that no code in them runs."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from kd_lightning.errors import InputError
from kd_lightning.runs.unpickling import find_stub, read_tensors

# what a fit restores, and an evaluation does not need
_OF_FIT = ("loops", "optimizer_states", "lr_schedulers")
_VERSION = "pytorch-lightning_version"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that stay whole, and reads them without running code.

    A checkpoint is written to a file beside its path, which is then renamed, so that a full disk leaves the old one
    whole. Lightning writes to the system's temporary folder first. If that lies on another disk, the file is copied,
    and an incomplete copy replaces the last good file. Remote paths (``s3://...``) are written by Lightning.

    Objects in saved hyperparameters that are neither tensors nor plain values are replaced by stubs.

    Args:
        resume: Whether a checkpoint must hold what a fit needs to go on. If False, the weights are enough.

    Raises:
        InputError: If a file cannot be written or read; the message names it and the reason.
    """

    def __init__(self, *, resume: bool = True) -> None:
        super().__init__()
        self.resume = resume

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

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU. With ``weights_only=False`` Lightning reads it, and code in it runs."""
        if weights_only is False:
            return super().load_checkpoint(path, weights_only=False)
        if "://" in str(path):
            with get_filesystem(path).open(str(path), "rb") as stream:
                checkpoint = _explain(path, lambda: _check(read_tensors(stream), resume=self.resume))
        else:
            checkpoint = _explain(path, lambda: _check(_open(Path(path), mmap=False), resume=self.resume))
        if not checkpoint["state_dict"]:
            raise InputError(f"ckpt_path: {path}: its state_dict is empty")
        if not self.resume:  # an evaluation has loops of its own
            checkpoint = {key: value for key, value in checkpoint.items() if key not in _OF_FIT}
            if not _has_version(checkpoint):
                checkpoint[_VERSION] = lightning.__version__
            if not isinstance(checkpoint.get("callbacks"), Mapping):
                checkpoint["callbacks"] = None
        return checkpoint


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` whenever it is due; Lightning's ``save_last`` writes it only together with a best one.

    Args:
        kwargs: Arguments of ModelCheckpoint that define when to save.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(filename="last", monitor=None, save_top_k=1, enable_version_counter=False, **kwargs)


class BestCheckpoint(ModelCheckpoint):
    """Writes the best checkpoint if its metric is logged, for modules of which this is not known.

    Lightning ends a fit whose validation does not log the metric.

    Args:
        kwargs: Arguments of ModelCheckpoint.
    """

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Names the metrics that were logged, if the monitored one was not."""
        super().on_train_end(trainer, pl_module)
        names = [*trainer.callback_metrics]
        if not names or self.monitor in names or self.best_model_path:
            return
        logged = ", ".join([name for name in names if "val" in name.lower()] or names)
        rank_zero_warn(
            f"checkpoint.monitor: {self.monitor} was never logged, so that the last weights are deployed, not the best "
            f"ones; set it to one of the metrics that were: {logged}"
        )


def follow_move(state: dict[str, Any], folder: str | Path | None) -> None:
    """Correct the paths in the saved state of a ModelCheckpoint if its folder was moved.

    Without it Lightning forgets the best value, so that a worse checkpoint becomes the best one.

    Args:
        state: The saved state. It is changed in place.
        folder: The present folder of the callback.
    """
    old = state.get("dirpath")
    if not isinstance(old, str) or folder is None or old == str(folder):
        return

    def moved(path: str) -> str:
        return str(Path(folder, Path(path).relative_to(old))) if Path(path).is_relative_to(old) else path

    best = state.get("best_model_path") or state.get("last_model_path") or ""
    if moved(best) == best or not Path(moved(best)).is_file():  # another run's folder
        return
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = moved(state.get(key, ""))
    state["best_k_models"] = {moved(path): value for path, value in state.get("best_k_models", {}).items()}
    state["dirpath"] = str(folder)


def read_checkpoint(path: Path, *, resume: bool = False) -> dict[str, Any]:
    """Open a checkpoint. No code in it runs, and its tensors stay on disk.

    Objects in its hyperparameters that are neither tensors nor plain values are replaced by stubs.

    Args:
        path: The file.
        resume: Whether it must hold what a fit needs to go on. If False, a ``state_dict`` is enough.

    Raises:
        InputError: If it cannot be read, lacks something, or its state holds an object that is not read. The message
            names what, and if the file is damaged, the newest readable one beside it.
    """
    return _explain(path, lambda: _check(_open(path), resume=resume))


def _explain(path: str | Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a checkpoint; what is wrong with it becomes an InputError of one line."""
    try:
        return read()
    except pickle.UnpicklingError as error:
        raise InputError(
            f"ckpt_path: {path} holds more than tensors and plain values; loading it could run code"
        ) from error
    except InputError as error:
        raise InputError(f"ckpt_path: {path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"ckpt_path: no checkpoint at {path}") from error
    except Exception as error:  # a damaged file can raise any exception
        beside = sorted(Path(path).parent.glob("*.ckpt"), key=_age)
        whole = next((p for p in beside if p != Path(path) and _is_whole(p)), None)
        hint = f"; {whole} beside it can be read" if whole else ""
        reason = str(error).split("\n", 1)[0].split(". This can happen", 1)[0]
        raise InputError(f"ckpt_path: {path} is damaged or no checkpoint ({reason}){hint}") from error


def _open(path: Path, mmap: bool = True) -> Any:
    if path.is_dir():
        raise RuntimeError("it is a folder")
    if path.suffix == ".safetensors":
        raise RuntimeError("safetensors hold weights alone")
    if path.exists() and not zipfile.is_zipfile(path):
        raise RuntimeError("its end is missing, or it was not written by torch.save")
    return read_tensors(path, mmap=mmap)


def _check(content: Any, *, resume: bool) -> dict[str, Any]:
    """Return a checkpoint's content, or raise InputError if it lacks something."""
    if not isinstance(content, dict) or "state_dict" not in content:
        raise RuntimeError("it holds no state_dict")
    unused = () if resume else _OF_FIT
    stub = find_stub({key: value for key, value in content.items() if key not in unused and not _is_hparam(key)})
    if stub is not None:
        place, name = stub
        raise InputError(
            f"{place} holds an object of {name}, which is not read, since loading it could run code; allowed: tensors "
            "and plain values"
        )
    _check_kind(content, "state_dict", Mapping)
    if resume:
        _check_position(content)
    return content


def _check_position(content: dict[str, Any]) -> None:
    """Raise InputError unless a checkpoint holds what a fit needs to go on."""
    if not content["state_dict"]:
        raise InputError("its state_dict is empty")
    if not content.keys() & {"optimizer_states", "lr_schedulers"}:
        raise InputError("it holds weights alone (save_weights_only), from which a fit cannot go on")
    for key in ("optimizer_states", "lr_schedulers"):
        _check_kind(content, key, list)
    for key in ("callbacks", "loops"):
        _check_kind(content, key, Mapping)
    loop = content["loops"].get("fit_loop")
    for key in ("epoch_progress", "epoch_loop.batch_progress"):
        counters = loop.get(key) if isinstance(loop, Mapping) else None
        if not isinstance(counters, Mapping) or not {"total", "current"} <= counters.keys():
            raise InputError(f"loops.fit_loop.{key}, the position of the fit, is missing")
    if not _has_version(content):
        raise InputError(f"{_VERSION} must be the version of Lightning, got {content.get(_VERSION)!r}")


def _check_kind(content: dict[str, Any], key: str, kind: type) -> None:
    if not isinstance(content.get(key), kind):
        found = f"got {type(content[key]).__name__}" if key in content else "it is missing"
        raise InputError(f"{key} must be {'a list' if kind is list else 'a mapping'}, {found}")


def _has_version(content: dict[str, Any]) -> bool:
    return re.match(r"\d+\.\d+", str(content.get(_VERSION))) is not None


def _is_hparam(key: Any) -> bool:
    """Return whether a key of a checkpoint holds hyperparameters, which are not restored."""
    return str(key).endswith(("hyper_parameters", "hparams_type", "hparams_name", "hparams"))


def _is_whole(path: Path) -> bool:
    try:
        return bool(_check(_open(path), resume=False))
    except Exception:  # a damaged file can raise any exception
        return False


def _age(path: Path) -> float:
    return -path.stat().st_mtime
