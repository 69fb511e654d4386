"""guard_loggers: a logger that fails warns once, and the training goes on."""

import copy
import pickle
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kd_lightning import SupervisedModule
from kd_lightning.runs.csv_logger import ResumableCSVLogger
from kd_lightning.runs.guard_loggers import guard_loggers


class Broken(Logger):
    """Every call fails."""

    name, version, experiment = "broken", "0", None

    def fail(self, *args, **kwargs):
        raise ConnectionError("the server is away\nretry later")

    log_metrics = log_hyperparams = log_graph = save = after_save_checkpoint = finalize = fail


def messages(found):
    return sorted(str(one.message) for one in found if "failed, and the run goes on" in str(one.message))


def test_a_training_goes_on(quiet_trainer, loader, student, tmp_path):
    sound = ResumableCSVLogger(str(tmp_path), "run", "v")
    trainer = quiet_trainer(logger=[Broken(), sound], enable_checkpointing=True, max_epochs=2, log_every_n_steps=1)
    guard_loggers(trainer)
    with pytest.warns(UserWarning, match="the server is away") as found:
        trainer.fit(SupervisedModule(student), loader(), loader())
    assert trainer.global_step == 6
    assert "val/accuracy" in (tmp_path / "run" / "v" / "metrics.csv").read_text()
    assert [text.split(" ")[0] for text in messages(found)] == [
        f"Broken.{name}"
        for name in ("after_save_checkpoint", "finalize", "log_graph", "log_hyperparams", "log_metrics", "save")
    ]
    assert all(text.endswith("ConnectionError: the server is away") for text in messages(found))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_folder_that_disappears(quiet_trainer, loader, student, tmp_path):
    """TensorBoard's thread ends with an error, and the next calls raise it."""
    board = TensorBoardLogger(tmp_path / "board", "", "")

    class Disappear(SupervisedModule):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                shutil.rmtree(tmp_path / "board")

    trainer = quiet_trainer(logger=board, max_epochs=3, log_every_n_steps=1)
    guard_loggers(trainer)
    with pytest.warns(UserWarning, match=r"TensorBoardLogger\.\w+ failed, and the run goes on.*FileNotFoundError"):
        trainer.fit(Disappear(student), loader())
    assert trainer.global_step == 9


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_guarded_loggers_can_be_copied(tmp_path, copy_of):
    """Spawned processes get their loggers pickled."""
    logger = ResumableCSVLogger(str(tmp_path), "run", "v")
    guard_loggers(SimpleNamespace(loggers=[logger]))
    other = copy_of(logger)
    assert other.log_metrics.logger is other
    other.log_metrics({"a": 1.0}, 0)
    assert (tmp_path / "run" / "v" / "metrics.csv").is_file()


def test_results_pass_and_interrupts_end_a_run():
    class Sound(Broken):
        def log_metrics(self, metrics, step=None):
            return step

        def save(self):
            raise KeyboardInterrupt

    logger = Sound()
    guard_loggers(SimpleNamespace(loggers=[logger]))
    assert logger.log_metrics({}, step=3) == 3
    with pytest.raises(KeyboardInterrupt):
        logger.save()


class WandB:
    """As Weights & Biases: one open run in the process."""

    def __init__(self, monkeypatch):
        self.run, self.finished = None, []
        monkeypatch.setitem(sys.modules, "wandb", self)

    def start(self, fails=False):
        def finish():
            self.finished.append(self.run)
            self.run = None
            if fails:
                raise OSError("full disk")

        self.run = self.run or SimpleNamespace(finish=finish)
        return self.run


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_of_an_earlier_trainer_is_finished(monkeypatch, fails):
    server, first, second = WandB(monkeypatch), Broken(), Broken()
    guard_loggers(SimpleNamespace(loggers=[first]))
    first._experiment = earlier = server.start(fails)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        guard_loggers(SimpleNamespace(loggers=[second]))
    assert len(messages(found)) == fails
    assert server.finished == [earlier] and server.run is None
    guard_loggers(SimpleNamespace(loggers=[]))
    assert server.finished == [earlier]  # second has opened none


def test_the_run_of_the_calling_program_stays_open(monkeypatch):
    server, logger = WandB(monkeypatch), Broken()
    outer = server.start()
    guard_loggers(SimpleNamespace(loggers=[logger]))
    logger._experiment = server.start()
    assert logger._experiment is outer
    guard_loggers(SimpleNamespace(loggers=[]))
    assert not server.finished
