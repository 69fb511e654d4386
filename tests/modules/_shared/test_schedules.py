"""Learning rate schedules of a fixed length: refused before the run if it is longer."""

from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LRScheduler, OneCycleLR, SequentialLR

from kd_lightning import EnsembleDistillModule, HintModule, InputError, PseudoLabelModule, SupervisedModule

STEPS = 3  # of an epoch
one_cycle = partial(OneCycleLR, max_lr=0.01)


class Began(Callback):
    """Counts the training steps that begin."""

    steps = 0

    def on_train_batch_start(self, *_):
        self.steps += 1


def fit(make_trainer, module, data, steps=None, **kwargs):
    """Fit; or, if it is refused, check that no step began. Returns the message."""
    began = Began()
    trainer = make_trainer(callbacks=[began, *kwargs.pop("callbacks", [])], **kwargs)
    if steps is not None:
        trainer.fit(module, data, data)
        assert began.steps == steps
        return None
    with pytest.raises(InputError) as caught:
        trainer.fit(module, data, data)
    assert not began.steps
    return str(caught.value)


@pytest.mark.parametrize(
    ("interval", "total", "options", "planned"),
    [
        ("step", 6, {"max_epochs": 2}, None),
        ("step", 5, {"max_epochs": 2}, 6),
        ("step", 4, {"max_epochs": 2, "accumulate_grad_batches": 2}, None),
        ("step", 3, {"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ("step", 2, {"max_epochs": 2, "limit_train_batches": 1}, None),
        ("step", 4, {"max_epochs": -1, "max_steps": 4}, None),
        ("step", 3, {"max_epochs": -1, "max_steps": 4}, 4),
        ("step", 3, {"max_epochs": 9, "max_steps": 4}, 4),
        ("step", 3, {"max_epochs": -1}, "neither max_epochs nor max_steps"),
        ("epoch", 2, {"max_epochs": 2}, None),
        ("epoch", 1, {"max_epochs": 2}, 2),
        ("epoch", 1, {"max_epochs": 9, "max_steps": 5}, None),  # one whole epoch
        ("epoch", 1, {"max_epochs": 9, "max_steps": 6}, 2),
    ],
)
def test_one_cycle(quiet_trainer, loader, student, interval, total, options, planned):
    scheduler = partial(one_cycle, total_steps=total)
    module = SupervisedModule(student, optimizer=SGD, lr_scheduler=scheduler, lr_interval=interval)
    if planned is None:
        quiet_trainer(**options).fit(module, loader())
        return
    message = fit(quiet_trainer, module, loader(), **options)
    assert message.startswith(f"lr_scheduler: OneCycleLR ends after total_steps {total}, but the training ")
    assert str(planned) in message and interval in message if isinstance(planned, int) else planned in message


def test_the_total_of_the_checkpoint_counts(quiet_trainer, loader, student, tmp_path):
    """OneCycleLR's state holds its total_steps, and replaces those of the config."""

    def make(epochs):
        scheduler = partial(one_cycle, total_steps=STEPS * epochs)
        return SupervisedModule(student, optimizer=SGD, lr_scheduler=scheduler, lr_interval="step")

    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(make(1), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="ends after total_steps 3, but the training takes 6 optimiser steps"):
        quiet_trainer(max_epochs=2).fit(make(2), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda o, total: SequentialLR(o, [ConstantLR(o), one_cycle(o, total_steps=total)], [2]), 4),
        (lambda o, total: SequentialLR(o, [one_cycle(o, total_steps=total), ConstantLR(o)], [2]), 1),
        (lambda o, total: ChainedScheduler([ConstantLR(o), one_cycle(o, total_steps=total)], o), 6),
    ],
)
def test_inside_another_scheduler(quiet_trainer, loader, student, make, fits):
    def module(total):
        return SupervisedModule(student, optimizer=SGD, lr_scheduler=partial(make, total=total), lr_interval="step")

    fit(quiet_trainer, module(fits), loader(), steps=6, max_epochs=2)
    if fits > 1:
        assert "OneCycleLR" in fit(quiet_trainer, module(fits - 1), loader(), max_epochs=2)


