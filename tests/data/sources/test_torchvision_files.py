"""Pictures of torchvision's datasets of files go through the loader; those in memory stay as they are."""

import csv
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from kd_lightning import InputError, SemiSupervisedDataModule, TorchvisionDataset
from kd_lightning.data.sources.images import path_of

STORED, UPRIGHT = (12, 8), (8, 12)  # width and height


def turned(path):
    """Write a picture that lies on its side."""
    exif = Image.Exif()
    exif[274] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", STORED, (250, 0, 0)).save(path, format="jpeg", exif=exif)


def dtd(root):
    for split in ("train", "test"):
        for name in ("dots", "lines"):
            turned(root / "dtd/dtd/images" / name / f"{name}_{split}.jpg")
        (root / "dtd/dtd/labels").mkdir(exist_ok=True)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(f"dots/dots_{split}.jpg\nlines/lines_{split}.jpg\n")


def food(root):
    (root / "food-101/meta").mkdir(parents=True)
    for split in ("train", "test"):
        names = {name: [f"{name}/{split}"] for name in ("pie", "soup")}
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(names))
        for (name,) in names.values():
            turned(root / f"food-101/images/{name}.jpg")


def signs(root):
    for number in range(2):
        turned(root / f"gtsrb/GTSRB/Training/{number:05d}/0.ppm")
        turned(root / f"gtsrb/GTSRB/Final_Test/Images/{number}.ppm")
    with (root / "gtsrb/GT-final_test.csv").open("w") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("Filename", "ClassId"), ("0.ppm", 0), ("1.ppm", 1)])


def pets(root):
    (root / "oxford-iiit-pet/annotations").mkdir(parents=True)
    for place, split in enumerate(("trainval", "test")):
        lines = [f"{name}_{place} {number} {number} 1" for number, name in ((1, "cat"), (2, "dog"))]
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("\n".join(lines) + "\n")
        for name in ("cat", "dog"):
            turned(root / f"oxford-iiit-pet/images/{name}_{place}.jpg")


def aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("A\nB\n")
    for split in ("train", "test"):
        (data / f"images_variant_{split}.txt").write_text(f"0{split} A\n1{split} B\n")
        for number in range(2):
            turned(data / f"images/{number}{split}.jpg")


def caltech101(root):
    for name in ("ant", "bee"):
        turned(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg")
    (root / "caltech101/101_ObjectCategories/BACKGROUND_Google").mkdir()


def caltech256(root):
    for number, name in enumerate(("001.ant", "002.bee"), 1):
        turned(root / f"caltech256/256_ObjectCategories/{name}/{number:03d}_0001.jpg")


SPECIES = ("00000_a_b_c_d_e_f_g", "00001_a_b_c_d_e_f_h")


def two_classes(*places, names=SPECIES, ending="jpg"):
    def write(root):
        for place in places:
            for name in names:
                turned(root / place / name / f"0.{ending}")

    return write


def imagenet(root):
    two_classes("train", "val")(root)
    torch.save((dict(zip(SPECIES, [("ant",), ("bee", "fly")], strict=True)), []), root / "meta.bin")


DATASETS = {  # how the files are written, and arguments
    "DTD": (dtd, {}),
    "Food101": (food, {}),
    "GTSRB": (signs, {}),
    "OxfordIIITPet": (pets, {"train_split": "trainval"}),
    "FGVCAircraft": (aircraft, {}),
    "Caltech101": (caltech101, {}),
    "Caltech256": (caltech256, {}),
    "EuroSAT": (two_classes("eurosat/2750"), {}),
    "ImageFolder": (two_classes("."), {}),
    "INaturalist": (two_classes("2021_train"), {"options": {"version": "2021_train"}}),
    "Country211": (two_classes("country211/train", "country211/test"), {}),
    "RenderedSST2": (
        two_classes("rendered-sst2/train", "rendered-sst2/test", names=("negative", "positive"), ending="png"),
        {},
    ),
    "ImageNet": (imagenet, {"test_split": "val"}),
}


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.imagenet, "check_integrity", lambda *args: True)


def source_of(name, root, **arguments):
    write, needed = DATASETS[name]
    write(root)
    return TorchvisionDataset(name, str(root), **needed | arguments)


def name_of_file(path):
    return (path, "seen")


COUNT_FILES = ("Caltech101", "Caltech256")  # and name them in order, so that a file more is a missing one


