"""Finished fits on disk, and a training that depends on its seed alone."""

import json

import pytest
import torch
from scipy import stats

from kd_lightning import SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data import Digits
from kd_lightning.models import DigitsCNN


@pytest.fixture
def training(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import training

    return training


def test_a_figure_is_read_from_the_file_only_under_the_same_settings_sources_and_versions(
    training, tmp_path, monkeypatch
):
    store, fits = tmp_path / "fits.jsonl", []

    def get(settings):
        def fit():
            fits.append(settings)
            return {"accuracy": [0.1 + 0.2, float(len(fits))]}

        return training.Fits(store).get(settings, fit)

    first = get([0, "alone", {"lr": 0.1}])
    assert get([0, "alone", {"lr": 0.1}]) == first == {"accuracy": [0.1 + 0.2, 1.0]}
    assert len(fits) == 1
    assert get([0, "alone", {"lr": 0.2}]) != first
    assert get([1, "alone", {"lr": 0.1}]) != first
    assert len(fits) == 3
    with monkeypatch.context() as other:
        other.setattr(training, "code_hash", lambda files: "other")
        assert get([0, "alone", {"lr": 0.1}])["accuracy"][1] == 4
    with monkeypatch.context() as other:
        other.setattr(training, "version", lambda name: "0.0")
        assert get([0, "alone", {"lr": 0.1}])["accuracy"][1] == 5
    assert get([0, "alone", {"lr": 0.1}]) == first
    assert len(store.read_text().splitlines()) == len(fits) == 5


def test_a_failed_fit_is_not_stored(training, tmp_path):
    fits = training.Fits(tmp_path / "fits.jsonl")
    with pytest.raises(ZeroDivisionError):
        fits.get([0], lambda: 1 / 0)
    assert fits.get([0], lambda: 2) == 2
    assert [json.loads(line)["figures"] for line in (tmp_path / "fits.jsonl").read_text().splitlines()] == [2]


def test_the_sources_are_those_of_the_package_and_of_what_is_imported(training, monkeypatch):
    found = []
    monkeypatch.setattr(training, "code_hash", lambda files: found.extend(files))
    monkeypatch.setattr(training.sys, "argv", ["benchmarks/hints.py"])
    training.Fits()
    names = {file.name for file in found}
    assert {"hints.py", "training.py", "measuring.py"} <= names
    assert "kills.py" not in names


def test_a_training_does_not_depend_on_what_was_drawn_before(training):
    def weights(before):
        torch.manual_seed(before)
        data = SemiSupervisedDataModule(Digits(), labeled=10, batch_size=64, seed=0)
        return training.train(2, 7, lambda: DigitsCNN(4), SupervisedModule, data).student.state_dict()

    first, second = weights(1), weights(2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interval_is_that_of_a_paired_t_test_and_is_corrected_for_the_number_of_comparisons(training):
    values, others = [3.0, 5.0, 4.0, 7.0], [1.0, 4.5, 3.0, 3.0]
    test = stats.ttest_rel(values, others)
    for comparisons, level in ((1, 0.95), (10, 0.995)):
        low, high = test.confidence_interval(level)
        assert training.difference(values, others, comparisons) == pytest.approx((1.875, low, high))