class Warmup(LRScheduler):
    """A schedule that holds its last rate."""

    total_steps = 2

    def get_lr(self):
        return [1e-3 for _ in self.optimizer.param_groups]


def test_what_need_not_fail_gets_a_warning(quiet_trainer, loader, student):
    module = SupervisedModule(student, optimizer=SGD, lr_scheduler=Warmup, lr_interval="step")
    with pytest.warns(UserWarning, match="Warmup ends after total_steps 2"):
        quiet_trainer().fit(module, loader())
    module = SupervisedModule(
        student, optimizer=SGD, lr_scheduler=partial(one_cycle, total_steps=9), lr_interval="step"
    )
    with pytest.warns(UserWarning, match="OneCycleLR ends after total_steps 9"):
        quiet_trainer(max_epochs=4, callbacks=[Timer(timedelta(microseconds=1))]).fit(module, loader())


def test_a_loader_without_length(quiet_trainer, loader, student):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([*loader().dataset])

    data = torch.utils.data.DataLoader(Stream(), 4)

    def module(total):
        scheduler = partial(one_cycle, total_steps=total)
        return SupervisedModule(student, optimizer=SGD, lr_scheduler=scheduler, lr_interval="step")

    fit(quiet_trainer, module(3), data, steps=3)  # the length is unknown
    assert "takes 5 optimiser" in fit(quiet_trainer, module(4), data, max_epochs=-1, max_steps=5)


@pytest.mark.parametrize("kind", ["pseudo", "ensemble"])
def test_modules_with_a_hook_of_their_own(quiet_trainer, loader, student, teacher, kind):
    options = {"optimizer": SGD, "lr_scheduler": partial(one_cycle, total_steps=1), "lr_interval": "step"}
    make = {
        "pseudo": lambda: PseudoLabelModule(student, **options),
        "ensemble": lambda: EnsembleDistillModule(student, [teacher], **options),
    }
    assert "total_steps 1" in fit(quiet_trainer, make[kind](), loader())


class TestStages:
    """HintModule: a schedule for each stage."""

    def module(self, student, teacher, first, second, epochs=1, interval="step", **kwargs):
        schedules = {"hint_lr_scheduler": first, "lr_scheduler": second}
        schedules = {name: total and partial(one_cycle, total_steps=total) for name, total in schedules.items()}
        return HintModule(
            student, teacher, {"5": "5"}, epochs, optimizer=SGD, lr_interval=interval, **schedules, **kwargs
        )

    def test_both_fit(self, quiet_trainer, loader, student, teacher):
        fit(quiet_trainer, self.module(student, teacher, 3, 6), loader(), steps=9, max_epochs=3)
        fit(quiet_trainer, self.module(student, teacher, 1, 2, interval="epoch"), loader(), steps=9, max_epochs=3)

    @pytest.mark.parametrize(
        ("first", "second", "name", "planned"), [(2, 6, "hint_lr_scheduler", 3), (3, 5, "lr_scheduler", 6)]
    )
    def test_one_is_too_short(self, quiet_trainer, loader, student, teacher, first, second, name, planned):
        message = fit(quiet_trainer, self.module(student, teacher, first, second), loader(), max_epochs=3)
        assert message.startswith(f"{name}: OneCycleLR ends") and f"takes {planned} " in message

    def test_patience_may_lengthen_the_second(self, quiet_trainer, loader, student, teacher):
        module = self.module(student, teacher, 6, 3, epochs=2, hint_patience=1)
        assert "lr_scheduler" in fit(quiet_trainer, module, loader(), max_epochs=3)
        module = self.module(student, teacher, 6, 6, epochs=2, hint_patience=1)
        fit(quiet_trainer, module, loader(), steps=9, max_epochs=3)

    def test_resumed_in_the_second(self, quiet_trainer, loader, student, teacher, tmp_path):
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(self.module(student, teacher, 3, 6), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        again = self.module(student, teacher, 3, 6)
        quiet_trainer(max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        with pytest.raises(InputError, match="lr_scheduler: .* takes 9 "):
            quiet_trainer(max_epochs=4).fit(
                self.module(student, teacher, 3, 6), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
            )
