"""ImageTable: each row meets its image, whatever the paths, the separator and the order; and what is refused."""

import csv
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd_lightning import ImageTable, InputError, SemiSupervisedDataModule
from kd_lightning.__main__ import main
from kd_lightning.data.sources.report_once import report_once
from kd_lightning.runs.run import Run

COLORS = {"a.png": 10, "b.png": 20, "c.png": 30, "d.png": 40, "e.png": 50, "deep/f.png": 60, "deep/a2.png": 70}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, color in COLORS.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (color, 0, 0)).save(path)
    return tmp_path


def write(*rows, name="labels.csv", separator=",", encoding="utf-8"):
    with Path(name).open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return name


def load(*rows, table=None, **arguments):
    return ImageTable(table or write(*rows), **({"folder": "images", "image_size": 8} | arguments)).load()


def content(part):
    """{colour: label} of a part."""
    return {part.images[n].getpixel((0, 0))[0]: part.targets[n].tolist() for n in range(len(part.images))}


ROWS = [("b.png", "dog"), ("a.png", "cat"), ("deep/f.png", "dog"), ("c.png", "")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["path", "filename", "FilePath", "image", "image_id"])
def test_labels_meet_their_images(folder, separator, column):
    parts = load(table=write((column, "label"), *ROWS, separator=separator))
    assert parts.class_names == ["cat", "dog"]
    assert content(parts.train) == {20: 1, 10: 0, 60: 1, 30: -100}


def test_parquet_and_utf16(folder):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS, columns=["path", "class"]).to_parquet("labels.parquet")
    assert content(load(table="labels.parquet").train) == {20: 1, 10: 0, 60: 1, 30: -100}
    assert content(load(table=write(("path", "class"), *ROWS, encoding="utf-16")).train)[10] == 0


def test_the_order_of_rows_does_not_matter(folder):
    one, other = (load(("path", "label"), *rows) for rows in (ROWS, ROWS[::-1]))
    assert one.train.images.paths == other.train.images.paths
    assert torch.equal(one.train.targets, other.train.targets)


@pytest.mark.parametrize(
    "cell",
    [
        "f.png",
        "f",
        "deep/f",
        "./deep/f.png",
        "deep\\f.png",
        "C:\\data\\images\\deep\\f.png",
        "/data/upload/7/deep/f.png",
        "https://tool.example/data/deep%2Ff.png?x=1",
        "https://tool.example/deep/f.png?key=images/c.png",
        "s3://bucket/images/deep/f.png",
        "/data/local-files/?d=deep/f.png",
        "/data/local-files/?d=home/photos%5Cdeep%5Cf.png",
        "http://localhost:8080/data/local-files/?d=images%2Fdeep/f.png",
        "/data/upload/7/5f2e8a4b-f.png",
        "https://tool.example/data/upload/12/0cafe123-f.png",
    ],
)
def test_paths_of_other_machines(folder, cell):
    assert content(load(("image", "label"), (cell, "x")).train) == {60: 0}


def test_addresses_name_one_image(folder):
    """Neither the end of an address's query nor a part of a file's own name decides."""
    for name in ("5f2e8a4b-a.png", "deep/c.png"):
        Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "images" / name)
    parts = load(("image", "label"), ("/data/local-files/?d=deep/c.png", "x"), ("/data/upload/1/5f2e8a4b-a.png", "y"))
    assert {Path(path).name for path in parts.train.images.paths} == {"c.png", "5f2e8a4b-a.png"}
    assert "images/deep/c.png" in parts.train.images.paths
    for cell in ("5f2e8a4b-b.png", "/data/upload/1/5f2e8a4-b.png", "/data/local-files/?d=deep/b.png"):
        with pytest.raises(InputError, match="has no image of any of its 1 rows"):
            load(("image", "label"), (cell, "x"))


