"""Lines of YAML of the cures: they are a change of the config that can be read."""

from types import SimpleNamespace

import pytest
import yaml
from torch import nn

from kd_lightning import Digits, DistillModule, ImageFolder, SemiSupervisedDataModule
from kd_lightning.data.transforms import Compose, photo_transforms
from kd_lightning.losses import DKDLoss, KDLoss
from kd_lightning.report.cures import with_cure
from kd_lightning.runs.build import build
from kd_lightning.teachers.findings import Finding


@pytest.fixture
def module(student, teacher):
    return DistillModule(student, teacher)


def lines(reason, module, data=None, config=None):
    found = with_cure(Finding("x", "text", "hint", reason=reason), module, data, config)
    return None if found.lines is None else yaml.safe_load(found.lines), found.hint


def test_none(module):
    for finding in (Finding("x", "text"), Finding("x", "text", "hint"), Finding("x", "text", "hint", reason="poor")):
        assert with_cure(finding, module, None, {}) is finding
    info = Finding("x", "text", reason="wrong")
    assert with_cure(info, module, None, {}) is info


def test_losses_of_the_config(module):
    """The loss of the config is wrapped as it is there; each one of a sum."""
    kd, l1 = {"class_path": "KDLoss", "init_args": {"temperature": 2.0}}, {"class_path": "torch.nn.L1Loss"}
    wrapped = {"class_path": "kd_lightning.losses.ConditionalLoss", "init_args": {"loss": kd}}
    for given, expected in (
        (kd, wrapped),
        ("KDLoss", {**wrapped, "init_args": {"loss": {"class_path": "KDLoss"}}}),
        ({"a": [1.0, kd], "b": [0.5, l1]}, {"a": [1.0, wrapped], "b": [0.5, {**wrapped, "init_args": {"loss": l1}}]}),
    ):
        config = {"model": {"init_args": {"soft_loss": given}}}
        assert lines("wrong", module, None, config)[0] == {"model": {"init_args": {"soft_loss": expected}}}


def test_a_loss_that_cannot_be_written(student, teacher):
    module = DistillModule(student, teacher, soft_loss=DKDLoss())
    assert lines("wrong", module) == (None, "hint") and lines("one-hot", module)[0] is None


@pytest.mark.parametrize(("weight", "lower"), [(0.9, 0.5), (0.5, 0.25), (0.2, 0.1)])
def test_a_lower_soft_weight(student, teacher, weight, lower):
    module = DistillModule(student, teacher, soft_weight=weight)
    assert lines("balance", module)[0] == {"model": {"init_args": {"soft_weight": lower}}}


def test_teachers_of_folds(module):
    found = lines("memory", module)[0]["model"]["init_args"]["teacher"]
    assert found["class_path"] == "kd_lightning.CrossFittedTeacher"
    assert lines("memory", SimpleNamespace(soft_weight=0.9))[0] == {"model": {"init_args": {"soft_weight": 0.5}}}


class TestMilderCrop:
    def test_of_the_config(self, module):
        crop = {
            "class_path": "torchvision.transforms.v2.RandomResizedCrop",
            "init_args": {"size": 8, "scale": [0.1, 1]},
        }
        transform = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [crop]}}
        config = {"data": {"init_args": {"train_transform": transform}}}
        found, hint = lines("views", module, None, config)
        [changed] = found["data"]["init_args"]["train_transform"]["init_args"]["transforms"]
        assert changed["init_args"] == {"size": 8, "scale": [0.5, 1.0]} and crop["init_args"]["scale"] == [0.1, 1]
        assert "train_transform.init_args.transforms[0].init_args.scale: scale is [0.1, 1]" in hint
        del crop["init_args"]["scale"]
        assert "[0.08, 1.0]" in lines("views", module, None, config)[1]

    def test_of_the_source(self, module):
        """The lines build the source's own transform with a milder crop."""
        train, _ = photo_transforms(16)
        data = SimpleNamespace(train_transform=train)
        found, hint = lines("views", module, data)
        built = build(Compose, found["data"]["init_args"]["train_transform"])
        assert [type(one) for one in built.transforms] == [type(one) for one in train.transforms]
        crop, before = built.transforms[1], train.transforms[1]
        assert crop.scale == (0.5, 1.0) and crop.size == before.size and crop.ratio == before.ratio
        assert [*built.transforms[3].mean] == [*train.transforms[3].mean] and "[0.08, 1.0]" in hint

    def test_without_a_crop(self, module):
        assert lines("views", module, SimpleNamespace(train_transform=nn.Identity())) == (None, "hint")
        transform = {"class_path": "torch.nn.Identity"}
        config = {"data": {"init_args": {"train_transform": transform}}}
        assert lines("views", module, None, config) == (None, "hint")


def test_longer(module):
    assert lines("gap", module, None, {"trainer": {"max_epochs": 15}})[0] == {"trainer": {"max_epochs": 30}}
    assert lines("gap", module, None, {"trainer": {"max_steps": 15}})[0] == {"trainer": {"max_steps": 30}}
    for trainer in ({"max_epochs": None}, {}):
        assert lines("gap", module, None, {"trainer": trainer})[0] is None


def test_longer_schedules(module):
    """What is written in epochs follows: a cosine that is half as long as the run would rise again."""
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 15, "eta_min": 0.1}}
    callbacks = [{"class_path": "EarlyStopping", "init_args": {"patience": 3}}]
    model = {"class_path": "DistillModule", "init_args": {"lr_scheduler": cosine, "soft_weight": 0.9}}
    config = {"trainer": {"max_epochs": 15, "max_steps": -1, "callbacks": callbacks}, "model": model}
    scheduler = {"init_args": {"T_max": 30}}
    expected = {"trainer": {"max_epochs": 30}, "model": {"init_args": {"lr_scheduler": scheduler}}}
    assert lines("gap", module, None, config)[0] == expected and cosine["init_args"]["T_max"] == 15


def test_softer(student, teacher):
    module = DistillModule(student, teacher, soft_loss=KDLoss(temperature=3.0))
    loss = lines("one-hot", module)[0]["model"]["init_args"]["soft_loss"]
    assert loss == {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": 6.0}}


def test_unlabeled_samples(module):
    data = SimpleNamespace(unlabeled="rest", split=None, source=object.__new__(ImageFolder))
    source = {"init_args": {"unlabeled": "PICTURES"}}
    assert lines("few", module, data)[0] == {"data": {"init_args": {"unlabeled": "source", "source": source}}}
    data = SemiSupervisedDataModule(Digits(), labeled=5, unlabeled="none")
    data.setup("fit")
    assert lines("few", module, data)[0] == {"data": {"init_args": {"unlabeled": "rest"}}}
    data = SimpleNamespace(unlabeled="rest", split=None, source=object.__new__(Digits))
    assert lines("few", module, data)[0] is None
