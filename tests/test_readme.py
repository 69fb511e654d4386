"""The README's examples, as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from kd_lightning.__main__ import main
from kd_lightning.batch import LabelKind
from kd_lightning.quantization.calibration import is_calibrated


def blocks(root, language):
    text = (root / "README.md").read_text()
    return re.findall(rf"<!-- run by tests/test_readme.py -->\n```{language}\n(.*?)```", text, re.S)


@pytest.mark.slow
def test_yaml(root, photos):
    teacher = {f"net.{key}": tensor for key, tensor in resnet18(num_classes=3).state_dict().items()}
    torch.save({"state_dict": teacher}, "teacher.ckpt")
    (text,) = blocks(root, "yaml")
    Path("photos.yaml").write_text(text)
    quick = ["--config", "photos.yaml", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    main(["fit", *quick])
    main(["test", *quick])
    assert Path("runs/photos/version_0/student.safetensors").is_file()


@pytest.mark.slow
def test_python(root, photos):
    one_line, first, hints, terms, backbone, several, quantised, few, weak = blocks(root, "python")
    exec(compile(one_line, "README.md", "exec"), {})
    exec(compile(first, "README.md", "exec"), {})
    assert Path("student.pt").is_file()
    names = {}
    exec(compile(hints, "README.md", "exec"), names)
    assert names["module"].distilling
    exec(compile(terms, "README.md", "exec"), names)
    assert names["module"].features.is_built
    exec(compile(backbone, "README.md", "exec"), names)
    assert names["backbone"].fc.out_features == 3
    exec(compile(several, "README.md", "exec"), names)
    assert len(names["module"].ensemble) == 3
    exec(compile(quantised, "README.md", "exec"), names)
    assert is_calibrated(names["small"])
    exec(compile(few, "README.md", "exec"), names)
    assert len(names["trainer"].callbacks[0].table.label) == 18
    exec(compile(weak, "README.md", "exec"), names)
    kinds = next(iter(names["data"].train_dataloader())).kind.unique().tolist()
    assert kinds == [LabelKind.MISSING, LabelKind.COARSE, LabelKind.NOISY]
