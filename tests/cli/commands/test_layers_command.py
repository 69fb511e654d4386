"""``layers``: the table, and what it needs."""

from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from lightning.pytorch import LightningDataModule

from kd_lightning import SupervisedModule
from kd_lightning.__main__ import main
from kd_lightning.cli.commands.layers import LayersCLI
from kd_lightning.features.layers import list_layers
from kd_lightning.models import DigitsCNN


def test_both_networks_side_by_side(config, capsys):
    config["model"]["init_args"]["student"]["init_args"] = {"width": 4}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["layers", "--config", "config.yaml"])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    assert len(rows) == 14
    assert rows[0] == ["0 (Conv2d)", "4 x 8 x 8", "2,304", "36", "0 (Conv2d)", "8 x 8 x 8", "4,608", "72"]
    assert rows[-1] == ["13 (Linear)", "10", "160", "170", "13 (Linear)", "10", "320", "330"]
    assert not Path("runs").exists()


def test_student_alone(config, capsys):
    del config["model"]["init_args"]["teacher"], config["model"]["init_args"]["soft_weight"]
    config["model"]["class_path"] = "SupervisedModule"
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["layers", "--config", "config.yaml"])
    out = capsys.readouterr().out
    assert "student's layer" in out and "teacher" not in out


def test_teacher_behind_preprocessing(config, capsys):
    """Its layers are those of the network, on inputs as it takes them."""
    network = config["model"]["init_args"]["teacher"]
    preprocess = {"class_path": "torch.nn.Upsample", "init_args": {"scale_factor": 2.0}}
    config["model"]["init_args"]["teacher"] = {
        "class_path": "Teacher",
        "init_args": {"network": network, "preprocess": preprocess},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["layers", "--config", "config.yaml"])
    assert "8 x 16 x 16" in capsys.readouterr().out


def test_a_mapping_and_a_module_that_calls_its_student_in_another_way():
    class Own(SupervisedModule):
        def call(self, network, x):
            return network(x["image"] * x["scale"].view(-1, 1, 1, 1))

    batch = {"image": torch.zeros(4, 1, 8, 8), "scale": torch.ones(4), "label": torch.arange(4)}
    data = LightningDataModule()
    data.train_dataloader = lambda: [batch]
    found = SimpleNamespace()
    LayersCLI.fit(found, Own(DigitsCNN(4)), data)
    assert found.networks == {"student": list_layers(DigitsCNN(4), batch["image"])}


def test_hooks_of_the_module_change_its_inputs():
    class Hooked(SupervisedModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return torch.zeros(4, 1, 8, 8), batch

    data = LightningDataModule()
    data.train_dataloader = lambda: [torch.arange(4)]
    found = SimpleNamespace()
    LayersCLI.fit(found, Hooked(DigitsCNN(4)), data)
    assert found.networks == {"student": list_layers(DigitsCNN(4), torch.zeros(4, 1, 8, 8))}
