"""The cost of features: all contenders train, and each ratio becomes a row."""

import importlib

import pytest

from kd_lightning.models import CifarResNet


@pytest.fixture
def speed(root, monkeypatch):
    """The script, with tiny networks."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    speed = importlib.import_module("feature_speed")
    for name in ("resnet8", "resnet32"):
        monkeypatch.setattr(speed, name, lambda classes: CifarResNet(8, (2, 2, 4, 64), classes))
    return speed


def test_each_ratio_is_a_row(speed):
    rows = []

    class Table:
        def add(self, name, of, over, most, unit):
            rows.append((name, len(of), len(over), most))

    speed.measure(Table(), rounds=2, size=64)
    assert rows == [(f"{of} / {over}", 2, 2, most) for of, over, most in speed.RATIOS]
