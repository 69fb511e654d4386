"""experiment and compare."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from scipy.stats import ttest_1samp

from kd_lightning.__main__ import main
from kd_lightning.commands.compare import Group, Run, choose_stage, paired_difference
from kd_lightning.commands.experiment import _teacher_runs
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN


@pytest.fixture(scope="module")
def experiment(root, tmp_path_factory):
    """A quick experiment of two seeds in a folder of its own; where its config and its runs lie."""
    folder = tmp_path_factory.mktemp("experiment")
    config = yaml.safe_load((root / "configs/distill_digits.yaml").read_text())
    config["trainer"] |= {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    config["trainer"]["callbacks"] = [
        {"class_path": "kd_lightning.SoftWeightAnnealing", "init_args": {"start": 0.9, "end": 0.5}}
    ]
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = str(folder / "teacher.pt")
    torch.manual_seed(0)
    torch.save(DigitsCNN(32).state_dict(), folder / "teacher.pt")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["experiment", str(path), "--seeds", "2"])
    return path, folder / "runs"


def test_twin_has_the_same_steps_and_labels(experiment):
    _, runs = experiment
    for version in ("version_0", "version_1"):
        method, twin = runs / "distill_digits" / version, runs / "distill_digits_alone" / version
        splits = [json.loads((run / "split.json").read_text()) for run in (method, twin)]
        assert splits[0] == splits[1]
        assert len(splits[0]["labeled"]) == 100
        checkpoints = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (method, twin)]
        assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 2 * 17
        configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (method, twin)]
        for key in ("student", "optimizer", "lr_scheduler", "hard_loss"):
            assert configs[0]["model"]["init_args"][key] == configs[1]["model"]["init_args"][key]
        assert configs[0]["seed_everything"] == configs[1]["seed_everything"] == int(version[-1])


def test_report(experiment):
    _, runs = experiment
    out = runs / "distill_digits_comparison"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    alone, taught = json.loads((out / "comparison.json").read_text())
    assert [alone["name"], taught["name"]] == ["distill_digits_alone", "distill_digits"]
    assert alone["parameters"] == sum(p.numel() for p in DigitsCNN(8).parameters())
    # written out: a 3x3 convolution costs 9 * inputs * outputs for each of its pixels
    macs = 9 * 8 * 64 + 9 * 8 * 16 * 64 + 9 * 16 * 32 * 16 + 32 * 10
    assert alone["macs"] == taught["macs"] == macs
    assert 0 < taught["latency_ms"] < 100
    differences = [b["accuracy"] - a["accuracy"] for a, b in zip(alone["runs"], taught["runs"], strict=True)]
    assert taught["difference"]["mean"] == pytest.approx(statistics.mean(differences))
    table = (out / "comparison.md").read_text()
    mean = 100 * statistics.mean(run["accuracy"] for run in taught["runs"])
    assert f"{mean:.2f} ± " in table
    assert all(run["stage"] == "test" for run in taught["runs"])
    assert "agreement" in taught["runs"][0]


def test_again_is_quick_and_trains_nothing(experiment, capsys):
    path, runs = experiment
    before = sorted(runs.rglob("*.ckpt"))
    main(["experiment", str(path), "--seeds", "2"])
    assert capsys.readouterr().out.count("is done") == 4
    assert sorted(runs.rglob("*.ckpt")) == before


def test_runs_of_several_teachers_are_found(tmp_path):
    """Each once, bare or in a Teacher; not where nothing was tested."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").touch()

    def load(name):
        return {"class_path": "kd_lightning.load_weights", "init_args": {"path": str(tmp_path / name / "student.pt")}}

    wrapped = {"class_path": "kd_lightning.Teacher", "init_args": {"network": load("two")}}
    plain = {"class_path": "torchvision.models.resnet18"}
    teachers = [load("one"), wrapped, load("one"), load("three"), plain]
    assert _teacher_runs({"model": {"init_args": {"teachers": teachers}}}) == [tmp_path / "one", tmp_path / "two"]
    assert _teacher_runs({"model": {"init_args": {"teacher": wrapped}}}) == [tmp_path / "two"]
    assert _teacher_runs({"model": {"init_args": {}}}) == []


def test_compare_needs_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path} is no finished run" in capsys.readouterr().err


def test_test_and_validation_are_never_compared():
    tested = Run(Path("a"), "a", 0, {"test": {"accuracy": 0.5}, "val": {"accuracy": 0.6}}, [])
    fitted = Run(Path("b"), "b", 0, {"val": {"accuracy": 0.7}}, [])
    choose_stage([tested])
    assert tested.figures["accuracy"] == 0.5
    choose_stage([tested, fitted])
    assert (tested.figures["accuracy"], fitted.figures["accuracy"]) == (0.6, 0.7)
    del tested.stages["val"]
    with pytest.raises(InputError, match="b has no test accuracy; run test on it first"):
        choose_stage([tested, fitted])


def test_runs_of_one_seed_are_one_observation():
    base, other = group("a", {0: 0.90, 1: 0.80}), group("b", {0: 0.95, 1: 0.83})
    once = paired_difference(other, base)
    other.runs += group("b", {0: 0.95}).runs
    assert paired_difference(other, base) == pytest.approx(once)
    assert paired_difference(other, group("a", {0: 0.9})) is None


def group(name, accuracies):
    runs = [Run(Path(), name, seed, {"test": {"accuracy": value}}, []) for seed, value in accuracies.items()]
    return Group(name, runs)


def test_paired_difference_agrees_with_scipy():
    base = group("a", {0: 0.90, 1: 0.80, 2: 0.85, 7: 0.1})
    other = group("b", {2: 0.95, 1: 0.83, 0: 0.94, 8: 0.9})  # another order; seeds 7 and 8 have no pair
    mean, half, pairs = paired_difference(other, base)
    expected = ttest_1samp([0.04, 0.03, 0.10], 0).confidence_interval(0.95)
    assert pairs == 3
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


def test_one_pair_has_no_interval():
    assert paired_difference(group("a", {0: 0.5}), group("b", {0: 0.4})) is None
