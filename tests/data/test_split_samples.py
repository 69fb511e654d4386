"""Saved splits follow their samples when files are renamed, added, removed or replaced."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from kd_lightning import InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data import DatasetSource, ImageFolder
from kd_lightning.data.splits import Split


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten cats and ten dogs, and a saved split in which two cats are labeled dogs by a file."""
    for number in range(10):
        write(tmp_path / "images" / "cats" / f"{number}.png", number)
        write(tmp_path / "images" / "dogs" / f"{number}.png", 100 + number)
    data = open_data(tmp_path / "images", labeled=3)
    two = [index for index in data.split.unlabeled if index < 10][:2]
    (tmp_path / "a.csv").write_text("index,label\n" + "".join(f"{index},dogs\n" for index in two))
    open_data(tmp_path / "images", labeled=3, label_file=tmp_path / "a.csv").save_split(tmp_path / "split.json")
    return tmp_path / "images"


def open_data(folder, **kwargs):
    data = SemiSupervisedDataModule(ImageFolder(str(folder), image_size=8), **{"val_size": 2, "seed": 0} | kwargs)
    data.setup("fit")
    return data


def by_name(data):
    """Path of each sample in the parts, and the label that training sees."""
    labels, names = data.visible_labels().tolist(), data.samples.identities[0].paths
    parts = {part: {names[index] for index in getattr(data.split, part)} for part in ("labeled", "unlabeled", "val")}
    return parts, {names[index]: data.class_names[labels[index]] for index in data.split.labeled}


def reopen(folder):
    return open_data(folder, labeled=folder.parent / "split.json")


def test_unchanged_data(folder, recwarn):
    data = reopen(folder)
    _, labels = by_name(data)
    assert {*labels.values()} == {"cats", "dogs"}
    assert sum(name.startswith("cats") and label == "dogs" for name, label in labels.items()) == 2
    assert not [warning for warning in recwarn if "split.json" in str(warning.message)]


def test_a_file_is_removed_and_another_added(folder, caplog):
    before, labels = by_name(reopen(folder))
    gone = sorted(before["unlabeled"])[0]
    (folder / gone).unlink()
    write(folder / "cats" / "00.png", 1000)  # sorted before all others but 0.png
    with caplog.at_level("INFO"):
        after, now = by_name(reopen(folder))
    assert now == labels
    assert after["val"] == before["val"]
    assert after["unlabeled"] == before["unlabeled"] - {gone} | {"cats/00.png"}
    assert f"1 gone ({gone}), 1 new" in caplog.text


@pytest.mark.parametrize("part", ["labeled", "unlabeled", "val"])
def test_a_file_is_renamed(folder, part, caplog):
    before, labels = by_name(reopen(folder))
    name = sorted(name for name in before[part] if name.startswith("dogs"))[0]
    (folder / name).rename(folder / "dogs" / "zz.png")
    with caplog.at_level("INFO"):
        after, now = by_name(reopen(folder))
    assert after == before | {part: before[part] - {name} | {"dogs/zz.png"}}
    assert now == {"dogs/zz.png" if key == name else key: label for key, label in labels.items()}
    assert f"1 renamed ({name} is dogs/zz.png)" in caplog.text


def test_two_files_change_names(folder):
    """A validation image is not trained on because it has the name of a training image now."""
    before, _ = by_name(reopen(folder))
    one, two = (sorted(name for name in before[part] if name.startswith("dogs"))[0] for part in ("val", "unlabeled"))
    (folder / one).rename(folder / "dogs" / "tmp.png")
    (folder / two).rename(folder / one)
    (folder / "dogs" / "tmp.png").rename(folder / two)
    after, _ = by_name(reopen(folder))
    assert after["val"] == before["val"] - {one} | {two}
    assert after["unlabeled"] == before["unlabeled"] - {two} | {one}


def test_a_file_is_replaced(folder):
    before, labels = by_name(reopen(folder))
    name = sorted(labels)[0]
    write(folder / name, 2000)
    with pytest.warns(UserWarning, match=re.escape(f"1 with another content ({name})")):
        after, now = by_name(reopen(folder))
    assert (after, now) == (before, labels)


def test_a_class_is_added(folder):
    """Class numbers of the label file move with their names."""
    before, labels = by_name(reopen(folder))
    write(folder / "birds" / "0.png", 3000)  # birds come first, so that cats and dogs have other numbers
    with pytest.warns(UserWarning, match=r"the classes, and their numbers, have changed since \(new: birds\)"):
        after, now = by_name(reopen(folder))
    assert now == labels
    assert after["unlabeled"] == before["unlabeled"] | {"birds/0.png"}


def test_a_class_of_a_label_is_gone(folder):
    (folder / "dogs").rename(folder / "hounds")
    with pytest.raises(InputError, match="labels of class 'dogs', which is gone"):
        reopen(folder)


