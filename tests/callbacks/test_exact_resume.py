"""Fits that are killed two and three times, from the command line and in Python."""

import random
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from kd_lightning import (
    Batch,
    Digits,
    ExactResume,
    InputError,
    SeedEveryStep,
    SemiSupervisedDataModule,
    StudentWriter,
    SupervisedModule,
)
from kd_lightning.cli.main import DistillCLI


class Foreign(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
        self.validations = 0

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch.x), batch.y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch.x), batch.y))

    def on_validation_epoch_end(self):
        self.validations += not self.trainer.sanity_checking

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.fixture
def fit(quiet_trainer, tmp_path):
    """Four epochs of five steps, with a checkpoint after each step."""

    def run(name, path=None, make=Foreign, callbacks=(), **kwargs):
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"max_epochs": 4, "limit_train_batches": 5, "limit_val_batches": 1, "enable_checkpointing": True}
        trainer = quiet_trainer(callbacks=[SeedEveryStep(1), *callbacks, saver], **(options | kwargs))
        trainer.fit(make(), datamodule=SemiSupervisedDataModule(Digits(), batch_size=16), ckpt_path=path)
        return trainer

    return run


@pytest.mark.parametrize("steps", [(5, 19), (5, 12), (10, 15), (5, 10, 15), (20,)], ids=str)
@pytest.mark.parametrize(("make", "callbacks"), [(Foreign, [ExactResume()]), (None, []), (None, [ExactResume()])])
def test_killed_several_times(fit, tmp_path, steps, make, callbacks):
    """The first resume is from an epoch's last batch. The package's own modules need no callback."""
    make = make or partial(SupervisedModule, nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)))
    fit = partial(fit, make=make, callbacks=callbacks)
    whole = before = fit("0")
    for number, step in enumerate(steps):
        before = fit(str(number + 1), tmp_path / str(number) / f"step={step}.ckpt")
    assert before.global_step == 20
    assert before.fit_loop.epoch_progress == whole.fit_loop.epoch_progress
    assert before.callback_metrics == whole.callback_metrics
    state = before.lightning_module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.lightning_module.state_dict().items())


def test_the_validation_that_was_due_runs(fit, tmp_path):
    assert fit("0", callbacks=[ExactResume()]).lightning_module.validations == 4
    for step, left in ((4, 4), (5, 4), (6, 3), (20, 1)):
        again = fit("1", tmp_path / "0" / f"step={step}.ckpt", callbacks=[ExactResume()])
        assert again.lightning_module.validations == left, step


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_with_a_progress_bar(fit, tmp_path, bar, capsys):
    import lightning.pytorch.callbacks as callbacks

    fit("0", callbacks=[ExactResume()])
    bars = {"callbacks": [ExactResume(), getattr(callbacks, bar)()], "enable_progress_bar": True}
    for step in (3, 5):
        assert fit("1", tmp_path / "0" / f"step={step}.ckpt", **bars).global_step == 20


class Plain(Foreign):
    """Batches of PyTorch's own loader."""

    def training_step(self, batch, batch_idx):
        return super().training_step(Batch(*batch), batch_idx)


class Validated(Plain):
    """Has a validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val/size", float(len(batch[0])))


class Augmented:
    """20 samples that change whenever they are read, by each of the global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, number):
        noise = torch.rand(1) + np.random.rand() + random.random()
        return torch.full((1, 8, 8), number / 20.0) + noise.float(), number % 10


@pytest.fixture
def fit_plain(quiet_trainer, tmp_path):
    """Three epochs of five steps with PyTorch's own loader, with a checkpoint after each step."""

    def run(name, path=None, make=Plain, **kwargs):
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [SeedEveryStep(1), ExactResume(), saver]
        trainer = quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
        module = make()
        torch.manual_seed(0 if path is None else 5)  # a new process has drawn other random numbers before
        trainer.fit(module, DataLoader(Augmented(), batch_size=4, shuffle=True, **kwargs), ckpt_path=path)
        return trainer.lightning_module.state_dict()

    return run


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("step", [5, 10])
def test_a_plain_loader_resumes_after_an_epoch(fit_plain, tmp_path, step, workers):
    whole = fit_plain("0", num_workers=workers)
    again = fit_plain("1", tmp_path / "0" / f"step={step}.ckpt", num_workers=workers)
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.parametrize("make", [Plain, partial(SupervisedModule, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))])
def test_a_plain_loader_does_not_resume_within_an_epoch(fit_plain, tmp_path, make):
    fit_plain("0", make=make)
    with pytest.raises(InputError, match="^ckpt_path: .* after 2 of 5 batches of an epoch, .* DataLoader .* end of an"):
        fit_plain("1", tmp_path / "0" / "step=7.ckpt", make=make)


