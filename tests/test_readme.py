"""The README's two examples, as they stand there."""

import re
from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.models import resnet18

from kd_lightning.__main__ import main


def block(root, language):
    found = re.findall(
        rf"<!-- run by tests/test_readme.py -->\n```{language}\n(.*?)```", (root / "README.md").read_text(), re.S
    )
    assert len(found) == 1
    return found[0]


def test_yaml(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for number in range(18):
            image = Path("photos", part, f"class{number % 3}", f"{number}.png")
            image.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(256, (3, 70, 80), dtype=torch.uint8), str(image))
    teacher = {f"net.{key}": tensor for key, tensor in resnet18(num_classes=3).state_dict().items()}
    torch.save({"state_dict": teacher}, "teacher.ckpt")
    Path("photos.yaml").write_text(block(root, "yaml"))
    main(["fit", "--config", "photos.yaml", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    main(["test", "--config", "photos.yaml", "--ckpt_path", "last"])
    assert Path("runs/photos/version_0/student.safetensors").is_file()


def test_python(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block(root, "python"), "README.md", "exec"), {})
    assert Path("student.pt").is_file()
