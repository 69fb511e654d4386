"""Learning rate schedules: lengths that the run gives, and those that are refused since the run is longer."""

import copy
import itertools
import math
import re
import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from small_networks import Resumable
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)
from torch.utils.data import DataLoader

from kd_lightning import (
    ChainedSchedule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    PseudoLabelModule,
    SequentialSchedule,
    SupervisedModule,
)
from kd_lightning.models import DigitsCNN

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


class Rates(Callback):
    """Collects the learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


warm_up = partial(LinearLR, total_iters=2)
warm_cosine = partial(SequentialSchedule, schedulers=[warm_up, CosineAnnealingLR], milestones=[2])
LEFT_OUT = {
    "cosine": (CosineAnnealingLR, lambda n: partial(CosineAnnealingLR, T_max=n)),
    "one cycle": (one_cycle, lambda n: partial(one_cycle, total_steps=n)),
    "warm-up": (
        warm_cosine,
        lambda n: lambda o: SequentialLR(o, [warm_up(o), CosineAnnealingLR(o, max(n - 2, 1))], [2]),
    ),
    "chained": (
        partial(ChainedSchedule, schedulers=[warm_up, CosineAnnealingLR]),
        lambda n: lambda o: ChainedScheduler([warm_up(o), CosineAnnealingLR(o, n)], o),
    ),
}


class TestLengthLeftOut:
    """A schedule that leaves out its length takes that of the run."""

    def rates(self, make_trainer, loader, scheduler, interval="epoch", path=None, **options):
        torch.manual_seed(0)
        module = SupervisedModule(DigitsCNN(4), optimizer=SGD, lr_scheduler=scheduler, lr_interval=interval)
        recorder = Rates()
        trainer = make_trainer(callbacks=[recorder, *options.pop("callbacks", [])], **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r".*lr_scheduler\.step.*|.*milestone")
            resumed = {} if path is None else {"ckpt_path": path, "weights_only": True}
            trainer.fit(module, Resumable(loader(count=4 * STEPS).dataset, 4), **resumed)
        return recorder.rates

    @pytest.mark.parametrize("kind", LEFT_OUT)
    @pytest.mark.parametrize(
        ("interval", "length", "options"),
        [
            ("epoch", 4, {"max_epochs": 4}),
            ("step", 12, {"max_epochs": 4}),
            ("step", 8, {"max_epochs": 4, "accumulate_grad_batches": 2}),
            ("step", 4, {"max_epochs": 4, "limit_train_batches": 1}),
            ("step", 7, {"max_steps": 7, "max_epochs": 9}),
            ("step", 7, {"max_steps": 7, "max_epochs": -1}),
            ("epoch", 3, {"max_steps": 7, "max_epochs": 9}),  # the third epoch ends early
        ],
    )
    def test_equals_the_length_by_hand(self, quiet_trainer, loader, kind, interval, length, options):
        left_out, given = LEFT_OUT[kind]
        found = self.rates(quiet_trainer, loader, left_out, interval, **options)
        assert found == self.rates(quiet_trainer, loader, given(length), interval, **options)

    @pytest.mark.parametrize("kind", LEFT_OUT)
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_resume(self, quiet_trainer, loader, tmp_path, kind, interval):
        """The checkpoint is one of torch's schedule, and the rates go on as in the unbroken run, also a second time."""
        schedule = LEFT_OUT[kind][0]
        whole = self.rates(quiet_trainer, loader, schedule, interval, max_epochs=4)
        start = None
        for step in (4, 7):
            path = tmp_path / f"{step}.ckpt"
            save = [SaveAt(step, path)]
            self.rates(quiet_trainer, loader, schedule, interval, start, max_epochs=4, callbacks=save)
            start = path
        # a plain loader begins the epoch anew, so that steps 7 ... 12 are run
        found = self.rates(quiet_trainer, loader, schedule, interval, start, max_epochs=4)
        assert found == whole[-len(found) :]
        assert len(found) == 5
        (state,) = torch.load(start, weights_only=True)["lr_schedulers"]
        assert "step" not in state

    @pytest.mark.parametrize("kind", LEFT_OUT)
    def test_resume_from_the_end_of_an_epoch(self, quiet_trainer, loader, tmp_path, kind):
        """The checkpoint has nothing but torch's state."""
        schedule = LEFT_OUT[kind][0]
        whole = self.rates(quiet_trainer, loader, schedule, max_epochs=4)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        options = {"enable_checkpointing": True, "max_epochs": 4}
        self.rates(quiet_trainer, loader, schedule, callbacks=[saver], **options)
        for epoch in (0, 2):
            path = tmp_path / f"epoch={epoch}.ckpt"
            assert self.rates(quiet_trainer, loader, schedule, path=path, **options) == whole[3 * (epoch + 1) :]
            (state,) = torch.load(path, weights_only=True)["lr_schedulers"]
            assert not {"step", "_awaiting"} & {*state}

    @pytest.mark.parametrize("kind", LEFT_OUT)
    def test_a_longer_run_goes_on_as_if_it_always_was(self, quiet_trainer, loader, tmp_path, kind):
        schedule, path = LEFT_OUT[kind][0], tmp_path / "a.ckpt"
        self.rates(quiet_trainer, loader, schedule, max_epochs=3, callbacks=[SaveAt(9, path)])
        whole = self.rates(quiet_trainer, loader, schedule, max_epochs=6)
        with pytest.warns(UserWarning, match="lr_scheduler: the length of the run is another one than in the check"):
            found = self.rates(quiet_trainer, loader, schedule, path=path, max_epochs=6)
        assert found == whole[9:]

    def test_a_length_that_is_given_stays(self, quiet_trainer, loader):
        for interval, position in (("epoch", 1), ("step", 5)):
            found = self.rates(quiet_trainer, loader, partial(CosineAnnealingLR, T_max=9), interval, max_epochs=2)
            assert found[-1] == pytest.approx(5e-4 * (1 + math.cos(math.pi * position / 9)))
            assert self.rates(quiet_trainer, loader, LinearLR, interval, max_epochs=2)[0] == pytest.approx(1e-3 / 3)

    def test_the_order_of_random_numbers_stays(self, quiet_trainer, loader, tmp_path):
        """The length is found without a second loader: training is bit-equal to that of the length by hand."""
        weights = []
        for scheduler in (CosineAnnealingLR, partial(CosineAnnealingLR, T_max=2)):
            torch.manual_seed(0)
            module = SupervisedModule(DigitsCNN(4, dropout=0.5), optimizer=SGD, lr_scheduler=scheduler)
            quiet_trainer(max_epochs=2).fit(module, DataLoader(loader().dataset, 4, shuffle=True))
            weights.append(module.state_dict())
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    def test_unknown(self, quiet_trainer, loader, student):
        def module(interval="epoch"):
            return SupervisedModule(student, optimizer=SGD, lr_scheduler=CosineAnnealingLR, lr_interval=interval)

        assert fit(quiet_trainer, module(), loader(), max_epochs=-1) == (
            "lr_scheduler: its length is left out, so it is that of the run, which is not known: the trainer has "
            "neither max_epochs nor max_steps"
        )
        changing = [GradientAccumulationScheduler({0: 1, 1: 2})]
        message = fit(quiet_trainer, module("step"), loader(), max_epochs=2, callbacks=changing)
        assert message.endswith("GradientAccumulationScheduler changes it")
        with pytest.raises(InputError, match="there is no trainer"):
            module().configure_optimizers()

    def test_a_loader_without_length(self, quiet_trainer, loader, student):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([*loader().dataset])

        def module(interval="epoch"):
            return SupervisedModule(student, optimizer=SGD, lr_scheduler=CosineAnnealingLR, lr_interval=interval)

        data = DataLoader(Stream(), 4)
        fit(quiet_trainer, module(), data, steps=6, max_epochs=2)
        fit(quiet_trainer, module("step"), data, steps=5, max_epochs=-1, max_steps=5)
        assert "the data loader has no length" in fit(quiet_trainer, module("step"), data, max_epochs=2)

    def test_a_module_that_skips_the_base_class(self, quiet_trainer, loader, student):
        """The length is filled in before the first step of the schedule."""

        class Careless(SupervisedModule):
            def on_train_start(self):
                pass

        recorder = Rates()
        module = Careless(student, optimizer=SGD, lr_scheduler=CosineAnnealingLR)
        trainer = quiet_trainer(max_epochs=2, callbacks=[recorder])
        trainer.fit(module, loader())
        assert recorder.rates[-1] == pytest.approx(5e-4)
        assert type(trainer.lr_scheduler_configs[0].scheduler) is CosineAnnealingLR

    def test_warnings(self, quiet_trainer, loader, student):
        def module(scheduler):
            return SupervisedModule(student, optimizer=SGD, lr_scheduler=scheduler)

        with pytest.warns(UserWarning, match="milestone 2 lies outside of the run, which takes 2 epochs .*never begin"):
            quiet_trainer(max_epochs=2).fit(module(warm_cosine), loader())
        with pytest.warns(UserWarning, match="PolynomialLR has a learning rate of 0 after total_iters 5, but .* 6 epo"):
            quiet_trainer(max_epochs=6).fit(module(PolynomialLR), loader())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(milestone|PolynomialLR)")
            quiet_trainer(fast_dev_run=True).fit(module(warm_cosine), loader())
            quiet_trainer(max_epochs=3).fit(module(warm_cosine), loader())
            quiet_trainer(max_epochs=5).fit(module(PolynomialLR), loader())