class Stateful(DataLoader):
    """A loader with a state."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


WITHIN = "checkpoints within epochs: a run can"


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"val_check_interval": 2}, True),  # five batches an epoch
        ({"val_check_interval": 0.4}, True),
        ({"val_check_interval": 2, "limit_val_batches": 0}, False),
        ({"val_check_interval": "00:01:00:00"}, True),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, True),
        ({"val_check_interval": 10, "check_val_every_n_epoch": None}, False),
        ({"val_check_interval": 5}, False),
        ({"check_val_every_n_epoch": 2}, False),
        ({}, False),
    ],
)
def test_warns_of_checkpoints_of_validations_within_epochs(quiet_trainer, tmp_path, recwarn, options, warns):
    loader, validation = DataLoader(Augmented(), batch_size=4), DataLoader(Augmented(), batch_size=10)
    for saver, expected in ({}, warns), ({"save_on_train_epoch_end": True}, False):
        recwarn.clear()
        callbacks = [ExactResume(), ModelCheckpoint(tmp_path, **saver)]
        options = {"max_epochs": 1, "enable_checkpointing": True, "num_sanity_val_steps": 0} | options
        quiet_trainer(callbacks=callbacks, **options).fit(Validated(), loader, validation)
        assert any(WITHIN in str(one.message) for one in recwarn) == expected


class Endless(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        return (Augmented()[number] for number in range(20))


@pytest.mark.parametrize(("options", "warns"), [({}, False), ({"val_check_interval": 2}, True)])
def test_warns_of_validations_within_epochs_of_no_length(quiet_trainer, tmp_path, recwarn, options, warns):
    callbacks = [ExactResume(), ModelCheckpoint(tmp_path)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=1, enable_checkpointing=True, **options)
    trainer.fit(Validated(), DataLoader(Endless(), 4), DataLoader(Augmented(), batch_size=10))
    assert any(WITHIN in str(one.message) for one in recwarn) == warns


@pytest.mark.parametrize(
    ("options", "name"),
    [({"generator": torch.Generator()}, "generator"), ({"num_workers": 1, "persistent_workers": True}, "persistent_w")],
)
def test_warns_of_a_loader_with_a_state_of_its_own(quiet_trainer, tmp_path, recwarn, options, name):
    callbacks = [ExactResume(), ModelCheckpoint(tmp_path, filename="end", enable_version_counter=False)]
    trainer = partial(quiet_trainer, enable_checkpointing=True, callbacks=callbacks)
    for loader, expected in ((DataLoader(Augmented(), 4), False), (DataLoader(Augmented(), 4, **options), True)):
        trainer(max_epochs=1).fit(Plain(), loader)
        recwarn.clear()
        trainer(max_epochs=2).fit(Plain(), loader, ckpt_path=tmp_path / "end.ckpt")
        assert any(f"resume: {name}" in str(one.message) for one in recwarn) == expected


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"every_n_train_steps": 2}, True),
        ({"train_time_interval": timedelta(hours=1)}, True),
        ({"every_n_train_steps": 10}, False),  # five batches an epoch
        ({"every_n_epochs": 1}, False),
    ],
)
def test_warns_at_the_start_of_checkpoints_within_epochs(quiet_trainer, tmp_path, recwarn, options, warns):
    for loader, expected in ((DataLoader(Augmented(), batch_size=4), warns), (Stateful(Augmented(), 4), False)):
        recwarn.clear()
        callbacks = [ExactResume(), ModelCheckpoint(tmp_path, **options)]
        quiet_trainer(max_epochs=1, enable_checkpointing=True, callbacks=callbacks).fit(Plain(), loader)
        assert any(WITHIN in str(one.message) for one in recwarn) == expected


def test_warns_at_the_start_of_what_cannot_resume(fit):
    averaging = StochasticWeightAveraging(0.1)
    with pytest.warns(UserWarning, match="StochasticWeightAveraging does not resume .* EMAWeightAveraging"):
        fit("0", callbacks=[ExactResume(), averaging], max_epochs=1)


@pytest.mark.parametrize("averaged", [False, True])
def test_killed_after_the_last_checkpoint(fit, tmp_path, averaged):
    """The resumed run does what is left: it deploys the averaged weights."""
    module = partial(SupervisedModule, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    saver = partial(ModelCheckpoint, tmp_path, filename="end", enable_version_counter=False)
    ends = []
    for path in (None, tmp_path / "end.ckpt"):
        callbacks = [StudentWriter(), saver(), *[EMAWeightAveraging(decay=0.5)] * averaged]
        fit("0", path, module, callbacks, max_epochs=1)
        ends.append(load_file(tmp_path / "student.safetensors"))
        (tmp_path / "student.safetensors").unlink()
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())
    last = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[f"student.{key}"], value) for key, value in ends[0].items())


def test_the_command_line_adds_it(config, tmp_path):
    (tmp_path / "config.yaml").write_text(str(config))
    cli = DistillCLI(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "1"])
    assert sum(isinstance(callback, ExactResume) for callback in cli.trainer.callbacks) == 1
