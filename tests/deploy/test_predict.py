"""Predictions of any files: those of ``test`` for the same pictures, without the data, and for each task."""

import csv
import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from kd_lightning.__main__ import main
from kd_lightning.data import SemiSupervisedDataModule
from kd_lightning.deploy.export import export_student
from kd_lightning.deploy.predict import load_predictor, predict
from kd_lightning.errors import InputError
from kd_lightning.modules import SupervisedModule
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import metadata_texts, save_weights

RANDOM = np.random.default_rng(0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Net(nn.Sequential):
    """A tiny network of pictures, whose outputs depend on where the colours lie."""

    def __init__(self, outputs: int = 2, channels: int = 3, dense: bool = False) -> None:
        head = [nn.Conv2d(4, outputs, 1)] if dense else [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, outputs)]
        super().__init__(nn.Conv2d(channels, 4, 3, 2 - dense, 1), nn.Tanh(), *head)


class Halves(SupervisedModule):
    """Calls its network with half of the inputs."""

    def call(self, network, x):
        return network(x / 2)


class WithMask(nn.Module):
    """A transform of a picture and its mask."""

    def forward(self, sample):
        return {"image": sample["image"][:, :6, :6].float() / 255, "mask": sample["mask"][:6, :6]}


def picture(path, size=(12, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
    image = Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8).squeeze(), mode)
    image.save(path)
    return str(path)


