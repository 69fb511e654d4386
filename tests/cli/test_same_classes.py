"""Weights are evaluated on the classes that they were trained on."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save_file

from kd_lightning import InputError
from kd_lightning.cli.same_classes import SameClasses
from kd_lightning.cli.selection import Selection
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import check_classes

OTHER = [
    (["ants", "cats"], r"new: \['ants'\], gone: \['dogs'\]"),  # as many classes, other numbers
    (["ants", "cats", "dogs"], r"new: \['ants'\]"),
    (["cats"], r"gone: \['dogs'\]"),
    (["dogs", "cats"], "another order"),
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "student.safetensors", {"classes": json.dumps(["cats", "dogs"])})
    return Run(tmp_path)


def check(selection, names, stage=TrainerFn.TESTING):
    trainer = SimpleNamespace(datamodule=SimpleNamespace(class_names=names))
    SameClasses(selection).setup(trainer, None, stage)


@pytest.mark.parametrize(("names", "message"), OTHER)
def test_other_classes_are_refused(run, names, message):
    for selection in (Selection(origin=run), Selection(weights=run.weights)):
        with pytest.raises(InputError, match=message):
            check(selection, names)
        check(selection, names, TrainerFn.FITTING)


@pytest.mark.parametrize("data", [None, SimpleNamespace(), SimpleNamespace(class_names=["cats", "dogs"])])
def test_the_same_or_unknown_classes(run, data):
    check_classes(run.class_names, data, run.folder)


def test_names_are_compared_in_one_unicode_form(run):
    check_classes(["caf\u00e9"], SimpleNamespace(class_names=["cafe\u0301"]), run.folder)


def test_a_run_without_weights(run):
    """Its split has the names of the classes from the start of the fit."""
    run.weights.unlink()
    check(Selection(origin=run), ["a"])
    (run.folder / "split.json").write_text(json.dumps({"class_names": ["cats", "dogs"]}))
    with pytest.raises(InputError, match="'a'"):
        check(Selection(origin=run), ["a"])