class TestCosineThatIsTooShort:
    """CosineAnnealingLR falls until T_max, and then rises to its first rate."""

    cosine = partial(CosineAnnealingLR, T_max=3)

    @pytest.mark.parametrize(
        ("schedule", "interval", "options", "message"),
        [
            (cosine, "epoch", {"max_epochs": 5}, r"T_max 3, but the training takes 5 epochs \(lr_interval: epoch\)"),
            (cosine, "epoch", {"max_epochs": 4}, None),  # the last epoch has the lowest rate
            (cosine, "epoch", {"max_epochs": 9, "max_steps": 9}, None),
            (cosine, "step", {"max_epochs": 2}, "T_max 3, but the training takes 6 optimiser steps"),
            (cosine, "step", {"max_epochs": 2, "accumulate_grad_batches": 2}, None),
            (cosine, "step", {"max_epochs": -1}, "T_max 3, but the training has neither max_epochs nor max_steps"),
            (cosine, "epoch", {"max_epochs": 2, "fast_dev_run": True}, None),
            (CosineAnnealingLR, "step", {"max_epochs": 3}, None),
            (warm_cosine, "step", {"max_epochs": 3}, None),
            (
                partial(SequentialSchedule, schedulers=[ConstantLR, cosine], milestones=[2]),
                "step",
                {"max_epochs": 3},
                "T_max 3, but the training takes 7",
            ),
            (
                partial(SequentialSchedule, schedulers=[ConstantLR, cosine], milestones=[6]),
                "step",
                {"max_epochs": 3},
                None,
            ),
            (
                partial(SequentialSchedule, schedulers=[cosine, ConstantLR], milestones=[6]),
                "step",
                {"max_epochs": 3},
                "T_max",
            ),
            (
                partial(SequentialSchedule, schedulers=[cosine, ConstantLR], milestones=[3]),
                "step",
                {"max_epochs": 3},
                None,
            ),
            (partial(ChainedSchedule, schedulers=[ConstantLR, cosine]), "step", {"max_epochs": 3}, "T_max 3, but"),
        ],
    )
    def test_warning(self, quiet_trainer, loader, student, schedule, interval, options, message):
        stop = [Timer(timedelta(microseconds=1))] if options["max_epochs"] < 0 else []
        module = SupervisedModule(student, optimizer=SGD, lr_scheduler=schedule, lr_interval=interval)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(**options, callbacks=stop).fit(module, loader())
        found = [str(w.message) for w in caught if "T_max" in str(w.message)]
        assert len(found) == (message is not None)
        if message is not None:
            assert re.match("lr_scheduler: CosineAnnealingLR: its learning rate rises again after T_max 3", found[0])
            assert re.search(message, found[0])

    def test_the_warning_is_right(self):
        """It comes if some step uses a higher rate than the step before it."""
        for steps in range(1, 9):
            optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            scheduler, rates = self.cosine(optimizer), []
            for _ in range(steps):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            assert any(b > a for a, b in itertools.pairwise(rates)) == (steps - 1 > 3)