def odd_pictures(folder):
    """Pictures that are wrong if they are decoded in another way than by the sources of the package."""
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(picture(folder / "0.png")).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(RANDOM.integers(0, 2**16, (9, 12), dtype=np.uint16)).save(folder / "deep.png")
    Image.open(picture(folder / "1.png", (20, 8))).quantize(8).save(folder / "palette.gif")
    picture(folder / "clear.png", (8, 20), "RGBA")
    picture(folder / "grey.png", (8, 8), "L")
    picture(folder / "print.jpg", (16, 16), "CMYK")
    (folder / "notes.txt").write_text("no picture")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was tested and has predicted, and its test folder; its data lie elsewhere now."""
    folder = tmp_path_factory.mktemp("predict")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            odd_pictures(folder / "data" / part / name)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(folder / "runs")}
    source = {"train": str(folder / "data/train"), "test": str(folder / "data/test"), "image_size": 8}
    config = {
        "name": "photos",
        "trainer": trainer | {"enable_progress_bar": False, "enable_model_summary": False},
        "model": {"class_path": "SupervisedModule", "init_args": {"student": {"class_path": f"{__name__}.Net"}}},
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {"source": {"class_path": "ImageFolder", "init_args": source}, "batch_size": 4},
        },
    }
    (folder / "photos.yaml").write_text(yaml.safe_dump(config))
    for verb in ("fit", "test", "predict"):
        main([verb, "--config", str(folder / "photos.yaml")])
    shutil.move(folder / "data", folder / "elsewhere")
    return folder / "runs/photos/version_0", folder / "elsewhere/test"


@pytest.fixture
def make_run(tmp_path):
    """Makes the folder of a finished run, without a fit."""

    def make(student, *, shape, source, data=None, classes=None, module="SupervisedModule", **arguments):
        torch.manual_seed(0)
        network = {"class_path": f"{__name__}.Net", "init_args": student}
        init_args = {"source": source, **(data or {})}
        config = {
            "model": {"class_path": module, "init_args": {"student": network, **arguments}},
            "data": {"class_path": "SemiSupervisedDataModule", "init_args": init_args},
        }
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        net = Net(**student).eval()
        metadata = {"task": arguments.get("task", "multiclass"), "input_shape": shape, "classes": classes}
        save_weights(net.state_dict(), folder / "student.safetensors", metadata_texts(metadata))
        return folder, net

    return make


PHOTOS = {"class_path": "ImageFolder", "init_args": {"train": "gone", "image_size": 8}}
FAKE = {"class_path": "FakeData", "init_args": {"image_size": [3, 6, 6]}}  # its transform does not resize


def values_of(path):
    """Pixels of a picture as floats (1, C, H, W) in [0, 1]."""
    pixels = np.asarray(Image.open(path), np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).movedim(-1, 0)[None]


# The same predictions as the run's own.


def test_the_predictions_are_those_of_test_and_of_predict(trained, tmp_path, monkeypatch):
    run, test = trained
    monkeypatch.chdir(tmp_path)
    found = Run(run).predict(test)
    with (run / "predictions.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [Path(path).relative_to(test).as_posix() for path in found.paths] == [row["path"] for row in rows]
    assert found.names == ["cat", "dog"]
    expected = torch.tensor([[float(row["cat"]), float(row["dog"])] for row in rows])
    torch.testing.assert_close(found.values, expected, rtol=0, atol=2e-6)  # six digits are written
    with gzip.open(run / "test_predictions.csv.gz", "rt") as file:
        tested = {row["path"]: row["prediction"] for row in csv.DictReader(file)}
    assert {Path(one.path).relative_to(test).as_posix(): one.name for one in found} == tested
    assert all(
        one.probability == pytest.approx(max(values)) for one, values in zip(found, found.values.tolist(), strict=True)
    )
    assert found.errors == {}
    assert found.values.std(dim=0).min() > 1e-3  # else any decoding would do


def test_another_batch_size_and_workers_change_nothing(trained):
    run, test = trained
    predictor = load_predictor(run)
    one = predictor.predict(test, batch_size=1)
    torch.testing.assert_close(predictor.predict(test, batch_size=7).values, one.values, rtol=0, atol=1e-6)
    spread = predictor.predict(test, batch_size=1, workers=2)
    assert spread.paths == one.paths
    assert torch.equal(spread.values, one.values)


def test_order_and_repetitions_stay(trained):
    run, test = trained
    paths = [test / "dog/grey.png", test / "cat/deep.png", test / "dog/grey.png"]
    found = Run(run).predict(paths)
    assert found.paths == [*map(str, paths)]
    assert torch.equal(found.values[0], found.values[2])
    assert not torch.equal(found.values[0], found.values[1])


def test_files_that_cannot_be_read(trained, tmp_path):
    run, test = trained
    broken = tmp_path / "broken.png"
    broken.write_bytes((test / "cat/1.png").read_bytes()[:200])
    good = str(test / "cat/turned.jpg")
    paths = ["gone.jpg", str(broken), good, str(test), "gone.jpg", str(test / "cat/notes.txt"), good]
    paths.remove(str(test))
    found = Run(run).predict(paths, batch_size=2)  # the first batch has no picture
    assert found.paths == paths
    assert found.errors.keys() == {0, 1, 3, 4}
    assert found.errors[0] == "No such file or directory"
    assert "truncated" in found.errors[1]
    assert found.errors[4] == "it has no format of pictures that Pillow reads"
    assert found.values[[0, 1, 3, 4]].isnan().all()
    assert torch.equal(found.values[2], Run(run).predict(good).values[0])
    assert [one.name is None for one in found] == [True, True, False, True, True, False]
    nothing = Run(run).predict(["gone.jpg"])
    assert (len(nothing), nothing[0][1:]) == (1, (None, None, "No such file or directory"))


def test_weights_of_another_name_beside_the_config(trained, tmp_path):
    run, test = trained
    shutil.copy(run / "config.yaml", tmp_path)
    shutil.copy(run / "student.safetensors", tmp_path / "small.safetensors")
    assert torch.equal(predict(tmp_path / "small.safetensors", test).values, Run(run).predict(test).values)


def test_without_the_dataset_class_the_described_transform_counts(trained, tmp_path):
    run, test = trained
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((moved / "config.yaml").read_text())
    dataset = {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": "gone"}}
    config["data"]["init_args"]["source"] = {"class_path": "DatasetSource", "init_args": {"train": dataset}}
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    torch.testing.assert_close(Run(moved).predict(test).values, Run(run).predict(test).values, rtol=0, atol=1e-6)


# From a picture to inputs.


def test_a_network_of_one_channel_gets_greys(make_run, tmp_path):
    source = {"class_path": "TorchvisionDataset", "init_args": {"name": "MNIST", "root": "gone"}}
    run, net = make_run({"outputs": 10, "channels": 1}, shape=[1, 28, 28], source=source)
    path = picture(tmp_path / "a.png", (28, 28))
    grey = torch.from_numpy(np.array(Image.open(path).convert("L"), np.float32))[None, None] / 255
    expected = net((grey - 0.1307) / 0.3081).softmax(1)
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)


def test_pictures_of_another_size_than_those_of_training(make_run, tmp_path):
    run, net = make_run({}, shape=[3, 6, 6], source=FAKE)
    paths = [picture(tmp_path / f"{n}.png", size) for n, size in enumerate([(6, 6), (7, 6), (6, 6)])]
    found = Run(run).predict(paths)
    assert found.errors.keys() == {1}
    assert "becomes [3, 6, 7], but the network was trained on [3, 6, 6]" in found.errors[1]
    expected = torch.cat([net(values_of(path)).softmax(1) for path in (paths[0], paths[2])])
    torch.testing.assert_close(found.values[[0, 2]], expected, rtol=0, atol=1e-6)


def test_a_network_of_other_channels(make_run, tmp_path):
    run, _ = make_run({"channels": 4}, shape=[4, 8, 8], source=PHOTOS)
    with pytest.raises(InputError, match="gives 3 channels, but the network takes 4"):
        Run(run).predict(picture(tmp_path / "a.png"))


def test_a_loader_of_the_user(make_run, tmp_path):
    source = {"class_path": "ImageFolder", "init_args": PHOTOS["init_args"] | {"loader": f"{__name__}.load_numbers"}}
    source["init_args"]["endings"] = [".txt"]
    run, _ = make_run({}, shape=[3, 8, 8], source=source)
    for name in ("a.txt", "b.png"):
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text("7")
    found = Run(run).predict(tmp_path / "files")
    assert found.paths == [str(tmp_path / "files/a.txt")]
    assert found.errors == {}


def load_numbers(path):
    return Image.new("RGB", (8, 8), (int(Path(path).read_text()),) * 3)


def test_a_dataset_with_a_loader_or_a_transform_of_its_own(make_run, tmp_path):
    picture(tmp_path / "data/cat/a.png", (6, 6))
    dataset = {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": str(tmp_path / "data")}}
    dataset["init_args"]["loader"] = f"{__name__}.load_red"
    run, net = make_run({}, shape=[3, 6, 6], source={"class_path": "DatasetSource", "init_args": {"train": dataset}})
    expected = net(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 6, 6)).softmax(1)
    torch.testing.assert_close(Run(run).predict(tmp_path / "data").values, expected, rtol=0, atol=1e-6)
    dataset["init_args"]["transform"] = {"class_path": "torchvision.transforms.v2.ColorJitter"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["source"]["init_args"]["train"] = dataset
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="ImageFolder has a transform of its own"):
        Run(run).predict(tmp_path / "data")


class OwnDataset(Dataset):
    """Reads files in its own way."""

    def __init__(self, path: str, order: list[int]) -> None:
        self.paths, self.order, self.targets = [path], order, [0]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index):
        return np.asarray(Image.open(self.paths[0]))[:, :, self.order].copy(), 0


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_dataset_that_decodes_in_its_own_way(make_run, tmp_path, order):
    path = picture(tmp_path / "a.png", (6, 6))
    dataset = {"class_path": f"{__name__}.OwnDataset", "init_args": {"path": path, "order": order}}
    run, net = make_run({}, shape=[3, 6, 6], source={"class_path": "DatasetSource", "init_args": {"train": dataset}})
    if order == [0, 1, 2]:
        expected = net(values_of(path)).softmax(1)
        torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)
    else:
        with pytest.raises(InputError, match=r"OwnDataset decodes .*a\.png in another way than load_image"):
            Run(run).predict(path)


def load_red(path):
    return Image.new("RGB", (6, 6), "red")


# Tasks.


@pytest.mark.parametrize("classes", [["no", "yes"], None])
def test_binary(make_run, tmp_path, classes):
    run, net = make_run({"outputs": 1}, shape=[3, 6, 6], source=FAKE, task="binary", classes=classes)
    paths = [picture(tmp_path / f"{n}.png", (6, 6)) for n in range(8)]
    found = Run(run).predict(paths)
    yes = torch.cat([net(values_of(path)).sigmoid()[0] for path in paths])
    torch.testing.assert_close(found.values, torch.stack([1 - yes, yes], 1), rtol=0, atol=1e-6)
    names = classes or ["0", "1"]
    assert [one.name for one in found] == [names[int(p > 0.5)] for p in yes]
    assert [one.probability for one in found] == pytest.approx([max(p, 1 - p) for p in yes.tolist()], abs=1e-6)


def test_multilabel(make_run, tmp_path):
    names = ["a", "b", "c"]
    run, net = make_run({"outputs": 3}, shape=[3, 6, 6], source=FAKE, task="multilabel", classes=names)
    paths = [picture(tmp_path / f"{n}.png", (6, 6)) for n in range(4)]
    found = Run(run).predict(paths)
    expected = torch.cat([net(values_of(path)).sigmoid() for path in paths])
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6)
    for one, row in zip(found, expected.tolist(), strict=True):
        assert one.name == tuple(name for name, p in zip(names, row, strict=True) if p > 0.5)
        assert one.probability == pytest.approx([p for p in row if p > 0.5], abs=1e-6)


@pytest.mark.parametrize(("outputs", "names"), [(1, ["value"]), (2, ["value_0", "value_1"])])
def test_regression(make_run, tmp_path, outputs, names):
    run, net = make_run({"outputs": outputs}, shape=[3, 6, 6], source=FAKE, task="regression", hard_loss=MSE)
    path = picture(tmp_path / "a.png", (6, 6))
    found = Run(run).predict(path)
    assert found.names == names
    torch.testing.assert_close(found.values, net(values_of(path)), rtol=0, atol=1e-6)
    assert found[0] == (path, None, None, "")


MSE = {"class_path": "torch.nn.MSELoss"}


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_dense_of_any_size(make_run, tmp_path, task):
    student = {"outputs": 3 if task == "multiclass" else 1, "dense": True}
    run, net = make_run(student, shape=[3, 6, 6], source=FAKE, task=task, class_dim=1)
    paths = [picture(tmp_path / f"{n}.png", size) for n, size in enumerate([(6, 6), (9, 7), (6, 6)])] + ["gone.png"]
    found = Run(run).predict(paths)
    for path, mask in zip(paths[:3], found.masks, strict=False):
        logits = net(values_of(path))[0]
        assert torch.equal(mask, logits.argmax(0) if task == "multiclass" else (logits[0] > 0).long())
    assert found.masks[3] is None
    assert found.errors == {3: "No such file or directory"}
    assert found.values.shape == (4, 0)


def test_dense_with_a_transform_of_picture_and_mask(make_run, tmp_path):
    own = {"eval_transform": {"class_path": f"{__name__}.WithMask"}}
    run, net = make_run({"dense": True}, shape=[3, 6, 6], source=FAKE, data=own, class_dim=1)
    path = picture(tmp_path / "a.png", (9, 7))
    assert torch.equal(Run(run).predict(path).masks[0], net(values_of(path)[:, :, :6, :6])[0].argmax(0))


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_dense_of_several_values_a_pixel(make_run, tmp_path, task):
    options = {"hard_loss": MSE} if task == "regression" else {}
    run, _ = make_run({"dense": True}, shape=[3, 6, 6], source=FAKE, task=task, class_dim=1, **options)
    with pytest.raises(InputError, match=f"a {task} task for each pixel"):
        Run(run).predict(picture(tmp_path / "a.png", (6, 6)))


def test_a_module_that_calls_its_network_in_its_own_way(make_run, tmp_path):
    run, net = make_run({}, shape=[3, 6, 6], source=FAKE, module=f"{__name__}.Halves")
    path = picture(tmp_path / "a.png", (6, 6))
    expected = net(values_of(path) / 2).softmax(1)
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)


class Named(Net):
    """Returns other values as its logits."""

    def forward(self, x):
        return {"logits": x.mean((2, 3)), "scores": super().forward(x)}


class HookedModule(SupervisedModule):
    """Halves its inputs where a batch comes to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return replace(batch, x=batch.x / 2)


