"""A folder with every oddity of real ones is trained on, tested, predicted and cached right, also after it has changed.

One process and two. The folder is that of odd_folder.py.
"""

import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from odd_folder import NFC, NFD, make_odd_folder, picture

from kd_lightning import SemiSupervisedDataModule
from kd_lightning.__main__ import main
from kd_lightning.data import ImageFolder
from kd_lightning.models import CifarResNet
from kd_lightning.runs.results import read_result

pytestmark = pytest.mark.slow
NETWORK = {"class_path": "CifarResNet", "init_args": {"depth": 8, "widths": [4, 4, 8, 8], "num_classes": 5}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder, a label file, and a teacher."""
    monkeypatch.chdir(tmp_path)
    make_odd_folder(tmp_path / "pictures")
    # names as macOS writes them; rows of the validation part agree with the source; one picture has no label yet
    rows = [[f"pictures/train/{NFD}/{path.name}", NFD] for path in Path("pictures/train", NFD).iterdir()]
    rows += [["pictures/unlabeled/linked/2.png", "café"]]
    Path("labels.csv").write_text("".join(f"{path},{name}\n" for path, name in [["path", "label"], *rows]))
    torch.manual_seed(0)
    torch.save(CifarResNet(8, (4, 4, 8, 8), num_classes=5).state_dict(), "teacher.pt")
    return tmp_path / "pictures"


def config(method, **data):
    """Networks with BatchNorm. 33 pictures to train on, in batches of 4, leave one row over; so do 17 a process."""
    teacher = {"class_path": "kd_lightning.load_weights", "init_args": {"model": NETWORK, "path": "teacher.pt"}}
    cached = {"class_path": "Teacher", "init_args": {"network": teacher, "cache": "cache", "cache_dtype": "float32"}}
    model = {
        "SupervisedModule": {},
        "DistillModule": {"teacher": cached, "soft_weight": 0.5},
        "PseudoLabelModule": {"selection": {"class_path": "FixedThreshold", "init_args": {"threshold": 0.3}}},
    }[method]
    source = {
        "train": "pictures/train",
        "test": "pictures/test",
        "unlabeled": "pictures/unlabeled",
        "image_size": [16, 12],
    }
    content = {
        "name": method,
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
        "model": {"class_path": method, "init_args": {"student": NETWORK, **model}},
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {
                "source": {"class_path": "ImageFolder", "init_args": source},
                "batch_size": 4,
                "num_views": 2,
                "val_size": 2,
                "labeled": 4,
                "labeled_at_most": True,
                "label_file": "labels.csv",
            }
            | data,
        },
    }
    Path(f"{method}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", f"{method}.yaml"]


def newest(name):
    return max(Path("runs", name).glob("version_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def table(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named(split, kind):
    """Paths or contents of all samples of a saved split: those of the source's unlabeled part come last."""
    return split["samples"][kind] + split["pool"][kind]


def color(image):
    """The mean of each channel."""
    return np.asarray(image.convert("RGB"), np.float64).mean((0, 1))


def test_samples(folder):
    """What is a sample, of which class, and what it looks like."""
    source = ImageFolder("pictures/train", "pictures/test", "pictures/unlabeled", image_size=(16, 12))
    data = SemiSupervisedDataModule(source, val_size=0)
    data.setup("fit")
    assert data.class_names == ["birds", NFC, "cats", "dogs", "empty"]
    parts = source.load()
    assert torch.bincount(parts.train.targets, minlength=5).tolist() == [3, 12, 13, 12, 0]
    assert torch.bincount(parts.test.targets, minlength=5).tolist() == [0, 4, 4, 4, 0]
    assert len(parts.unlabeled) == 9
    names = data.identities("train").paths[:40]
    assert len({*names}) == 40
    assert not [name for name in names if Path(name).name.startswith((".", "broken", "notes"))]
    for index, name in enumerate(names):
        image = data.image(index)
        assert image.mode == "RGB"
        assert image.size == (18, 14), name  # the turned one, too
        grey = "grey" in name or "bits" in name or "float" in name
        kind = unicodedata.normalize("NFC", name.partition("/")[0])
        wanted = color(picture(kind, 20 if grey else 0).convert("L" if grey else "RGB"))
        assert np.abs(wanted - color(image)).max() < (1 if grey else 10), name


def test_a_lone_row(folder):
    """The batches of the fits below."""
    (path,) = (argument for argument in config("DistillModule") if argument.endswith("yaml"))
    settings = yaml.safe_load(Path(path).read_text())["data"]["init_args"]
    folders = settings.pop("source")["init_args"]
    data = SemiSupervisedDataModule(ImageFolder(**folders), **settings)
    data.setup("fit")
    assert [*map(len, data.train_dataloader())] == [4, 4, 4, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("method", ["SupervisedModule", "DistillModule", "PseudoLabelModule"])
def test_one_process(folder, method):
    pool = method == "PseudoLabelModule"
    arguments = config(method, unlabeled="source" if pool else "rest", batch_size=9 if pool else 4)
    main(["fit", *arguments])
    run = newest(method)
    split = json.loads((run / "split.json").read_text())
    *indices, by_file = sorted(split["labeled"] + split["unlabeled"] + split["val"])
    assert indices == list(range(40))
    assert by_file in split["labeled"]
    assert named(split, "paths")[by_file] == "linked/2.png"
    counts = json.loads((run / "samples.json").read_text())
    assert [[*row.values()] for row in counts["classes"]] == [
        ["birds", 1, 2, 0],  # a small class
        [NFC, 11, 2, 4],  # those of the label file
        ["cats", 4, 2, 4],
        ["dogs", 4, 2, 4],
        ["empty", 0, 0, 0],
    ]
    assert counts["samples"] == {
        "labeled": 20,
        "coarse": 0,
        "unlabeled": 8 if pool else 13,
        "validation": 8,
        "test": 12,
        "validation_without_label": 0,
        "test_without_label": 0,
        "unused": 13 if pool else 8,
        "passed_over": 9,
    }
    for command in ("test", "validate", "predict"):
        main([command, *arguments])
    assert [row["path"] for row in table(newest(method) / "predictions.csv")] == [
        name
        for kind in (NFC, "cats", "dogs")
        for name in (f"{kind}/{number}.png" for number in [100, 101, 102, *(["copy"] if kind == "cats" else [103])])
    ]
    assert read_result(run, "test").samples == 12
    assert read_result(run, "val").samples == 8


def test_files_are_renamed_added_and_removed(folder):
    arguments = config("DistillModule")
    main(["fit", *arguments])
    run = newest("DistillModule")
    before = json.loads((run / "split.json").read_text())
    (cache,) = Path("cache").iterdir()
    paths, contents = named(before, "paths"), named(before, "contents")
    parts = {part: {contents[index] for index in before[part]} for part in ("labeled", "unlabeled", "val")}

    gone = next(paths[index] for index in before["unlabeled"] if paths[index].startswith("cats"))
    (folder / "train" / gone).unlink()
    renamed = next(paths[index] for index in before["val"] if paths[index].startswith("dogs"))
    (folder / "train" / renamed).rename(folder / "train" / "dogs" / "00 first.png")
    picture("cats", 300).save(folder / "train" / "cats" / "000.png")

    main(["fit", *arguments, "--data.init_args.labeled", str(run / "split.json"), "--name", "again"])
    after = json.loads((newest("again") / "split.json").read_text())
    contents = named(after, "contents")
    again = {part: {contents[index] for index in after[part]} for part in ("labeled", "unlabeled", "val")}
    assert again["labeled"] == parts["labeled"]
    assert again["val"] == parts["val"]
    (new,) = again["unlabeled"] - parts["unlabeled"]
    assert named(after, "paths")[contents.index(new)] == "cats/000.png"
    assert len(again["unlabeled"]) == len(parts["unlabeled"])
    for command in ("test", "validate"):
        main([command, *arguments])
    assert cache.is_dir()


def test_two_processes_equal_one(folder, processes):
    """Same samples, same stored outputs of the teacher, same figures; a lone row ends each epoch."""
    arguments = config("DistillModule")
    main(["fit", *arguments])
    one = newest("DistillModule")
    cached = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*") if path.is_file()}
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    arguments += ["--name", "two"]
    processes.run_ranks(["fit", *arguments, *two])
    run = newest("two")
    for name in ("split.json", "samples.json"):
        assert (run / name).read_text() == (one / name).read_text()
    assert cached
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*") if path.is_file()} == cached
    processes.run_ranks(["test", *arguments, *two])
    found = read_result(run, "test")
    rows = found.predictions()
    main(["test", *arguments])
    assert found.samples == 12
    assert rows == read_result(run, "test").predictions()
    assert found.figures == pytest.approx(read_result(run, "test").figures, abs=1e-5)


def test_fewer_test_samples_than_processes(folder, processes):
    """The process without a sample of its own takes part, and counts for nothing."""
    for path in [*(folder / "test").rglob("*.png")]:
        if path.name not in ("101.png", "102.png") or path.parent.name != "cats":
            path.unlink()
    arguments = config("DistillModule")
    main(["fit", *arguments])
    run = newest("DistillModule")
    found = []
    for world in (1, 3):
        devices = ["--trainer.devices", str(world), "--trainer.strategy", "ddp"] if world > 1 else []
        for command in ("test", "predict"):
            argv = [command, *arguments, *devices]
            processes.run_ranks(argv, world=world) if world > 1 else main(argv)
        result = read_result(run, "test")
        rows = table(run / "predictions.csv")
        assert [row["path"] for row in rows] == [row.path for row in result.predictions()]
        found.append((result.samples, result.figures, rows))
        for path in (*run.glob("test*"), run / "predictions.csv"):
            path.unlink()
    (one, figures, rows), (three, others, theirs) = found
    assert one == three == 2
    assert figures.keys() == others.keys() >= {"loss", "accuracy", "agreement", "teacher_kl", "teacher_accuracy"}
    assert others == pytest.approx(figures, abs=1e-6)
    for row, other in zip(rows, theirs, strict=True):
        names = ["index", "path", "content", "prediction"]
        assert [other.pop(name) for name in names] == [row.pop(name) for name in names]
        assert [*map(float, other.values())] == pytest.approx([*map(float, row.values())], abs=1e-5)
