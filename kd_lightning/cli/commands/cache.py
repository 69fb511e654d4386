"""``cache CONFIG ...``: fill the caches of a config's teachers ahead. Takes fit's arguments, and trains nothing."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kd_lightning.cache.store import readable
from kd_lightning.callbacks import StudentWriter
from kd_lightning.cli.main import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher


def main(args: list[str]) -> None:
    """Fill the caches on all devices, and print each folder's size."""
    configs = [f"--config={path}" for path in takewhile(lambda arg: not arg.startswith("-"), args)]
    trainer = CacheCLI(["fit", *configs, *args[len(configs) :]]).trainer
    for teacher in _cached(trainer.lightning_module) if trainer.is_global_zero else ():
        for folder in teacher.kept_in:
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{folder}: {readable(size)}")


class CacheCLI(DistillCLI):
    """Builds what ``fit`` would, and ends it before its first step."""

    def before_instantiate_classes(self) -> None:
        """Nothing is written beside the caches, nor any student read."""
        self.config["fit"].ckpt_path = None
        super().before_instantiate_classes()
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As for a fit that leaves nothing behind."""
        trainer = super().instantiate_trainer(
            logger=False, enable_checkpointing=False, num_sanity_val_steps=0, **kwargs
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [c for c in callbacks if not isinstance(c, StudentWriter)] + [_NoSteps()]
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
