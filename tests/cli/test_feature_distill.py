"""A backbone from the command line: fitted on pictures without labels, deployed, fine-tuned with few labels."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.io import write_png
from torchvision.models import resnet18

from kd_lightning import load_weights
from kd_lightning.__main__ import main

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
TIMM = {
    "class_path": "timm.create_model",
    "init_args": {"model_name": "test_resnet"},
    "dict_kwargs": {"num_classes": 0},
}


def write(folder, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        write_png(torch.randint(256, (3, 34, 36), generator=generator).to(torch.uint8), str(folder / f"{number}.png"))


def teach(student, **model):
    source = {"class_path": "ImageFolder", "init_args": {"unlabeled": "photos", "val": "val", "image_size": 32}}
    teacher = {**TIMM, "init_args": {"model_name": "test_efficientnet"}}
    return {
        "name": "backbone",
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, **QUIET},
        "model": {"class_path": "FeatureDistillModule", "init_args": {"student": student, "teachers": teacher} | model},
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source, "batch_size": 8}},
    }


def fit(config, name):
    Path(name).write_text(yaml.safe_dump(config))
    main(["fit", "--config", name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fitted backbone of timm."""
    root = tmp_path_factory.mktemp("backbone")
    write(root / "photos" / "deep", 24)
    for number, name in enumerate(("birds", "cats")):
        write(root / "val" / name, 12, number + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fit(teach(TIMM), "backbone.yaml")
    return root


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return Path("runs/backbone/version_0")


def test_the_best_checkpoint_is_that_of_the_least_loss(run):
    found = yaml.safe_load((run / "config.yaml").read_text())
    assert found["model"]["class_path"].endswith("FeatureDistillModule")
    with safe_open(run / "student.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["weights"].startswith("epoch=0")
    assert metadata["task"] == "features"
    assert "val/loss" in (run / "metrics.csv").read_text()


def test_timm_and_torchvision_load_it(run, folder, monkeypatch, tmp_path):
    import timm

    state = load_file(run / "student.safetensors")
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict(state)
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "val"):
        (tmp_path / name).symlink_to(folder / name)
    loss = {"class_path": "kd_lightning.losses.CosineLoss"}
    terms = {
        "global": {
            "class_path": "kd_lightning.FeatureTerm",
            "init_args": {"layers": {"avgpool": ""}, "pool": "mean", "loss": loss},
        }
    }
    fit(teach({"class_path": "torchvision.models.resnet18", "init_args": {"weights": None}}, features=terms), "tv.yaml")
    resnet18().load_state_dict(load_file("runs/backbone/version_0/student.safetensors"))


def test_predict_and_export_give_features(run, capsys):
    main(["predict", str(run), "photos", "--out", "features.csv"])
    with Path("features.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 24
    width = sum(name.startswith("value_") for name in rows[0])
    network = load_weights(_backbone(), run / "student.safetensors").eval()
    assert width == network(torch.zeros(1, 3, 32, 32)).shape[1]
    main(["export", str(run), "--out", "student.pt2"])
    output = capsys.readouterr().out
    assert "predictions agree" not in output
    assert "accuracy" not in output
    main(["predict", "student.pt2", "photos", "--out", "exported.csv"])
    with Path("exported.csv").open() as file:
        exported = [*csv.DictReader(file)]
    for one, other in zip(rows, exported, strict=True):
        assert float(one["value_0"]) == pytest.approx(float(other["value_0"]), abs=1e-3)


def _backbone():
    import timm

    return timm.create_model("test_resnet", num_classes=0)


def test_validate_compare_and_report(run, capsys):
    main(["validate", "--config", "backbone.yaml"])
    assert "knn_accuracy" in capsys.readouterr().out
    main(["report", str(run)])
    assert "warning" not in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_experiment_is_refused(run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["experiment", "backbone.yaml", "--seeds", "2"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "FeatureDistillModule has none: fit it, then name a config that trains its student.safetensors" in line


def test_it_learns_a_task_from_few_labels(run):
    """The next config of the README: its weights, a new classifier, which trains alone at first."""
    loaded = {"class_path": "kd_lightning.load_weights"}
    loaded["init_args"] = {"model": TIMM, "path": str(run / "student.safetensors")}
    student = {"class_path": "kd_lightning.reset_classifier", "init_args": {"network": loaded, "num_classes": 2}}
    config = teach(TIMM)
    config |= {"name": "finetuned", "model": {"class_path": "SupervisedModule", "init_args": {"student": student}}}
    finetuning = {"class_path": "LayerwiseFinetuning", "init_args": {"frozen_epochs": 1}}
    config["trainer"] |= {"callbacks": [finetuning], "limit_val_batches": 0}
    source = {"class_path": "ImageFolder", "init_args": {"train": "val", "image_size": 32}}
    config["data"]["init_args"] = {"source": source, "labeled": 4, "unlabeled": "none", "batch_size": 8}
    fit(config, "finetune.yaml")
    before = load_file(run / "student.safetensors")
    after = load_file("runs/finetuned/version_0/student.safetensors")
    assert {*after} - {*before} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("weight"))


def test_a_schedule_takes_the_length_of_the_run(run):
    config = teach(TIMM)
    config["model"]["init_args"]["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    config["name"] = "scheduled"
    fit(config, "scheduled.yaml")
    assert Path("runs/scheduled/version_0/student.safetensors").is_file()
