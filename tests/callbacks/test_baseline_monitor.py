"""BaselineMonitor: which accuracies it compares, when it warns, and what it refuses."""

import json
import math
import warnings
from dataclasses import replace
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
from kd_lightning.callbacks.baseline_monitor import (
    BaselineMonitor,
    describe_difference,
    difference_interval,
    read_accuracy,
    select_accuracy,
)
from kd_lightning.runs.csv_logger import ResumableCSVLogger
from kd_lightning.runs.run import Run


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

    def make(checkpoint=None, split=None, finished=True, trainer=None, **figures):
        logger = ResumableCSVLogger(str(tmp_path), "alone", "version_0")
        for epoch, values in enumerate(zip(*figures.values(), strict=True)):
            logger.log_metrics({"train/loss": 1.0}, epoch)
            logger.log_metrics({"epoch": epoch} | dict(zip(["val/" + n for n in figures], values, strict=True)), epoch)
            logger.save()
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"name": "alone", "model": {"class_path": "Scripted"}, "checkpoint": checkpoint, "trainer": trainer}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Run.write_state(folder, finished=finished)
        if split is not None:
            split.save(folder / "split.json")
        return folder

    return make


@pytest.fixture
def fit(quiet_trainer, loader, caplog):
    """Fits; returns the monitor's warnings and the trainer. ``infos`` then has its other lines."""

    def run(module, monitor, epochs, data=None, ckpt_path=None, callbacks=(), samples=12, **kwargs):
        trainer = quiet_trainer(
            max_epochs=epochs, enable_checkpointing=bool(callbacks), callbacks=[monitor, *callbacks], **kwargs
        )
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
            warnings.simplefilter("always")
            if data is None:
                trainer.fit(module, loader(), loader(samples, 60), ckpt_path=ckpt_path)
            else:
                trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        run.infos = [record.getMessage() for record in caplog.records if "BaselineMonitor" in record.getMessage()]
        return [str(w.message) for w in caught if "BaselineMonitor" in str(w.message)], trainer

    return run


def data(**kwargs):
    return SemiSupervisedDataModule(Digits(), **({"labeled": 5, "unlabeled": "none", "batch_size": 512} | kwargs))


def split_of(made):
    made.setup("fit")
    return made.split


def test_last_or_best(baseline):
    figures = {"accuracy": [0.5, 0.9, 0.7, 0.6], "loss": [3.0, 2.0, 1.0, 4.0]}
    assert read_accuracy(Run(baseline(**figures))) == 0.6  # no checkpoint in the config
    for checkpoint, expected in [
        ({"monitor": None, "mode": "max"}, 0.6),
        ({"monitor": "val/accuracy", "mode": "max"}, 0.9),
        ({"monitor": "val/loss", "mode": "min"}, 0.7),
        ({"monitor": "val/loss", "mode": "max"}, 0.6),
        ({"monitor": "val/loss", "mode": None}, 0.7),
        ({"monitor": "train/elsewhere", "mode": "max"}, 0.6),
    ]:
        assert read_accuracy(Run(baseline(checkpoint=checkpoint))) == expected


@pytest.mark.parametrize("monitor", [None, "val/accuracy"])
def test_rows_of_the_command_validate_do_not_count(baseline, monitor):
    """They may be of other weights, and of a part of the samples; their step is 0."""
    folder = baseline(checkpoint={"monitor": monitor, "mode": "max"}, accuracy=[0.5, 0.6])
    logger = ResumableCSVLogger(str(folder.parent.parent), "alone", "version_0")
    logger.log_metrics({"epoch": 0, "val/accuracy": 1.0}, 0)
    logger.save()
    assert len(Run(folder).rows()) == 5
    assert read_accuracy(Run(folder)) == 0.6


def test_choice_among_rows():
    assert select_accuracy([]) is None
    assert select_accuracy([{"val/loss": 1.0}], "val/loss", "min") is None
    rows = [{"val/accuracy": a, "val/loss": b} for a, b in [(0.1, math.nan), (0.2, 2.0), (0.3, 2.0)]]
    assert select_accuracy(rows, "val/loss", "min") == 0.2  # the first of equals, as ModelCheckpoint
    assert select_accuracy(rows[:1], "val/loss", "min") == 0.1