def test_other_data_with_the_same_names(folder):
    for kind, start in (("cats", 5000), ("dogs", 6000)):
        (folder / kind).rename(folder.parent / f"old {kind}")
        for number in range(10):
            write(folder / kind / f"new {number}.png", start + number)
    with pytest.raises(InputError, match="belongs to other data: only 0 of its 20 samples are here"):
        reopen(folder)


def test_tensors_in_another_order(tmp_path):
    x, y = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3

    def make(order, **kwargs):
        data = SemiSupervisedDataModule(DatasetSource(TensorDataset(x[order], y[order])), **{"val_size": 2} | kwargs)
        data.setup("fit")
        return data

    first = make(torch.arange(30), labeled=2)
    first.save_split(tmp_path / "split.json")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    second = make(order, labeled=tmp_path / "split.json")
    for part in ("labeled", "unlabeled", "val"):
        assert sorted(order[getattr(second.split, part)].tolist()) == getattr(first.split, part)


def test_what_names_no_samples(tmp_path):
    """Data that return other items each time: only number and labels can be compared."""

    class Random(TensorDataset):
        def __getitem__(self, index):
            return torch.rand(3), self.tensors[1][index]

    def make(y, **kwargs):
        data = SemiSupervisedDataModule(DatasetSource(Random(torch.zeros(30, 3), y)), **kwargs)
        data.setup("fit")
        return data

    y = torch.arange(30) % 3
    make(y, labeled=2).save_split(tmp_path / "split.json")
    with pytest.warns(UserWarning, match="does not name its samples"):
        make(y, labeled=tmp_path / "split.json")
    with pytest.raises(InputError, match="belongs to other data"):
        make(y.flip(0), labeled=tmp_path / "split.json")


def test_a_split_that_is_no_partition_is_not_trained_on(quiet_trainer, tmp_path):
    data = open_tensors()
    data.setup("")
    data.split = replace(data.split, unlabeled=data.split.unlabeled[1:])
    with pytest.raises(InputError, match="is in no part"):
        quiet_trainer().fit(SupervisedModule(torch.nn.Linear(3, 3)), datamodule=data)


def open_tensors():
    y = torch.arange(30) % 3
    return SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(30, 3), y)), labeled=2, val_size=2)


def test_samples_in_no_part_are_refused_in_a_file(tmp_path):
    data = open_tensors()
    data.setup("fit")
    split = data.split
    replace(split, val=split.val[1:]).save(tmp_path / "split.json")
    with pytest.raises(InputError, match=f"sample {split.val[0]} is in no part"):
        Split.load(tmp_path / "split.json", torch.arange(30) % 3)
    replace(split, val=split.val[1:], left_out=split.val[:1]).save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json", torch.arange(30) % 3).left_out == split.val[:1]


