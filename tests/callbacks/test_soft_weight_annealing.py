"""SoftWeightAnnealing: values of each shape, on our modules and on anybody's."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_lightning import Digits, DistillModule, InputError, SemiSupervisedDataModule, SoftWeightAnnealing

# at a quarter, at half, and at three quarters of the way from 0.8 to 0.2
SHAPES = {
    "linear": [0.65, 0.5, 0.35],
    "cosine": [0.5 + 0.3 * 0.5**0.5, 0.5, 0.5 - 0.3 * 0.5**0.5],
    "exponential": [0.8 * 4**-0.25, 0.4, 0.8 * 4**-0.75],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape):
    annealing = SoftWeightAnnealing(0.8, 0.2, begin_epoch=2, end_epoch=6, shape=shape)
    values = [annealing.value(epoch, last_epoch=99) for epoch in range(9)]
    assert values[:3] == pytest.approx([0.8] * 3)
    assert values[3:6] == pytest.approx(SHAPES[shape])
    assert values[6:] == [0.2] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_rises_as_it_falls(shape):
    up, down = SoftWeightAnnealing(0.2, 0.8, shape=shape), SoftWeightAnnealing(0.8, 0.2, shape=shape)
    assert [up.value(e, 8) for e in range(9)] == pytest.approx([down.value(8 - e, 8) for e in range(9)])


@pytest.mark.parametrize(
    ("arguments", "epoch", "last", "expected"),
    [
        ({}, 0, 9, 0.0),
        ({}, 3, 9, 1.0),
        ({}, 9, 9, 3.0),
        ({}, 20, 9, 3.0),  # more epochs than last_epoch
        ({"begin_epoch": 9}, 8, 9, 0.0),
        ({"begin_epoch": 12}, 9, 9, 0.0),  # never begins
        ({"begin_epoch": 4, "end_epoch": 4}, 3, 9, 0.0),  # a jump
        ({"begin_epoch": 4, "end_epoch": 4}, 4, 9, 3.0),
        ({"end_epoch": 12}, 9, 9, 2.25),  # the last epoch does not cut it short
    ],
)
def test_limit_cases(arguments, epoch, last, expected):
    assert SoftWeightAnnealing(0.0, 3.0, **arguments).value(epoch, last) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "square"}, "shape must be one of linear, cosine, exponential, got 'square'"),
        ({"shape": "exponential", "end": 0.0}, "start and end must be above 0 .* got 1.0 and 0.0"),
        ({"shape": "exponential", "start": -1.0}, "above 0"),
        ({"begin_epoch": 3, "end_epoch": 2}, "0 <= begin_epoch <= end_epoch, got 3 and 2"),
        ({"begin_epoch": -1}, "0 <= begin_epoch <= end_epoch, got -1 and None"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(InputError, match=message):
        SoftWeightAnnealing(**({"start": 1.0, "end": 0.5} | arguments))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("soft_wait", "'soft_wait' to anneal: DistillModule has no attribute of that name"),
        ("soft_loss.heat", "'soft_loss.heat' to anneal: DistillModule has no attribute"),
        ("loss.temperature", "has no attribute of that name"),
        ("student", "'student' of DistillModule must be a number, got DigitsCNN"),
        ("task", "must be a number, got str"),
        ("automatic_optimization", "must be a number, got bool"),
    ],
)
def test_module_without_it(quiet_trainer, loader, student, teacher, attribute, message):
    trainer = quiet_trainer(callbacks=[SoftWeightAnnealing(1.0, 0.0, attribute=attribute)])
    with pytest.raises(InputError, match=message):
        trainer.fit(DistillModule(student, teacher), loader())


def test_needs_a_last_epoch(quiet_trainer, loader, student, teacher):
    def fit(**kwargs):
        trainer = quiet_trainer(max_epochs=-1, max_steps=4, callbacks=[SoftWeightAnnealing(1.0, 0.0, **kwargs)])
        trainer.fit(DistillModule(student, teacher), loader())

    with pytest.raises(InputError, match="end_epoch must be set if max_epochs is not, got max_epochs -1"):
        fit()
    fit(end_epoch=3)


@pytest.mark.parametrize("ends", [(1.5, 0.0), (0.9, -0.5), (float("nan"), 0.0)])
def test_soft_weight_stays_within_its_range(quiet_trainer, loader, student, teacher, ends):
    trainer = quiet_trainer(max_epochs=2, callbacks=[SoftWeightAnnealing(*ends)])
    with pytest.raises(InputError, match=r"soft_weight must lie in \[0, 1\], got"):
        trainer.fit(DistillModule(student, teacher), loader())


def test_is_charted_and_reaches_the_loss(quiet_trainer, loader, tmp_path, student, teacher):
    seen = []

    class Recording(DistillModule):
        def losses(self, batch):
            terms = super().losses(batch)
            seen.append((terms["hard"].weight, terms["soft"].weight))
            return terms

    trainer = quiet_trainer(
        max_epochs=3,
        logger=TensorBoardLogger(tmp_path, "", ""),
        log_every_n_steps=1,
        callbacks=[SoftWeightAnnealing(0.9, 0.1), SoftWeightAnnealing(8.0, 2.0, attribute="soft_loss.temperature")],
    )
    module = Recording(student, teacher)
    trainer.fit(module, loader())
    assert [w for pair in seen for w in pair] == pytest.approx([0.1, 0.9] * 3 + [0.5, 0.5] * 3 + [0.9, 0.1] * 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, expected in {"soft_weight": [0.9, 0.5, 0.1], "soft_loss.temperature": [8.0, 5.0, 2.0]}.items():
        by_step = {event.step: event.value for event in events.Scalars(name)}
        assert list(by_step.values()) == pytest.approx(expected)
    assert module.soft_loss.temperature == 2.0


def test_resumed_in_mid_epoch(quiet_trainer, tmp_path, student, teacher):
    seen = []

    class Recording(DistillModule):
        def losses(self, batch):
            seen.append(self.soft_weight)
            return super().losses(batch)

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [SoftWeightAnnealing(0.9, 0.1), saves]
    for path in (None, tmp_path / "step=4.ckpt"):
        trainer = quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=callbacks, limit_train_batches=3)
        data = SemiSupervisedDataModule(Digits(), batch_size=8)
        trainer.fit(Recording(student, teacher), datamodule=data, ckpt_path=path)
    assert len(seen) == 9 + 5
    assert seen[9:] == seen[4:9]  # from the second batch of the second epoch on


@pytest.mark.parametrize("attribute", ["alpha", "settings.alpha", "net.0.alpha"])
def test_somebody_elses_module(quiet_trainer, loader, attribute):
    class Layer(nn.Linear):
        alpha = 7

    class Theirs(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Layer(64, 10))
            self.alpha, self.settings, self.seen = 7.0, SimpleNamespace(alpha=7.0), []

        def training_step(self, batch, batch_idx):
            self.seen.append((self.alpha, self.settings.alpha, self.net[0].alpha))
            return self.net(batch[0].flatten(1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Theirs()
    trainer = quiet_trainer(max_epochs=3, callbacks=[SoftWeightAnnealing(0.0, 1.0, attribute=attribute)])
    trainer.fit(module, loader(4))
    column = ["alpha", "settings.alpha", "net.0.alpha"].index(attribute)
    for number, values in enumerate(zip(*module.seen, strict=True)):
        assert list(values) == ([0.0, 0.5, 1.0] if number == column else [7.0] * 3)
    assert trainer.callback_metrics[attribute] == 1.0


def test_leaves_other_stages_alone(quiet_trainer, loader, student):
    trainer = quiet_trainer(callbacks=[SoftWeightAnnealing(1.0, 0.0, attribute="nothing")])
    trainer.validate(DistillModule(student, None), loader(), verbose=False)
