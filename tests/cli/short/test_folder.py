"""The pictures of a folder, their parts, and folders that cannot be trained on."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kd_lightning.cli.short.folder import read_folder
from kd_lightning.cli.short.networks import find_network
from kd_lightning.cli.short.plan import plan_folder
from kd_lightning.cli.short.recipe import distill_yaml
from kd_lightning.cli.short.table import with_parts, write_table
from kd_lightning.data import ImageTable, SemiSupervisedDataModule
from kd_lightning.errors import InputError


def parts_of(pictures):
    return Counter((one.part, one.label) for one in pictures.pictures)


def plan(folder, tmp_path, **options):
    options = {"out": tmp_path / "runs", "name": None, "test": "needed"} | options
    return plan_folder(folder, [find_network("resnet8", "--student")], **options)


def test_class_folders(class_folders, picture):
    folder = class_folders({"cat": 3, "dog": 2})
    picture(folder / "unlabeled" / "deep" / "a.png")
    found = read_folder(folder)
    assert parts_of(found) == {("train", "cat"): 3, ("train", "dog"): 2, ("unlabeled", ""): 1}
    assert found.classes == ["cat", "dog"] and found.side == 36 and found.kind == "class folders"
    assert [one.path for one in found.pictures] == sorted(one.path for one in found.pictures)


def test_unlabeled_may_be_a_link_to_any_pictures(class_folders, tmp_path):
    """Of other sizes and classes; the median side, and so the image size, is that of all."""
    folder = class_folders({"cat": 3, "dog": 2})
    (tmp_path / "elsewhere" / "birds").mkdir(parents=True)
    Image.new("L", (50, 9)).save(tmp_path / "elsewhere/birds/wide.jpg")
    Image.new("RGBA", (7, 70)).save(tmp_path / "elsewhere/high.png")
    (folder / "unlabeled").symlink_to(tmp_path / "elsewhere")
    found = read_folder(folder)
    assert parts_of(found) == {("train", "cat"): 3, ("train", "dog"): 2, ("unlabeled", ""): 2}
    write_table(tmp_path / "split.csv", found)  # it checks that a config reads the same
    data = SemiSupervisedDataModule(
        ImageTable(str(tmp_path / "split.csv"), str(folder), image_size=8), unlabeled="source", val_size=0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.x.shape == (7, 3, 8, 8) and (batch.y == -100).sum() == 2


def test_folders_of_parts(class_folders):
    folder = class_folders({"train/cat": 3, "train/dog": 2, "Test/dog": 1, "validation/cat": 1, "unlabeled": 2})
    found = read_folder(folder)
    expected = {("train", "cat"): 3, ("train", "dog"): 2, ("test", "dog"): 1, ("val", "cat"): 1, ("unlabeled", ""): 2}
    assert parts_of(found) == expected


def test_a_class_may_have_the_name_of_a_part(class_folders):
    assert read_folder(class_folders({"train": 3, "bus": 2})).classes == ["bus", "train"]


@pytest.mark.parametrize("name_of_table", [False, True])
def test_a_table(class_folders, name_of_table):
    folder = class_folders({"images": 4})
    rows = ["path,label,weight"] + [f"images/{number}.png,{'ab'[number % 2]},{number}" for number in range(4)]
    (folder / "labels.csv").write_text("\n".join(rows))
    found = read_folder(folder / "labels.csv" if name_of_table else folder)
    assert parts_of(found) == {("train", "a"): 2, ("train", "b"): 2}
    assert [one.weight for one in found.pictures] == ["0", "1", "2", "3"]


def test_a_table_beside_class_folders_is_not_read(class_folders):
    folder = class_folders({"cat": 3, "dog": 2})
    (folder / "notes.csv").write_text("what,ever\n1,2\n")
    assert read_folder(folder).kind == "class folders"


def test_unreadable_pictures_are_left_out(class_folders, tmp_path):
    folder = class_folders({"cat": 5, "dog": 5})
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    (folder / "dog" / "empty.jpg").touch()
    whole = (folder / "dog" / "0.png").read_bytes()
    (folder / "dog" / "half.png").write_bytes(whole[: len(whole) // 2])
    found = plan(folder, tmp_path)
    assert [path for path, _ in found.pictures.unreadable] == ["cat/broken.png", "dog/empty.jpg", "dog/half.png"]
    (line,) = (line for line in found.lines if line.startswith("cannot be read, and left out: "))
    why = "it has no format of pictures that Pillow reads"
    assert f": 3 pictures: cat/broken.png ({why}), dog/empty.jpg ({why})" in line
    assert "dog/half.png (OSError: " in line and str(folder) not in line  # each path stands there once
    assert len(found.pictures.pictures) == 10


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({}, "must have a folder for each class, or pictures and a table of labels, got neither"),
        ({"cat": 0}, "got no image"),
        ({"cat": 9}, "must have pictures of at least two classes, got one, cat"),
        ({"cat": 2, "dog": 1}, "must have at least two classes of 4 pictures or more, got cat 2, dog 1"),
        ({"train/cat": 9, "train/dog": 9, "test/bird": 1}, "got another class bird"),
    ],
)
def test_folders_that_cannot_be_trained_on(class_folders, tmp_path, counts, text):
    folder = class_folders(counts)
    folder.mkdir(exist_ok=True)
    with pytest.raises(InputError) as error:
        plan(folder, tmp_path)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_no_readable_picture(class_folders, tmp_path):
    folder = class_folders({"cat": 0, "dog": 0})
    for name in ("cat/a.png", "dog/b.png"):
        (folder / name).write_bytes(b"?")
    with pytest.raises(InputError, match="none of its 2 pictures can be read"):
        plan(folder, tmp_path)


def test_pictures_without_class_folder_or_table(class_folders, tmp_path, picture):
    folder = class_folders({})
    picture(folder / "a.png")
    with pytest.raises(InputError, match="got pictures in no class folder, and no table"):
        plan(folder, tmp_path)


def test_a_class_of_one_picture_trains_and_does_not_test(class_folders, tmp_path):
    found = plan(class_folders({"cat": 8, "dog": 8, "rare": 1}), tmp_path)
    assert parts_of(found.pictures)["train", "rare"] == 1
    assert found.pictures.counts("test") == {"cat": 2, "dog": 2}
    assert "fewer than 3 pictures train of: rare" in found.lines


def test_the_test_part_is_the_same_each_time_and_has_whole_copies(class_folders, tmp_path):
    folder = class_folders({"cat": 20, "dog": 20})
    for number in range(10):
        shutil.copy(folder / "cat" / f"{number}.png", folder / "cat" / f"copy of {number}.png")
    first, again = (with_parts(read_folder(folder), tmp_path / "none.csv", test=True)[0] for _ in range(2))
    assert first.pictures == again.pictures
    part = {one.path: one.part for one in first.pictures}
    assert all(part[f"cat/{n}.png"] == part[f"cat/copy of {n}.png"] for n in range(10))
    assert first.counts("test")["dog"] == 4


def test_a_rerun_has_the_parts_of_the_table(class_folders, tmp_path, picture):
    folder, table = class_folders({"cat": 10, "dog": 10}), tmp_path / "split.csv"
    before, _ = with_parts(read_folder(folder), table, test=True)
    write_table(table, before)
    gone = next(one.path for one in before.pictures if one.part == "test")
    (folder / gone).unlink()
    picture(folder / "cat" / "new.png")
    after, lines = with_parts(read_folder(folder), table, test=True)
    expected = {one.path: one.part for one in before.pictures if one.path != gone} | {"cat/new.png": "train"}
    assert {one.path: one.part for one in after.pictures} == expected
    assert lines[1:] == ["new, and training: 1 picture (cat/new.png)", f"gone: 1 picture of {table} ({gone})"]


@pytest.mark.parametrize("counts", [{"cat": 10, 'a, "b"': 10, "=7": 9}, {"10": 5, "9": 5, "-1": 5}])
def test_the_table_is_what_the_datamodule_reads(class_folders, tmp_path, counts):
    from kd_lightning import ImageTable

    folder = class_folders(counts)
    found = plan(folder, tmp_path)
    found.write()
    parts = ImageTable(str(found.recipe.table), str(found.recipe.folder)).load()
    assert parts.class_names == found.pictures.classes
    for name, part in (("train", parts.train), ("test", parts.test)):
        listed = [Path(path).relative_to(folder).as_posix() for path in part.images.paths]
        assert listed == [one.path for one in found.pictures.pictures if one.part == name]
        labels = [one.label for one in found.pictures.pictures if one.part == name]
        assert [parts.class_names[k] for k in part.targets.tolist()] == labels
    with found.recipe.table.open(newline="") as file:
        assert next(csv.reader(file)) == ["path", "label", "split"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"labels_per_class": -1}, "--labels-per-class must be at least 1, got -1"),
        ({"image_size": 0}, "--image-size must be at least 1, got 0"),
        ({"name": ".."}, "--name must be the name of a folder in --out, got '..'"),
    ],
)
def test_options_out_of_range(class_folders, tmp_path, options, text):
    with pytest.raises(InputError) as error:
        plan(class_folders({"cat": 8, "dog": 8}), tmp_path, **options)
    assert text in str(error.value)


@pytest.mark.parametrize(("labels", "weight"), [(None, 0.5), (2, 0.9), (7, 0.5)])
def test_the_teacher_counts_more_where_few_pictures_have_a_label(class_folders, tmp_path, labels, weight):
    recipe = plan(class_folders({"cat": 10, "dog": 10}), tmp_path, labels_per_class=labels).recipe
    networks = [find_network("resnet8", "--student"), find_network("resnet14", "--teacher")]
    text = distill_yaml(recipe, *networks, "resnet8", tmp_path / "teacher.safetensors", None)
    assert yaml.safe_load(text)["model"]["init_args"]["soft_weight"] == weight


def test_runs_do_not_lie_among_the_pictures(class_folders, tmp_path):
    folder = class_folders({"cat": 8, "dog": 8})
    with pytest.raises(InputError, match="whose pictures it would join; name another folder"):
        plan(folder, tmp_path, out=folder / "runs")


def test_a_full_disk(class_folders, tmp_path, monkeypatch):
    found = plan(class_folders({"cat": 8, "dog": 8}), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(InputError, match="needs about 4 MB, and the disk has 1 MB free"):
        found.write()


def test_a_network_of_one_size_sets_the_image_size(class_folders, tmp_path):
    folder = class_folders({"cat": 8, "dog": 8})
    networks = [find_network("timm/test_vit", "--student"), find_network("resnet8", "--teacher")]
    options = {"out": tmp_path / "runs", "name": None, "test": "needed"}
    assert plan_folder(folder, networks, **options).recipe.image_size == 160
    assert plan_folder(folder, networks[1:], **options).recipe.image_size == 32


@pytest.mark.parametrize(
    ("counts", "more", "text"),
    [
        ({"1": 5, "1.0": 5, "cat": 5}, None, "names of classes differ in a table; rename '1.0'"),
        ({"cat": 5, "dog": 5}, "cat/4.png.png", "fits several images"),
    ],
)
def test_names_that_a_table_cannot_have(class_folders, tmp_path, picture, counts, more, text):
    folder = class_folders(counts)
    if more is not None:
        picture(folder / more)
    with pytest.raises(InputError, match=text):
        plan(folder, tmp_path).write()
    assert not [*(tmp_path / "runs/photos").iterdir()]
