"""Runs with Weights & Biases (offline) and MLflow (on sqlite): folders of their own, and figures. Nothing is sent."""

import socket
import sqlite3
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from kd_lightning import PseudoLabelModule, PseudoLabelRefresh, SemiSupervisedDataModule, StudentWriter
from kd_lightning.__main__ import main
from kd_lightning.data import Digits
from kd_lightning.models import DigitsCNN

FIGURES = {"pseudo_labels/confidence", "pseudo_labels/classes", "test/confusion_matrix"}
SHORT = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
pytestmark = [
    pytest.mark.slow,  # importing MLflow and making its database takes long
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Away(CSVLogger):
    """A logger whose server is away."""

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("the server is away")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty working directory, and no connection but to this machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect, outside = socket.socket.connect, []

    def check(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", check)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    assert not outside


def write_yaml(logger):
    """A config of a run of four steps, with one or several loggers."""
    config = {
        "seed_everything": 1,
        "trainer": {
            **SHORT,
            "default_root_dir": "root",
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": logger,
            "callbacks": [{"class_path": "PseudoLabelRefresh", "init_args": {"warmup_epochs": 1}}],
        },
        "model": {
            "class_path": "PseudoLabelModule",
            "init_args": {
                "student": {"class_path": "DigitsCNN", "init_args": {"width": 4}},
                "pseudo_labels": "refreshed",
            },
        },
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {
                "source": {"class_path": "Digits"},
                "labeled": 4,
                "batch_size": 32,
                "labeled_batch_size": 8,
            },
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))


def fit(trainer_of, logger):
    """One fit and test of the Python API; gives the folder in which the checkpoints lie."""
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint()
    trainer = trainer_of(
        **SHORT,
        logger=logger,
        enable_checkpointing=True,
        callbacks=[PseudoLabelRefresh(warmup_epochs=1), StudentWriter(), checkpoint],
        log_every_n_steps=1,
    )
    data = SemiSupervisedDataModule(Digits(), labeled=4, batch_size=32, labeled_batch_size=8)
    module = PseudoLabelModule(DigitsCNN(4), pseudo_labels="refreshed")
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return Path(checkpoint.dirpath).parent


def check_runs(folders, configs=False):
    """Check that each folder holds one whole run."""
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert (folder / "split.json").is_file() and (folder / "student.safetensors").is_file()
        assert [path.name for path in sorted((folder / "pseudo_labels").iterdir())] == [
            "round_0000.csv",
            "round_0001.csv",
        ]
        assert [*(folder / "checkpoints").glob("*.ckpt")]
        assert (folder / "config.yaml").is_file() or not configs


def runs_below(root):
    return sorted(path.parent for path in Path(root).rglob("student.safetensors"))


def wandb_media(folder):
    """The names of the figures of a run, and how many of each."""
    images = [path.relative_to(folder) for path in folder.rglob("media/images/**/*.png")]
    names = [path.as_posix().split("media/images/")[1].rsplit("_", 2)[0] for path in images]
    return {name: names.count(name) for name in names}


def mlflow_artifacts(folder, run):
    """The names of the figures of a run."""
    return {path.relative_to(folder / run / "artifacts").as_posix() for path in (folder / run).rglob("*.png")}


def metrics_of(database):
    """The names of the metrics of each run."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_uuid, key from metrics").fetchall()
    return {run: {key for other, key in rows if other == run} for run, _ in rows}


class TestPythonAPI:
    def test_weights_and_biases(self, quiet_trainer, tmp_path):
        folders = []
        for _ in range(2):
            logger = WandbLogger(save_dir=tmp_path / "logs", offline=True, project="digits")
            folders.append(fit(quiet_trainer, logger))
            assert folders[-1] == tmp_path / "logs" / "digits" / logger.version
            logger.experiment.finish()
        check_runs(folders)
        files = [tmp_path.glob(f"logs/wandb/offline-run-*-{folder.name}") for folder in folders]
        for (own,) in files:
            assert wandb_media(own) == dict.fromkeys(FIGURES, 2) | {"test/confusion_matrix": 1}

    def test_mlflow(self, quiet_trainer, tmp_path):
        folders = []
        for _ in range(2):
            logger = MLFlowLogger(
                "digits", tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts")
            )
            folders.append(fit(quiet_trainer, logger))
            assert folders[-1] == tmp_path / logger.experiment_id / logger.run_id
        check_runs(folders)
        for folder in folders:
            assert mlflow_artifacts(tmp_path / "artifacts", folder.name) == {
                *(f"pseudo_labels/{name}_step_{step}.png" for name in ("confidence", "classes") for step in (2, 4)),
                "test/confusion_matrix_step_4.png",
            }
        assert {*metrics_of("runs.db")} == {folder.name for folder in folders}

    def test_second_logger_changes_nothing(self, quiet_trainer, tmp_path):
        """The first one decides on the folder; each gets the metrics, and the figures if it takes them."""
        first = CSVLogger(tmp_path, "csv")
        second = WandbLogger(save_dir=tmp_path / "logs", offline=True)
        folder = fit(quiet_trainer, [first, second])
        assert folder == tmp_path / "csv" / "version_0"
        check_runs([folder])
        second.experiment.finish()
        assert runs_below(tmp_path) == [folder]
        assert wandb_media(tmp_path / "logs").keys() == FIGURES
        assert "test/accuracy" in (folder / "metrics.csv").read_text()


class TestCommandLine:
    def test_weights_and_biases(self):
        arguments = {"save_dir": "logs", "project": "digits", "offline": True}
        write_yaml({"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": arguments})
        for _ in range(2):  # in one process, in which Weights & Biases has one open run
            main(["fit", "--config", "config.yaml"])
        folders = runs_below(".")
        assert [folder.parent for folder in folders] == [Path("logs/digits")] * 2
        check_runs(folders, configs=True)
        config = dict(sys.modules["wandb"].run.config)
        wanted = {"model": "PseudoLabelModule", "model.student.width": 4, "data.labeled": 4}
        assert wanted == {name: config.get(name) for name in wanted}
        sys.modules["wandb"].finish()
        for folder in folders:
            (own,) = Path("logs/wandb").glob(f"offline-run-*-{folder.name}")
            own_figures = dict.fromkeys(FIGURES - {"test/confusion_matrix"}, 2)
            assert wandb_media(own) == own_figures | {"samples/augmentation": 1}

    def test_mlflow(self):
        arguments = {"tracking_uri": "sqlite:///runs.db", "artifact_location": "artifacts"}
        write_yaml({"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": arguments})
        for _ in range(2):
            main(["fit", "--config", "config.yaml"])
        folders = runs_below("root")
        assert len(folders) == 2
        check_runs(folders, configs=True)
        for folder in folders:
            found = mlflow_artifacts(Path("artifacts"), folder.name)
            assert found == {"samples/augmentation_step_0.png"} | {
                f"pseudo_labels/{name}_step_{step}.png" for name in ("confidence", "classes") for step in (2, 4)
            }
        assert {*metrics_of("runs.db")} == {folder.name for folder in folders}
        with sqlite3.connect("runs.db") as connection:
            parameters = connection.execute("select run_uuid, value from params where key = 'data.batch_size'")
            assert {*parameters} == {(folder.name, "32") for folder in folders}

    def test_several_loggers(self):
        # a database of its own name: MLflow holds one connection per name, also when its file has gone
        write_yaml(
            [
                {
                    "class_path": "lightning.pytorch.loggers.MLFlowLogger",
                    "init_args": {"tracking_uri": "sqlite:///both.db", "artifact_location": "artifacts"},
                },
                {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv"}},
            ]
        )
        main(["fit", "--config", "config.yaml"])
        (folder,) = runs_below(".")
        assert folder.is_relative_to("root")
        check_runs([folder], configs=True)
        assert {path.name for path in Path("csv").rglob("*.*")} == {"metrics.csv", "hparams.yaml"}

    def test_a_logger_that_fails_does_not_end_a_training(self):
        write_yaml([{"class_path": f"{__name__}.Away", "init_args": {"save_dir": "csv"}}])
        with pytest.warns(UserWarning, match=r"^Away.log_metrics failed, and the run goes on.*the server is away$"):
            main(["fit", "--config", "config.yaml"])
        assert len(runs_below("csv")) == 1
