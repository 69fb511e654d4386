"""BoardWriter: learning rates, the config as text and as hyperparameters."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kd_lightning.callbacks import BoardWriter
from kd_lightning.callbacks.board_writer import learning_rates, scalars
from kd_lightning.runs.csv_logger import read_metrics

CONFIG = {
    "name": "x",
    "config": ["x.yaml"],
    "seed_everything": 3,
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "callbacks": [{"class_path": "a.B"}]},
    "model": {"class_path": "kd.Module", "init_args": {"student": {"class_path": "a.Net", "init_args": {"width": 8}}}},
    "data": {"class_path": "D", "init_args": {"sizes": [1, 2], "cache": None, "path": object}},
}


def test_scalars():
    assert dict(scalars(CONFIG)) == {
        "seed_everything": 3,
        "trainer.max_epochs": 2,
        "model": "Module",
        "model.student": "Net",
        "model.student.width": 8,
        "data": "D",
        "data.sizes": "1, 2",
        "data.path": "<class 'object'>",
    }


def test_learning_rates_of_optimisers_and_groups():
    def optimizer(kind, *rates):
        return kind([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])

    sgd, adam = torch.optim.SGD, torch.optim.Adam
    assert learning_rates([optimizer(sgd, 0.1, 0.1), optimizer(adam, 0.2, 0.3)]) == {
        "lr/SGD": 0.1,
        "lr/Adam/0": 0.2,
        "lr/Adam/1": 0.3,
    }
    assert learning_rates([optimizer(sgd, 0.1), optimizer(sgd, 0.2)]) == {"lr/SGD_0": 0.1, "lr/SGD_1": 0.2}
    assert learning_rates([]) == {}


class Other(Logger):
    """A logger of another package: what it gets."""

    name, version = "other", "0"

    def __init__(self):
        super().__init__()
        self.hyperparameters = {}

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        self.hyperparameters |= params


@pytest.mark.parametrize("resumes", [False, True])
def test_other_loggers_get_the_config_as_hyperparameters(quiet_trainer, resumes):
    logger = Other()
    trainer = quiet_trainer(logger=logger, callbacks=[BoardWriter(CONFIG, resumes=resumes)], limit_train_batches=1)
    trainer.fit(BoringModel())
    assert logger.hyperparameters == dict(scalars(CONFIG))


def test_a_logger_that_refuses_the_config_is_a_warning(quiet_trainer):
    logger = Other()
    logger.log_hyperparams = lambda params: 1 / 0
    trainer = quiet_trainer(logger=logger, callbacks=[BoardWriter(CONFIG)], limit_train_batches=1)
    with pytest.warns(UserWarning, match="the config in Other is left out, and the run goes on"):
        trainer.fit(BoringModel())


@pytest.fixture
def fit(tmp_path):
    """Fits 2 epochs of 5 steps; a scheduler divides the rate by 10 after each epoch."""

    def run(config=CONFIG, resumes=False, broken=False):
        board = TensorBoardLogger(tmp_path, name="board", version=0, default_hp_metric=False)
        table = CSVLogger(tmp_path, name="table", version=0)
        if broken:
            board.experiment.add_text = lambda *args: 1 / 0
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=5,
            limit_val_batches=1,
            log_every_n_steps=3,
            logger=[board, table],
            callbacks=[BoardWriter(config, resumes=resumes)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(BoringModel())
        events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0}).Reload()
        return events, read_metrics(tmp_path / "table/version_0/metrics.csv")

    return run


def test_events_of_a_fit(fit):
    events, rows = fit()
    steps, rates = zip(*((one.step, one.value) for one in events.Scalars("lr/SGD")), strict=True)
    assert steps == (0, 2, 5, 8) and rates == pytest.approx((0.1, 0.1, 0.01, 0.01))
    (text,) = events.Tensors("config/text_summary")
    assert b"width: 8" in text.tensor_proto.string_val[0]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.student.width"].number_value == 8 and found["model"].string_value == "Module"
    assert not any("lr/SGD" in row for row in rows)


def test_a_resumed_fit_has_the_config_already(fit):
    events, _ = fit(resumes=True)
    assert "config/text_summary" not in events.Tags()["tensors"] and events.Scalars("lr/SGD")


def test_a_failure_is_a_warning(fit):
    with pytest.warns(UserWarning, match="the config in TensorBoard is left out, and the run goes on"):
        events, _ = fit(broken=True)
    assert events.Scalars("lr/SGD")
