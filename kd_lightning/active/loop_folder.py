"""The folder of an active-learning loop: what makes a loop that was stopped end as an unbroken one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from torch import Tensor, nn

from kd_lightning.cache.content import fingerprint
from kd_lightning.callbacks.exact_resume import ExactResume
from kd_lightning.callbacks.seed_every_step import SeedEveryStep
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.data.resume_settings import check_resume, describe_transforms
from kd_lightning.errors import InputError
from kd_lightning.runs.checkpoints import SafeCheckpointIO
from kd_lightning.runs.folder import lock_folder
from kd_lightning.runs.resume import cannot_resume
from kd_lightning.runs.weights import save_weights

_STATE = "loop.json"
_LAST = "last.ckpt"
_FORMAT = 1
_TRUTH = {"truth": "the true labels of the pool", "test": "the labels of the test images"}
# settings of a trainer that decide which weights a fit ends with, and what its test measures
_OF_TRAINER = [
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "limit_train_batches", "limit_val_batches", "overfit_batches", "precision"),
    *("check_val_every_n_epoch", "val_check_interval", "reload_dataloaders_every_n_epochs", "limit_test_batches"),
]


class LoopFolder:
    """The folder of a loop: ``loop.json``, and a folder for each training.

    ``loop.json`` has the settings, and the results of the finished trainings. ``round_N/student.safetensors`` has the
    student's weights after training N. While it trains, ``round_N/last.ckpt`` is the checkpoint of the last epoch.

    Args:
        folder: The folder. It is created by :meth:`open`.

    Attributes:
        results: The results of the finished trainings.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.results: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = {}

    @contextmanager
    def open(self, settings: dict[str, Any], data: dict[str, Any]) -> Iterator[None]:
        """Lock the folder, compare the settings with those of the loop that began in it, and read its results.

        Args:
            settings: Settings of the loop by name, as JSON represents them.
            data: State of the data before the first selection, see :func:`data_state`.

        Raises:
            InputError: If the folder has other files, its loop has other settings or data, or another process uses it.
        """
        file = self.folder / _STATE
        if self.folder.exists() and not file.is_file():
            found = [p.name for p in self.folder.iterdir() if p.name != ".lock"] if self.folder.is_dir() else ["a file"]
            if found:
                raise InputError(f"folder: {self.folder} must be new, empty, or of an earlier loop, got {found[0]}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder):
            self._settings = {"settings": settings, "data": data}
            if file.is_file():
                self._read(file, settings, data)
            else:
                self.results = []
                self._write()
            yield

    def _read(self, file: Path, settings: dict[str, Any], data: dict[str, Any]) -> None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            before, data_before, results = (content[name] for name in ("settings", "data", "results"))
            if content["format"] != _FORMAT or not isinstance(before, dict):
                raise ValueError(f"its format must be {_FORMAT}, got {content['format']!r:.20}")
            results = [{"labels": r["labels"], "accuracy": r["accuracy"], "queried": [*r["queried"]]} for r in results]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"folder: {file} is not the state of a loop: {error!r:.120}; name another folder"
            ) from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{name}: {_difference(name, before.get(name), value)}; the loop in {self.folder} "
                    "goes on with the same, or name another folder"
                )
        try:
            check_resume(data_before, data)
            for name, what in _TRUTH.items():
                if data_before.get(name) != data[name]:
                    raise InputError(f"{what} have changed; name another folder")
        except InputError as error:
            raise InputError(f"make_data: {self.folder} has a loop on other data: {error}") from error
        self.results = results
        for number in range(len(results)):  # the process may have ended before it was deleted
            (self._round(number) / _LAST).unlink(missing_ok=True)

    def _write(self) -> None:
        part = self.folder / f".{_STATE}.part"
        content = {"format": _FORMAT, **self._settings, "results": self.results}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / _STATE)

    def prepare(self, trainer: Trainer, seed: int) -> str | None:
        """Make the next training store a checkpoint after each epoch, and return the checkpoint to start from.

        A trainer whose callbacks cannot resume stores none: its training starts anew.

        Args:
            trainer: The trainer. Callbacks are added to it.
            seed: Seed of the training steps.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        seeds = [callback for callback in callbacks if isinstance(callback, SeedEveryStep)]
        for callback in seeds:
            callback.seed = seed if callback.state_dict()["seed"] is None else callback.seed
        callbacks[:0] = [] if seeds else [SeedEveryStep(seed)]
        if cannot_resume(trainer) is not None:
            return None
        if not any(isinstance(callback, ExactResume) for callback in callbacks):
            callbacks[:0] = [ExactResume()]
        folder = self._round()
        callbacks.append(_EachEpoch(folder))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        return str(folder / _LAST) if (folder / _LAST).is_file() else None

    def finish(self, result: dict[str, Any], student: nn.Module) -> None:
        """Store the result of a training and its student; the checkpoint is deleted."""
        folder = self._round()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / ".student.safetensors.part"
        save_weights(student.state_dict(), part, {})
        part.replace(folder / "student.safetensors")
        self.results.append(result)
        self._write()
        (folder / _LAST).unlink(missing_ok=True)

    def _round(self, number: int | None = None) -> Path:
        """Return the folder of a training. Default: None, which means the next one."""
        return self.folder / f"round_{len(self.results) if number is None else number}"


def data_state(data: SemiSupervisedDataModule, pool: Tensor) -> dict[str, Any]:
    """Return what decides the results of a loop beside module and trainer, as JSON represents it.

    It is the state that a checkpoint has, the transform of evaluations, and the labels that the loop reveals and that
    its tests compare with.

    Args:
        data: The datamodule, set up.
        pool: Indices of the samples without a label, (N,).
    """
    state = data.state_dict()
    settings = state["settings"] | describe_transforms({"eval_transform": data.eval_transform})
    test = data.samples.parts.test
    truth = {"truth": data.hidden_truth(pool), "test": None if test is None else test.targets}
    return state | {"settings": settings} | {name: fingerprint(labels) for name, labels in truth.items()}


class _EachEpoch(ModelCheckpoint):
    """Stores the last epoch of a training. It has a name of its own among the checkpoint callbacks of a trainer."""

    def __init__(self, folder: Path) -> None:
        options: dict[str, Any] = {"save_top_k": 1, "every_n_epochs": 1, "save_on_train_epoch_end": True}
        super().__init__(folder, filename=Path(_LAST).stem, enable_version_counter=False, **options)


def training_settings(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Return what decides the weights of a training beside the data, as JSON represents it.

    Args:
        module: The new module. Its weights, attributes and code count.
        trainer: The new trainer. Files that its checkpoint callbacks write do not count, nor do progress bars.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    used = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint | ProgressBar)]
    of_trainer = {name: _plain(getattr(trainer, name)) for name in _OF_TRAINER}
    of_trainer["device"] = trainer.strategy.root_device.type
    of_trainer["callbacks"] = [[type(callback).__name__, fingerprint(callback)] for callback in used]
    return {"make_module": [type(module).__name__, fingerprint(module)], "make_trainer": of_trainer}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str | None) else str(value)  # a float as text: 1.0 is all batches, 1 is one


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
        return f"{key} was {_short(before.get(key))}, got {_short(now.get(key))}"
    if isinstance(before, list) and isinstance(now, list) and before[0] == now[0]:
        return f"weights, attributes or code of {now[0]} have changed"
    return f"it was {_short(before)}, got {_short(now)}"


def _short(value: Any) -> str:
    """Return a value as a text; of objects with a fingerprint the name."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]" if all(isinstance(one, list) for one in value) else str(value[0])
    return str(value)
