"""Write the student's weights to a file, ready to deploy."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.folder import run_folder
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.weights import check_fit, metadata_texts, plain_key, read_state, save_weights


class StudentWriter(Callback):
    """Write ``student.safetensors`` to the run's folder at the end of a fit.

    The weights are those of the best checkpoint if a checkpoint callback monitors a metric, else the last ones. If the
    best checkpoint is gone or cannot be read, a warning names it, and the last ones are written. The file's metadata
    holds their origin, the task, the input shape of one sample, the precision, the size of the weights at that
    precision in bytes, and the datamodule's class names and evaluation transforms. The origin ``weights`` is the path
    of the checkpoint in the folder of checkpoints, or ``step N``. Metadata that cannot be determined are left out, with
    a warning. Works on any LightningModule with a ``student``. The command line adds this callback to every fit.

    Raises:
        InputError: If the module has no ``student``, or the file cannot be written.
    """

    def __init__(self) -> None:
        self.input_shape: list[int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Runs when a checkpoint is saved. Returns the input shape: a resumed fit may have no batch left."""
        return {"input_shape": self.input_shape}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Runs when a fit is resumed. Restores the input shape."""
        self.input_shape = state_dict["input_shape"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the module has a student."""
        if not isinstance(getattr(pl_module, "student", None), torch.nn.Module):
            raise InputError(f"StudentWriter needs a module with a student, {type(pl_module).__name__} has none")
        require_whole_weights(trainer, "StudentWriter")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Records the input shape from the first one."""
        if self.input_shape is None:
            try:
                self.input_shape = [*Batch.from_any(batch).x.shape[1:]]
            except (InputError, AttributeError):  # a batch of another kind
                return

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of a fit. Writes the file."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        student: torch.nn.Module = pl_module.student  # type: ignore[assignment]
        state, origin = _select_weights(trainer, student)
        path = folder / "student.safetensors"
        metadata = self._metadata(trainer, pl_module, student) | {"weights": origin}
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_weights(state, part, metadata)
            part.replace(path)
        except Exception as error:  # of the disk, or a tensor of a kind that safetensors lacks
            part.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written: {_line(error)}") from error
        if left_out := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            rank_zero_warn(f"{path} lacks {', '.join(left_out)}, extra state that is no tensor")
        parameters = sum(parameter.numel() for parameter in student.parameters())
        size = f", {float(metadata['size_bytes']) / 1000:,.1f} KB" if "size_bytes" in metadata else ""
        rank_zero_info(f"student written to {path}: {parameters:,} parameters, {metadata.get('precision')}{size}")

    def _metadata(self, trainer: Trainer, module: LightningModule, student: torch.nn.Module) -> dict[str, str]:
        """Return the metadata but the origin, without those that cannot be determined."""
        data = getattr(trainer, "datamodule", None)
        parts: dict[str, Callable[[], Any]] = {
            "kd_lightning": lambda: version("kd-lightning"),
            "task": lambda: getattr(module, "task", None),
            "input_shape": lambda: self.input_shape,
            "precision": lambda: precision_of(student),
            "size_bytes": lambda: math.ceil(size_of(student).stored),
            "classes": lambda: getattr(data, "class_names", None),
            "preprocessing": lambda: repr(getattr(data, "eval_transform", None)),
        }
        found: dict[str, str] = {}
        for name, part in parts.items():
            try:
                found |= metadata_texts({name: part()})
            except Exception as error:  # of any network, data or transform; the weights matter more
                rank_zero_warn(f"the metadata of student.safetensors lack {name}: {_line(error)}")
        return found


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _select_weights(trainer: Trainer, student: torch.nn.Module) -> tuple[dict[str, Any], str]:
    """Return the state of the student in the best checkpoint, else its present one, and the origin of the state."""
    own: dict[str, Any] = student.state_dict()
    problems = []
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.monitor or not callback.best_model_path:
            continue
        path = _find_best(callback)
        if path is None:
            problems.append(f"the best checkpoint {callback.best_model_path} is gone")
            continue
        try:
            saved = {plain_key(key): value for key, value in read_state(path).items()}
            state = {key: saved[name] for key in own if (name := f"student.{plain_key(key)}") in saved}
            check_fit(state, own, f"{path} does not fit the student")
        except InputError as error:
            problems.append(str(error))
            continue
        folder = callback.dirpath or path.parent
        return state, (path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)).as_posix()
    if problems:
        rank_zero_warn(f"student.safetensors holds the last weights, not the best ones: {'; '.join(problems)}")
    return own, f"step {trainer.global_step}"


def _find_best(callback: ModelCheckpoint) -> Path | None:
    """Return the file of the best checkpoint. A run that was moved and resumed has its old path."""
    best = Path(callback.best_model_path)
    inner = [best.parts[start:] for start in range(1, len(best.parts))] if callback.dirpath else []
    candidates = [best, *(Path(str(callback.dirpath), *parts) for parts in inner)]
    return next((path for path in candidates if path.is_file()), None)
