"""Make a resumed fit equal an unbroken one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from kd_lightning.runs.resume import cannot_resume, prepare_resume, saves_within_epochs, store_position


class ExactResume(Callback):
    """Make a fit that resumes from a checkpoint equal an unbroken one, however often it is killed.

    Lightning alone leaves out the validation, the epoch's last hooks and the step of ReduceLROnPlateau that follow
    the checkpoint. After a second resume from an epoch's last batch it trains too long. A fit that EarlyStopping has
    stopped stays stopped, unless its patience is raised. Wrong counters in checkpoints of older versions are corrected.

    Works on any LightningModule. The modules of this package need no callback. PyTorch's own DataLoader resumes between
    epochs, and with ``SeedEveryStep`` in the same order. Within an epoch, a loader needs ``load_state_dict``, as those
    of ``SemiSupervisedDataModule`` have. The command line adds this callback to every fit.

    Raises:
        InputError: When a fit resumes with another ``accumulate_grad_batches``, with Lightning's
            StochasticWeightAveraging or BackboneFinetuning, or within an epoch where a loader has no
            ``load_state_dict``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs at the start of a fit. Warns of a callback that cannot resume."""
        if (reason := cannot_resume(trainer)) is not None:
            rank_zero_warn(f"trainer.callbacks: {reason}, if the run may be interrupted")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs before the first epoch. Warns of checkpoints from which the run could not resume."""
        if (reason := saves_within_epochs(trainer)) is not None:
            rank_zero_warn(reason)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs before a checkpoint is written. Adds the monitored metrics and what else a resume needs."""
        store_position(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs after a checkpoint's weights are loaded. Prepares the rest of the interrupted epoch."""
        prepare_resume(trainer, checkpoint)