@pytest.mark.parametrize("cell", ["other/a.png", "deep/b.png", "images2/deep/x.png", "a2"])
def test_another_folder_is_another_image(folder, cell):
    """An end that both paths have is not enough, or val/1.jpg would be train/1.jpg."""
    (folder / "images/deep/a2.png").unlink()
    (folder / "images/a.png").rename(folder / "images/deep/a.png")
    with pytest.raises(InputError, match="has no image of any of its 1 rows"):
        load(("image", "label"), (cell, "x"))


def test_unicode_and_spaces(folder):
    name = unicodedata.normalize("NFD", "caf\u00e9 1.png")
    Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "images" / name)
    for cell in ("caf\u00e9 1.png", name, "caf%C3%A9%201.png"):
        parts = load(("path", "label"), (cell, unicodedata.normalize("NFD", "\u00e9t\u00e9")))
        assert content(parts.train) == {99: 0}
        assert parts.class_names == ["\u00e9t\u00e9"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        (["3.0", "1.0", "2.0"], ["1", "2", "3"]),
        (["007", "7", "cat"], ["007", "7", "cat"]),
        (["0.5", "b", "a"], ["0.5", "a", "b"]),
    ],
)
def test_numbers_are_names(folder, labels, names):
    parts = load(("path", "label"), *zip(("a.png", "b.png", "c.png"), labels, strict=True))
    assert parts.class_names == names
    shown = [label.removesuffix(".0") for label in labels]
    assert content(parts.train) == dict(zip((10, 20, 30), map(names.index, shown), strict=True))


def test_splits(folder):
    rows = [("a.png", "x", "train"), ("b.png", "y", ""), ("c.png", "y", "Valid"), ("d.png", "x", "TEST")]
    rows += [("e.png", "", "unlabeled"), ("f.png", "x", "unlabeled")]
    parts = load(("path", "label", "split"), *rows)
    assert [content(part) for part in (parts.train, parts.val, parts.test)] == [{10: 0, 20: 1}, {30: 1}, {40: 0}]
    assert [image.getpixel((0, 0))[0] for image in parts.unlabeled] == [60, 50]
    data = SemiSupervisedDataModule(ImageTable("labels.csv", "images", image_size=8))
    data.setup("fit")
    assert {data.path(index) for index in data.split.val} == {"images/c.png"}


def test_images_without_a_row(folder, caplog):
    caplog.set_level("INFO")
    report_once.cache_clear()
    for _ in range(2):  # the fits of one command read the table again and again
        assert load(("path", "label"), *ROWS).unlabeled is None
    text = "table: 3 images of images without a row (d.png): left out; unlabeled with others: true"
    assert caplog.messages.count(text) == 1
    parts = load(("path", "label"), *ROWS, others=True)
    assert [image.getpixel((0, 0))[0] for image in parts.unlabeled] == [40, 70, 50]


def any_pictures(folder):
    """Photographs of other sizes, kinds and classes than those of the task, in folders of their own."""
    folder.mkdir()
    (folder / "birds").mkdir()
    Image.new("RGB", (37, 11), (1, 2, 3)).save(folder / "wide.jpg")
    Image.new("L", (9, 50), 4).save(folder / "birds/grey.png")
    Image.new("RGBA", (5, 5), (5, 6, 7, 100)).save(folder / "birds/transparent.PNG")
    (folder / "notes.txt").write_text("no picture")


def test_unlabeled_pictures_of_another_folder(folder):
    """Any pictures train beside the labeled ones, without a label, and those that have a row stay where they are."""
    any_pictures(folder / "photos")
    (folder / "photos/again.png").symlink_to(folder / "images/a.png")
    rows = [(path, label or "cat", "") for path, label in ROWS]
    table = write(("path", "label", "split"), *rows, ("d.png", "", "unlabeled"))
    source = ImageTable(table, "images", unlabeled="photos", image_size=8)
    assert [Path(path).name for path in source.load().unlabeled.paths] == [
        "d.png",
        "grey.png",
        "transparent.PNG",
        "wide.jpg",
    ]
    data = SemiSupervisedDataModule(source, unlabeled="source", val_size=0, batch_size=16)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.x.shape == (8, 3, 8, 8) and (batch.y == -100).sum() == 4
    assert load(("path", "label"), *ROWS, unlabeled="photos").unlabeled is not None
    with pytest.raises(InputError, match="unlabeled: nowhere"):
        load(("path", "label"), *ROWS, unlabeled="nowhere")


