"""``cache CONFIG ...``: fill the caches of a config's teachers before training. Takes the arguments of fit."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.cache.store import format_size
from kd_lightning.callbacks import StudentWriter
from kd_lightning.cli.main import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher


def main(options: Namespace) -> None:
    """Fill the caches on all devices, and print the size of each folder."""
    trainer = CacheCLI(["fit", *options.overrides]).trainer
    for teacher in _teachers_with_cache(trainer.lightning_module) if trainer.is_global_zero else ():
        for folder in teacher.cache_folders.values():
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{folder}: {format_size(size)}")


class CacheCLI(DistillCLI):
    """Builds what ``fit`` builds, and ends the fit before its first step."""

    def before_instantiate_classes(self) -> None:
        """Before anything is built: drop the checkpoint and the saved config, so that only caches are written."""
        self.config["fit"].ckpt_path = None
        super().before_instantiate_classes()
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a trainer that writes no run folder and takes no step."""
        trainer = super().instantiate_trainer(
            logger=False, enable_checkpointing=False, num_sanity_val_steps=0, **kwargs
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [c for c in callbacks if not isinstance(c, StudentWriter)] + [_NoSteps()]
        return trainer

    def fit(self, model: nn.Module, **kwargs: Any) -> None:
        """Run in place of ``Trainer.fit``."""
        if not any(_teachers_with_cache(model)):
            name = type(model).__name__
            raise InputError(f"cache: no teacher of {name} has a cache; set cache: DIR in the init_args of a Teacher")
        self.trainer.fit(model, **kwargs)  # type: ignore[arg-type]


class _NoSteps(Callback):
    """Ends a fit before its first step; modules fill their caches when a fit starts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When a fit starts: set the number of epochs to zero."""
        trainer.fit_loop.max_epochs = 0


def _teachers_with_cache(model: nn.Module) -> list[Teacher]:
    return [part for part in model.modules() if isinstance(part, Teacher) and part.cache is not None]
