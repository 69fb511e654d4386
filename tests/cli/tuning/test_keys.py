"""Dotted keys: found, read and set, through class paths and lists."""

from copy import deepcopy

import pytest

from kd_lightning.cli.tuning.keys import find_key, set_value, short_name, value_at
from kd_lightning.errors import InputError

CROP = {"class_path": "v2.RandomResizedCrop", "init_args": {"size": 8, "scale": [0.3, 1.0]}}
CONFIG = {
    "trainer": {"max_epochs": 4},
    "model": {"class_path": "M", "init_args": {"soft_weight": 0.5, "optimizer": {"class_path": "SGD"}}},
    "data": {"class_path": "D", "init_args": {"train_transform": {"class_path": "C", "init_args": {"parts": [CROP]}}}},
}
SCALE = "data.init_args.train_transform.init_args.parts[0].init_args.scale[0]"


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("trainer.max_epochs", "trainer.max_epochs", 4),
        ("model.soft_weight", "model.init_args.soft_weight", 0.5),
        ("model.init_args.soft_weight", "model.init_args.soft_weight", 0.5),
        ("model.optimizer.lr", "model.init_args.optimizer.init_args.lr", None),  # not there yet
        ("data.train_transform.parts[0].scale[0]", SCALE, 0.3),
        (SCALE, SCALE, 0.3),
        ("model.class_path", "model.class_path", "M"),
    ],
)
def test_found_and_set(key, path, value):
    assert find_key(CONFIG, key) == path
    assert value_at(CONFIG, path) == value
    changed = deepcopy(CONFIG)
    set_value(changed, path, 7)
    assert value_at(changed, path) == 7 and changed != CONFIG
    set_value(changed, path, value)
    assert value is None or changed == CONFIG


@pytest.mark.parametrize(
    "key",
    ["model.init_args.soft_weight.x", "modle.soft_weight", "data.train_transform.parts[1].scale", "a..b", "", "a["],
)
def test_no_such_key(key):
    with pytest.raises(InputError, match=r"no such key|must be names with dots"):
        find_key(CONFIG, key)


def test_a_similar_key_is_named():
    with pytest.raises(InputError, match=r"model.optimiser.lr: no such key; did you mean model."):
        find_key(CONFIG, "model.optimiser.lr")


def test_short_names():
    assert short_name(SCALE) == "scale[0]"
    assert short_name("name") == "name"
