"""Hyperparameters of modules of other projects: tensors are tensors in them, and checkpoints load in Python."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kd_lightning.__main__ import main
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.class_paths import with_tensors

COUNTS = torch.tensor([1, 2])


class Weighted(LightningModule):
    """A module of a project, whose weights and loss a config describes."""

    def __init__(
        self,
        weight: Tensor | None = None,
        counts: Tensor = COUNTS,
        loss: nn.Module | None = None,
        sizes: list[int] | None = None,
        more: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.net = DigitsCNN(4)
        self.given, self.loss = (weight, counts, sizes), loss

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y, weight=self.hparams.weight)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def project(monkeypatch):
    module = ModuleType("project")
    module.Weighted = Weighted
    monkeypatch.setattr(Weighted, "__module__", "project")
    monkeypatch.setitem(sys.modules, "project", module)


LOSS = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"weight": [2] * 10}}
ARGUMENTS = {"weight": [1] * 10, "counts": [3, 4], "loss": LOSS, "sizes": [5, 6], "more": {"a": [7], "b": 8}}


def test_a_checkpoint_loads_in_python(config):
    config |= {"model": {"class_path": "project.Weighted", "init_args": ARGUMENTS}, "checkpoint": {"monitor": None}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    run = Path("runs/tiny/version_0")
    module = Weighted.load_from_checkpoint(run / "checkpoints/last.ckpt")
    weight, counts, sizes = module.given
    assert weight.tolist() == [1.0] * 10
    assert (counts.tolist(), counts.dtype) == ([3, 4], torch.int64)
    assert sizes == [5, 6]
    assert module.loss.weight.tolist() == [2.0] * 10
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert saved["weight"] == [1] * 10
    assert saved["loss"]["init_args"]["weight"] == [2] * 10


def test_with_tensors():
    spec = {"class_path": "project.Weighted", "init_args": ARGUMENTS, "other": [{"class_path": "none.Such"}, 1]}
    found = with_tensors(spec)
    assert found["init_args"]["weight"].dtype == torch.float32
    assert found["init_args"]["loss"]["init_args"]["weight"].tolist() == [2.0] * 10
    assert {**found, "init_args": None} == {**spec, "init_args": None}
    assert found["init_args"]["sizes"] == [5, 6]
    assert {name: value.tolist() for name, value in found["init_args"]["more"].items()} == {"a": [7.0], "b": 8.0}
    assert ARGUMENTS["weight"] == [1] * 10