@pytest.mark.parametrize(("last", "warned"), [(0.625, True), (0.75, False), (0.875, False)])
def test_warns_if_the_baseline_is_better(baseline, fit, last, warned):
    monitor = BaselineMonitor(baseline(accuracy=[0.9, 0.75]))
    messages, _ = fit(Scripted(accuracy=[0.875, last]), monitor, 2, samples=600)
    assert len(messages) == warned and len(fit.infos) == (not warned)
    text = (messages or fit.infos)[0]
    assert f"val/accuracy is {last:.4f}, that of the baseline 0.7500" in text
    assert "on 600 validation samples, 95% interval " in text
    for advice in ("higher threshold", "smaller unsupervised_weight", "later warm-up"):
        assert (advice in text) == warned


def test_difference_that_may_be_chance(baseline, fit):
    messages, _ = fit(Scripted(accuracy=[0.74]), BaselineMonitor(baseline(accuracy=[0.75])), 1, samples=120)
    assert "may be chance" in messages[0] and "several seeds" in messages[0] and "threshold" not in messages[0]


def test_too_few_samples_are_not_judged(baseline, fit):
    assert not fit(Scripted(accuracy=[0.1]), BaselineMonitor(baseline(accuracy=[0.9])), 1, samples=99)[0]
    assert "on 99 validation samples, 95% interval -8" in fit.infos[0]
    assert "too few to judge" in fit.infos[0] and "chance" not in fit.infos[0]


@pytest.mark.parametrize("known", [True, False])
def test_only_labeled_samples_count(baseline, fit, loader, quiet_trainer, known):
    labels = torch.arange(120) % 10
    labels[:20] = -100
    module = Scripted(accuracy=[0.5])
    if not known:  # a batch of another library
        module.on_after_batch_transfer = lambda batch, dataloader_idx: ("two", *batch)
        module.training_step = lambda batch, batch_idx: module.net(batch[1].flatten(1)).square().mean()
    monitor = BaselineMonitor(baseline(accuracy=[0.5]))
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(module, loader(), loader(120, 60, labels))
    assert monitor._samples == (100 if known else 120)


@pytest.mark.parametrize(
    ("monitor", "mode", "reached"), [("val/accuracy", "max", 0.875), ("val/loss", "min", 0.5), (None, "min", 0.25)]
)
def test_best_of_the_run_where_monitored(baseline, fit, tmp_path, monitor, mode, reached):
    module = Scripted(accuracy=[0.875, 0.5, 0.25], loss=[3.0, 1.0, 2.0])
    saves = ModelCheckpoint(tmp_path / "saved", monitor=monitor, mode=mode)
    compare = BaselineMonitor(baseline(accuracy=[reached + 0.0625]))
    assert f"is {reached:.4f}, that of" in fit(module, compare, 3, callbacks=[saves], samples=120)[0][0]
    saves = ModelCheckpoint(tmp_path / "again", monitor=monitor, mode=mode)
    compare = BaselineMonitor(baseline(accuracy=[reached]))
    assert not fit(module, compare, 3, callbacks=[saves], samples=120)[0]


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
            samples=120,
            logger=logger if logged else False,
            ckpt_path=path,
        )

    start(2)
    messages, trainer = start(4, tmp_path / "saved" / "epoch=1.ckpt")
    if not logged and monitor == "val/loss":  # the old accuracy is not stored
        reached = 0.5
    assert f"is {reached:.4f}, that of the baseline 0.9500" in messages[0]
    assert len(messages) == 1
    checkpoint = torch.load(tmp_path / "saved" / "epoch=3.ckpt", weights_only=True)
    assert not any("BaselineMonitor" in name for name in checkpoint["callbacks"])
    assert trainer.current_epoch == 4


def test_resumed_with_nothing_left(baseline, fit, tmp_path):
    saves = ModelCheckpoint(tmp_path / "saved", "last")
    module, monitor = Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.95]))
    assert len(fit(module, monitor, 1, callbacks=[saves], samples=120)[0]) == 1
    assert not fit(module, monitor, 1, callbacks=[saves], samples=120, ckpt_path=tmp_path / "saved/last.ckpt")[0]


def test_on_our_own_run(baseline, fit, student):
    """The samples are those of the validation part."""
    made = data()
    split = split_of(data())
    messages, trainer = fit(SupervisedModule(student), BaselineMonitor(baseline(split=split, accuracy=[1.0])), 1, made)
    accuracy = trainer.callback_metrics["val/accuracy"].item()
    assert len(messages) == 1
    assert f"{100 * (accuracy - 1):+.2f} points on {len(split.val)} validation samples" in messages[0]
    assert not fit(SupervisedModule(student), BaselineMonitor(baseline(split=split, accuracy=[1.0, 0.0])), 1, data())[0]