@pytest.mark.parametrize("name", DATASETS)
class TestEach:
    def test_pictures_are_upright_and_labels_stay(self, tmp_path, name):
        source = source_of(name, tmp_path)
        theirs = [source._open(selector, download=False) for selector in source._selectors().values()]
        parts = source.load()
        ours = [part for part in (parts.train, parts.test) if part is not None]
        assert len(ours) == len(theirs)
        for part, plain in zip(ours, theirs, strict=True):
            assert len(part.images) == len(plain) == 2
            for index in range(2):
                image, label = part.images[index]
                assert image.size == UPRIGHT and image.mode == "RGB"
                assert plain[index][0].size == STORED
                assert label == plain[index][1] == part.targets[index] == index
                assert Path(path_of([part.images], index)).is_file()
        names = getattr(theirs[0], "classes", getattr(theirs[0], "all_categories", None))  # the second of INaturalist
        assert parts.class_names == (None if names is None else [*map(str, names)])

    def test_another_loader(self, tmp_path, name):
        images = source_of(name, tmp_path, loader=name_of_file).load().train.images
        (path, seen), label = images[1]
        assert (path, seen, label) == (path_of([images], 1), "seen", 1)

    def test_system_files_are_no_samples(self, tmp_path, name):
        if name in COUNT_FILES:
            return
        source = source_of(name, tmp_path)
        before = len(source.load().train.images)
        for path in [*tmp_path.rglob("*")]:
            if path.suffix in (".jpg", ".ppm", ".png"):
                path.with_name(f"._{path.name}").write_bytes(b"no picture")  # as macOS does on foreign disks
        assert len(source.load().train.images) == before


def test_celeb_a(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    base = tmp_path / "celeba"
    for number in range(4):
        turned(base / f"img_align_celeba/{number}.jpg")
    (base / "list_eval_partition.txt").write_text("0.jpg 0\n1.jpg 0\n2.jpg 2\n3.jpg 2\n")
    (base / "identity_CelebA.txt").write_text("".join(f"{n}.jpg {7 + n}\n" for n in range(4)))
    for name, columns in {"list_bbox_celeba": 4, "list_landmarks_align_celeba": 10, "list_attr_celeba": 3}.items():
        rows = [f"{n}.jpg " + " ".join(str(-1 if (n + k) % 2 else 1) for k in range(columns)) for n in range(4)]
        (base / f"{name}.txt").write_text("\n".join(["4", "names", *rows]) + "\n")
    parts = TorchvisionDataset("CelebA", str(tmp_path)).load()
    assert parts.train.targets.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert parts.test.images[1][0].size == UPRIGHT
    assert path_of([parts.test.images], 1) == str(base / "img_align_celeba/3.jpg")
    parts = TorchvisionDataset("CelebA", str(tmp_path), options={"target_type": "identity"}).load()
    assert parts.test.targets.tolist() == [9, 10]


class TestInMemory:
    @pytest.fixture
    def root(self, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        images = np.random.default_rng(0).integers(0, 256, (20, 28, 28)).astype(np.uint8)
        for part in ("train", "t10k"):
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + bytes(range(10)) * 2)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 20, 28, 28) + images.tobytes())
        return tmp_path

    def test_images_stay_to_the_bit(self, root):
        ours = TorchvisionDataset("MNIST", str(root)).load().train.images
        theirs = torchvision.datasets.MNIST(str(root))
        assert type(ours) is type(theirs)
        for index in range(20):
            assert ours[index][0].mode == "L"
            assert np.array_equal(ours[index][0], theirs[index][0])

    def test_a_loader_is_refused(self, root):
        with pytest.raises(InputError, match="loader: the images of MNIST are not read by a loader"):
            TorchvisionDataset("MNIST", str(root), loader=name_of_file).load()


def test_transforms_of_the_dataset_are_applied(tmp_path):
    options = {"transform": lambda image: image.resize((5, 5)), "target_transform": lambda label: 1 - label}
    part = source_of("DTD", tmp_path, options=options).load().train
    assert part.images[0][0].size == (5, 5)
    assert part.targets.tolist() == [1, 0]


def test_classes_of_the_test_part_are_found_by_name(tmp_path):
    source = source_of("Country211", tmp_path)
    (tmp_path / "country211/test/00000_a_b_c_d_e_f_g/0.jpg").unlink()
    (tmp_path / "country211/test/00000_a_b_c_d_e_f_g").rmdir()
    assert source.load().test.targets.tolist() == [1]


def test_a_broken_file_is_named(tmp_path):
    source = source_of("GTSRB", tmp_path)
    (broken := tmp_path / "gtsrb/GTSRB/Training/00001/0.ppm").write_bytes(b"no picture")
    data = SemiSupervisedDataModule(source, val_size=0, batch_size=2)
    with pytest.raises(InputError, match=f"image {broken} cannot be read"):
        list(data.train_dataloader())


@pytest.mark.parametrize("name", ["GTSRB", "EuroSAT", "ImageFolder"])
def test_system_folders_are_no_classes(tmp_path, name):
    (tmp_path / ".cache").mkdir()
    source = source_of(name, tmp_path / ".cache")
    assert len(source.load().train.images) == 2
    first = min(tmp_path.rglob("00000*/0.*"))
    system = first.parent.parent / ".ipynb_checkpoints"
    system.mkdir()
    (system / first.name).write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=re.escape("must hold no folder .ipynb_checkpoints")):
        source.load()


def test_own_loader_of_a_dataset(tmp_path):
    two_classes(".")(tmp_path)
    options = {"loader": name_of_file}
    assert TorchvisionDataset("ImageFolder", str(tmp_path), options).load().train.images[1][0][1] == "seen"
