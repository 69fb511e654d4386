"""Lets the tests of this folder import its probe, and fit for a few epochs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fit(quiet_trainer):
    """Fits a module for three epochs with some callbacks; gives the trainer."""

    def run(module, *callbacks, datamodule, ckpt_path=None, **kwargs):
        trainer = quiet_trainer(**({"max_epochs": 3, "callbacks": [*callbacks]} | kwargs))
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        return trainer

    return run