def test_part_of_the_validation_images(baseline, fit, student):
    part = {"limit_val_batches": 1}
    folder = baseline(split=split_of(data()), accuracy=[1.0])
    with pytest.raises(InputError, match=r"limit_val_batches 1\.0, this run 1;"):  # all of them, and one
        fit(SupervisedModule(student), BaselineMonitor(folder), 1, data(batch_size=64), **part)
    folder = baseline(split=split_of(data()), trainer=part)
    assert not fit(SupervisedModule(student), BaselineMonitor(folder), 1, data(batch_size=64), **part)[0]
    assert "on 64 validation samples" in fit.infos[0]


def test_interval_of_newcombe():
    """Table II of the paper, method 10; and the limits."""
    for share in (0.0, 0.9, 1.0):
        low, high = difference_interval(share, share, 10)
        assert low == pytest.approx(-high) and high > 0.1
    # 9 of 10 against 3 of 10, and 10 of 10 against 0 of 10
    assert difference_interval(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert difference_interval(1.0, 0.0, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)


@pytest.mark.parametrize(
    ("accuracy", "before", "samples", "chance"),
    [(0.90, 0.92, 100, True), (0.90, 0.92, 10_000, False), (0.0, 0.5, 100, False), (1.0, 1.0, 100, True)],
)
def test_verdict(accuracy, before, samples, chance):
    text = describe_difference(accuracy, before, samples)
    assert f"{100 * (accuracy - before):+.2f} points on {samples} " in text
    assert ("may be chance" in text) == chance and ("unlikely" in text) != chance
    assert "unknown" in describe_difference(accuracy, before, 0)


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
    seeds = r" \(seed 1, not 0\)" if "seed" in other else ""
    with pytest.raises(InputError, match=f"baseline: .*has another split{seeds}, its {differ} samples differ"):
        fit(SupervisedModule(student), monitor, 1, data())


def test_other_data_with_the_same_indices(baseline, fit, student):
    split = replace(split_of(data()), data="other")
    with pytest.raises(InputError, match="was trained on other data"):
        fit(SupervisedModule(student), BaselineMonitor(baseline(split=split, accuracy=[0.5])), 1, data())


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

    assert not fit(Scripted(accuracy=[0.5]), BaselineMonitor(baseline(accuracy=[0.75])), 1, Theirs())[0]
    assert "-25.00 points" in fit.infos[0]


def test_bad_baselines(baseline, fit, tmp_path):
    def refused(folder, message):
        with pytest.raises(InputError, match=message):
            fit(Scripted(accuracy=[0.5]), BaselineMonitor(folder), 1)

    refused(tmp_path / "gone", "baseline: .*gone is no run: it does not exist$")
    folder = baseline(loss=[0.5])
    refused(str(tmp_path), r"baseline: .* it has no config\.yaml$")
    refused(folder.parent, r"baseline: .* it has no config\.yaml; name one of its runs: version_0$")
    refused(folder, r"metrics\.csv has no val/accuracy; the baseline must have a validation part")
    (folder / "metrics.csv").write_text("step,val/accuracy\n3,high\n")
    refused(folder, r"metrics\.csv is damaged: could not convert")
    (folder / "metrics.csv").write_text("")
    refused(folder, "has no val/accuracy")
    (folder / "metrics.csv").write_text("step,val/accuracy,val/loss\n3,0.5,1.0\n4\n")  # cut off
    assert read_accuracy(Run(folder)) == 0.5
    for content in ("- a list", "a: [b"):
        (folder / "config.yaml").write_text(content)
        refused(folder, r"baseline: .*config\.yaml ")


def test_unfinished_baseline(baseline, fit):
    """It may still get better."""
    folder = baseline(accuracy=[0.5], finished=False)
    with pytest.raises(InputError, match="version_0 is not finished; fit it again"):
        fit(Scripted(accuracy=[0.5]), BaselineMonitor(folder), 1)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").touch()
    with pytest.raises(InputError, match="version_0 is not finished; --ckpt_path last"):
        fit(Scripted(accuracy=[0.5]), BaselineMonitor(folder), 1)


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
