"""A source's own validation part: exactly its samples validate, none of them trains, and label files may correct it."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, TensorDataset

from kd_lightning import DatasetSource, DistillModule, ImageFolder, InputError, SemiSupervisedDataModule, Teacher
from kd_lightning.data import ClassSubset, Digits, ImageMaskFolder, RotatedClasses, TextSource
from kd_lightning.data.sources.memory import rows_of
from kd_lightning.data.splits import Split

NAMES = ("cats", "dogs")


def write(root, parts=("train", "val"), count=6):
    """Folders with the same file names in each part; each picture has a colour of its own."""
    for part_number, part in enumerate(parts):
        for class_number, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                color = (40 * part_number + 20, 100 * class_number, 30 * number)
                Image.new("RGB", (12, 12), color).save(root / part / name / f"{number}.png")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ("train", "val", "test"))
    return tmp_path


def source(**arguments):
    return ImageFolder("train", **({"val": "val", "image_size": 8} | arguments))


def module(made=None, **arguments):
    data = SemiSupervisedDataModule(made or source(), **({"labeled": 2, "batch_size": 5} | arguments))
    data.setup("fit")
    return data


def paths(data, indices):
    return {data.path(int(index)) for index in indices}


class TestParts:
    def test_exactly_its_samples_validate(self, folders):
        data = module()
        seen = [index for batch in data.val_dataloader() for index in batch.index.tolist()]
        labels = torch.cat([batch.y for batch in data.val_dataloader()])
        assert [Path(data.path(index)).parts[-3:] for index in seen] == [
            ("val", name, f"{number}.png") for name in NAMES for number in range(6)
        ]
        assert labels.tolist() == [0] * 6 + [1] * 6

    @pytest.mark.parametrize("labeled", [2, 0.5, None])
    def test_none_of_them_trains(self, folders, labeled):
        data = module(labeled=labeled, num_views=2)
        trained = {index for batch in data.train_dataloader() for index in batch.index.tolist()}
        trained |= {*data.train_views().outputs.indices.tolist(), *data.pool_views().outputs.indices.tolist()}
        assert len(trained) == 12
        assert all(Path(path).parts[-3] == "train" for path in paths(data, trained))
        assert len(data.split.labeled) == {2: 4, 0.5: 6, None: 12}[labeled]

    def test_the_training_split_is_that_of_no_validation_part(self, folders):
        """Own samples change nothing for the others."""
        alone = module(source(val=None), val_size=0)
        data = module()
        assert (data.split.labeled, data.split.unlabeled) == (alone.split.labeled, alone.split.unlabeled)

    def test_without_one_a_tenth_validates(self):
        data = module(Digits(), labeled=None)
        tenth = module(Digits(), labeled=None, val_size=0.1)
        assert data.split.val == tenth.split.val
        assert len(data.split.val) > 100

    @pytest.mark.parametrize("size", [0.1, 2, 0])
    def test_a_size_beside_it_is_refused(self, folders, size):
        with pytest.raises(InputError, match=f"val_size: {size}, but ImageFolder has its own validation part"):
            module(val_size=size)

    def test_its_unlabeled_samples_stay_in_it(self):
        x = torch.rand(10, 3)
        made = DatasetSource(
            TensorDataset(x, torch.arange(10) % 2), val=TensorDataset(x[:3] + 1, torch.tensor([0, -100, 1]))
        )
        data = module(made, labeled=None, batch_size=4)
        assert (data.split.val, len(data.split.labeled)) == ([10, 11, 12], 10)
        assert data.unlabeled_indices() == []
        (batch,) = data.val_dataloader()
        assert torch.equal(batch.x, x[:3] + 1)
        assert batch.y.tolist() == [0, -100, 1]

    def test_classes_are_found_by_name(self, folders):
        (folders / "val/cats").rename(folders / "gone")
        data = module()
        assert torch.cat([batch.y for batch in data.val_dataloader()]).tolist() == [1] * 6
        (folders / "val/eels").mkdir()
        Image.new("RGB", (8, 8)).save(folders / "val/eels/1.png")
        with pytest.raises(InputError, match="eels"):
            module()

    def test_files_that_are_in_both_parts(self, folders):
        """Only a copy that lies elsewhere is a matter of duplicates."""
        with pytest.raises(InputError, match=r"val: 12 samples of ImageFolder are in the training part, too \(.*train"):
            module(source(val=str(folders / "val/../train")))
        with pytest.raises(InputError, match="leaves no training sample"):
            module(source(val="train"), duplicates="together")
        (folders / "val/cats/0.png").write_bytes((folders / "train/cats/0.png").read_bytes())
        assert len(module().split.val) == 12

    def test_tiles_of_one_file_in_both_parts(self, folders):
        class Tiles(torch.utils.data.Dataset):
            def __init__(self, numbers):
                self.samples = [(str(folders / "train/cats/0.png"), number) for number in numbers]
                self.targets = [number % 2 for number in numbers]

            def __len__(self):
                return len(self.samples)

            def __getitem__(self, index):
                number = self.samples[index][1]
                return torch.full((3,), float(number)), number % 2

        assert module(DatasetSource(Tiles(range(6)), val=Tiles(range(6, 9)))).split.val == [6, 7, 8]
        with pytest.raises(InputError, match="val: 1 samples of DatasetSource are in the training part, too"):
            module(DatasetSource(Tiles(range(6)), val=Tiles(range(5, 9))))

    def test_labels_of_another_kind(self):
        one, many = TensorDataset(torch.rand(4, 2), torch.arange(4)), TensorDataset(torch.rand(2, 2), torch.ones(2, 3))
        with pytest.raises(InputError, match="the validation part of DatasetSource: its labels must have the shape"):
            module(DatasetSource(one, val=many))
        with pytest.raises(InputError, match="val: the val part of DatasetSource is empty"):
            module(DatasetSource(one, val=TensorDataset(torch.rand(0, 2), torch.arange(0))))

    def test_texts(self):
        rows = [("a b", "x"), ("c", "y"), ("d", "x")]
        made = TextSource(rows, val=[("e f g", "y")], tokenizer=lambda text, **_: {"input_ids": [*map(ord, text)]})
        data = module(made, labeled=None)
        (batch,) = data.val_dataloader()
        assert batch.x["input_ids"].tolist() == [[*map(ord, "e f g")]]
        assert batch.y.tolist() == [1]

    def test_images_in_memory_stay_one_tensor(self):
        """A batch is read at once, as without the part."""
        x = torch.rand(9, 3)
        made = DatasetSource(
            TensorDataset(x[:6], torch.arange(6) % 2), val=TensorDataset(x[6:], torch.tensor([0, 1, 0]))
        )
        rows = rows_of(module(made).samples.images)
        assert torch.equal(rows.read(torch.tensor([7, 0, 8, 5])), x[[7, 0, 8, 5]])

    def test_masks(self, tmp_path, monkeypatch):
        """Masks are read with their pictures, also from decoded ones, and hashed as those of two folders."""
        monkeypatch.chdir(tmp_path)
        for part, first in (("train", 0), ("val", 10)):
            for folder in ("images", "masks"):
                (tmp_path / part / folder).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (first + number,) * 3).save(tmp_path / part / f"images/{number}.png")
                Image.new("L", (8, 8), (first + number) % 3).save(tmp_path / part / f"masks/{number}.png")
        for arguments in ({}, {"decoded": "pictures"}, {"num_workers": 1}):
            data = module(ImageMaskFolder("train", val="val", image_size=8), **arguments)
            (batch,) = data.val_dataloader()
            assert [mask.unique().tolist() for mask in batch.y] == [[1], [2], [0], [1]]
        both = [module(ImageMaskFolder(part)).samples.label_contents for part in ("train", "val")]
        assert data.samples.label_contents == [*both[0], *both[1]]
        data.save_split(tmp_path / "split.json")
        again = module(ImageMaskFolder("train", val="val", image_size=8), labeled=tmp_path / "split.json")
        assert again.split.hash == data.split.hash

    @pytest.mark.parametrize("wrapper", [lambda one: ClassSubset(one, [1, 0]), RotatedClasses])
    def test_sources_of_sources(self, folders, wrapper):
        alone = module(wrapper(source(val=None)), val_size=0)
        data = module(wrapper(source()))
        assert (data.split.labeled, data.class_names) == (alone.split.labeled, alone.class_names)
        labels = torch.cat([batch.y for batch in data.val_dataloader()])
        dogs = data.class_names.index("dogs" if "dogs" in data.class_names else "dogs at 0")
        shown = [Path(data.path(n)).parts[-3:-1] for n in data.split.val]
        assert {place for place, label in zip(shown, labels, strict=True) if label == dogs} == {("val", "dogs")}
        assert {place[0] for place in shown} == {"val"}

    def test_workers(self, folders):
        def batches(**arguments):
            return [batch.x for batch in module(**arguments).val_dataloader()]

        for one, other in zip(batches(), batches(num_workers=1), strict=True):
            assert torch.equal(one, other)


class TestSplits:
    def test_saved_split(self, folders, tmp_path):
        data = module()
        data.save_split(tmp_path / "split.json")
        again = module(labeled=tmp_path / "split.json")
        assert again.split.hash == data.split.hash

    def test_split_of_the_training_folder_alone(self, folders, tmp_path):
        """New samples join the pool elsewhere: those of the own validation part must not."""
        module(source(val=None), val_size=0).save_split(tmp_path / "split.json")
        data = module(labeled=tmp_path / "split.json")
        assert data.split.val == [*range(12, 24)]
        assert not {*data.unlabeled_indices()} & {*data.split.val}

    def test_split_with_another_validation_part(self, folders, tmp_path):
        module(source(val=None), val_size=1).save_split(tmp_path / "split.json")
        with pytest.raises(InputError, match=r"validates on 2 samples \(cats/\d.png\) that are not in the"):
            module(labeled=tmp_path / "split.json")

    def test_split_that_trains_on_it(self, folders, tmp_path):
        made = ImageFolder("val", image_size=8)
        SemiSupervisedDataModule(made, labeled=2, val_size=0).save_split(tmp_path / "split.json")
        with pytest.raises(InputError, match=r"trains on 12 samples \(val: cats/0.png\) that are in the source's own"):
            module(labeled=tmp_path / "split.json")

    def test_split_of_a_part_with_unlabeled_samples(self, tmp_path):
        x = torch.rand(10, 3)
        own = TensorDataset(x[:3] + 1, torch.tensor([0, -100, 1]))
        made = DatasetSource(TensorDataset(x, torch.arange(10) % 2), val=own)
        module(made).save_split(tmp_path / "split.json")
        assert module(made, labeled=tmp_path / "split.json").split.val == [10, 11, 12]

    @pytest.mark.parametrize("count", [2, 6])
    def test_source_without_the_part(self, tmp_path, monkeypatch, count):
        """The run would go on without any validation."""
        monkeypatch.chdir(tmp_path)
        write(tmp_path, ("train",))
        write(tmp_path, ("x", "val"), count)
        module().save_split(tmp_path / "split.json")
        with pytest.raises(InputError, match=f"has {2 * count} validation samples, and none of them is here"):
            module(source(val=None), labeled=tmp_path / "split.json")

    def test_source_that_has_all_in_one_folder(self, folders, tmp_path):
        """The part is found by content, and validates."""
        data = module()
        data.save_split(tmp_path / "split.json")
        labeled = {data.content(index) for index in data.split.labeled}
        for name in NAMES:
            for number in range(6):
                (folders / f"val/{name}/{number}.png").rename(folders / f"train/{name}/v{number}.png")
        one = module(source(val=None), labeled=tmp_path / "split.json")
        assert {Path(path).name[0] for path in paths(one, one.split.val)} == {"v"}
        assert (len(one.split.val), {one.content(index) for index in one.split.labeled}) == (12, labeled)

    def test_another_part_of_the_same_file_names(self, folders, tmp_path):
        """Its pictures are others: no correction of the earlier ones is theirs, and the line says so."""
        (tmp_path / "labels.csv").write_text("path,label\nval/cats/0.png,dogs\n")
        module(label_file=tmp_path / "labels.csv", correct_val=True).save_split(tmp_path / "split.json")
        with pytest.warns(UserWarning, match="the validation part has changed since: 0 of its 12 samples are here, 12"):
            data = module(source(val="test"), labeled=tmp_path / "split.json")
        assert data.split.val == [*range(12, 24)]
        assert data.split.label_rows == []
        assert torch.cat([batch.y for batch in data.val_dataloader()]).tolist() == [0] * 6 + [1] * 6

    def test_files_that_come_and_go(self, folders, tmp_path):
        module(labeled=2).save_split(tmp_path / "split.json")
        (folders / "val/cats/0.png").rename(folders / "val/cats/renamed.png")
        (folders / "val/dogs/3.png").unlink()
        Image.new("RGB", (12, 12), "white").save(folders / "val/dogs/9.png")
        with pytest.warns(UserWarning, match="11 of its 12 samples are here, 1 are new"):
            data = module(labeled=tmp_path / "split.json")
        assert data.split.val == [*range(12, 24)]
        assert not {*data.split.val} & {*data.split.labeled, *data.unlabeled_indices()}

    def test_folders_that_moved_together(self, folders, tmp_path):
        """Names are relative to each folder, so that a run resumes elsewhere."""
        here = module()
        (folders / "there").mkdir()
        for part in ("train", "val"):
            (folders / part).rename(folders / "there" / part)
        there = module(ImageFolder("there/train", val="there/val", image_size=8))
        assert there.samples.images_hash == here.samples.images_hash
        assert there.samples.hash == here.samples.hash

    def test_files_of_one_name_are_two_samples(self, folders):
        data = module()
        names = data.identities("train").paths
        assert len({*names}) == 24
        assert (names[0], names[12]) == ("cats/0.png", "val: cats/0.png")

    def test_copies_without_paths_have_contents_of_their_own(self, tmp_path):
        x = torch.rand(4, 3)
        made = DatasetSource(
            TensorDataset(x, torch.tensor([0, 1, 0, 1])), val=TensorDataset(x[:2], torch.tensor([0, 1]))
        )
        data = module(made)
        assert data.content(4) == f"{data.content(0)}#2"
        (tmp_path / "labels.csv").write_text(f"content,label\n{data.content(5)},0\n")
        assert module(made, label_file=tmp_path / "labels.csv", correct_val=True).validation_labels()[4:].tolist() == [
            0,
            0,
        ]

    def test_training_part_that_is_random(self, tmp_path):
        """Samples without a name are not taken for samples that are gone."""

        class Random(torch.utils.data.Dataset):
            targets = [0, 1] * 5

            def __len__(self):
                return 10

            def __getitem__(self, index):
                return torch.rand(3), self.targets[index]

        def made():
            return DatasetSource(Random(), val=TensorDataset(torch.rand(3, 3), torch.tensor([0, 1, 1])))

        data = module(made())
        data.save_split(tmp_path / "split.json")
        assert module(made(), labeled=tmp_path / "split.json").split.labeled == data.split.labeled
        saved = Split.load(tmp_path / "split.json", data.samples.parts.train.targets)
        fewer = TensorDataset(torch.rand(2, 3), torch.tensor([1, 1]))
        joined = DatasetSource(ConcatDataset([Random(), TensorDataset(torch.rand(1, 3), torch.tensor([0]))]), val=fewer)
        assert saved.samples is None
        with pytest.raises(InputError, match=r"validates on 1 samples \(sample 10\) that are not in the source's own"):
            module(joined, labeled=tmp_path / "split.json")

    def test_copies_stay_apart(self, folders):
        """A training picture that is a copy of a validation picture is left out; the part itself stays."""
        content = (folders / "val/cats/3.png").read_bytes()
        (folders / "train/cats/0.png").write_bytes(content)
        (folders / "test/dogs/1.png").write_bytes((folders / "val/dogs/2.png").read_bytes())
        data = module(duplicates="together", unlabeled="rest")
        left = paths(data, data.split.left_out)
        assert {Path(path).parts[-3:] for path in left} == {("train", "cats", "0.png")}
        assert data.split.val == [*range(12, 24)]
        made = source(test="test")
        data = module(made, duplicates="together")
        left = {Path(path).parts[-3:] for path in paths(data, data.split.left_out)}
        assert left == {("train", "cats", "0.png"), ("val", "dogs", "2.png")}


class TestLabelFile:
    def rows(self, path, *rows):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "kind"), *rows])
        return path

    def test_corrections(self, folders, tmp_path):
        file = self.rows(
            tmp_path / "labels.csv",
            ("val/cats/0.png", "dogs", ""),
            ("val/cats/1.png", "", "missing"),
            ("val/cats/2.png", "cats", ""),
            ("train/cats/0.png", "dogs", ""),
        )
        with pytest.raises(InputError, match="correct_val: true corrects its label"):
            module(label_file=file)
        data = module(label_file=file, correct_val=True)
        labels = torch.cat([batch.y for batch in data.val_dataloader()])
        assert labels.tolist() == [1, -100, 0, 0, 0, 0] + [1] * 6
        assert data.validation_labels()[12:].tolist() == labels.tolist()
        assert data.split.val == [*range(12, 24)]
        assert (data.visible_labels()[12:] == -100).all()
        assert data.visible_labels()[0] == 1
        data.save_split(tmp_path / "split.json")
        again = module(labeled=tmp_path / "split.json")
        assert torch.cat([batch.y for batch in again.val_dataloader()]).tolist() == labels.tolist()
        assert module().split.hash != again.split.hash

    def test_rows_that_agree_are_no_error(self, folders, tmp_path):
        """A whole export of a labelling tool names all pictures."""
        rows = [(f"{part}/{name}/{n}.png", name, "") for part in ("train", "val") for name in NAMES for n in range(6)]
        data = module(label_file=self.rows(tmp_path / "labels.csv", *rows))
        assert not {*data.split.val} & {*data.split.labeled}
        assert len(data.split.labeled) == 12

    def test_rows_that_agree_that_a_label_is_missing(self, tmp_path):
        x = torch.rand(6, 3)
        made = DatasetSource(TensorDataset(x, torch.arange(6) % 2), val=TensorDataset(x[:2] + 1, torch.tensor([0, -1])))
        (tmp_path / "labels.csv").write_text("index,label,kind\n6,0,\n7,,missing\n0,1,\n")
        assert module(made, label_file=tmp_path / "labels.csv").split.val == [6, 7]

    def test_second_file(self, folders, tmp_path):
        """A later file is compared with the corrected labels, and may take a correction back."""
        wrong = self.rows(tmp_path / "wrong.csv", ("val/cats/0.png", "dogs", ""))
        module(label_file=wrong, correct_val=True).save_split(tmp_path / "split.json")
        split = tmp_path / "split.json"
        assert module(labeled=split, label_file=wrong).validation_labels()[12] == 1
        back = self.rows(tmp_path / "back.csv", ("val/cats/0.png", "cats", ""))
        with pytest.raises(InputError, match="correct_val: true corrects its label"):
            module(labeled=split, label_file=back)
        assert module(labeled=split, label_file=back, correct_val=True).validation_labels()[12] == 0

    def test_paths_that_two_parts_have(self, folders, tmp_path):
        with pytest.raises(InputError, match=r"'cats/0.png' fits several images; give the whole path"):
            module(label_file=self.rows(tmp_path / "labels.csv", ("cats/0.png", "dogs", "")))

    def test_superclass(self, folders, tmp_path):
        file = self.rows(tmp_path / "labels.csv", ("val/cats/0.png", "pets", "coarse"))
        with pytest.raises(InputError, match="cannot have a superclass|superclass"):
            module(label_file=file, correct_val=True)

    def test_needs_a_file(self):
        with pytest.raises(InputError, match="correct_val: true needs label_file"):
            SemiSupervisedDataModule(Digits(), correct_val=True)


def test_cached_teacher_and_resume(folders, quiet_trainer, tmp_path):
    """The teacher's outputs of the own part are not stored, and a resumed fit is the same."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))

    def fit(epochs, folder, **kwargs):
        torch.manual_seed(1)
        student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        made = DistillModule(student, Teacher(network, cache=tmp_path / "outputs"))
        data = SemiSupervisedDataModule(source(), labeled=2, batch_size=4, num_views=1)
        trainer = quiet_trainer(max_epochs=epochs, default_root_dir=str(tmp_path / folder), limit_val_batches=1.0)
        trainer.fit(made, datamodule=data, **kwargs)
        assert data.train_views().outputs.indices.tolist() == [*range(12)]
        return trainer, made

    trainer, _ = fit(1, "first")
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, resumed = fit(2, "second", ckpt_path=tmp_path / "one.ckpt")
    _, whole = fit(2, "whole")
    assert torch.equal(resumed.student[1].weight, whole.student[1].weight)
