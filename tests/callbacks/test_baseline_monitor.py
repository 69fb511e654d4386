"""BaselineMonitor: which accuracies it compares, when it warns, and what it refuses."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_lightning import Digits, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.callbacks.baseline_monitor import BaselineMonitor, describe_difference, read_accuracy, select_accuracy
from kd_lightning.runs.csv_logger import ResumableCSVLogger


class Scripted(LightningModule):
    """Anybody's module; its figures of epoch e are the e-th of each list."""

    def __init__(self, **figures):
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.figures = {"val/" + name: values for name, values in figures.items()}

    def training_step(self, batch, batch_idx):
        return self.net(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        for name, values in self.figures.items():
            self.log(name, values[self.current_epoch])

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def baseline(tmp_path):
    """Makes a finished run of these figures for each epoch."""

    def make(checkpoint=None, split=None, **figures):
        logger = ResumableCSVLogger(str(tmp_path), "alone", "version_0")
        for epoch, values in enumerate(zip(*figures.values(), strict=True)):
            logger.log_metrics({"train/loss": 1.0}, epoch)
            logger.log_metrics({"epoch": epoch} | dict(zip(["val/" + n for n in figures], values, strict=True)), epoch)
            logger.save()
        folder = Path(logger.log_dir)
        if checkpoint is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump({"checkpoint": checkpoint}))
        if split is not None:
            split.save(folder / "split.json")
        return folder

    return make


@pytest.fixture
def fit(quiet_trainer, loader):
    """Fits; returns the monitor's warnings and the trainer."""

    def run(module, monitor, epochs, data=None, ckpt_path=None, callbacks=(), **kwargs):
        trainer = quiet_trainer(
            max_epochs=epochs, enable_checkpointing=bool(callbacks), callbacks=[monitor, *callbacks], **kwargs
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if data is None:
                trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
            else:
                trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return [str(w.message) for w in caught if "BaselineMonitor" in str(w.message)], trainer

    return run


def data(**kwargs):
    return SemiSupervisedDataModule(Digits(), **({"labeled": 5, "unlabeled": "none", "batch_size": 512} | kwargs))


def split_of(made):
    made.setup("fit")
    return made.split


def test_last_or_best(baseline):
    figures = {"accuracy": [0.5, 0.9, 0.7, 0.6], "loss": [3.0, 2.0, 1.0, 4.0]}
    assert read_accuracy(baseline(**figures)) == 0.6  # no config.yaml
    for checkpoint, expected in [
        ({"monitor": None, "mode": "max"}, 0.6),
        ({"monitor": "val/accuracy", "mode": "max"}, 0.9),
        ({"monitor": "val/loss", "mode": "min"}, 0.7),
        ({"monitor": "val/loss", "mode": "max"}, 0.6),
        ({"monitor": "train/elsewhere", "mode": "max"}, 0.6),
    ]:
        (baseline() / "config.yaml").write_text(yaml.safe_dump({"checkpoint": checkpoint}))
        assert read_accuracy(baseline()) == expected


def test_choice_among_rows():
    assert select_accuracy([]) is None
    assert select_accuracy([{"val/loss": 1.0}], "val/loss", "min") is None
    rows = [{"val/accuracy": a, "val/loss": b} for a, b in [(0.1, math.nan), (0.2, 2.0), (0.3, 2.0)]]
    assert select_accuracy(rows, "val/loss", "min") == 0.2  # the first of equals, as ModelCheckpoint
    assert select_accuracy(rows[:1], "val/loss", "min") == 0.1


@pytest.mark.parametrize(("last", "warned"), [(0.625, True), (0.75, False), (0.875, False)])
def test_warns_if_the_baseline_is_better(baseline, fit, last, warned):
    messages, _ = fit(Scripted(accuracy=[0.875, last]), BaselineMonitor(baseline(accuracy=[0.9, 0.75])), 2)
    assert len(messages) == warned
    if warned:
        assert "val/accuracy is 0.6250, below the 0.7500 of the baseline" in messages[0]
        for advice in ("higher threshold", "smaller unsupervised_weight", "later warm-up"):
            assert advice in messages[0]
        assert "images" not in messages[0]  # their number is not known


@pytest.mark.parametrize(
    ("monitor", "mode", "reached"), [("val/accuracy", "max", 0.875), ("val/loss", "min", 0.5), (None, "min", 0.25)]
)
def test_best_of_the_run_where_monitored(baseline, fit, tmp_path, monitor, mode, reached):
    module = Scripted(accuracy=[0.875, 0.5, 0.25], loss=[3.0, 1.0, 2.0])
    saves = ModelCheckpoint(tmp_path / "saved", monitor=monitor, mode=mode)
    compare = BaselineMonitor(baseline(accuracy=[reached + 0.0625]))
    assert f"is {reached:.4f}, below" in fit(module, compare, 3, callbacks=[saves])[0][0]
    saves = ModelCheckpoint(tmp_path / "again", monitor=monitor, mode=mode)
    compare = BaselineMonitor(baseline(accuracy=[reached]))
    assert not fit(module, compare, 3, callbacks=[saves])[0]


def test_both_curves_in_one_group(baseline, fit, tmp_path):
    board = TensorBoardLogger(tmp_path, "board", "")
    monitor = BaselineMonitor(baseline(accuracy=[0.75]))
    _, trainer = fit(Scripted(accuracy=[0.8, 0.9]), monitor, 2, logger=board, num_sanity_val_steps=2)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.value for e in events.Scalars("val/baseline_accuracy")] == [0.75, 0.75]
    steps = [[e.step for e in events.Scalars(f"val/{name}")] for name in ("accuracy", "baseline_accuracy")]
    assert steps == [[2, 5], [2, 5]]  # none of the sanity check
    assert trainer.callback_metrics["val/baseline_accuracy"] == 0.75


