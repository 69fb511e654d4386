"""duplicates: equal and similar samples of a run or a config, through the command line."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import kd_lightning.cli.commands.duplicates as command
from kd_lightning.__main__ import main
from kd_lightning.data import DatasetSource, ImageFolder, SemiSupervisedDataModule


def scene(seed, size=64):
    """A picture whose frequencies are those of photographs."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    plane = np.fft.ifft2(np.fft.fft2(draw.normal(size=(size, size))) / frequency**1.3).real
    plane = (plane - plane.min()) / np.ptp(plane) * 255
    return Image.fromarray(np.stack([plane, 0.8 * plane, 0.6 * plane], axis=2).astype(np.uint8))


@pytest.fixture
def folder(config):
    """Pictures of two classes in train, unlabeled and test, some of which are copies; and a config."""
    for number in range(12):
        for part, start in (("train", 0), ("test", 100)):
            for kind, name in enumerate(("cats", "dogs")):
                path = Path("data", part, name, f"{number}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                if part == "train" or number < 4:
                    scene(start + 50 * kind + number).save(path)
    Path("data/unlabeled").mkdir()
    shutil.copy("data/train/cats/0.png", "data/test/dogs/equal.png")  # equal, of another class
    scene(1).resize((48, 40)).save("data/test/cats/smaller.jpg", quality=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(2).transpose(Image.Transpose.ROTATE_90).save("data/test/cats/turned.jpg", exif=exif, quality=80)
    scene(3).save("data/unlabeled/again.jpg", quality=60)
    scene(900).save("data/unlabeled/other.jpg", quality=60)
    source = {"class_path": "kd_lightning.data.ImageFolder", "init_args": {"image_size": 32}}
    source["init_args"] |= {part: f"data/{part}" for part in ("train", "test", "unlabeled")}
    arguments = {"source": source, "val_size": 3, "unlabeled": "source"}
    config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": arguments}
    config["model"] = {
        "class_path": "SupervisedModule",
        "init_args": {"student": {"class_path": "DigitsCNN", "init_args": {"width": 4}}},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return config


def table(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named(rows):
    """The pairs of file names."""
    return {frozenset((Path(row["path_a"]).name, Path(row["path_b"]).name)) for row in rows}


def test_copies_in_a_folder_of_pictures(folder, capsys):
    main(["duplicates", "--config", "config.yaml"])
    rows = table("runs/tiny_duplicates.csv")
    assert list(rows[0]) == command.COLUMNS
    first, *others = rows
    assert (first["path_a"], first["path_b"]) == ("dogs/equal.png", "cats/0.png")
    assert (first["part_a"], first["distance"], first["exact"]) == ("test", "0", "yes")
    assert (first["label_a"], first["label_b"]) == ("dogs", "cats")
    copies = named(rows)
    assert frozenset(("smaller.jpg", "1.png")) in copies
    assert frozenset(("turned.jpg", "2.png")) in copies
    assert len(rows) <= 4 and {row["exact"] for row in others} == {"no"}
    assert all(int(row["distance"]) <= 6 for row in others)
    for row in rows:  # a picture has its label; one of the pool has none
        for end in "ab":
            name = row[f"path_{end}"].rpartition("/")[0]
            assert row[f"label_{end}"] == ("" if name == "unlabeled" else name)
    with Image.open("runs/tiny_duplicates.png") as sheet:
        assert sheet.size[0] > 300
    out = capsys.readouterr().out
    assert "test and validation: pairs of equal samples 1, of similar pictures 0, with different labels 1" in out
    assert "20 training, 6 validation, 11 test samples" in out
    assert {path.name for path in Path("runs").iterdir()} == {"tiny_duplicates.csv", "tiny_duplicates.png"}


def test_within_one_side(folder):
    main(["duplicates", "--config", "config.yaml", "--within", "--out", "here/all.csv"])
    across = {frozenset(pair) for pair in (("equal.png", "0.png"), ("smaller.jpg", "1.png"), ("turned.jpg", "2.png"))}
    assert named(table("here/all.csv")) == across | {frozenset(("again.jpg", "3.png"))}
    assert Path("here/all.png").is_file()


def test_distance_and_number_of_pairs(folder, capsys):
    main(["duplicates", "--config", "config.yaml", "--distance", "0", "--pairs", "1"])
    (row,) = table("runs/tiny_duplicates.csv")
    assert row["exact"] == "yes"


def test_together_leaves_near_copies_alone(folder):
    main(["duplicates", "--config", "config.yaml", "--data.duplicates", "together"])
    rows = table("runs/tiny_duplicates.csv")
    assert frozenset(("smaller.jpg", "1.png")) in named(rows)
    assert {row["exact"] for row in rows} == {"no"}


def test_a_config_that_refuses_them(folder, fails):
    main(["duplicates", "config.yaml", "--data.duplicates=refuse"])
    assert table("runs/tiny_duplicates.csv")[0]["exact"] == "yes"
    assert "duplicates: refuse" in fails("fit", "--config", "config.yaml", "--data.duplicates", "refuse")


def test_a_run(folder, capsys):
    """Its own split counts."""
    source = ImageFolder("data/train", "data/test", "data/unlabeled", image_size=32)
    data = SemiSupervisedDataModule(source, val_size=3, unlabeled="source", seed=5)
    data.prepare_data()
    data.setup("fit")
    run = Path("runs/tiny/version_0")
    data.save_split(run / "split.json")
    (run / "config.yaml").write_text(yaml.safe_dump(folder))
    main(["duplicates", str(run)])
    val = {*json.loads((run / "split.json").read_text())["val"]}
    rows = table(run / "duplicates.csv")
    assert rows and (run / "duplicates.png").is_file()
    for row in rows:
        assert (row["part_b"] == "validation") == (int(row["index_b"]) in val)


def test_labels_of_a_label_file_count(folder):
    """Corrected ones of training and validation, and those of the unlabeled part."""
    rows = ["unlabeled/again.jpg,dogs,", "unlabeled/other.jpg,cats,"]
    rows += [
        f"train/cats/{number}.png,,missing" if number == 5 else f"train/cats/{number}.png,dogs," for number in range(12)
    ]
    Path("data/labels.csv").write_text("\n".join(["path,label,kind", *rows]))
    shutil.copy("data/train/cats/5.png", "data/test/cats/equal5.png")
    folder["data"]["init_args"] |= {"label_file": "data/labels.csv", "correct_val": True}
    Path("config.yaml").write_text(yaml.safe_dump(folder))
    main(["duplicates", "--config", "config.yaml", "--within", "--distance", "6"])
    rows = table("runs/tiny_duplicates.csv")
    seen = {row[f"path_{end}"]: (row[f"part_{end}"], row[f"label_{end}"]) for row in rows for end in "ab"}
    assert {part for part, _ in seen.values()} >= {"training", "validation", "test"}
    for path, (_, label) in seen.items():
        by_file = {"cats/5.png": "", "cats/equal5.png": "cats", "again.jpg": "dogs", "dogs/equal.png": "dogs"}
        corrected = "dogs" if path.startswith("cats/") and path.endswith(".png") else path.split("/")[0]
        assert label == by_file.get(path, corrected), path


def test_no_pairs_leave_no_sheet_of_an_earlier_time(folder, capsys):
    main(["duplicates", "--config", "config.yaml"])
    shutil.rmtree("data/test")
    shutil.rmtree("data/unlabeled")
    arguments = folder["data"]["init_args"]
    arguments["source"]["init_args"] |= {"test": None, "unlabeled": None}
    arguments["unlabeled"] = "rest"
    Path("config.yaml").write_text(yaml.safe_dump(folder))
    main(["duplicates", "--config", "config.yaml"])
    assert table("runs/tiny_duplicates.csv") == []
    assert not Path("runs/tiny_duplicates.png").exists()
    assert "no equal samples" in capsys.readouterr().out


# Other data.


def report(train, test=None, unlabeled=None, pool="rest", **more):
    data = SemiSupervisedDataModule(DatasetSource(train, test, unlabeled), unlabeled=pool)
    data.setup("fit")
    return command.report(data, Path("out.csv"), **more)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_data_that_are_no_pictures(capsys):
    values = torch.rand(40, 5)
    labels = torch.arange(40) % 2
    found = report(TensorDataset(values, labels), TensorDataset(values[:3] + 0.0, labels[:3]))
    assert [pair.exact for pair in found.rows] == [True] * 3
    assert not Path("out.png").exists()
    out = capsys.readouterr().out
    assert "no sample is a picture: compared by content only" in out


def test_normalised_tensors(capsys):
    pictures = torch.stack([torch.tensor(np.asarray(scene(n))).permute(2, 0, 1).float() for n in range(30)])
    labels = torch.arange(30) % 2
    found = report(TensorDataset(pictures, labels), TensorDataset(pictures[:4] / 51.0 - 2.0, labels[:4]))
    tests = [pair for pair in found.rows if not pair.exact]
    assert len(tests) == 4
    assert Path("out.png").is_file()


def test_small_pictures_are_named(capsys):
    report(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 2))
    assert "8 x 8 pixels are small" in capsys.readouterr().out


def test_blank_pictures_do_not_flood_the_table(capsys):
    blank = torch.zeros(400, 1, 40, 40)
    pictures = torch.stack([torch.tensor(np.asarray(scene(n, 40).convert("L"))).float()[None] for n in range(4)]) / 255
    train = TensorDataset(torch.cat([blank, pictures]), torch.arange(404) % 2)
    found = report(train, TensorDataset(torch.cat([blank[:50], pictures * 0.9]), torch.arange(54) % 2), pairs=20)
    assert len(found.rows) == 20
    near = [pair for pair in found.rows if not pair.exact]
    assert len(near) >= 4 and len({pair.b for pair in near}) >= 4
    out = capsys.readouterr().out
    assert "450 pictures are blank" in out
    assert "450 samples are equal" in out
    assert "--pairs 20: the closest 20 of more than" in out


def test_all_pictures_blank(capsys):
    report(TensorDataset(torch.zeros(40, 1, 40, 40), torch.arange(40) % 2))
    assert "all pictures are blank: compared by content only" in capsys.readouterr().out


def test_the_transductive_pool_is_the_test_part():
    pictures = torch.rand(40, 1, 40, 40)
    train, test = TensorDataset(pictures[:30], torch.arange(30) % 2), TensorDataset(pictures[30:], torch.arange(10) % 2)
    assert report(train, test, pool="test").rows == []


def test_a_source_without_test_part():
    assert report(TensorDataset(torch.rand(40, 1, 40, 40), torch.arange(40) % 2)).rows == []


class Noise(Dataset):
    """Another picture each time."""

    targets = list(range(2)) * 20

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(1, 40, 40), self.targets[index]


def test_a_dataset_of_random_pictures_is_refused():
    with pytest.raises(command.InputError, match="differently each time"):
        report(Noise())


# Wrong input.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["run", "config"]),
        (["--config", "config.yaml", "--distance", "17"], ["--distance", "from 0 to 16", "17"]),
        (["--config", "config.yaml", "--distance", "-1"], ["--distance", "from 0 to 16", "-1"]),
        (["--config", "config.yaml", "--pairs", "0"], ["--pairs", "at least 1", "0"]),
        (["--config", "config.yaml", "--images", "1"], ["--images", "at least 2", "1"]),
        (["--config", "config.yaml", "--out", "x.txt"], ["--out", ".csv", "x.txt"]),
        (["--config", "config.yaml", "--dist", "3"], ["dist"]),
        (["--config", "config.yaml", "--data.labled", "3"], ["labled"]),
        (["runs", "--config", "config.yaml"], ["no config or overrides", "--config"]),
        (["runs", "--unknown", "3"], ["no config or overrides", "--unknown 3"]),
        (["nowhere"], ["nowhere is no run"]),
        (["--config", "none.yaml"], ["none.yaml"]),
    ],
)
def test_wrong_arguments(config, fails, arguments, parts):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("runs").mkdir()
    message = fails("duplicates", *arguments)
    for part in parts:
        assert part in message


def test_without_data(config, fails):
    del config["data"]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert "needs data" in fails("duplicates", "--config", "config.yaml")


def test_without_imagehash(config, fails, monkeypatch):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert "pip install 'kd-lightning[weak]'" in fails("duplicates", "--config", "config.yaml")