class TestPool:
    """Ten cats and ten dogs, and eight pictures without labels, of which three have labels from a file."""

    @pytest.fixture
    def root(self, tmp_path):
        for number in range(10):
            write(tmp_path / "train" / "cats" / f"{number}.png", number)
            write(tmp_path / "train" / "dogs" / f"{number}.png", 100 + number)
        for number in range(8):
            write(tmp_path / "pool" / f"{number}.png", 300 + number)
            write(tmp_path / "test" / "cats" / f"{number}.png", 400 + number)
        rows = "pool/2.png,cats\npool/3.png,dogs\npool/4.png,cats\n"
        (tmp_path / "a.csv").write_text(f"path,label\n{rows}")
        self.open(tmp_path, labeled=3, label_file=tmp_path / "a.csv").save_split(tmp_path / "split.json")
        return tmp_path

    def open(self, root, **kwargs):
        folders = [str(root / name) if (root / name).exists() else None for name in ("train", "test", "pool")]
        kwargs = {"val_size": 2, "unlabeled": "source", "labeled": root / "split.json"} | kwargs
        data = SemiSupervisedDataModule(ImageFolder(*folders, image_size=8), **kwargs)
        data.setup("fit")
        return data

    def labels_by_file(self, data):
        """Label of each sample that has one by a file."""
        labels, names = data.visible_labels().tolist(), data.identities("train").paths
        return {names[row[0]]: data.class_names[labels[row[0]]] for row in data.split.label_rows}

    def test_pictures_are_sorted_into_the_class_folders(self, root, caplog):
        (root / "pool" / "2.png").rename(root / "train" / "cats" / "2 of the pool.png")
        (root / "pool" / "3.png").rename(root / "train" / "dogs" / "3 of the pool.png")
        (root / "pool" / "0.png").rename(root / "train" / "dogs" / "0 of the pool.png")
        with caplog.at_level("INFO"):
            data = self.open(root)
        wanted = {"cats/2 of the pool.png": "cats", "dogs/3 of the pool.png": "dogs", "4.png": "cats"}
        assert self.labels_by_file(data) == wanted
        names = data.identities("train").paths
        assert wanted.keys() < {names[index] for index in data.split.labeled}
        assert names.index("dogs/0 of the pool.png") in data.split.unlabeled  # the file says nothing of it
        assert "(2 of these moved to the training part)" in caplog.text

    def test_all_are_sorted(self, root):
        for number in range(8):
            (root / "pool" / f"{number}.png").rename(root / "train" / "dogs" / f"p{number}.png")
        (root / "pool").rmdir()
        data = self.open(root, unlabeled="rest")
        assert self.labels_by_file(data) == {"dogs/p2.png": "cats", "dogs/p3.png": "dogs", "dogs/p4.png": "cats"}

    def test_files_are_numbered_anew_and_saved_anew(self, root):
        """A label must not go to the file that has the name now."""
        (root / "pool" / "1.png").unlink()
        for number in range(2, 8):
            (root / "pool" / f"{number}.png").rename(root / "pool" / f"{number - 1}.png")
        for number in (1, 2):
            Image.open(root / "pool" / f"{number}.png").save(root / "pool" / f"{number}.png", compress_level=1)
        with pytest.warns(UserWarning, match="1 of 3 label rows are passed over"):
            data = self.open(root)
        assert self.labels_by_file(data) == {"3.png": "cats"}

    def test_files_are_saved_anew(self, root):
        for path in (root / "pool").iterdir():
            Image.open(path).save(path, compress_level=1)
        with pytest.warns(UserWarning, match="3 of 3 label rows are followed by path"):
            data = self.open(root)
        assert self.labels_by_file(data) == {"2.png": "cats", "3.png": "dogs", "4.png": "cats"}

    def test_training_file_with_a_row_is_another(self, root):
        """It loses its label, and is unlabeled."""
        (root / "b.csv").write_text("path,label\ntrain/cats/3.png,dogs\n")
        index = self.open(root, val_size=0, labeled=0, label_file=root / "b.csv").split.label_rows[0][0]
        self.open(root, val_size=0, labeled=0, label_file=root / "b.csv").save_split(root / "split.json")
        write(root / "train" / "cats" / "3.png", 999)
        (root / "train" / "cats" / "5.png").rename(root / "train" / "cats" / "55.png")
        with pytest.warns(UserWarning, match="1 of 1 label rows are passed over"):
            split = self.open(root).split
        assert (split.labeled, split.label_rows) == ([], [])
        assert index in split.unlabeled

    @pytest.mark.parametrize("pool", ["test", "rest"])
    @pytest.mark.parametrize("gone", [False, True])
    def test_left_out_copies_are_those_of_the_pool(self, root, pool, gone):
        """A number that counts on from the training part means the unlabeled part, not the test part."""
        (root / "pool" / "5.png").write_bytes((root / "test" / "cats" / "0.png").read_bytes())
        data = self.open(root, labeled=3, duplicates="together")
        assert data.split.left_out == [25]
        data.save_split(root / "split.json")
        if gone:
            for path in (root / "pool").iterdir():
                path.unlink()
            (root / "pool").rmdir()
        data = self.open(root, unlabeled=pool)
        if pool == "test":
            assert data.unlabeled_indices() == [*range(20, 28)]
        assert set(data.split.left_out) <= {25}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_ranks_that_see_other_samples_do_not_evaluate(folder, stage):
    """A file is missing on another rank; figures of several ranks would be of other samples."""
    write(folder.parent / "test" / "cats" / "0.png", 1)
    write(folder.parent / "test" / "dogs" / "0.png", 2)
    source = ImageFolder(str(folder), str(folder.parent / "test"), image_size=8)

    def evaluate(sent):
        """On rank 1 of 2, which gets what rank 0 sends."""
        data = SemiSupervisedDataModule(source, val_size=2)
        seen = []
        strategy = SimpleNamespace(broadcast=lambda mine: seen.append(mine) or sent or mine)
        data.trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)
        data.setup(stage)
        return seen[0]

    same = evaluate(None)
    (folder.parent / "test" / "cats" / "0.png").rename(folder.parent / "test" / "cats" / "1.png")
    (folder / "cats" / "0.png").rename(folder / "cats" / "a.png")
    other = evaluate(None)
    assert same != other
    with pytest.raises(InputError, match="rank 1 has other samples or another split than rank 0"):
        evaluate(same)


def test_a_second_fit_of_a_datamodule_names_the_files_of_its_time(folder, quiet_trainer):
    data = SemiSupervisedDataModule(ImageFolder(str(folder), image_size=8), val_size=2, labeled=3)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    contents = []
    for number in range(2):
        quiet_trainer(limit_val_batches=0).fit(SupervisedModule(network), datamodule=data)
        contents.append(data.split.samples.contents)
        write(folder / "cats" / "0.png", 7000 + number)
    assert [a != b for a, b in zip(*contents, strict=True)] == [True] + [False] * 19
