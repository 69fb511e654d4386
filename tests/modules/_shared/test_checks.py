"""Faults of networks that every module names in one line, before its first step."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ApprenticeModule,
    CoTeachingModule,
    DatasetSource,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.models import DigitsCNN


def net(classes=10, width=4):
    return DigitsCNN(width, classes)


MAKE = {
    "supervised": lambda student, **kw: SupervisedModule(student, **kw),
    "distill": lambda student, **kw: DistillModule(student, net(out(student)), **kw),
    "hint": lambda student, **kw: HintModule(student, net(out(student)), {"5": "5"}, 1, **kw),
    "hint with a shape": lambda student, **kw: HintModule(
        student, net(out(student)), {"5": "5"}, 1, input_shape=[1, 8, 8], **kw
    ),
    "ensemble": lambda student, **kw: EnsembleDistillModule(student, [net(out(student))], **kw),
    "apprentice": lambda student, **kw: ApprenticeModule(student, net(out(student)), **kw),
    "pseudo": lambda student, **kw: PseudoLabelModule(student, **kw),
    "co-teaching": lambda student, **kw: CoTeachingModule(student, net(out(student)), 0.1, **kw),
}
every_module = pytest.mark.parametrize("kind", MAKE)


def out(student):
    return student[-1].out_features


def refused(make_trainer, module, *data, **kwargs):
    trainer = make_trainer(max_epochs=2, limit_train_batches=2, **kwargs)
    with pytest.raises(InputError) as caught:
        trainer.fit(module, *data) if data else trainer.fit(module, datamodule=digits())
    assert trainer.global_step == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digits(**kwargs):
    return SemiSupervisedDataModule(Digits(), labeled=5, batch_size=32, **kwargs)


@every_module
class TestNumberOfOutputs:
    @pytest.mark.parametrize("sanity", [2, 0])
    def test_forgotten(self, quiet_trainer, kind, sanity):
        message = refused(quiet_trainer, MAKE[kind](net(12)), num_sanity_val_steps=sanity)
        assert message.startswith("student: it must have 10 outputs") and "num_classes: 12" in message

    def test_asked_for(self, quiet_trainer, kind):
        module = MAKE[kind](net(12), num_classes=12)
        if kind == "pseudo":  # its pseudo-labels need labels of each class
            assert "no labeled sample of class '10', '11'" in refused(quiet_trainer, module)
        else:
            quiet_trainer(max_epochs=2, limit_train_batches=1).fit(module, datamodule=digits())
        message = refused(quiet_trainer, MAKE[kind](net(12), num_classes=10))
        assert message == "num_classes: the student must have 10 outputs, got 12"

    def test_too_few(self, quiet_trainer, kind):
        for options in ({}, {"num_classes": 9}):
            message = refused(quiet_trainer, MAKE[kind](net(9), **options))
            assert message.startswith("student: ") and "at least 10" in message and "got 9" in message

    def test_numbers_that_are_none(self, kind):
        with pytest.raises(InputError, match="num_classes must be at least 1, got 0"):
            MAKE[kind](net(), num_classes=0)


def test_outputs_without_known_classes(quiet_trainer, loader):
    quiet_trainer().fit(SupervisedModule(net(12)), loader())
    assert "num_classes" in refused(quiet_trainer, SupervisedModule(net(12), num_classes=10), loader())


@pytest.mark.parametrize("last", [nn.Flatten(0), nn.Identity()])
def test_outputs_of_the_binary_task(quiet_trainer, last):
    part = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    data = SemiSupervisedDataModule(DatasetSource(part, part, class_names=["no", "yes"]), val_size=0)
    network = nn.Sequential(nn.Linear(4, 1), last)
    for number in (None, 1):
        quiet_trainer().fit(SupervisedModule(network, task="binary", num_classes=number), datamodule=data)
    with pytest.raises(InputError, match="num_classes: the student must have 2 outputs, got 1"):
        quiet_trainer().fit(SupervisedModule(network, task="binary", num_classes=2), datamodule=data)


def test_outputs_of_the_multilabel_task(quiet_trainer):
    part = TensorDataset(torch.randn(8, 4), torch.randint(2, (8, 3)).float())
    data = SemiSupervisedDataModule(DatasetSource(part, part, class_names=["a", "b", "c"]), val_size=0)
    quiet_trainer().fit(SupervisedModule(nn.Linear(4, 3), task="multilabel"), datamodule=data)
    with pytest.raises(InputError, match="student: it must have 3 outputs"):
        quiet_trainer().fit(SupervisedModule(nn.Linear(4, 4), task="multilabel"), datamodule=data)


@every_module
def test_nothing_to_train(quiet_trainer, kind):
    message = refused(quiet_trainer, MAKE[kind](net().requires_grad_(False)))
    assert message.startswith("student: at least one parameter must require a gradient, got none of ")


def test_validation_needs_nothing_to_train(quiet_trainer, loader):
    quiet_trainer().validate(SupervisedModule(net().requires_grad_(False)), loader(), verbose=False)


SHARING = {
    "distill": DistillModule,
    "hint": lambda student, teacher: HintModule(student, teacher, {"5": "5"}, 1),
    "ensemble": lambda student, teacher: EnsembleDistillModule(student, [net(), teacher]),
    "joint": ApprenticeModule,
    "fixed teacher": lambda student, teacher: ApprenticeModule(student, teacher, "fixed_teacher"),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("wrap", [lambda network: network, Teacher, nn.Sequential])
def test_one_network_as_student_and_teacher(kind, wrap):
    student = net()
    if kind == "joint" and wrap is Teacher:
        return  # refused, since it is frozen
    with pytest.raises(InputError, match=r"^(teacher|teachers\[1\]) and student must be two networks, got the same"):
        SHARING[kind](student, wrap(student))
    SHARING[kind](net(), copy.deepcopy(net()))


@pytest.mark.parametrize("kind", SHARING)
def test_shared_layers(kind):
    student = net()
    teacher = nn.Sequential(*list(student)[:-1], nn.Linear(16, 10))
    with pytest.raises(InputError, match=r"must have parameters of their own, got 9 .* such as 0.weight"):
        SHARING[kind](student, teacher)


@pytest.mark.parametrize("twice", [lambda t: t, copy.deepcopy, lambda t: Teacher(t, classes=None)])
def test_a_teacher_given_twice(quiet_trainer, loader, twice):
    teacher = net()
    module = EnsembleDistillModule(net(), [net(), teacher, twice(teacher)])
    message = refused(quiet_trainer, module, loader())
    assert "teachers must differ" in message and "teachers[1] and teachers[2]" in message


def test_teachers_that_share_something(quiet_trainer, loader):
    """One network under two preprocessings, two class orders, or with another architecture around the same weights."""
    teacher = net()
    others = [
        Teacher(teacher, preprocess=nn.Hardtanh()),
        Teacher(teacher, classes=[1, 0, *range(2, 10)]),
        nn.Sequential(teacher),
    ]
    quiet_trainer().fit(EnsembleDistillModule(net(), [teacher, *others]), loader())


@every_module
def test_a_last_batch_of_one_row(quiet_trainer, kind):
    """Between linear layers, where BatchNorm has one value of each channel."""

    class Student(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Identity(), nn.ReLU())
            self.append(nn.Linear(8, 10))

    make = MAKE[kind]
    if kind.startswith("hint"):
        teacher = Student()
        module = HintModule(Student(), teacher, {"5": "5"}, 1)
    else:
        module = make(Student())
    x, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, -100, 3])
    data = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(InputError) as caught:
        quiet_trainer(max_epochs=2).fit(module, data)
    assert "one row" in str(caught.value) and "batch_size" in str(caught.value) and "drop_last" in str(caught.value)


def test_other_errors_stay(quiet_trainer, loader):
    class Fault(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        quiet_trainer().fit(SupervisedModule(Fault()), loader())


class TestOneLabel:
    """The multilabel task with a single label is the binary task."""

    def data(self):
        y = (torch.arange(12) % 2).float().reshape(12, 1)
        y[3] = torch.nan
        return DataLoader(TensorDataset(torch.randn(12, 1, 8, 8), y), 4)

    @pytest.mark.parametrize("kind", ["supervised", "distill", "hint", "ensemble", "apprentice"])
    def test_it_trains_and_is_evaluated(self, quiet_trainer, kind):
        data, trainer = self.data(), quiet_trainer(max_epochs=2)
        module = MAKE[kind](net(1), task="multilabel")
        trainer.fit(module, data, data)
        found = trainer.test(module, data, verbose=False)[0]
        x, y = data.dataset.tensors
        known = ~y.isnan().flatten()
        predicted = (module.eval()(x) > 0).flatten()
        expected = (predicted == (y.flatten() > 0.5))[known].float().mean()
        assert found["test/accuracy"] == pytest.approx(float(expected))
        assert module.hparams["task"] == "multilabel"

    def test_one_class_is_none(self, quiet_trainer):
        data = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), 4)
        with pytest.raises(InputError, match="task: multiclass needs a student of at least 2 outputs, got 1"):
            quiet_trainer().fit(SupervisedModule(nn.Linear(4, 1)), data)


@pytest.mark.parametrize(
    ("monitor", "mode", "right"), [("val/accuracy", "min", "max"), ("val/loss", "max", "min"), ("val/f1", "min", "max")]
)
def test_directions(quiet_trainer, loader, monitor, mode, right):
    """ReduceLROnPlateau would lower the rate of an improving run, EarlyStopping would end it."""
    plateau = partial(ReduceLROnPlateau, monitor=monitor, mode=mode)
    message = refused(quiet_trainer, SupervisedModule(net(), lr_scheduler=plateau), loader(), loader())
    assert message.startswith(f"lr_scheduler: mode must be {right} with monitor {monitor}")
    stop = EarlyStopping(monitor, mode=mode)
    message = refused(quiet_trainer, SupervisedModule(net()), loader(), loader(), callbacks=[stop])
    assert message.startswith(f"EarlyStopping: mode must be {right} with monitor {monitor}")
