"""Fewer epochs: which ones are tried, and what follows them."""

from copy import deepcopy

import pytest

from kd_lightning.runs.lengths import following_keys, length_of, scale_lengths, shorter_lengths


def config(model=None, **trainer):
    trainer = {"max_epochs": 40, "max_steps": -1, "check_val_every_n_epoch": 1, "callbacks": None} | trainer
    return {"trainer": trainer, "model": {"class_path": "M", "init_args": model or {}}}


@pytest.mark.parametrize(
    ("trainer", "found", "lengths"),
    [
        ({}, ("trainer.max_epochs", 40), (10, 20, 40)),
        ({"max_epochs": 15}, ("trainer.max_epochs", 15), (4, 8, 15)),
        ({"max_epochs": 2}, ("trainer.max_epochs", 2), (1, 2)),
        ({"max_epochs": 1}, ("trainer.max_epochs", 1), ()),
        ({"max_epochs": 40, "check_val_every_n_epoch": 8}, ("trainer.max_epochs", 40), (16, 24, 40)),
        ({"max_epochs": -1, "max_steps": 1000}, ("trainer.max_steps", 1000), (250, 500, 1000)),
        ({"max_epochs": None, "max_steps": 1000}, ("trainer.max_steps", 1000), (250, 500, 1000)),
        ({"max_epochs": 40, "max_steps": 1000}, None, ()),
        ({"max_epochs": -1}, None, ()),
    ],
)
def test_lengths(trainer, found, lengths):
    assert length_of(config(**trainer)) == found
    assert shorter_lengths(config(**trainer)) == lengths
    assert not lengths or max(lengths) == found[1]  # never more


def spec(name, **arguments):
    return {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}


def test_schedules_keep_their_shape():
    parts = [spec("LinearLR", total_iters=4), spec("CosineAnnealingLR", T_max=36, eta_min=0.1)]
    schedule = {
        "class_path": "kd_lightning.SequentialSchedule",
        "init_args": {"schedulers": parts, "milestones": [4], "length": 40},
    }
    annealing = {"class_path": "kd_lightning.SoftWeightAnnealing", "init_args": {"begin_epoch": 8, "end_epoch": None}}
    teacher = {"class_path": "Net", "init_args": {"length": 40, "step_size": 40}}
    model = {"lr_scheduler": schedule, "hint_epochs": 12, "teacher": teacher, "length": 40, "soft_weight": 1}
    whole = config(model, callbacks=[annealing])
    before = deepcopy(whole)
    scale_lengths(whole, 0.25)
    arguments = whole["model"]["init_args"]
    assert arguments["lr_scheduler"]["init_args"]["milestones"] == [1]
    assert arguments["lr_scheduler"]["init_args"]["length"] == 10
    first, second = arguments["lr_scheduler"]["init_args"]["schedulers"]
    assert first["init_args"] == {"total_iters": 1}
    assert second["init_args"] == {"T_max": 9, "eta_min": 0.1}
    assert arguments["hint_epochs"] == 3
    assert arguments["teacher"] == teacher and arguments["length"] == 40 and arguments["soft_weight"] == 1
    assert whole["trainer"]["callbacks"][0]["init_args"] == {"begin_epoch": 2, "end_epoch": None}
    assert following_keys(before) == ["T_max", "begin_epoch", "hint_epochs", "length", "milestones", "total_iters"]


def test_milestones_grow():
    whole = config({"lr_scheduler": spec("MultiStepLR", milestones=[30, 36, 38])})
    scale_lengths(whole, 0.1)
    assert whole["model"]["init_args"]["lr_scheduler"]["init_args"]["milestones"] == [3, 4, 5]
    assert following_keys(config()) == []
