"""The training and the measurement that benchmarks of few or weak labels share."""

from functools import partial

from ensemble import accuracy
from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR


def train(steps, seed, make_module, data, callbacks=(), lr=0.01):
    """Train for so many steps, with AdamW and a cosine schedule. Return the module."""
    schedule = partial(CosineAnnealingLR, T_max=steps)
    options = {"optimizer": partial(AdamW, lr=lr, weight_decay=0.01), "lr_scheduler": schedule, "lr_interval": "step"}
    seed_everything(seed, verbose=False)
    module = make_module(**options)
    trainer = make_trainer(steps, callbacks)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    return module


def make_trainer(steps, callbacks=()):
    """Make a trainer that writes nothing."""
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )


def measure(module, data):
    """Accuracy in %, on validation images if there are some, else on test images."""
    return 100 * accuracy(module.student, data.val_dataloader() or data.test_dataloader())
