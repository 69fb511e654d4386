"""A signal ends predictions after the batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.ranks import stop_if_recorded


class StopPredictions(Callback):
    """Ends ``predict`` after the batch in which a signal came, as Lightning ends its other loops."""

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Runs after each batch.

        Raises:
            SIGTERMException: If the trainer has recorded a signal.
        """
        stop_if_recorded(trainer)
