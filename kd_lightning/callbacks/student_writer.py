"""Write the student's weights to a file, ready to deploy."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.errors import InputError
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.weights import save_weights


class StudentWriter(Callback):
    """Write ``student.safetensors`` to the run's folder at the end of a fit.

    The weights are those of the best checkpoint if a checkpoint callback monitors a metric, else the last ones. The
    file's metadata holds their origin (checkpoint or step), the task, the input shape of one sample, the precision, the
    size of the weights at that precision in bytes, and the datamodule's class names and evaluation transforms. Works
    on any LightningModule with a ``student``. The command line adds this callback to every fit.

    Raises:
        InputError: If the module has no ``student``, or the file cannot be written.
    """

    def __init__(self) -> None:
        self.input_shape: list[int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the module has a student."""
        if not isinstance(getattr(pl_module, "student", None), torch.nn.Module):
            raise InputError(f"StudentWriter needs a module with a student, {type(pl_module).__name__} has none")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Records the input shape from the first one."""
        if self.input_shape is None:
            self.input_shape = [*Batch.from_any(batch).x.shape[1:]]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of a fit. Writes the file."""
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective call: all ranks make it
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        # a resumed run stores the old path of its best checkpoint; the file may be gone
        best = next((c.best_model_path for c in monitors if Path(c.best_model_path).is_file()), "")
        student: torch.nn.Module = pl_module.student  # type: ignore[assignment]
        state: dict[str, Tensor] = student.state_dict()
        if best:
            saved = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            state = {key: saved[f"student.{key}"] for key in state}
        data = getattr(trainer, "datamodule", None)
        precision, size = precision_of(student), math.ceil(size_of(student).stored)
        metadata = {
            "kd_lightning": version("kd-lightning"),
            "task": getattr(pl_module, "task", None),
            "input_shape": self.input_shape,
            "precision": precision,
            "size_bytes": size,
            "classes": getattr(data, "class_names", None),
            "preprocessing": repr(getattr(data, "eval_transform", None)),
            "weights": Path(best).name if best else f"step {trainer.global_step}",
        }
        path = Path(folder) / "student.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            save_weights(state, part, metadata)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written: {error}") from error
        parameters = sum(parameter.numel() for parameter in student.parameters())
        rank_zero_info(f"student written to {path}: {parameters:,} parameters, {precision}, {size / 1000:,.1f} KB")
