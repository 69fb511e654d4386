"""The table of losses: every one of them can be built, and trains from few labels."""

import importlib

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def terms(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        yield importlib.import_module("terms")


class Images:
    """60 noisy images of each class for training, and 20 for the rest, in place of Fashion-MNIST."""

    def __init__(self, folder, train):
        count = 600 if train else 200
        generator = torch.Generator().manual_seed(int(train))
        self.targets = torch.arange(count) % 10
        self.data = torch.randint(0, 100, (count, 28, 28), dtype=torch.uint8, generator=generator)
        for number, y in enumerate(self.targets):
            self.data[number, 2 * y : 2 * y + 4, 4:24] += 150


@pytest.fixture
def fitted(terms, tmp_path, monkeypatch):
    fashion = importlib.import_module("fashion")
    monkeypatch.setattr(fashion, "FashionMNIST", Images)
    monkeypatch.setattr(fashion, "VAL", 200)
    for name, value in {"STEPS": 2, "POOL": 200, "LABELS": 4}.items():
        monkeypatch.setattr(terms, name, value)
    torch.save(terms.TEACHER().state_dict(), tmp_path / "teacher.pt")
    return lambda method, part="test": terms.Fit(tmp_path, tmp_path / "cache", part, 0)(method, *terms.tries(method)[0])


def test_every_method_has_six_tries_and_a_loss(terms):
    for method in terms.METHODS:
        tries = terms.tries(method)
        assert len(tries) == len({*tries}) == 6
        if method not in ("alone", "SimKD"):
            options = terms.terms(method, tries[0][1])
            assert isinstance(options["soft_loss"], nn.Module)
            assert ("features" in options) == (method in terms.FEATURES)
            assert terms.terms(method, tries[0][1])["soft_loss"] is not options["soft_loss"]  # no fit shares a state


@pytest.mark.parametrize("method", ["alone", "RKD", "ReviewKD", "SimKD"])
def test_a_method_trains(fitted, method):
    figures = fitted(method)
    assert {*figures} == {"accuracy", "balanced"} and 0 <= figures["accuracy"] <= 100
    assert fitted(method) == figures  # a seed decides all


def test_images_of_one_seed_are_the_same_for_all_methods(terms, fitted, tmp_path):
    first, again, other = (terms.Fit(tmp_path, None, "test", seed).rows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({*first.tolist()}) == 200


def test_each_setting_is_one_of_the_tries(terms):
    assert terms.SETTINGS.keys() == {*terms.METHODS}
    assert all(setting in terms.tries(method) for method, setting in terms.SETTINGS.items())


def test_the_best_try_is_bold(terms, monkeypatch, capsys):
    accuracy = {("val", 100, "KD", 0.03, 0.9): 81.0, ("val", 100, "alone", 0.1, None): 82.0}
    monkeypatch.setattr(
        terms, "in_parallel", lambda function, cases, processes: [{"accuracy": accuracy.get(c, 10.0)} for c in cases]
    )
    terms.select(None, ["alone", "KD"], 1)
    out = capsys.readouterr().out
    assert "; 0.03, 0.5: 10.00; **0.03, 0.9: 81.00**; 0.03, 1: 10.00 |" in out
    assert "| alone | 0.001: 10.00; " in out and "; **0.1: 82.00** |" in out
    assert out.count("**") == 4


def test_the_table_compares_with_kd(terms, monkeypatch, capsys):
    """The settings are those that were selected, and each seed is compared with itself."""
    own = {"KD": 90, "DKD": 91}

    def measured(function, cases, processes):
        assert all(part == "test" and setting == [*terms.SETTINGS[name]] for part, _, name, *setting in cases)
        return [{"accuracy": own[name] + seed**2 * 0.1} for _, seed, name, *_ in cases]

    monkeypatch.setattr(terms, "in_parallel", measured)
    terms.compare(None, ["KD", "DKD"], 3, 1)
    out = capsys.readouterr().out
    assert "| KD | 0.03, 1 | 90.17 ± 0.21 |  |" in out
    assert "| DKD | 0.03, 1 | 91.17 ± 0.21 | +1.00 [+1.00, +1.00] |" in out