@pytest.mark.parametrize(("monitor", "mode", "reached"), [("val/accuracy", "max", 0.9), ("val/loss", "min", 0.8)])
@pytest.mark.parametrize("logged", [True, False])
def test_resumed_run(baseline, fit, tmp_path, monitor, mode, reached, logged):
    """The best epoch lies before the resume."""
    module = Scripted(accuracy=[0.8, 0.9, 0.5, 0.4], loss=[1.0, 2.0, 3.0, 4.0])
    folder = baseline(accuracy=[0.95])

    def start(epochs, path=None):
        saves = ModelCheckpoint(tmp_path / "saved", "{epoch}", monitor=monitor, mode=mode, save_top_k=-1)
        logger = ResumableCSVLogger(str(tmp_path), "run", "version_0", purge_step=6 if path else None)
        return fit(
            module,
            BaselineMonitor(folder),
            epochs,
            callbacks=[saves],
            logger=logger if logged else False,
            ckpt_path=path,
        )

    start(2)
    messages, trainer = start(4, tmp_path / "saved" / "epoch=1.ckpt")
    if not logged and monitor == "val/loss":  # the old accuracy is not stored
        reached = 0.5
    assert f"is {reached:.4f}, below the 0.9500" in messages[0]
    assert len(messages) == 1
    checkpoint = torch.load(tmp_path / "saved" / "epoch=3.ckpt", weights_only=True)
    assert not any("BaselineMonitor" in name for name in checkpoint["callbacks"])
    assert trainer.current_epoch == 4


def test_resumed_with_nothing_left(baseline, fit, tmp_path):
    saves = ModelCheckpoint(tmp_path / "saved", "last")
    module, monitor = Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.95]))
    assert len(fit(module, monitor, 1, callbacks=[saves])[0]) == 1
    assert not fit(module, monitor, 1, callbacks=[saves], ckpt_path=tmp_path / "saved/last.ckpt")[0]


def test_on_our_own_run(baseline, fit, student):
    """The difference as a number of images, and its standard error."""
    made = data()
    split = split_of(data())
    messages, trainer = fit(SupervisedModule(student), BaselineMonitor(baseline(split=split, accuracy=[1.0])), 1, made)
    accuracy = trainer.callback_metrics["val/accuracy"].item()
    count = len(split.val)
    assert f"{count * (1 - accuracy):.0f} of {count} validation images" in messages[0]
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    assert f"a standard error of {100 * error:.2f} points" in messages[0]
    assert not fit(SupervisedModule(student), BaselineMonitor(baseline(split=split, accuracy=[1.0, 0.0])), 1, data())[0]


def test_part_of_the_validation_images(baseline, fit, student):
    monitor = BaselineMonitor(baseline(split=split_of(data()), accuracy=[1.0]))
    messages, _ = fit(SupervisedModule(student), monitor, 1, data(batch_size=64), limit_val_batches=1)
    assert len(messages) == 1
    assert "images" not in messages[0]


