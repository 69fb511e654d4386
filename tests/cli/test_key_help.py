"""``--model.help X``: the arguments of a class on a screen."""

import inspect

import pytest

from kd_lightning import DistillModule
from kd_lightning.cli.key_help import key_help, wanted_help
from kd_lightning.data import ImageFolder
from kd_lightning.errors import InputError


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--model.help", "DistillModule"], ("model", "DistillModule")),
        (["--model.help=DistillModule"], ("model", "DistillModule")),
        (["--config=a.yaml", "--data.help"], ("data", "")),
        (["--data.help", "--name", "x"], ("data", "")),
        (["--model.init_args.optimizer.help", "AdamW"], ("model.init_args.optimizer", "AdamW")),
        (["--config=a.yaml", "--name", "model.help"], None),
    ],
)
def test_wanted(args, wanted):
    assert wanted_help(args) == wanted


@pytest.mark.parametrize(("key", "owner"), [("model", DistillModule), ("data", ImageFolder)])
def test_all_arguments_on_a_screen(key, owner):
    text = key_help(key, owner.__name__)
    lines = text.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3] != " "]
    assert {*inspect.signature(owner).parameters} - {"kwargs"} <= {*names}
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert ":class:" not in text


def test_needed_arguments_and_defaults():
    lines = {
        line.split()[0]: line.split()[1] for line in key_help("model", "DistillModule").splitlines() if line.strip()
    }
    assert lines["student"] == "needed"
    assert lines["optimizer"] == "Adam"
    assert lines["soft_weight"] == "0.5"


@pytest.mark.parametrize(
    ("key", "name", "place"),
    [
        ("model", "DistillModule", "--model.init_args.KEY"),
        ("data", "SemiSupervisedDataModule", "--data.init_args.KEY"),
        ("data", "ImageFolder", "--data.init_args.source.init_args.KEY"),
        ("model", "DigitsCNN", "--model.init_args.student.init_args.KEY"),
        ("model.init_args.optimizer", "AdamW", "--model.init_args.optimizer.init_args.KEY"),
        ("trainer", "", "--trainer.KEY"),
        ("checkpoint", "", "--checkpoint.KEY"),
    ],
)
def test_place(key, name, place):
    assert f"\nkeys: {place}" in key_help(key, name)


def test_classes():
    found = [line.split()[0] for line in key_help("model", "").splitlines() if line]
    assert {"DistillModule", "SupervisedModule", "PseudoLabelModule"} <= {*found}
    assert {"SemiSupervisedDataModule", "ImageFolder", "Digits"} <= {
        line.split()[0] for line in key_help("data", "").splitlines() if line
    }
    assert "SGD" in key_help("model.optimizer", "")


def test_wrong_names():
    with pytest.raises(InputError, match="--model.help: no class 'Distilmodule'; did you mean DistillModule?"):
        key_help("model", "Distilmodule")
    with pytest.raises(InputError, match="--name.help needs a class"):
        key_help("name", "")
