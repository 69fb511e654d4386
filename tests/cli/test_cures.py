"""The lines of a cure are a second config: with them, a config has what they name, and all else stays."""

from types import SimpleNamespace

import pytest
import yaml

from kd_lightning import DistillModule, ImageFolder
from kd_lightning.cli.parse import parse_config
from kd_lightning.data.transforms import photo_transforms
from kd_lightning.report.cures import with_cure
from kd_lightning.report.selection_check import selection
from kd_lightning.teachers.findings import Finding

CONFIG = """
name: student
trainer: {max_epochs: 15}
model:
  class_path: DistillModule
  init_args:
    student: {class_path: kd_lightning.models.CifarResNet, init_args: {depth: 8, num_classes: 6}}
    teacher: {class_path: torchvision.models.mobilenet_v2, dict_kwargs: {num_classes: 6}}
    soft_weight: 0.9
    soft_loss: {class_path: kd_lightning.losses.KDLoss, init_args: {temperature: 4.0}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 15, eta_min: 0.0001}}
data:
  class_path: SemiSupervisedDataModule
  init_args:
    source: {class_path: ImageFolder, init_args: {train: train, test: test, image_size: 16}}
    batch_size: 32
"""


def flat(node, path=""):
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, one in node.items() for key, value in flat(one, f"{path}.{name}").items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.yaml").write_text(CONFIG)
    return tmp_path


REASONS = ("wrong", "views", "one-hot", "gap", "balance", "few", "memory", "selection")


def cure(reason, student, teacher):
    if reason == "selection":
        return selection(20, "val/accuracy", [])
    data = SimpleNamespace(train_transform=photo_transforms(16)[0], unlabeled="rest", split=None)
    data.source = object.__new__(ImageFolder)
    module = DistillModule(student, teacher)
    return with_cure(Finding("x", "text", "hint", reason=reason), module, data, yaml.safe_load(CONFIG))


def test_lines_alone(folder, student, teacher):
    args = ["--config", "student.yaml"]
    before = flat(parse_config(args, "fit"))
    together = []
    for reason in REASONS:
        found = cure(reason, student, teacher)
        (folder / f"{reason}.yaml").write_text(found.lines)
        after = flat(parse_config([*args, "--config", f"{reason}.yaml"], "fit"))
        together += [] if reason in ("wrong", "one-hot") else ["--config", f"{reason}.yaml"]
        named = flat(yaml.safe_load(found.lines))
        named = {key: value for key, value in named.items() if not key.endswith("class_path")}
        assert named.items() <= after.items(), reason
        replaced = (".model.init_args.teacher.", ".data.init_args.train_transform", ".model.init_args.soft_loss.")
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert {key for key in changed if not key.startswith(replaced)} <= named.keys(), reason
    assert flat(parse_config([*args, *together], "fit"))[".trainer.max_epochs"] == 30
