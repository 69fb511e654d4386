"""ImageFolder and TorchvisionDataset as users call them: classes by name, sizes, and loaders, also from YAML."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms import v2

from kd_lightning import ImageFolder, InputError, SemiSupervisedDataModule, TorchvisionDataset
from kd_lightning.__main__ import main
from kd_lightning.data.sources.image_loader import load_image
from kd_lightning.data.transforms import photo_transforms, strong_photos
from kd_lightning.data.transforms.resize import RandomResizedCrop
from kd_lightning.runs.build import build

COLORS = {"birds": (200, 0, 0), "cats": (0, 200, 0), "dogs": (0, 0, 200), "eels": (200, 200, 0)}


def write(root, count=2, *, size=(20, 16), without=()):
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(0 if name in without else count):
            Image.new("RGB", size, color).save(root / name / f"{number}.png")


def loader_of(color):
    return lambda path: Image.new("RGB", (20, 20), color)


def red(path):
    """A loader that a config names."""
    assert isinstance(path, str)
    return Image.new("RGB", (20, 20), (255, 0, 0))


class Grey:
    """A loader with an argument, whose pictures are tensors."""

    def __init__(self, value: int = 1):
        self.value = value

    def __call__(self, path):
        return torch.full((3, 20, 20), self.value, dtype=torch.uint8)


class TestWithoutTraining:
    """Images that have no labels are the training part; validation and test have some."""

    def make(self, root, val=(), test=None):
        write(root / "photos", count=3)  # their folders are no classes
        Image.new("RGB", (20, 16)).save(root / "photos" / "flat.png")
        write(root / "val", without=val)
        if test is not None:
            write(root / "test")
        folders = {name: str(root / name) for name in ("val", "test") if (root / name).exists()}
        return ImageFolder(unlabeled=str(root / "photos"), image_size=8, **folders)

    def test_all_images_train_without_labels(self, tmp_path):
        data = SemiSupervisedDataModule(self.make(tmp_path), batch_size=4)
        data.setup("fit")
        batches = [*data.train_dataloader()]
        assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == [*range(13)]
        assert {*torch.cat([batch.y for batch in batches]).tolist()} == {-100}
        assert data.class_names == [*COLORS]
        validated = [*data.val_dataloader()]
        assert torch.cat([batch.y for batch in validated]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert batches[0].x.shape[1:] == validated[0].x.shape[1:] == (3, 8, 8)

    def test_classes_are_those_of_validation_and_test(self, tmp_path):
        source = self.make(tmp_path, test=True)
        (tmp_path / "val" / "cats").rename(tmp_path / "val" / "ants")
        parts = source.load()
        assert parts.class_names == ["ants", *COLORS]
        assert parts.val.targets.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]
        assert parts.test.targets.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]

    def test_images_alone(self, tmp_path):
        write(tmp_path / "photos")
        data = SemiSupervisedDataModule(ImageFolder(unlabeled=str(tmp_path / "photos"), image_size=8))
        data.setup("fit")
        assert len(next(iter(data.train_dataloader()))) == 8
        assert data.class_names is None
        assert data.val_dataloader() == []

    def test_of_yaml(self, tmp_path):
        self.make(tmp_path)
        arguments = {"train": None, "unlabeled": str(tmp_path / "photos"), "val": str(tmp_path / "val")}
        parts = build(ImageFolder, {"class_path": "kd_lightning.ImageFolder", "init_args": arguments}).load()
        assert (len(parts.train.images), parts.unlabeled) == (13, None)

    def test_neither(self):
        with pytest.raises(InputError, match=r"^train or unlabeled must name a folder of images, got neither$"):
            ImageFolder(val="val")

    def test_a_flat_training_folder_is_explained(self, tmp_path):
        Image.new("RGB", (20, 16)).save(tmp_path / "flat.png")
        with pytest.raises(InputError, match=r"got no subfolder; images without labels are unlabeled$"):
            ImageFolder(str(tmp_path)).load()


class TestClasses:
    def test_labels_of_the_test_part_follow_names(self, tmp_path):
        write(tmp_path / "train")
        write(tmp_path / "test", without=["cats"])  # an empty folder
        (tmp_path / "test" / "birds").rename(tmp_path / "no longer")  # a missing one
        parts = ImageFolder(str(tmp_path / "train"), str(tmp_path / "test")).load()
        assert parts.class_names == [*COLORS]
        assert parts.test.targets.tolist() == [2, 2, 3, 3]
        for part in (parts.train, parts.test):
            for (image, label), target in zip(part.images, part.targets, strict=True):
                assert label == target
                assert image.getpixel((0, 0)) == COLORS[parts.class_names[target]]

    def test_an_extra_class_in_the_test_part_is_named(self, tmp_path):
        write(tmp_path / "train")
        write(tmp_path / "test")
        (tmp_path / "test" / "fish").mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / "test" / "fish" / "0.png")
        with pytest.raises(InputError, match="test: classes must be those of train, birds, .*, got another class fish"):
            ImageFolder(str(tmp_path / "train"), str(tmp_path / "test")).load()

    def test_an_empty_class_trains_and_tests(self, tmp_path):
        write(tmp_path / "train", 6, without=["cats"])
        write(tmp_path / "test", 2, without=["dogs"])
        source = ImageFolder(str(tmp_path / "train"), str(tmp_path / "test"), image_size=8)
        data = SemiSupervisedDataModule(source, val_size=3, batch_size=99)
        (batch,) = list(data.train_dataloader())
        assert data.class_names == [*COLORS]
        assert {*batch.y.tolist()} <= {0, 2, 3}
        (batch,) = list(data.test_dataloader())
        assert batch.y.tolist() == [0, 0, 1, 1, 3, 3]  # the class without training pictures, too

    def test_what_is_passed_over_is_known(self, tmp_path):
        write(tmp_path / "train")
        (tmp_path / "train" / "cats" / "notes.txt").write_text("")
        parts = ImageFolder(str(tmp_path / "train"), unlabeled=str(tmp_path / "train")).load()
        assert parts.train.images.passed_over == parts.unlabeled.passed_over == 1


class TestImageSize:
    @pytest.mark.parametrize("size", [(12, 20), [12, 20], (20, 12)])
    def test_two_numbers(self, tmp_path, size):
        write(tmp_path, size=(31, 45))
        data = SemiSupervisedDataModule(ImageFolder(str(tmp_path), image_size=size), val_size=1, batch_size=99)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert next(iter(loader)).x.shape[1:] == (3, *size)
        assert strong_photos(tuple(size))(Image.new("RGB", (31, 45))).shape == (3, *size)

    @pytest.mark.parametrize("shape", [(40, 30), (30, 40), (7, 100), (100, 7), (16, 16)])
    def test_evaluation_shows_the_centre_in_its_proportions(self, shape):
        height, width = shape
        rows, columns = np.mgrid[0:height, 0:width]
        image = Image.fromarray(np.stack([rows * 2, columns * 2, rows * 0], -1).astype(np.uint8))
        found = photo_transforms((14, 21))[1](image)[:2] * torch.tensor([0.229, 0.224])[:, None, None]
        found = (
            (found + torch.tensor([0.485, 0.456])[:, None, None]) * 255 / 2
        )  # the place in the picture of each pixel
        scale = max(16 / height, 24 / width)  # 8/7 of 14 and of 21 are covered
        assert (found[0, -1] - found[0, 0]).mean() == pytest.approx(13 / scale, rel=0.1, abs=1)
        assert (found[1, :, -1] - found[1, :, 0]).mean() == pytest.approx(20 / scale, rel=0.1, abs=1)
        assert found[0].mean() == pytest.approx((height - 1) / 2, abs=1 + 0.5 / scale)
        assert found[1].mean() == pytest.approx((width - 1) / 2, abs=1 + 0.5 / scale)

    def test_training_crops_keep_proportions(self):
        """A disc stays nearly round: stretched by at most 4/3."""
        rows, columns = np.mgrid[0:300, 0:300]
        disc = ((rows - 150) ** 2 + (columns - 150) ** 2 < 30**2).astype(np.uint8) * 255
        image = Image.fromarray(np.repeat(disc[..., None], 3, -1))
        crop = next(part for part in photo_transforms((30, 90))[0].transforms if isinstance(part, RandomResizedCrop))
        torch.manual_seed(0)
        ratios = []
        for _ in range(200):
            seen = crop(image)[0].numpy() > 127
            inner = seen[1:-1, 1:-1]
            if seen.sum() == inner.sum() > 60:  # the whole disc
                height, width = (np.ptp(np.nonzero(seen)[axis]) + 1 for axis in (0, 1))
                ratios.append(width / height)
        assert len(ratios) > 10
        assert min(ratios) > 0.6 and max(ratios) < 1.7
        assert np.median(ratios) == pytest.approx(1, abs=0.25)

    @pytest.mark.parametrize("size", [14, (14, 14), [14, 14]])
    def test_a_square_is_as_torchvision(self, size):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))
        tail = [v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True)]
        tail.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        train, evaluation = photo_transforms(size)
        wanted = v2.Compose([v2.Resize(16, antialias=True), v2.CenterCrop(14), *tail])
        made = evaluation(image)
        assert torch.allclose(made, wanted(v2.functional.to_image(image)), atol=1e-6)
        assert (made - wanted(image)).abs().max() < 1.01 / 255 / 0.224  # Pillow rounds some pixels to the next of 256
        crop = next(part for part in train.transforms if isinstance(part, RandomResizedCrop))
        assert (crop.size, crop.scale, crop.ratio) == ((14, 14), (0.08, 1), (3 / 4, 4 / 3))

    @pytest.mark.parametrize("size", [0, -1, (0, 4), (4, -1), (4,), (4, 4, 4), (), 4.5, (4, 4.0), "4", True, None])
    @pytest.mark.parametrize(
        "make",
        [
            photo_transforms,
            lambda size: ImageFolder("train", image_size=size),
            lambda size: TorchvisionDataset("EuroSAT", "root", image_size=size),
            lambda size: TorchvisionDataset("CIFAR10", "root", image_size=size),
        ],
    )
    def test_others_are_refused(self, make, size):
        with pytest.raises(InputError, match="image_size must be at least 1, got ") as error:
            make(size)
        assert str(size) in str(error.value) and "\n" not in str(error.value)


class TestLoader:
    def test_replaced(self, tmp_path):
        write(tmp_path / "train")
        write(tmp_path / "test")
        folders = [str(tmp_path / name) for name in ("train", "test", "train")]
        parts = ImageFolder(*folders, loader=loader_of((1, 2, 3))).load()
        for item in (parts.train.images[0][0], parts.test.images[0][0], parts.unlabeled[0]):
            assert item.getpixel((0, 0)) == (1, 2, 3)

    def test_files_of_another_kind(self, tmp_path):
        write(tmp_path)
        for folder in tmp_path.iterdir():
            np.save(folder / "array.npy", np.zeros((3, 4, 4), np.float32))
            (folder / "array.npy").rename(folder / "array.NPY")
        source = ImageFolder(str(tmp_path), unlabeled=str(tmp_path), loader=np.load, endings=[".npy"])
        parts = source.load()
        assert parts.train.targets.tolist() == [0, 1, 2, 3]
        assert parts.train.images[3][0].shape == parts.unlabeled[0].shape == (3, 4, 4)
        for endings in ([], ["npy"], ["."]):
            with pytest.raises(InputError, match="endings must"):
                ImageFolder(str(tmp_path), endings=endings)

    def test_default(self, tmp_path):
        write(tmp_path)
        Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "cats" / "0.png")
        parts = ImageFolder(str(tmp_path), unlabeled=str(tmp_path)).load()
        assert parts.train.images[2][0].getpixel((0, 0)) == parts.unlabeled[2].getpixel((0, 0)) == (128, 128, 128)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that writes a config with these arguments of the source."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos", 3)

    def make(**arguments):
        arguments = {"train": "photos", "test": "photos"} | arguments
        network = {"class_path": "CifarResNet", "init_args": {"depth": 8, "widths": [4, 4, 8, 8], "num_classes": 4}}
        trainer = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
        data = {"source": {"class_path": "ImageFolder", "init_args": arguments}, "batch_size": 4, "val_size": 1}
        content = {
            "name": "pictures",
            "trainer": trainer,
            "model": {"class_path": "SupervisedModule", "init_args": {"student": network}},
            "data": {"class_path": "SemiSupervisedDataModule", "init_args": data},
        }
        Path("config.yaml").write_text(yaml.safe_dump(content))
        return ["--config", "config.yaml"]

    return make


def printed(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["fit", *arguments, "--print_config"])
    assert not error.value.code
    text = capsys.readouterr().out
    return text, yaml.safe_load(text)["data"]["init_args"]["source"]["init_args"]


LOADERS = {
    "function": (f"{__name__}.red", (255, 0, 0)),
    "object": ({"class_path": f"{__name__}.Grey", "init_args": {"value": 51}}, (51, 51, 51)),
    "default": ("kd_lightning.data.sources.image_loader.load_image", None),
}


class TestYAML:
    @pytest.mark.parametrize("size", [16, [16, 12]])
    @pytest.mark.parametrize("loader", LOADERS)
    def test_printed_config_is_read_again(self, config, capsys, size, loader):
        loader, _ = LOADERS[loader]
        text, found = printed(config(image_size=size, loader=loader), capsys)
        assert (found["image_size"], found["loader"]) == (size, loader)
        Path("config.yaml").write_text(text)
        assert printed(["--config", "config.yaml"], capsys)[1] == found

    def test_from_the_command_line(self, config, capsys):
        given = {"image_size": "[16, 12]", "loader": f"{__name__}.red"}
        options = [f"--data.init_args.source.init_args.{key}={value}" for key, value in given.items()]
        _, found = printed([*config(), *options], capsys)
        assert found["image_size"] == [16, 12] and found["loader"] == given["loader"]

    @pytest.mark.parametrize(("loader", "size"), [("function", [16, 12]), ("object", 16), ("default", 16)])
    def test_saved_config_builds_the_same(self, config, loader, size):
        loader, color = LOADERS[loader]
        main(["fit", *config(image_size=size, loader=loader)])
        (saved,) = Path("runs").rglob("config.yaml")
        source = yaml.safe_load(saved.read_text())["data"]["init_args"]["source"]
        assert source["init_args"]["loader"] == loader and source["init_args"]["image_size"] == size
        for command in ("test", "predict"):
            main([command, "--config", str(saved)])
        data = build(SemiSupervisedDataModule, yaml.safe_load(saved.read_text())["data"])
        data.setup("fit")
        image = data.image(0)
        pixel = image[:, 0, 0].tolist() if isinstance(image, torch.Tensor) else [*image.getpixel((0, 0))]
        assert pixel == [*(color or COLORS["birds"])]
        shape = next(iter(data.val_dataloader())).x.shape
        assert shape[2:] == ((16, 16) if size == 16 else (16, 12))

    @pytest.mark.parametrize(
        ("arguments", "key"),
        [
            ({"image_size": 0}, "image_size"),
            ({"image_size": [16, -1]}, "image_size"),
            ({"image_size": [16, 16, 16]}, "image_size"),
            ({"image_size": 1.5}, "image_size"),
            ({"image_size": "big"}, "image_size"),
            ({"loader": f"{__name__}.gone"}, "loader"),
            ({"loader": f"{__name__}.COLORS"}, "loader"),
            ({"loader": 3}, "loader"),
            ({"loader": None}, "loader"),
        ],
    )
    def test_errors_have_one_line(self, config, capsys, arguments, key):
        with pytest.raises(SystemExit) as error:
            main(["fit", *config(**arguments)])
        assert error.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and key in lines[0]

    def test_torchvision_dataset(self, config, capsys):
        write(Path("eurosat/2750"))
        arguments = {"name": "EuroSAT", "root": ".", "image_size": [16, 12], "loader": f"{__name__}.red"}
        source = {"class_path": "TorchvisionDataset", "init_args": arguments}
        data = build(
            SemiSupervisedDataModule, {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source}}
        )
        assert data.source.loader.__name__ == "red"
        data.setup("fit")
        assert data.image(0).getpixel((0, 0)) == (255, 0, 0)
        content = yaml.safe_load(Path(config()[1]).read_text())
        content["data"]["init_args"]["source"] = source
        Path("config.yaml").write_text(yaml.safe_dump(content))
        found = printed(["--config", "config.yaml"], capsys)[1]
        assert found["loader"] == f"{__name__}.red" and found["image_size"] == [16, 12]


def test_workers_use_the_loader(tmp_path):
    write(tmp_path)
    source = ImageFolder(str(tmp_path), image_size=8, loader=red)
    data = SemiSupervisedDataModule(source, val_size=0, batch_size=8, num_workers=1, train_transform=v2.ToImage())
    (batch,) = list(data.train_dataloader())
    assert batch.x.shape == (8, 3, 20, 20) and (batch.x[:, 0] == 255).all()


def test_default_loader_is_ours():
    assert ImageFolder("train").loader is TorchvisionDataset("EuroSAT", "root").loader is load_image


def test_a_folder_that_another_argument_names_is_no_class(tmp_path, monkeypatch):
    """As in a folder of classes with ``unlabeled`` and ``test`` beside them; linked and relative names count, too."""
    monkeypatch.chdir(tmp_path)
    write(Path("photos"))
    write(Path("photos/test"), 1)
    write(Path("photos/unlabeled"), 3)
    Path("link").symlink_to("photos/unlabeled")
    parts = ImageFolder("photos", test="./photos/test", unlabeled="link", val="photos/val", image_size=8)
    with pytest.raises(InputError, match="val: "):
        parts.load()  # it does not exist
    parts = ImageFolder("photos", test="./photos/test", unlabeled="link", image_size=8).load()
    assert parts.class_names == sorted(COLORS)
    assert (len(parts.train.images), len(parts.test.images), len(parts.unlabeled)) == (8, 4, 12)