class TestLengthOfStages:
    """HintModule: the schedules of both stages leave out their length."""

    def rates(self, make_trainer, loader, student, teacher, lengths=(None, None), path=None, **options):
        schedules = [CosineAnnealingLR if n is None else partial(CosineAnnealingLR, T_max=n) for n in lengths]
        interval, epochs = options.pop("lr_interval", "epoch"), options.pop("max_epochs", 5)
        module = HintModule(
            copy.deepcopy(student),
            teacher,
            {"5": "5"},
            2,
            optimizer=partial(SGD, lr=1e-3),
            hint_lr_scheduler=schedules[0],
            lr_scheduler=schedules[1],
            lr_interval=interval,
            hint_patience=options.pop("hint_patience", None),
        )
        recorder = Rates()
        trainer = make_trainer(callbacks=[recorder, *options.pop("callbacks", [])], max_epochs=epochs, **options)
        data = Resumable(loader().dataset, 4)
        trainer.fit(module, data, loader(), ckpt_path=path, **({} if path is None else {"weights_only": True}))
        return recorder.rates

    @pytest.mark.parametrize(("interval", "lengths"), [("epoch", (2, 3)), ("step", (6, 9))])
    def test_each_has_its_own(self, quiet_trainer, loader, student, teacher, tmp_path, interval, lengths):
        options = {"lr_interval": interval}
        whole = self.rates(quiet_trainer, loader, student, teacher, lengths, **options)
        assert self.rates(quiet_trainer, loader, student, teacher, **options) == whole
        for step in (2, 6, 11):  # in stage 1, at its end, in stage 2
            path = tmp_path / f"{step}.ckpt"
            self.rates(quiet_trainer, loader, student, teacher, callbacks=[SaveAt(step, path)], **options)
            found = self.rates(quiet_trainer, loader, student, teacher, path=path, **options)
            assert found == whole[-len(found) :]

    def test_stage_1_ends_early(self, quiet_trainer, loader, student, teacher):
        """Stage 2 takes the rest of the run."""
        options = {"hint_patience": 1, "limit_val_batches": 1, "max_epochs": 4}

        class Patient(Callback):  # ends stage 1 after its first epoch
            def on_train_epoch_start(self, trainer, module):
                module._best_hint_loss = 0.0

        found = self.rates(quiet_trainer, loader, student, teacher, callbacks=[Patient()], **options)
        expected = self.rates(quiet_trainer, loader, student, teacher, (2, 3), callbacks=[Patient()], **options)
        assert found == expected
        assert found[3] == 1e-3  # the first of stage 2