def test_several_labels(folder):
    rows = [("a.png", "1", "0", "5"), ("b.png", "", "1", "3")]
    for arguments in ({}, {"label": ["red", "blue"]}):
        parts = load(("filename", "red", "blue", "size"), *rows, **arguments)
        assert parts.class_names == ["red", "blue"]
        assert content(parts.train)[10] == [1, 0]
        assert torch.tensor(content(parts.train)[20]).isnan().tolist() == [True, False]
    parts = load(
        ("path", "tags"), ("a.png", "red| blue"), ("b.png", ""), ("c.png", "blue"), label="tags", separator="|"
    )
    assert parts.class_names == ["blue", "red"]
    assert content(parts.train)[10] == [1, 1]
    assert content(parts.train)[30] == [1, 0]
    assert torch.tensor(content(parts.train)[20]).isnan().all()


def test_what_spreadsheets_make_of_zeros_and_ones(folder):
    """pandas writes 0.0 and 1.0 where a cell is empty; a column without any cell is no label."""
    parts = load(("path", "red", "blue", "note"), ("a.png", "1.0", "0", ""), ("b.png", "", "1", ""))
    assert parts.class_names == ["red", "blue"]
    parts = load(("path", "tags"), ("a.png", "red"), ("b.png", "|"), label="tags", separator="|")
    assert torch.tensor(content(parts.train)[20]).isnan().all()
    assert load(("path", "label"), ("a.png", "--1"), ("b.png", "2")).class_names == ["--1", "2"]


def test_a_folder_that_is_there_is_never_dropped(folder):
    """The label of a picture that is gone does not go to another one of the same name."""
    for cell in ("deep/sub/a.png", "deep/b.png", "x/deep/b.png"):
        with pytest.raises(InputError, match="has no image of any of its 1 rows"):
            load(("path", "label"), (cell, "x"))


def test_numbers_to_predict(folder):
    parts = load(("path", "target"), ("a.png", "1.5"), ("b.png", ""), ("c.png", "-2"), numbers=True)
    assert parts.class_names is None
    assert content(parts.train) == {10: 1.5, 20: pytest.approx(float("nan"), nan_ok=True), 30: -2}
    parts = load(("path", "x", "y"), ("a.png", "1.5", "2"), numbers=True, label=["x", "y"])
    assert content(parts.train) == {10: [1.5, 2]}