@pytest.mark.parametrize(
    ("accuracy", "before", "images", "chance"),
    [(0.90, 0.92, 100, True), (0.90, 0.92, 10_000, False), (0.0, 0.5, 10, False), (1.0, 1.0, 10, False)],
)
def test_standard_error(accuracy, before, images, chance):
    text = describe_difference(accuracy, before, images)
    counts = torch.distributions.Binomial(images, torch.tensor([accuracy, before], dtype=torch.float64))
    expected = float((counts.variance / images**2).sum().sqrt())
    assert f"{100 * (before - accuracy):.2f} points, {images * (before - accuracy):.0f} of {images} " in text
    assert f"a standard error of {100 * expected:.2f} points" in text
    assert ("may be chance" in text) == chance


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        ({"labeled": 6}, "labeled"),
        ({"val_size": 0.2, "labeled": 1}, "val and labeled"),
        ({"seed": 1}, "val and labeled"),
    ],
)
def test_other_split(baseline, fit, student, other, differ):
    monitor = BaselineMonitor(baseline(split=split_of(data(**other)), accuracy=[0.5]))
    with pytest.raises(InputError, match=f"has another split, its {differ} samples differ"):
        fit(SupervisedModule(student), monitor, 1, data())


def test_same_samples_but_another_pool(baseline, fit, student):
    """Only val and labeled count: the baseline does not train on the rest."""
    made = data(unlabeled="rest")
    folder = baseline(split=split_of(data()), accuracy=[0.0])
    saved = json.loads((folder / "split.json").read_text())
    (folder / "split.json").write_text(json.dumps(saved | {"unlabeled": []}))
    fit(SupervisedModule(student), BaselineMonitor(folder), 1, made)


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"val": [1]}', '{"val": 3, "labeled": 4}'])
def test_split_file_that_cannot_be(baseline, fit, student, content):
    folder = baseline(accuracy=[0.5])
    if content is not None:
        (folder / "split.json").write_text(content)
    with pytest.raises(InputError, match=r"split\.json is missing or is not a split file"):
        fit(SupervisedModule(student), BaselineMonitor(folder), 1, data())


def test_somebody_elses_split(baseline, fit, loader):
    class Theirs(LightningDataModule):
        split = "by patient"

        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader()

    assert len(fit(Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.75])), 1, Theirs())[0]) == 1


def test_bad_baselines(baseline, fit, tmp_path):
    def refused(folder, message):
        with pytest.raises(InputError, match=message):
            fit(Scripted(accuracy=[0.5]), BaselineMonitor(folder), 1)

    refused(tmp_path / "gone", "baseline: .*gone does not exist; allowed: the folder of a finished run$")
    folder = baseline(loss=[0.5])
    refused(str(tmp_path), r"has no metrics\.csv; allowed: the folder of a finished run$")
    refused(folder.parent, r"has no metrics\.csv; .*, such as .*version_0$")
    refused(folder, r"metrics\.csv has no val/accuracy; the baseline must have a validation part")
    (folder / "metrics.csv").write_text("step,val/accuracy\n3,high\n")
    refused(folder, r"metrics\.csv is damaged: could not convert")
    (folder / "metrics.csv").write_text("")
    refused(folder, "has no val/accuracy")
    (folder / "metrics.csv").write_text("step,val/accuracy,val/loss\n3,0.5,1.0\n4\n")  # cut off
    assert read_accuracy(folder) == 0.5
    for content in ("- a list", "a: [b"):
        (folder / "config.yaml").write_text(content)
        refused(folder, r"config\.yaml is not the config of a run")


def test_module_without_accuracy(baseline, fit):
    messages, _ = fit(Scripted(loss=[0.5, 0.4]), BaselineMonitor(baseline(accuracy=[0.75])), 2)
    assert messages == ["BaselineMonitor needs a module that logs val/accuracy, Scripted logs none"]


def test_run_without_validation(baseline, fit):
    messages, _ = fit(Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.75])), 1, limit_val_batches=0)
    assert len(messages) == 1
    assert "the run logged no val/accuracy" in messages[0]


def test_fast_dev_run_does_not_warn(baseline, fit):
    assert not fit(Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.75])), 1, fast_dev_run=True)[0]


def test_other_stages_need_no_baseline(quiet_trainer, loader, tmp_path):
    trainer = quiet_trainer(callbacks=[BaselineMonitor(tmp_path / "gone")])
    module = Scripted(accuracy=[0.5])
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    figures = trainer.validate(module, loader(), verbose=False)
    assert figures == [{"val/accuracy": 0.5}]
