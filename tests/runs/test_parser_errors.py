"""Complaints: one line that names the key, what is allowed, and the nearest right one."""

from pathlib import Path

import pytest
import torch
import yaml

from kd_lightning.runs.parser_errors import one_line


def change(config, path, value):
    *parents, last = path.split(".")
    for name in parents:
        config = config.setdefault(name, {})
    config[last] = value


MALICIOUS = "malicious.pt"
SOFT_LOSS = "model.init_args.soft_loss"


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("model.init_args.soft_wieght", 0.5, ["model.init_args.soft_wieght", "did you mean soft_weight?"]),
        ("model.init_args.student.init_args.widht", 4, ["student.init_args.widht", "did you mean width?"]),
        ("trainer.max_epoch", 4, ["trainer.max_epoch", "did you mean trainer.max_epochs?"]),
        ("modle", 3, ["modle", "did you mean model?"]),
        ("data.init_args.labled", 4, ["data.init_args.labled", "did you mean labeled?"]),
        ("model.class_path", "DistilModule", ["model.class_path", "did you mean DistillModule?"]),
        ("model.init_args.teacher.class_path", "torchvision.models.resnet81", ["teacher.class_path", "resnet18"]),
        ("model.init_args.soft_weight", 1.5, ["model.init_args.soft_weight must lie in [0, 1], got 1.5"]),
        ("model.init_args.soft_weight", "much", ["model.init_args.soft_weight", "float", "much"]),
        ("model.init_args.teacher.init_args.path", "nowhere.pt", ["no weights file at nowhere.pt"]),
        ("model.init_args.teacher.init_args.path", MALICIOUS, [MALICIOUS, "refused", "safetensors"]),
        ("model.init_args.teacher.init_args.model.init_args.width", 9, ["of another shape", "[8, 1, 3, 3]"]),
        ("model.init_args.student.init_args.num_classes", 7, ["same number of outputs", "[10]", "[7]"]),
        (
            SOFT_LOSS,
            {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": 0}},
            ["temperature"],
        ),
        ("model.init_args.optimizer.init_args.lr", -1.0, ["optimizer", "learning rate"]),
        ("data.init_args.labeled", 5000, ["labeled", "5000 per class asked", "class '0'"]),
        ("data.init_args.labeled", "gone/split.json", ["labeled", "gone/split.json"]),
        ("data.init_args.batch_size", 0, ["batch_size must be at least 1, got 0"]),
        ("data.init_args.unlabeled", "some", ["unlabeled", "rest", "some"]),
        ("ckpt_path", "gone.ckpt", ["ckpt_path", "gone.ckpt"]),
    ],
)
def test_bad_input(config, fails, path, value, parts):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("evil"),)

    torch.save({"state_dict": Evil()}, MALICIOUS)
    change(config, path, value)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    last = fails("fit", "--config", "config.yaml")
    for part in parts:
        assert part in last
    assert not Path("evil").exists()


INT = "Expected a <class 'int'>. Got value: x"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("two\n  lines\t here", "two lines here"),
        (f'Parser key "trainer.max_epochs":\n  {INT}', "trainer.max_epochs: Expected a int, got x"),
        ("width must be at least 1, got 0", "width must be at least 1, got 0"),
        ("Expected a dot import path string: Digit", "class_path: no class 'Digit'; did you mean Digits?"),
        ("Expected a dot import path string: Xyzzy", "class_path: no class 'Xyzzy'"),
        ("Option 'modle' is not accepted", "modle: no such key"),
        (
            "Problem with given class_path 'torch.optim.Adm': module 'torch.optim' has no attribute 'Adm'",
            "class_path: torch.optim has no 'Adm'; did you mean Adam?",
        ),
    ],
)
def test_without_a_config_file(message, expected):
    assert one_line(message) == expected


@pytest.mark.parametrize("args", [["--config", "c.yaml"], ["--config=c.yaml"], ["-c", "c.yaml"]])
def test_place_in_the_config_file(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("{callbacks: [{class_path: A}, {class_path: Xyzzy, init_args: {width: 0}}]}")
    assert one_line("Expected a dot import path string: Xyzzy", None, args).startswith("callbacks[1].class_path: no")
    assert one_line("width must be 1", None, args) == "callbacks[1].init_args.width must be 1"
    assert one_line("width must be 1", None, ["--config"]) == "width must be 1"  # whose file is missing
