"""A callback that looks at a fit from within."""

from lightning.pytorch import Callback


class Probe(Callback):
    """Calls a function at the start of each epoch, or of each batch; from an epoch on."""

    def __init__(self, check, batch=False, first_epoch=0):
        self.check = check
        self.batch = batch
        self.first_epoch = first_epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if not self.batch and trainer.current_epoch >= self.first_epoch:
            self.check(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batch and trainer.current_epoch >= self.first_epoch:
            self.check(trainer, pl_module, batch)
