"""ActivationCalibration: ranges of the first batch, once, on one process and on several."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ActivationCalibration,
    ApprenticeModule,
    Batch,
    Digits,
    InputError,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import activation_ranges, calibrate, is_calibrated
from kd_lightning.quantization.layers import quantize

STILL = partial(SGD, lr=0.0)


def ranges(student):
    return {name: value.item() for name, value in activation_ranges(student).items()}


class Watch(Callback):
    """Records the first batch, and the ranges after each."""

    def __init__(self):
        self.batch, self.ranges = None, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.batch is None:
            self.batch = copy.deepcopy(batch)

    def on_train_batch_end(self, trainer, module, *_):
        self.ranges.append(ranges(module.student))


@pytest.mark.parametrize("bits", [4, "ternary"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_equals_calibrate_by_hand(quiet_trainer, loader, student, bits, precision):
    lowered = quantize(student, bits)
    expected, before = copy.deepcopy(lowered), ranges(lowered)
    watch = Watch()
    module = SupervisedModule(lowered, optimizer=STILL)
    trainer = quiet_trainer(precision=precision, callbacks=[ActivationCalibration(), watch])
    trainer.fit(module, loader(), loader())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        calibrate(expected.train(), [next(iter(loader()))])
    assert watch.ranges == [ranges(expected)] * 3  # and the later batches leave them
    assert all(value != before[name] for name, value in ranges(lowered).items())


def test_views_of_the_datamodule(quiet_trainer, student):
    lowered = quantize(student, 4)
    expected, watch = copy.deepcopy(lowered), Watch()
    data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=32, val_size=0.1)
    trainer = quiet_trainer(limit_train_batches=1, callbacks=[ActivationCalibration(), watch])
    trainer.fit(SupervisedModule(lowered, optimizer=STILL), datamodule=data)
    assert isinstance(watch.batch, Batch)
    assert ranges(calibrate(expected.train(), [watch.batch])) == ranges(lowered)


def test_training_is_what_it_is_after_calibrating_by_hand(quiet_trainer, loader):
    """Nothing else moves: no statistics of BatchNorm, no random numbers (of dropout)."""
    ends, batch = [], next(iter(loader()))  # a loader draws a random number
    for callbacks in ([ActivationCalibration()], []):
        torch.manual_seed(0)
        lowered = quantize(DigitsCNN(4, dropout=0.5), 4)
        if not callbacks:
            calibrate(lowered.train(), [batch])
        quiet_trainer(callbacks=callbacks).fit(SupervisedModule(lowered), loader())
        ends.append(lowered.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_ranges_learn(quiet_trainer, loader, student):
    watch = Watch()
    module = SupervisedModule(quantize(student, 4), optimizer=partial(SGD, lr=0.1))
    quiet_trainer(max_epochs=2, callbacks=[ActivationCalibration(), watch]).fit(module, loader())
    assert watch.ranges[0] != watch.ranges[-1]


def test_calibrated_ones_are_left(quiet_trainer, loader, student):
    lowered = calibrate(quantize(student, 4), [torch.randn(64, 1, 8, 8) * 3])
    before = ranges(lowered)
    for _ in range(2):  # a second fit finds them calibrated, too
        quiet_trainer(callbacks=[ActivationCalibration()]).fit(SupervisedModule(lowered, optimizer=STILL), loader())
        assert ranges(lowered) == before


@pytest.mark.parametrize("change", [lambda net: net, lambda net: quantize(net, 4, activation_bits=None)])
def test_nothing_to_calibrate(quiet_trainer, loader, student, change):
    lowered = change(student)
    plain = copy.deepcopy(lowered)
    quiet_trainer(callbacks=[ActivationCalibration()]).fit(SupervisedModule(lowered), loader())
    quiet_trainer().fit(SupervisedModule(plain), loader())
    one, two = lowered.state_dict(), plain.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


class Theirs(LightningModule):
    """Somebody else's module."""

    def __init__(self, network, name):
        super().__init__()
        setattr(self, name, network)
        self.name = name

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(getattr(self, self.name)(x), y)

    def configure_optimizers(self):
        return STILL(self.parameters())


def test_anybodys_module(quiet_trainer, loader, student):
    lowered = quantize(student, 4)
    quiet_trainer(callbacks=[ActivationCalibration()]).fit(Theirs(lowered, "student"), loader())
    assert is_calibrated(lowered)
    with pytest.raises(
        InputError, match="ActivationCalibration: network: Theirs has no network 'student'; nearest: net"
    ):
        quiet_trainer(callbacks=[ActivationCalibration()]).fit(Theirs(lowered, "net"), loader())


def test_infinite_inputs(quiet_trainer, student):
    x = torch.ones(4, 1, 8, 8)
    x[0, 0, 0, 0] = torch.inf
    module = SupervisedModule(quantize(student, 4, skip=()))
    data = DataLoader(TensorDataset(x, torch.zeros(4).long()), 4)
    with pytest.raises(InputError, match="the input of 0 holds numbers that are not finite"):
        quiet_trainer(callbacks=[ActivationCalibration()]).fit(module, data)


class StoppedError(Exception):
    pass


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise StoppedError


@pytest.mark.parametrize("step", [1, 2])
def test_resumed_in_the_first_steps(quiet_trainer, tmp_path, step):
    """The ranges that the checkpoint holds go on; another batch would have given others."""

    def fit(folder, stop=None, path=None):
        torch.manual_seed(0)
        module = ApprenticeModule(quantize(DigitsCNN(4), 4), DigitsCNN(8))
        data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=64, seed=1)
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        watch = Watch()
        trainer = quiet_trainer(
            limit_val_batches=1,
            enable_checkpointing=True,
            callbacks=[ActivationCalibration(), watch, saves, *([] if stop is None else [Stop(stop)])],
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path)
        except StoppedError:
            assert stop is not None
        return module.state_dict(), watch.ranges

    whole, learned = fit(tmp_path / "whole")
    _, before = fit(tmp_path / "parts", stop=step)
    resumed, after = fit(tmp_path / "parts", path=tmp_path / "parts" / f"step={step}.ckpt")
    assert before + after == learned
    assert len(before) == step
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


SCRIPT = """
import json, os, sys, torch
from functools import partial
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning.pytorch import Trainer
from kd_lightning import ActivationCalibration, ApprenticeModule
from kd_lightning.quantization.calibration import activation_ranges
from kd_lightning.quantization.layers import quantize

def network(width):
    # no batch statistics
    convolutions = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))

if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = int(sys.argv[1])
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    x[1] *= 5  # the second process has the largest
    data = TensorDataset(x, y)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(data, devices, rank, shuffle=False)
    module = ApprenticeModule(quantize(network(6), 4), network(8), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1,
                      logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      limit_train_batches=2, callbacks=[ActivationCalibration()])
    trainer.fit(module, DataLoader(data, 16 // devices, sampler=sampler))
    found = {name: value.item() for name, value in activation_ranges(module.student).items()}
    open(f"{trainer.global_rank}_of_{devices}.json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["train.py", "1"])
    exec(SCRIPT, {"__name__": "__main__"})
    processes.run_ranks(["train.py", "2"])
    one, first, second = (
        json.loads(Path(tmp_path, name).read_text()) for name in ("0_of_1.json", "0_of_2.json", "1_of_2.json")
    )
    assert first == second
    assert first == pytest.approx(one, rel=1e-5)
    assert len(one) == 2