class HookedData(SemiSupervisedDataModule):
    """Halves its inputs in validation, and spoils them in training."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return replace(batch, x=batch.x / (0 if self.trainer.training else 2))


def test_hooks_of_batch_transfer(make_run, tmp_path):
    """Those of the module count, and those of the data."""
    path = picture(tmp_path / "a.png", (6, 6))
    run, net = make_run({}, shape=[3, 6, 6], source=FAKE, module=f"{__name__}.HookedModule")
    expected = net(values_of(path) / 2).softmax(1)
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["class_path"] = "SupervisedModule"
    config["data"]["class_path"] = f"{__name__}.HookedData"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)


class Foreign(LightningModule):
    """A module of another project, which doubles what its network gets."""

    def __init__(self, dense: bool = False, named: bool = False) -> None:
        super().__init__()
        self.net = Named() if named else Net(dense=dense)

    def validation_step(self, batch, batch_idx):
        x, y = batch.x, batch.y
        return nn.functional.cross_entropy(self.net(2 * x), y)


def teach_foreign(run, dense=False, named=False, **arguments):
    config = yaml.safe_load((run / "config.yaml").read_text())
    module = {"class_path": f"{__name__}.Foreign", "init_args": {"dense": dense, "named": named}}
    config["model"] = {
        "class_path": "kd_lightning.teach",
        "init_args": {"module": module, "teacher": None, **arguments},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_module_that_is_taught(make_run, tmp_path):
    run, net = make_run({}, shape=[3, 6, 6], source=FAKE, classes=["cat", "dog"])
    teach_foreign(run)
    path = picture(tmp_path / "a.png", (6, 6))
    expected = net(2 * values_of(path)).softmax(1)
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)
    teach_foreign(run, named=True, output="scores")
    torch.testing.assert_close(Run(run).predict(path).values, expected, rtol=0, atol=1e-6)
    teach_foreign(run, dense=True, class_dim=1)
    dense = Net(dense=True).eval()
    save_weights(dense.state_dict(), run / "student.safetensors", {"input_shape": "[3, 6, 6]", "task": "multiclass"})
    found = Run(run).predict(path).masks[0]
    assert torch.equal(found, dense(2 * values_of(path))[0].argmax(0))
    assert not torch.equal(found, dense(values_of(path))[0].argmax(0))


def test_an_unknown_task_without_class_names(make_run, tmp_path):
    run, net = make_run({}, shape=[3, 6, 6], source=FAKE, classes=["cat"])
    teach_foreign(run)
    save_weights(net.state_dict(), run / "student.safetensors", {"input_shape": "[3, 6, 6]"})
    with pytest.raises(InputError, match="the task of its module is not known, and it has 2 outputs for 0 class names"):
        Run(run).predict(picture(tmp_path / "a.png", (6, 6)))


# Exported files, without the run.


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("torch_export", ".pt2")])
def test_an_exported_file_alone(trained, tmp_path, kind, suffix):
    run, test = trained
    metadata = Run(run).metadata | {"class_dim": "null"}
    file = tmp_path / f"small{suffix}"
    export_student(Run(run).student().eval(), torch.zeros(2, 3, 8, 8), file, kind, metadata)
    found = predict(file, test)
    expected = Run(run).predict(test)
    assert (found.names, found.paths, found.task) == (expected.names, expected.paths, "multiclass")
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
    export_student(Run(run).student().eval(), torch.zeros(2, 3, 8, 8), file, kind, metadata | {"preprocessing": "null"})
    with pytest.raises(InputError, match="does not describe the way from a picture"):
        predict(file, test)


# What is refused.


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([9], {}, "predict takes pictures"),
        ({"ids": [4], "mask": [4]}, {}, "predict takes pictures"),
        ([[3, 6, 6], [3, 6, 6]], {}, "predict takes pictures"),
        ([3, 6, 6], {"source": {"class_path": "DatasetSource", "init_args": {"train": "nothing"}}}, "the data of"),
    ],
)
def test_runs_that_take_no_pictures(make_run, tmp_path, shape, data, message):
    run, _ = make_run({}, shape=shape, source=data.get("source", FAKE))
    with pytest.raises(InputError, match=message):
        Run(run).predict(picture(tmp_path / "a.png", (6, 6)))


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 0}, "batch_size"), ({"workers": -1}, "workers")])
def test_numbers_out_of_range(trained, options, message):
    with pytest.raises(InputError, match=f"{message} must be a whole number of at least"):
        Run(trained[0]).predict(trained[1], **options)


def test_models_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.onnx").write_text("")
    for path, message in (
        ("gone", "does not exist"),
        ("a.txt", "must be the folder of a run"),
        ("a.onnx", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            load_predictor(tmp_path / path)
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        load_predictor(tmp_path)
