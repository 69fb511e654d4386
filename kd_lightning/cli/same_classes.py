"""Check that a network is evaluated on the classes that it was trained on."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from kd_lightning.cli.selection import Selection
from kd_lightning.runs.weights import check_classes, class_names_of


class SameClasses(Callback):
    """Refuses to evaluate weights on data of other classes than those that they were trained on.

    A folder of images that comes or goes moves the numbers of the other classes.

    Args:
        selection: The weights of the command.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs at the start of each stage, after the setup of the data. Before an evaluation, checks the classes.

        Raises:
            InputError: If the data have other classes.
        """
        run, weights = self.selection.origin, self.selection.weights
        if stage == TrainerFn.FITTING:
            return
        data = getattr(trainer, "datamodule", None)
        if run is not None:
            check_classes(run.class_names, data, run.folder)
        elif weights is not None:
            check_classes(class_names_of(weights), data, weights)
