"""``cache --config ...``: fill the caches of a config's teachers ahead. Takes fit's arguments, and trains nothing."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.cli import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.output_cache import readable
from kd_lightning.teachers import Teacher


def main(args: list[str]) -> None:
    """Fill the caches on all devices, and print each folder's size."""
    trainer = CacheCLI(["fit", *args]).trainer
    for teacher in _cached(trainer.lightning_module) if trainer.is_global_zero else ():
        for folder in teacher.kept_in:
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{folder}: {readable(size)}")


class CacheCLI(DistillCLI):
    """Builds what ``fit`` would, and ends it before its first step."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Nothing is written beside the caches."""
        trainer = super().instantiate_trainer(logger=False, **kwargs)
        trainer.callbacks.append(_NoSteps())  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: nn.Module, **kwargs: Any) -> None:
        """Take the place of ``Trainer.fit``."""
        if not any(_cached(model)):
            name = type(model).__name__
            raise InputError(f"cache: no teacher of {name} has one; set cache: DIR in the init_args of a Teacher")
        self.trainer.fit(model, **kwargs)  # type: ignore[arg-type]


class _NoSteps(Callback):
    """Modules fill caches as a fit begins."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.max_epochs = 0


def _cached(model: nn.Module) -> list[Teacher]:
    return [part for part in model.modules() if isinstance(part, Teacher) and part.cache is not None]