def test_weights(folder):
    load(("path", "label", "weight"), ("a.png", "x", "3"), ("b.png", "y", ""), ("c.png", "y", "0.5"))
    data = SemiSupervisedDataModule(ImageTable("labels.csv", "images", image_size=8), val_size=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert dict(zip(batch.index.tolist(), batch.weight.tolist(), strict=True)) == {0: 3, 1: 1, 2: 0.5}
    before = data._labels.hash
    write(("path", "label", "weight"), ("a.png", "x", "3"), ("b.png", "y", ""), ("c.png", "y", "0.6"))
    data = SemiSupervisedDataModule(ImageTable("labels.csv", "images", image_size=8), val_size=0)
    data.setup("fit")
    assert data._labels.hash != before  # a resume notices


def test_an_image_named_twice(folder, caplog):
    """Columns that are not used may differ: one row for each annotator, or for each box."""
    columns = ("path", "label", "split", "weight", "who", "annotator")
    row = ("a.png", "x", "train", "2", "p1", "Ann")
    twice = ("images/a.png", *row[1:5], "Ben")
    parts = load(columns, row, twice, ("b.png", "y", "", "", "", ""), group="who")
    assert content(parts.train) == {10: 0, 20: 1}
    for place, cell in {1: "y", 2: "val", 3: "1", 4: "p2"}.items():
        other = (*twice[:place], cell, *twice[place + 1 :])
        name = columns[place]
        with pytest.raises(
            InputError, match=rf"line 3: 'images/a.png' has {name} '{cell}', but '{row[place]}' in line 2"
        ):
            load(columns, row, other, group="who")


def test_label_studio(folder):
    """A CSV export, where annotators agree; with several choices a cell is JSON."""
    columns = ("annotation_id", "annotator", "choice", "created_at", "id", "image", "lead_time", "updated_at")
    rows = [
        ("1", "1", "cat", "2024-01-01T10:00:00Z", "7", "/data/upload/1/0a1b2c3d-a.png", "3.1", "x"),
        ("2", "2", "cat", "2024-01-02T10:00:00Z", "7", "/data/upload/1/0a1b2c3d-a.png", "1.2", "y"),
        ("3", "1", "dog", "2024-01-02T10:00:00Z", "8", "/data/upload/1/0a1b2c3e-b.png", "9.1", "x"),
        ("4", "1", "", "2024-01-02T10:00:00Z", "9", "/data/upload/1/0a1b2c3f-c.png", "9.1", "x"),
    ]
    parts = load(columns, *rows)
    assert parts.class_names == ["cat", "dog"]
    assert content(parts.train) == {10: 0, 20: 1, 30: -100}
    several = (*rows[2][:2], '{"choices": ["dog", "cat"]}', *rows[2][3:])
    parts = load(columns, *rows[:2], several, rows[3])
    assert parts.class_names == ["cat", "dog"]
    assert content(parts.train)[10] == [1, 0]
    assert content(parts.train)[20] == [1, 1]
    assert torch.tensor(content(parts.train)[30]).isnan().all()


def test_names_of_uploaded_files(folder):
    """Django replaces spaces, and leaves out other special characters."""
    Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "images/IMG 1 (2).png")
    assert content(load(("image", "label"), ("/data/upload/1/0a1b2c3d-IMG_1_2.png", "x")).train) == {99: 0}
    Image.new("RGB", (8, 8), (98, 0, 0)).save(folder / "images/IMG 1 [2].png")
    with pytest.raises(InputError, match="fits several images: IMG 1 .2..png, IMG 1 .2..png; give the whole path"):
        load(("image", "label"), ("/data/upload/1/0a1b2c3d-IMG_1_2.png", "x"))


def test_roboflow(folder):
    """Spaces after the commas."""
    Path("_classes.csv").write_text("filename, cat, dog\na.png, 1, 0\nb.png, 0, 1\n")
    parts = load(table="_classes.csv")
    assert parts.class_names == ["cat", "dog"]
    assert content(parts.train) == {10: [1, 0], 20: [0, 1]}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([("file", "label"), ("a.png", "x")], {}, "must have a column of images, such as path"),
        ([("path", "kind"), ("a.png", "x")], {}, "must have a column of labels; name it by label; it has kind"),
        ([("path", "label"), ("a.png", "x")], {"label": "species"}, "must have the column 'species' that label names"),
        ([("path", "label"), ("a.png", "x")], {"image": "file"}, "must have the column 'file' that image names"),
        ([("path", "label", "split"), ("a.png", "x", "fold1")], {}, "line 2 split must be one of train|line 2: split"),
        ([("path", "label", "weight"), ("a.png", "x", "-1")], {}, "weight must be at least 0, below 1e38, got -1"),
        ([("path", "label", "weight"), ("a.png", "x", "much")], {}, "weight must be a number, got 'much'"),
        ([("path", "label"), ("", "x")], {}, "the cell of path is empty"),
        ([("path", "label"), ("a.png", "")], {}, "has no label in the column label"),
        ([("path", "label"), ("z.png", "x")], {}, "has no image of any of its 1 rows"),
        ([("path", "label")], {}, "has no image of any of its 0 rows"),
        ([("path", "label", "split"), ("a.png", "x", "test")], {}, "has no row of split train"),
        ([("path", "label", "label"), ("a.png", "x", "y")], {}, "has the column label twice"),
        ([("path", "label"), ("a.png", "x", "y")], {}, "line 2: there are more cells than columns"),
        ([("path", "target"), ("a.png", "x")], {"numbers": True}, "target must be a number, got 'x'"),
        ([("path", "x"), ("a.png", "2")], {"label": ["x"]}, "x must be 0, 1 or empty, got '2'"),
        (
            [("path", "label", "category"), ("a.png", "x", "y")],
            {},
            "has the columns label, category; name the right one",
        ),
        ([("path", "red"), ("a.png", "1")], {"separator": "|"}, "must have a column of labels"),
        ([("path", "label", "weight"), ("a.png", "x", "1e39")], {}, "weight must be at least 0, below 1e38"),
        ([("path", "label"), ("http://[x/1.jpg", "x")], {}, "has no image of any of its 1 rows"),
    ],
)
def test_what_cannot_be(folder, rows, arguments, message):
    with pytest.raises(InputError, match=message):
        load(*rows, **arguments)


