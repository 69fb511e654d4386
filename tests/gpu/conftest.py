"""What the GPU tests share. ``KD_LIGHTNING_TEST_DEVICE=cpu`` runs most of them on a CPU, to develop them."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from kd_lightning import Digits, SemiSupervisedDataModule

DEVICE = os.environ.get("KD_LIGHTNING_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    """All tests of this folder need the device."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def device():
    """Name of the device that is tested."""
    return DEVICE


@pytest.fixture(autouse=True)
def _exact():
    """Full float32 convolutions that give the same result each time; products are full by default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def fit(tmp_path):
    """Trains a module on digits, on the device, and returns the trainer."""

    def run(module, *callbacks, accelerator=DEVICE, data=None, **options):
        seed_everything(0, verbose=False)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        limits = {"max_epochs": 2, "limit_train_batches": 6, "limit_val_batches": 2, "num_sanity_val_steps": 0}
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            callbacks=[*callbacks],
            default_root_dir=tmp_path,
            **(quiet | limits | options),
        )
        trainer.fit(module, datamodule=data or SemiSupervisedDataModule(Digits(), labeled=20, batch_size=64))
        return trainer

    return run
