"""Few-label stamps: parts without common words, pictures as the networks expect them, and each way learns."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def scripts(root):
    """Both scripts, which lie in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        yield importlib.import_module("stamp_folders"), importlib.import_module("foundation")


def test_no_word_is_in_two_parts_and_half_of_each_folder_tests(scripts, tmp_path):
    stamps, _ = scripts
    for name in stamps.CLASSES:
        for number in range(20):
            word = "abcdefghijklmnopqrst"[number] * 3
            for path in (tmp_path / name / f"{word}_one.png", tmp_path / name / "more" / f"{word}-2.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    (tmp_path / "people").mkdir()
    (tmp_path / "people/one.png").touch()
    parts = stamps.split_stamps(tmp_path)
    assert [len(parts[part][0]) for part in ("train", "val", "test")] == [8 * 12, 8 * 8, 8 * 20]
    for number in range(8):
        words = [{path.stem[:3] for path, label in zip(*parts[part], strict=True) if label == number} for part in parts]
        assert sum(map(len, words)) == len(set.union(*words)) == 20
    assert all(
        path.parts[len(tmp_path.parts)] == stamps.CLASSES[label] for path, label in zip(*parts["test"], strict=True)
    )


def test_a_stamp_lies_on_white_in_its_own_proportions(scripts, tmp_path):
    stamps, _ = scripts
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (50, 40, 250, 140))
    image.save(tmp_path / "one.png")
    pixels = np.asarray(stamps.read_stamp(tmp_path / "one.png")).astype(int)
    assert pixels.shape == (112, 112, 3)
    red = (pixels[..., 1] < 128).nonzero()
    assert [np.ptp(axis) + 1 for axis in red] == [48, 96] and [axis.min() for axis in red] == [32, 8]
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all()


def test_crops_lie_within_their_photographs(scripts):
    stamps, _ = scripts
    photos = [Image.new("RGB", (300, 200), (number, 7, 9)) for number in range(3)]
    crops = stamps.crop(photos, 7, np.random.default_rng(0))
    assert [np.asarray(one).reshape(-1, 3).tolist() == [[n % 3, 7, 9]] * 112**2 for n, one in enumerate(crops)] == [
        True
    ] * 7


class Tiny(nn.Sequential):
    """A network in place of either one, with layers of both names."""

    def __init__(self, name, width):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU()))
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("classifier" if name == "features" else "fc", nn.Linear(width, 9))


@pytest.fixture
def stamps_of(scripts, tmp_path, monkeypatch):
    _, foundation = scripts
    monkeypatch.setattr(foundation, "shufflenet_v2_x0_5", lambda: Tiny("conv5", 6))
    monkeypatch.setattr(foundation, "mobilenet_v2", lambda: Tiny("features", 10))
    for name, value in {"DISTILL_STEPS": 3, "STEPS": 3, "PIXELS": 32}.items():
        monkeypatch.setattr(foundation, name, value)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 48), ("val", 16), ("test", 24)):
        x = torch.randint(256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)
        torch.save((x, torch.arange(count) % 8), tmp_path / f"{part}.pt")
    for name, count in {"photos": 90, "others": 8}.items():
        pictures = torch.randint(256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)
        torch.save(pictures, tmp_path / f"{name}.pt")
    torch.save(Tiny("features", 10).state_dict(), tmp_path / "teacher.pth")
    return lambda part, seed=0: foundation.Stamps(tmp_path, part, seed)


def test_five_labels_of_each_class_and_another_five_with_another_seed(scripts):
    _, foundation = scripts
    y = torch.arange(80) % 8
    first, other = (foundation.few_of_each(y, seed) for seed in (0, 1))
    assert torch.bincount(y[first]).tolist() == torch.bincount(y[other]).tolist() == [5] * 8
    assert len({*first.tolist()}) == 40 and not torch.equal(first, other)


def test_validation_stamps_train_where_test_stamps_are_measured(stamps_of):
    assert [len(stamps_of(part).parts["train"][1]) for part in ("val", "test")] == [48, 64]


def test_every_way_learns_from_distilled_weights(scripts, stamps_of):
    _, foundation = scripts
    stamps = stamps_of("test")
    for pictures in ("photographs", "photographs and stamps"):
        figures = stamps.distill(pictures)
        assert 0 < figures["train/vector"] < 2
        trained = stamps.network(pictures).conv5[0].weight
        assert not torch.equal(trained, stamps.network("student").conv5[0].weight)
    for way, (_, trained) in foundation.WAYS.items():
        figures = stamps.learn(way, foundation.GRID[trained][0])
        assert figures == stamps.learn(way, foundation.GRID[trained][0])
        assert 0 <= figures["balanced"] <= 100
