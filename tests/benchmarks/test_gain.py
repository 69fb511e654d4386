import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_lightning.runs.build import build

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gain():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "argv", ["gain.py"])
        yield importlib.import_module("gain")


def test_holm_multiplies_by_the_number_of_hypotheses_left(gain):
    assert gain.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, by hand
    assert gain.holm([0.9, 0.8]) == [1.0, 1.0] and gain.holm([]) == []


class Task:
    """The figure of a setting is known: the best is the second one; test parts are one point lower for each seed."""

    def fit(self, part, seed, way, setting):
        assert part.startswith("tuning") == (seed == 100)
        good = 10.0 * (setting == (0.003,) or setting == (0.01, 0.5, 4.0))
        return {"accuracy": 50 + good + 5 * (way == "tuned") - (0 if seed == 100 else seed)}


def test_settings_come_from_the_tries_of_the_same_split(gain, monkeypatch):
    monkeypatch.setattr(gain, "in_parallel", lambda function, cases, processes: [*map(function, cases)])
    groups = [([("split_0", 0), ("split_0", 1)], "tuning_0"), ([("split_1", 0), ("split_1", 1)], "tuning_1")]
    cells = {"task": (Task(), ("alone", "defaults", "tuned"), groups)}
    fits = gain.Fits()
    best, figures = gain.select(fits, cells, 1)
    assert best["task", "alone", "tuning_1"] == (0.003,) and best["task", "tuned", "tuning_0"] == (0.01, 0.5, 4.0)
    assert best["task", "defaults", "tuning_0"] == (0.003, 0.5, 4.0)
    assert figures["task", "alone", "tuning_0"][0.01,] == 50
    values = gain.measure(fits, cells, best, 1)
    assert values["task", "alone"] == [59.5, 59.5] and values["task", "tuned"] == [64.5, 64.5]
    assert values["task", "defaults"] == [49.5, 49.5]


def test_a_split_has_each_family_in_one_part(gain, tmp_path):
    rows = [f"{name}_{number}" for name in ("apple", "pear", "plum", "fig", "nut") for number in range(3)]
    stamps = importlib.import_module("gain_stamps")
    rows = [(f"stamps/food/{row}.png", "food", stamps.family(Path(row))) for row in rows]
    assert len({family for *_, family in rows}) == 5
    for split in range(stamps.SPLITS):
        test, val, train = stamps.split_families(rows, split)
        assert sorted(test | val | train) == [*range(15)] and len(test) == 6 and len(val) == 3
        families = [{rows[row][2] for row in part} for part in (test, val, train)]
        assert not families[0] & families[1] and not families[2] & (families[0] | families[1])


def test_each_teacher_has_a_config_that_is_built(gain, tmp_path):
    stamps = importlib.import_module("gain_stamps")
    for name in stamps.TEACHERS:
        config = stamps.teacher_config(tmp_path, name, "split_0")
        student = config["model"]["init_args"]["student"]["init_args"]["network"]["init_args"]
        network = build(nn.Module, student["model"])
        torch.save(network.state_dict(), student["path"])
        assert build(nn.Module, config["model"]["init_args"]["student"]).eval()(torch.zeros(1, 3, 64, 64)).shape == (
            1,
            6,
        )
