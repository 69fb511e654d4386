"""SLURM: no checkpoint in mid-step, and none of another run."""

import signal
from pathlib import Path

import pytest
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback

from kd_lightning.__main__ import main
from kd_lightning.cli.slurm import refuse_shared_checkpoint, stop_requeueing

JOB = {"JOB_ID": "7", "JOB_NAME": "x", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "NODELIST": "localhost"}


class Handler(Callback):
    """Notes what SIGUSR1 does while a fit runs."""

    seen: list = []

    def on_train_batch_end(self, *args, **kwargs):
        self.seen.append(signal.getsignal(signal.SIGUSR1))


@pytest.fixture
def job(config, monkeypatch):
    """A job with one task; the config is in ``config.yaml``."""
    for name, value in (JOB | {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    config["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 2,
        "callbacks": [{"class_path": f"{__name__}.Handler"}],
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Handler.seen.clear()


def test_a_signal_writes_no_checkpoint_within_a_step(job):
    before = signal.getsignal(signal.SIGUSR1)
    main(["fit", "config.yaml"])
    assert Handler.seen == [before] * 2


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_all_runs_share_is_refused(job, command, fails, monkeypatch):
    """Lightning would begin every command from it, also that of another config."""
    path = Path("runs/hpc_ckpt_1.ckpt")
    path.parent.mkdir()
    path.touch()
    text = fails(command, "config.yaml")
    assert text.startswith(f"error: trainer.default_root_dir: {path}") and "--ckpt_path" in text
    refuse_shared_checkpoint(path.parent, str(path))  # somebody has named it
    monkeypatch.delenv("SLURM_NTASKS")  # not on SLURM
    refuse_shared_checkpoint(path.parent, None)


def test_an_environment_of_the_config_stays(job, quiet_trainer):
    for given in (SLURMEnvironment(), [SLURMEnvironment()]):
        trainer = quiet_trainer(plugins=given)
        stop_requeueing(trainer, given)
        assert trainer._accelerator_connector.cluster_environment.auto_requeue
    stop_requeueing(trainer, None)
    assert not trainer._accelerator_connector.cluster_environment.auto_requeue
