"""The baseline of a method: the same student and labels, without what teaches it."""

from copy import deepcopy

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

from kd_lightning import InputError
from kd_lightning.cli.baseline import _model_alone, baseline_of, describe_baseline, with_seed, without_teacher
from kd_lightning.runs.build import build


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


def test_baseline_of_simkd_is_the_network_inside(root):
    config = yaml.safe_load((root / "configs/simkd_digits.yaml").read_text())
    student = config["model"]["init_args"]["student"]
    alone = baseline_of(config)["model"]
    assert alone["class_path"] == "kd_lightning.SupervisedModule"
    assert alone["init_args"].keys() == {"student", "optimizer", "lr_scheduler"}
    assert alone["init_args"]["student"] == {"class_path": "DigitsCNN", "init_args": {"width": 8}}
    assert "the network in the SimKDStudent" in describe_baseline(config["model"])
    any_module = {"class_path": "kd_lightning.DistillModule", "init_args": {"student": student, "teacher": {}}}
    assert _model_alone(any_module)["init_args"]["student"] == student["init_args"]["student"]
    loaded = {"class_path": "kd_lightning.load_weights", "init_args": {"model": student, "path": "x.safetensors"}}
    with pytest.raises(InputError, match=r"^experiment trains the network in model\.student alone.*load_weights$"):
        _model_alone({"class_path": "kd_lightning.SimKDModule", "init_args": {"student": loaded, "teacher": {}}})


def test_baseline_of_two_heads_is_their_mean(root):
    pytest.importorskip("timm")
    config = yaml.safe_load((root / "configs/distillation_token_digits.yaml").read_text())
    alone = baseline_of(config)["model"]
    assert alone["class_path"] == "kd_lightning.SupervisedModule"
    assert alone["init_args"]["student"] == config["model"]["init_args"]["student"]
    assert "two heads" in describe_baseline(config["model"])
    network, x = build(torch.nn.Module, alone["init_args"]["student"]).train(), torch.randn(2, 1, 8, 8)
    assert network(x).shape == (2, 10)  # the mean, also in training mode
    assert describe_baseline({"class_path": "kd_lightning.DistillModule", "init_args": {"student": {}}}) is None


def test_baseline_has_every_argument_of_the_base():
    """All that SupervisedModule takes: else the baseline of a dense student, or of another weight decay, differs."""
    shared = {"class_dim": 1, "causal": False, "auxiliary_weight": 0.0, "weight_decay_exclude_1d": True}
    shared |= {"task": "regression", "num_classes": 3, "lr_interval": "step"}
    method = {"class_path": "kd_lightning.DistillModule", "init_args": shared | {"student": {}, "teacher": {}}}
    assert _model_alone(method)["init_args"] == shared | {"student": {}}


def test_without_data_it_differs_in_the_length_of_its_epoch_alone(root):
    config = yaml.safe_load((root / "configs/fixmatch_digits.yaml").read_text())
    baseline, alone = baseline_of(config), without_teacher(config)
    assert alone["data"]["init_args"].pop("views_per_epoch", 1) < baseline["data"]["init_args"].pop("views_per_epoch")
    assert baseline["trainer"].pop("limit_train_batches") and "limit_train_batches" not in alone["trainer"]
    assert baseline == alone


def test_experiment_of_another_datamodule_names_what_it_needs():
    with pytest.raises(InputError, match=r"experiment needs data: SemiSupervisedDataModule, got StreamDataModule; "):
        with_seed({"data": {"class_path": "StreamDataModule"}}, 0)
