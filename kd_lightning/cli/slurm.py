"""SLURM: turns off what Lightning does there by itself, and a resume cannot be exact with.

At a signal Lightning writes a checkpoint in the middle of a step, requeues the job, and begins every later command on
SLURM from that checkpoint. It lies in ``trainer.default_root_dir``, which all runs share: another config, or ``test``,
would begin from it, too. ``docs/examples/slurm.md`` has a script that requeues a job and resumes its own run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from kd_lightning.errors import InputError


def stop_requeueing(trainer: Trainer, plugins: Any) -> None:
    """Let a trainer's job be requeued by its script alone.

    Args:
        trainer: The trainer, before it runs.
        plugins: Those of the config. A SLURMEnvironment among them stays as it is.
    """
    environment = trainer._accelerator_connector.cluster_environment
    given = plugins if isinstance(plugins, list) else [plugins]
    if isinstance(environment, SLURMEnvironment) and not any(environment is one for one in given):
        environment.auto_requeue = False


def refuse_shared_checkpoint(root: Path, checkpoint: str | None) -> None:
    """Raise InputError if Lightning would begin a command from a checkpoint that all runs below a folder share.

    Args:
        root: The folder of all runs.
        checkpoint: The checkpoint of the command. None means none, in whose place Lightning takes the shared one.
    """
    if checkpoint is not None or not SLURMEnvironment.detect():
        return
    for path in sorted(root.glob("hpc_ckpt_*.ckpt")):
        raise InputError(
            f"trainer.default_root_dir: {path}, which Lightning has written at a signal of SLURM, would be the start "
            "of every command on SLURM; move it away, or name the checkpoint with --ckpt_path"
        )
