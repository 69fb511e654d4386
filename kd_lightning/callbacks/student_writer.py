"""Write the student's weights to a file, ready to deploy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kd_lightning.batch import unpack
from kd_lightning.data.batch_transfer import own_hooks
from kd_lightning.data.preprocessing import describe_data
from kd_lightning.errors import InputError
from kd_lightning.inputs import tensors_of
from kd_lightning.quantization.sizes import precision_of, size_of
from kd_lightning.runs.folder import run_folder
from kd_lightning.runs.strategies import require_whole_weights
from kd_lightning.runs.student import STUDENT, find_network, inputs_of_call
from kd_lightning.runs.weights import check_fit, metadata_texts, plain_key, read_state, save_weights


class StudentWriter(Callback):
    """Write ``student.safetensors`` to the run's folder at the end of a fit.

    The weights are those of the best checkpoint if a checkpoint callback monitors a metric, else the last ones. If the
    best checkpoint is gone or cannot be read, a warning names it, and the last ones are written. The file's
    metadata holds their origin, the task, the input shape of one sample, the precision, the size of the weights at
    that precision in bytes, the datamodule's class names (null for a backbone), its evaluation transform as text, and
    as JSON the way from a picture to the input, ``preprocessing``
    (:data:`~kd_lightning.data.preprocessing.Description`; null if it has none). The origin ``weights`` is the path of
    the checkpoint in the folder of checkpoints, or ``step N``. Metadata that cannot be determined are left out, with a
    warning. Works on any LightningModule. The command line adds this callback to every fit of a module with a student.

    Where the network is called with several tensors, ``input_shape`` holds the shape of each: as a mapping by the names
    of arguments, or as a list of shapes. Where they are not floats, ``input_dtype`` holds their types in the same form.

    Args:
        network: Dotted path of the student in the module; "" for the module itself.

    Raises:
        InputError: If the module does not have the network, or the file cannot be written.
    """

    def __init__(self, network: str = STUDENT) -> None:
        self.network = network
        self.input_shape: Any = None
        self.input_dtype: Any = None
        self._handle: RemovableHandle | None = None

    def state_dict(self) -> dict[str, Any]:
        """Runs when a checkpoint is saved. Returns the input shape: a resumed fit may have no batch left."""
        return {"input_shape": self.input_shape, "input_dtype": self.input_dtype}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Runs when a fit is resumed. Restores the input shape."""
        self.input_shape = state_dict["input_shape"]
        self.input_dtype = state_dict.get("input_dtype")  # checkpoints of older versions have none

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage. Checks that the strategy leaves the weights whole."""
        require_whole_weights(trainer, "StudentWriter")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit, after ``configure_model``. Checks that the module has the network."""
        find_network(pl_module, self.network, "StudentWriter")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Runs before each training batch. Records the input shape from the first one.

        A module without ``unpack(batch)`` may call its network with other tensors than the batch's: they are recorded
        when the training step calls it.
        """
        if self.input_shape is not None or self._handle is not None:
            return
        network = find_network(pl_module, self.network, "StudentWriter")
        plain = network._compiled_call_impl is None and not hasattr(network, "_orig_mod")
        if network is not pl_module and plain and not callable(getattr(pl_module, "unpack", None)):
            self._handle = network.register_forward_pre_hook(self._record_call, with_kwargs=True)
            return
        try:
            self._record(unpack(pl_module, batch).x)
        except InputError:  # a batch of another kind
            return

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of training. Removes the hook of a network that was never called."""
        self._remove_hook()

    def _record_call(self, network: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._remove_hook()
        self._record(inputs_of_call(network, args, kwargs))

    def _record(self, x: Any) -> None:
        self.input_shape = _of_each(x, lambda tensor: [*tensor.shape[1:]])
        self.input_dtype = None
        if not all(tensor.is_floating_point() for tensor in tensors_of(x)):
            self.input_dtype = _of_each(x, lambda tensor: str(tensor.dtype).removeprefix("torch."))

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the end of a fit. Writes the file."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        student = find_network(pl_module, self.network, "StudentWriter")
        state, origin = _select_weights(trainer, student, f"{self.network}." if self.network else "")
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
        data, is_backbone = getattr(trainer, "datamodule", None), getattr(module, "task", None) == "features"
        parts: dict[str, Callable[[], Any]] = {
            "kd_lightning": lambda: version("kd-lightning"),
            "task": lambda: getattr(module, "task", None),
            "input_shape": lambda: self.input_shape,
            **({} if self.input_dtype is None else {"input_dtype": lambda: self.input_dtype}),
            "precision": lambda: precision_of(student),
            "size_bytes": lambda: math.ceil(size_of(student).stored),
            "classes": lambda: None if is_backbone else getattr(data, "class_names", None),
            "transform": lambda: repr(getattr(data, "eval_transform", None)),
            "preprocessing": lambda: None if own_hooks(data) else describe_data(data, self.input_shape),
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


def _of_each(x: Any, find: Callable[[Tensor], Any]) -> Any:
    """Return inputs with what a function finds in place of each tensor, without what is no tensor."""
    if isinstance(x, Tensor):
        return find(x)
    if isinstance(x, Mapping):
        return {name: found for name, part in x.items() if (found := _of_each(part, find)) is not None}
    if isinstance(x, tuple | list):
        return [found for part in x if (found := _of_each(part, find)) is not None]
    return None


def _select_weights(trainer: Trainer, student: torch.nn.Module, prefix: str) -> tuple[dict[str, Any], str]:
    """Return the state of the student in the best checkpoint, else its present one, and the origin of the state.

    Args:
        trainer: The trainer.
        student: The student.
        prefix: The text before the names of its weights in a checkpoint.
    """
    own: dict[str, Any] = student.state_dict()
    if not prefix:  # the module itself: what teaches it is not deployed
        own = {key: value for key, value in own.items() if not key.startswith("teaching.")}
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
            state = {key: saved[name] for key in own if (name := f"{prefix}{plain_key(key)}") in saved}
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