def test_a_name_that_several_images_have(folder):
    Image.new("RGB", (8, 8)).save(folder / "images/deep/a.png")
    assert content(load(("path", "label"), ("a.png", "x")).train) == {10: 0}  # the whole path
    (folder / "images/other").mkdir()
    (folder / "images/a.png").rename(folder / "images/other/a.png")
    with pytest.raises(InputError, match=r"'a.png' fits several images: deep/a.png, other/a.png; give the whole path"):
        load(("path", "label"), ("a.png", "x"))


def test_options():
    for label in ([], ["a", "a"]):
        with pytest.raises(InputError, match="label must be the name of a column, or different names of several"):
            ImageTable("x.csv", label=label)
    with pytest.raises(InputError, match="separator: '|' is for one column of class names"):
        ImageTable("x.csv", numbers=True, separator="|")
    with pytest.raises(InputError, match="table: there is no file x.csv"):
        ImageTable("x.csv").load()


def test_renamed_images_stay_in_their_part(folder):
    rows = [(f"{name}", "x" if number % 2 else "y") for number, name in enumerate(COLORS)]
    write(("path", "label"), *rows)
    data = SemiSupervisedDataModule(ImageTable("labels.csv", "images", image_size=8), labeled=1, val_size=0)
    data.setup("fit")
    data.save_split(Path("split.json"))
    contents = {data.content(index) for index in data.split.labeled}
    (folder / "images/a.png").rename(folder / "images/z.png")
    write(("path", "label"), *[(name.replace("a.png", "z.png"), label) for name, label in rows][::-1])
    data = SemiSupervisedDataModule(ImageTable("labels.csv", "images", image_size=8), labeled="split.json")
    data.setup("fit")
    assert {data.content(index) for index in data.split.labeled} == contents


def test_a_run_from_yaml(folder):
    rows = [
        (name, "x" if number % 2 else "y", split)
        for number, (name, split) in enumerate(
            zip(COLORS, ("train", "train", "train", "val", "test", "test", "unlabeled"), strict=True)
        )
    ]
    write(("path", "label", "split"), *rows)
    Path("run.yaml").write_text(
        """
name: table
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: SupervisedModule
  init_args:
    student: {class_path: torchvision.models.resnet18, init_args: {num_classes: 2}}
data:
  class_path: SemiSupervisedDataModule
  init_args:
    source: {class_path: ImageTable, init_args: {table: labels.csv, folder: images, image_size: 8}}
    unlabeled: source
"""
    )
    main(["fit", "--config", "run.yaml"])
    main(["test", "--config", "run.yaml"])
    run = Run(Path("runs/table/version_0"))
    assert run.finished
    split = json.loads((run.folder / "split.json").read_text())
    assert len(split["val"]) == 1
    main(["predict", "--config", "run.yaml"])
    found = [*Path("runs/table").rglob("predictions.csv")]
    with found[0].open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["deep/f.png", "e.png"]
