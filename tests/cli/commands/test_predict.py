"""predict RUN_OR_FILE SOURCE...: its files, its lines and its exit status."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from kd_lightning.__main__ import main
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import metadata_texts, save_weights

CLASSES = ["=cat", "dog"]


class Net(nn.Sequential):
    def __init__(self, outputs: int = 2, dense: bool = False) -> None:
        super().__init__(nn.Conv2d(3, outputs, 1), *([] if dense else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a finished run in ``run``, and three pictures and a broken one in ``photos``."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(3):
        pixels = np.full((6, 6, 3), 80 * number + 20, np.uint8)
        Image.fromarray(pixels).save(f"photos/{number}.png")
    Path("photos/broken.jpg").write_text("no picture")

    def make(classes=CLASSES, net=None, **arguments):
        torch.manual_seed(0)
        net = net or {"outputs": len(classes)}
        source = {"class_path": "FakeData", "init_args": {"image_size": [3, 6, 6]}}
        student = {"class_path": f"{__name__}.Net", "init_args": net}
        config = {
            "model": {"class_path": "SupervisedModule", "init_args": {"student": student, **arguments}},
            "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source}},
        }
        Path("run").mkdir()
        Path("run/config.yaml").write_text(yaml.safe_dump(config))
        metadata = {"task": arguments.get("task", "multiclass"), "input_shape": [3, 6, 6], "classes": classes}
        save_weights(Net(**net).state_dict(), Path("run/student.safetensors"), metadata_texts(metadata))

    return make


@pytest.fixture
def run(make):
    make()


def table(path):
    with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [*csv.DictReader(file)]


def status(*args):
    with pytest.raises(SystemExit) as error:
        main(["predict", *args])
    return error.value.code


@pytest.mark.usefixtures("run")
def test_csv_on_standard_output(capsys):
    main(["predict", "run", "photos"])
    out, err = capsys.readouterr()
    found = Run("run").predict("photos")
    lines = out.splitlines()
    assert lines[0] == "path,class,probability,error"
    rows = [*csv.DictReader(io.StringIO(out))]
    assert (
        [row["path"] for row in rows]
        == found.paths
        == [f"photos/{n}" for n in ("0.png", "1.png", "2.png", "broken.jpg")]
    )
    assert [row["class"].removeprefix("'") for row in rows] == [one.name or "" for one in found]
    assert [row["probability"] for row in rows[:3]] == [f"{one.probability:.6g}" for one in list(found)[:3]]
    assert rows[3]["class"] == rows[3]["probability"] == ""
    assert rows[3]["error"] == "it has no format of pictures that Pillow reads"
    assert err.splitlines()[-2] == f"cannot be read: photos/broken.jpg: {rows[3]['error']}"
    assert err.splitlines()[-1].startswith("4 pictures in ")
    assert err.splitlines()[-1].endswith("; 1 cannot be read")
    assert "\r" not in err  # progress is for terminals


@pytest.mark.usefixtures("run")
def test_formulas_are_escaped():
    Path("=photos").mkdir()
    Image.new("RGB", (6, 6)).save("=photos/a.png")
    main(["predict", "run", "=photos", "--all", "--out", "found.csv"])
    (row,) = table("found.csv")
    assert row["path"] == "'=photos/a.png"
    assert row["class"] in ("'=cat", "dog")
    assert [*row] == ["path", "class", "probability", "error", "probability_=cat", "probability_dog"]
    assert float(row["probability_=cat"]) + float(row["probability_dog"]) == pytest.approx(1)


@pytest.mark.usefixtures("run")
def test_json_lines_and_parquet():
    found = Run("run").predict("photos")
    main(["predict", "run", "photos", "--all", "--out", "new/found.jsonl"])
    rows = [json.loads(line) for line in Path("new/found.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == [one.name for one in found]
    assert [row["probability"] for row in rows] == [one.probability for one in found]
    values = [[row["probabilities"][name] for name in CLASSES] for row in rows]
    assert values[:3] == found.values[:3].tolist()
    assert values[3] == [None, None]
    parquet = pytest.importorskip("pyarrow.parquet")
    main(["predict", "run", "photos", "--all", "--out", "found.parquet"])
    read = parquet.read_table("found.parquet").to_pylist()
    assert [row["path"] for row in read] == found.paths
    assert [row["class"] for row in read] == [one.name for one in found]
    assert [row["probability_dog"] for row in read[:3]] == found.values[:3, 1].tolist()
    assert read[3]["probability_dog"] is None
    main(["predict", "run", "found.parquet", "--out", "again.csv"])  # a table of predictions names pictures
    assert [row["path"] for row in table("again.csv")] == found.paths


@pytest.mark.usefixtures("run")
def test_no_file_can_be_read(capsys):
    assert status("run", "photos/broken.jpg", "gone.png", "--out", "found.csv") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "found.csv: none of 2 pictures can be read"
    assert [row["error"] != "" for row in table("found.csv")] == [True, True]


@pytest.mark.usefixtures("run")
def test_many_files_that_cannot_be_read(capsys):
    main(["predict", "run", *(f"{n}.png" for n in range(15)), "photos/0.png", "--out", "found.csv"])
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("cannot be read: ") for line in lines) == 11
    assert lines[-2] == "cannot be read: 5 more; the column error has all"


@pytest.mark.usefixtures("run")
def test_a_path_that_is_no_text(capsys):
    name = b"photos/\xff.png"
    Path(os.fsdecode(name)).write_bytes(Path("photos/0.png").read_bytes())
    for suffix in ("csv", "jsonl", "parquet"):
        main(["predict", "run", "photos", "--out", f"found.{suffix}"])
    assert name in Path("found.csv").read_bytes()
    assert os.fsencode([row["path"] for row in table("found.csv")][-1]) == name
    paths = [json.loads(line)["path"] for line in Path("found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert os.fsencode(paths[-1]) == name
    main(["predict", "run", "photos"])
    assert "photos/" in capsys.readouterr().out


def test_multilabel(make):
    make(["a", "b", "c"], task="multilabel")
    found = Run("run").predict("photos")
    main(["predict", "run", "photos", "--out", "found.csv"])
    assert [row["class"] for row in table("found.csv")] == [";".join(one.name or ()) for one in found]
    main(["predict", "run", "photos", "--out", "found.parquet"])
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table("found.parquet").to_pylist()
    assert [row["class"] for row in rows] == [None if one.name is None else [*one.name] for one in found]


def test_regression(make, capsys):
    make([], net={"outputs": 1}, task="regression", hard_loss={"class_path": "torch.nn.MSELoss"})
    main(["predict", "run", "photos", "--out", "found.csv"])
    values = Run("run").predict("photos").values[:, 0].tolist()
    assert [row["value"] for row in table("found.csv")] == [*(f"{value:.6g}" for value in values[:3]), ""]
    assert status("run", "photos", "--all") == 2
    assert "--all is for probabilities" in capsys.readouterr().err


def test_masks(make, capsys):
    make(["sky", "road", "tree"], net={"outputs": 3, "dense": True}, class_dim=1)
    Path("photos/deep").mkdir()
    Image.new("RGB", (6, 8), "blue").save("photos/deep/0.png")
    assert status("run", "photos") == 2
    assert "--out must name a file" in capsys.readouterr().err
    main(["predict", "run", "photos", "--out", "found.csv"])
    rows, found = table("found.csv"), Run("run").predict("photos")
    names = ["found_masks/0.png", "found_masks/1.png", "found_masks/2.png", "", "found_masks/0_2.png"]
    assert [row["mask"] for row in rows] == names
    for row, mask in zip(rows, found.masks, strict=True):
        if mask is not None:
            assert np.array_equal(np.asarray(Image.open(row["mask"])), mask.numpy())
    assert {path.name for path in Path().iterdir()} == {"run", "photos", "found.csv", "found_masks"}
    assert status("run", "photos", "--out", "found.csv") == 2  # masks of other pictures would stay among the new ones
    assert "found_masks, where masks would lie, exists" in capsys.readouterr().err


@pytest.mark.usefixtures("run")
def test_an_old_file_stays_if_the_command_fails(monkeypatch):
    Path("found.csv").write_text("old")

    def fail(network, x):
        raise RuntimeError("broken")

    monkeypatch.setattr(Net, "forward", fail)
    assert status("run", "photos", "--out", "found.csv") == 2
    assert Path("found.csv").read_text() == "old"
    assert {path.name for path in Path().iterdir()} == {"run", "photos", "found.csv"}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "photos", "--out", "found.txt"], "--out must end in .csv, .parquet, .jsonl, got found.txt"),
        (["run", "list.csv", "--out", "list.csv"], "--out: list.csv is one of the sources, and would be lost"),
        (["run", "photos", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["run", "photos", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["nothing", "photos"], "nothing is no run and no exported file: it does not exist"),
        (["photos", "photos"], "photos is no run: it has no config.yaml"),
        (["run/config.txt", "photos"], "run/config.txt is no run and no exported file"),
        (["run", "gone/*.png"], "no picture fits gone/*.png"),
        (["run", "gone.png", "gone.csv"], "source: there is no file at gone.png, gone.csv"),
    ],
)
def test_what_is_refused(args, message, capsys):
    Path("list.csv").write_text("path\nphotos/0.png\n")
    assert status(*args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")
    assert Path("list.csv").read_text() == "path\nphotos/0.png\n"


def test_a_config_is_for_lightning(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: a\n")

    def start(args):
        raise SystemExit(" ".join(args))

    monkeypatch.setattr("kd_lightning.cli.main.DistillCLI", start)
    assert status("--config", "a.yaml").startswith("predict --config")
    assert status("a.yaml") == "predict --config=a.yaml"


@pytest.mark.usefixtures("run")
def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["predict", "run", "photos", "--batch_size", "1", "--workers", "0"])
    err = capsys.readouterr().err
    assert "1 of 4 pictures, " in err
    assert err.splitlines()[-1].removeprefix("\x1b[K").startswith("4 pictures in ")
