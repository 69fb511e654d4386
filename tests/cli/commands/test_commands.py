"""experiment and compare."""

import json
import statistics
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors.torch import save_file
from scipy.stats import ttest_1samp

from kd_lightning.__main__ import main
from kd_lightning.cli.commands.compare import Group, Run, build_student, figure, paired_difference, report, select_stage
from kd_lightning.cli.commands.experiment import _teacher_runs, baseline_of
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import calibrate
from kd_lightning.quantization.layers import quantize
from kd_lightning.runs.build import build


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


def test_baseline_has_the_same_steps_and_labels(experiment):
    _, runs = experiment
    for version in ("version_0", "version_1"):
        method, baseline = runs / "distill_digits" / version, runs / "distill_digits_alone" / version
        splits = [json.loads((run / "split.json").read_text()) for run in (method, baseline)]
        assert splits[0] == splits[1]
        assert len(splits[0]["labeled"]) == 100
        checkpoints = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (method, baseline)]
        assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"] == 2 * 17
        configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (method, baseline)]
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
    # 4 bytes for each parameter and for BatchNorm's statistics; not the file, which has a header, too
    assert alone["size_kb"] == 4 * (alone["parameters"] + 2 * (8 + 16 + 32)) / 1000
    assert alone["precision"] == "fp32" and "coded_kb" not in alone
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


@pytest.fixture(scope="module")
def precisions(tmp_path_factory):
    """Finished runs of one architecture at three precisions, whose students started from a file that is gone."""
    folder = tmp_path_factory.mktemp("precisions")
    network = {"class_path": "kd_lightning.models.DigitsCNN", "init_args": {"width": 8}}
    start = {"class_path": "kd_lightning.load_weights", "init_args": {"model": network, "path": "gone.pt"}}
    torch.manual_seed(0)
    plain = DigitsCNN(8)
    for name, bits in {"plain": None, "four": 4, "one_with_a_name_that_is_long_by_far": "ternary"}.items():
        run = folder / name / "version_0"
        run.mkdir(parents=True)
        student, network = start, plain
        if bits is not None:
            arguments = {"model": start, "weight_bits": bits}
            student = {"class_path": "kd_lightning.quantization.quantize", "init_args": arguments}
            network = calibrate(quantize(plain, bits), [torch.randn(8, 1, 8, 8)])
        model = {"class_path": "DistillModule", "init_args": {"student": student}}
        (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "model": model}))
        (run / "metrics.csv").write_text("step,test/accuracy\n1,0.5\n")
        save_file(network.state_dict(), run / "student.safetensors", {"input_shape": "[1, 8, 8]"})
    return [folder / name for name in ("plain", "four", "one_with_a_name_that_is_long_by_far")]


def test_precisions(precisions, tmp_path, capsys):
    """What is compared is what the weights take as they are, and never the latency of simulated rounding."""
    groups = report(precisions, tmp_path)
    plain, four, ternary = json.loads((tmp_path / "comparison.json").read_text())
    assert [entry["precision"] for entry in (plain, four, ternary)] == ["fp32", "8A-4W", "8A-ternary"]
    assert plain["macs"] == four["macs"] == ternary["macs"]
    weights = 9 * 8 * 16 + 9 * 16 * 32
    rest = 4 * (9 * 8 + 4 * (8 + 16 + 32) + 32 * 10 + 10)
    scales = 4 * (16 + 32 + 2)  # two ranges of activations
    assert plain["size_kb"] == pytest.approx((4 * weights + rest) / 1000)
    assert four["size_kb"] == pytest.approx((weights / 2 + scales + rest) / 1000)
    assert ternary["size_kb"] == pytest.approx((weights / 4 + scales + rest) / 1000)
    assert (scales + rest) / 1000 < ternary["coded_kb"] < ternary["size_kb"]
    assert four["coded_kb"] < four["size_kb"]
    assert "latency_ms" in plain and "latency_ms" not in four and "latency_ms" not in ternary
    text = (tmp_path / "comparison.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:5]]
    four_row = dict(zip(cells[0], cells[3], strict=True))
    assert (four_row["precision"], four_row["latency ms"]) == ("8A-4W", "-")
    assert four_row["size KB"] == f"{four['size_kb']:.1f}"
    assert f"four {four['coded_kb']:.1f} KB" in text
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 150
    assert figure(groups).axes[0].get_xlabel() == "KB of weights"


def test_one_precision_is_plotted_over_macs(precisions, capsys):
    groups = report(precisions[1:2], None)
    assert figure(groups).axes[0].get_xlabel() == "MACs for one image"
    assert "four" in capsys.readouterr().out


def test_student_is_built_without_the_weights_it_started_from():
    loaded = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    for name in ("kd_lightning.load_weights", "kd_lightning.runs.load_weights"):
        loaded = {"class_path": name, "init_args": {"model": loaded, "path": "gone.pt", "prefix": None}}
    assert build_student(loaded)[0].out_channels == 4
    with pytest.raises(InputError):
        build_student({"class_path": "DigitsCNN", "init_args": {"wide": 4}})


def test_compare_needs_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path} is no finished run" in capsys.readouterr().err


def test_test_and_validation_are_never_compared():
    tested = Run(Path("a"), "a", 0, {"test": {"accuracy": 0.5}, "val": {"accuracy": 0.6}}, [])
    fitted = Run(Path("b"), "b", 0, {"val": {"accuracy": 0.7}}, [])
    select_stage([tested])
    assert tested.figures["accuracy"] == 0.5
    select_stage([tested, fitted])
    assert (tested.figures["accuracy"], fitted.figures["accuracy"]) == (0.6, 0.7)
    del tested.stages["val"]
    with pytest.raises(InputError, match="b has no test accuracy; run test on it first"):
        select_stage([tested, fitted])


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


def test_baseline_of_fine_tuning_starts_from_the_same_weights(root):
    config = yaml.safe_load((root / "configs/apprentice_digits_finetune.yaml").read_text())
    arguments = config["model"]["init_args"]
    baseline = baseline_of(config)["model"]
    assert baseline["class_path"] == "kd_lightning.SupervisedModule"
    start = {"model": arguments["student"], "path": arguments["initial_weights"]}
    assert baseline["init_args"]["student"] == {"class_path": "kd_lightning.load_weights", "init_args": start}
    assert baseline["init_args"].keys() == {"student", "optimizer", "lr_scheduler"}


@pytest.mark.parametrize("name", ["fixmatch_digits", "pseudo_label_digits", "refresh_digits", "transductive_digits"])
def test_baseline_of_self_training_has_the_labels_alone(root, name):
    config = yaml.safe_load((root / "configs" / f"{name}.yaml").read_text())
    before = deepcopy(config)
    baseline = baseline_of(config)
    assert config == before
    assert baseline["model"]["class_path"] == "kd_lightning.SupervisedModule"
    assert baseline["model"]["init_args"].keys() == {"student", "optimizer", "lr_scheduler"}
    assert baseline["trainer"]["callbacks"] == []
    arguments = baseline["data"]["init_args"]
    pool = 600 if name == "transductive_digits" else 1038
    steps = -(-pool // 64)
    assert baseline["trainer"]["limit_train_batches"] == steps
    assert 40 * arguments["views_per_epoch"] >= steps * arguments["batch_size"] == steps * 96
    alone = build(LightningDataModule, baseline["data"])
    assert alone.unlabeled_indices() == []
    assert len(alone.train_dataloader()) >= steps
    method = build(LightningDataModule, config["data"])
    assert len(method.train_dataloader()) == steps
    assert method.split.labeled == alone.split.labeled
