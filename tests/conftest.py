"""What many tests share."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from kd_lightning.models import DigitsCNN

torch.set_num_threads(1)  # the networks are tiny


@pytest.fixture
def quiet_trainer(tmp_path):
    """Makes a Trainer that writes nothing but what a test asks for."""

    def make(**kwargs):
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(defaults | kwargs))

    return make


@pytest.fixture
def student():
    """A tiny student, the same in every test."""
    torch.manual_seed(0)
    return DigitsCNN(width=4)


@pytest.fixture
def teacher():
    """A wider network, untrained."""
    torch.manual_seed(1)
    return DigitsCNN(width=8)


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return Path(__file__).parent.parent
