"""docs/predict_onnx.py: its inputs against torchvision's, and its predictions in an environment of three packages."""

import importlib.util
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kd_lightning.data.preprocessing import describe_preprocessing
from kd_lightning.data.sources.image_loader import load_image
from kd_lightning.data.transforms import (
    CenterCrop,
    Compose,
    Resize,
    photo_transforms,
    segmentation_transforms,
    small_image_transforms,
    to_float,
)
from kd_lightning.deploy.export import export_student
from kd_lightning.models.cifar_resnet import resnet8

TRANSFORMS = {
    "photos": (photo_transforms(64)[1], (3, 64, 64)),
    "wide photos": (photo_transforms((48, 64))[1], (3, 48, 64)),
    "stretched": (segmentation_transforms((40, 30))[1], (3, 40, 30)),
    "padded": (Compose([Resize(20), CenterCrop(33), to_float()]), (3, 33, 33)),
    "grey": (small_image_transforms([0.2860], [0.3530], 60, flip=False)[1], (1, 60, 60)),
    "bicubic by Pillow": (
        v2.Compose([v2.Resize(50, v2.InterpolationMode.BICUBIC), v2.CenterCrop(48), v2.ToImage(), to_float()]),
        (3, 48, 48),
    ),
}


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("predict_onnx", root / "docs/predict_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_pictures(folder, sizes=((200, 150), (47, 61), (300, 64), (64, 301), (65, 65))):
    """Photos of coarse and fine colours, of several kinds of file."""
    random, paths = np.random.default_rng(0), []
    for number, (height, width) in enumerate(sizes):
        coarse = random.integers(0, 256, (height // 11 + 1, width // 11 + 1, 4)).repeat(11, 0).repeat(11, 1)
        pixels = coarse[:height, :width] * 3 // 4 + random.integers(0, 64, (height, width, 4))
        mode = ["RGBA", "RGB", "L", "P", "RGB"][number]
        image = Image.fromarray(pixels.astype(np.uint8), "RGBA").convert("RGBA" if mode == "RGBA" else "RGB")
        exif = image.getexif()
        exif[0x0112] = 6 if number == 4 else 1  # turned
        image = image.convert(mode)
        paths.append(folder / f"{number}.png")
        image.save(paths[-1], exif=exif)
    return paths


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inputs_are_those_of_torchvision(script, tmp_path, name):
    transform, shape = TRANSFORMS[name]
    how = describe_preprocessing(transform, shape)
    sizes = [(60, 60)] * 5 if name == "grey" else [(200, 150), (47, 61), (300, 64), (64, 301), (65, 65)]
    for path in save_pictures(tmp_path, sizes):
        image = load_image(path).convert(how["color"])
        expected, found = transform(image).numpy(), script.prepare(path, how)[0]
        assert found.shape == shape and found.dtype == np.float32
        std = np.array(how["std"] or [1.0]).reshape(-1, 1, 1)
        levels = np.abs(found - expected) * std * 255
        assert levels.max() <= 1.001  # one step of 255
        assert levels.mean() < 0.25  # of few pixels
        if how["resize"] is None or how["resize"]["library"] == "pillow":
            assert levels.max() < 1e-3


def test_what_differs_is_refused(script, tmp_path):
    Image.fromarray(np.full((70, 70), 40000, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(AssertionError, match="more than 8 bits"):
        script.prepare(tmp_path / "wide.png", describe_preprocessing(*TRANSFORMS["photos"]))
    chain = v2.Compose([v2.ToImage(), v2.Resize((64, 64), antialias=False), v2.ToDtype(torch.float32, scale=True)])
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    with pytest.raises(AssertionError, match="always averages"):
        script.prepare(tmp_path / "small.png", describe_preprocessing(chain, (3, 64, 64)))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with onnxruntime, numpy and Pillow alone, from the files of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    here = Path(sysconfig.get_paths()["purelib"])
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for name in ("onnxruntime", "numpy", "PIL", "numpy.libs", "pillow.libs"):
        if (here / name).exists():
            (there / name).symlink_to(here / name)
    return folder / "bin/python"


@pytest.mark.slow
def test_predictions_in_an_environment_of_three_packages(root, environment, tmp_path):
    transform, shape = TRANSFORMS["photos"]
    torch.manual_seed(0)
    net = resnet8(num_classes=4).eval()
    metadata = {"preprocessing": describe_preprocessing(transform, shape), "classes": [*"abcd"]}
    export_student(net, torch.rand(2, *shape), tmp_path / "student.onnx", "onnx", metadata)
    paths = save_pictures(tmp_path)
    code = (
        "import importlib.util as u; assert not any(map(u.find_spec, ['torch', 'torchvision', 'kd_lightning', 'onnx']))"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run([environment, "-c", code], check=True, env=clean, cwd=tmp_path)
    args = [environment, root / "docs/predict_onnx.py", "student.onnx", *paths]
    done = subprocess.run(args, capture_output=True, text=True, check=True, env=clean, cwd=tmp_path)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in paths]
    with torch.no_grad():
        expected = net(torch.stack([transform(load_image(path)) for path in paths])).softmax(1)
    for (_, name, probability), row in zip(rows, expected, strict=True):
        assert name == "abcd"[int(row.argmax())]
        assert float(probability) == pytest.approx(float(row.max()), abs=2e-3)
