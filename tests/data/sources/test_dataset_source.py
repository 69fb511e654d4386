"""DatasetSource: labels and classes of users' datasets, from the source to the batch."""

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder as TorchvisionFolder

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.batch import is_labeled
from kd_lightning.cli.main import DistillCLI


class Dicts(Dataset):
    """PIL pictures in dicts; the label is a text."""

    def __init__(self, names, key="label", classes=None):
        self.names = names
        self.key = key
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"image": Image.new("RGB", (4, 4), (index, 0, 0)), self.key: self.names[index], "id": index}


def tensors(labels, **attributes):
    dataset = TensorDataset(torch.arange(len(labels)).float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def test_dicts_and_names_reach_the_batch():
    names = ["emu", "cat", None, "dog", "cat", "emu"]
    source = DatasetSource(Dicts(names), Dicts(["dog", "emu", ""]), Dicts(["?"] * 3, key="comment"))
    data = SemiSupervisedDataModule(source, val_size=0, unlabeled="source", batch_size=99)
    (batch,) = list(data.train_dataloader())
    assert data.class_names == ["cat", "dog", "emu"]
    found = {int(i): int(y) for i, y in zip(batch.index, batch.y, strict=True)}
    assert found == {0: 2, 1: 0, 3: 1, 4: 0, 5: 2} | dict.fromkeys([6, 7, 8], -100)
    red = {int(i): round(float(x[0, 0, 0]) * 255) for i, x in zip(batch.index, batch.x, strict=True)}
    assert red == {0: 0, 1: 1, 3: 3, 4: 4, 5: 5, 6: 0, 7: 1, 8: 2}
    assert next(iter(data.test_dataloader())).y.tolist() == [1, 2, -100]
    rest = SemiSupervisedDataModule(source, val_size=0)
    assert rest.split is None
    assert rest.unlabeled_indices() == [2]


@pytest.mark.parametrize("missing", [-1, -100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32])
def test_samples_without_a_label_are_the_unlabeled_pool(missing, dtype):
    """Of 60 samples all are used."""
    labels = torch.full((60,), missing, dtype=dtype)
    labels[:12] = torch.arange(12) % 2
    data = SemiSupervisedDataModule(DatasetSource(tensors(labels)), val_size=0.25, batch_size=99)
    (batch,) = list(data.train_dataloader())
    split = data.split
    assert len(split.labeled) + len(split.val) == 12
    assert split.unlabeled == [*range(12, 60)]
    assert sorted(batch.index.tolist()) == sorted({*range(60)} - {*split.val})
    known = ~batch.y.isnan() if dtype.is_floating_point else batch.y != -100
    assert sorted(batch.index[known].tolist()) == split.labeled
    assert torch.equal(batch.y[known].float(), labels[batch.index[known]].float())
    assert torch.equal(next(iter(data.val_dataloader())).y.float(), labels[split.val].float())


def test_class_156_of_uint8():
    labels = torch.tensor([0, 156] * 10, dtype=torch.uint8)
    data = SemiSupervisedDataModule(DatasetSource(tensors(labels), tensors(labels)), val_size=0, batch_size=99)
    (batch,) = list(data.train_dataloader())
    assert batch.y.tolist().count(156) == 10
    assert batch.labeled.tolist() == [*range(20)]
    assert next(iter(data.test_dataloader())).labeled.tolist() == [*range(20)]


def test_rows_with_missing_entries():
    rows = torch.tensor([[0, 1, 1], [1, -1, 0], [-1, -1, -1], [0, 0, 1]])
    data = SemiSupervisedDataModule(DatasetSource(tensors(rows)), val_size=0, batch_size=9)
    assert (data.visible_labels().isnan().sum(dim=1).tolist(), data.unlabeled_indices()) == ([0, 1, 3, 0], [2])
    assert data.hidden_truth(torch.tensor([1]))[0, [0, 2]].tolist() == [1, 0]


class Pictures(Dataset):
    """Pictures of 8 bits in one form, alone or in a mapping."""

    def __init__(self, form, named=False, channels=3):
        self.form = form
        self.named = named
        self.pixels = torch.arange(8 * channels * 30, dtype=torch.int64).reshape(8, channels, 6, 5).to(torch.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        image = self.form(self.pixels[index])
        return {"image": image, "label": index % 2, "id": index} if self.named else (image, index % 2)


def to_array(pixels):
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("own", [None, nn.Identity()])
def test_tensors_of_8_bits_are_pictures(channels, named, own):
    """They reach the batch as arrays do. A transform of the user gets them as they are."""
    found = []
    for form in (torch.clone, to_array):
        source = DatasetSource(Pictures(form, named, channels), Pictures(form, named, channels))
        data = SemiSupervisedDataModule(source, val_size=0, batch_size=8, train_transform=own)
        (train,), (test,) = list(data.train_dataloader()), list(data.test_dataloader())
        found.append((train.x[train.index.argsort()], test.x))
        if own is not None:
            assert train.x.dtype == torch.uint8
            break
    pixels = Pictures(torch.clone, channels=channels).pixels
    assert torch.allclose(found[0][1], pixels.float() / 255)
    if own is None:
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    else:
        assert torch.equal(found[0][0], pixels)


def test_pictures_of_8_bits_in_a_tensor_dataset_and_with_masks():
    pixels = Pictures(torch.clone).pixels
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(pixels, torch.arange(8) % 2)), val_size=0, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert torch.allclose(batch.x, pixels[batch.index].float() / 255)
    masks = torch.arange(8).reshape(8, 1, 1).expand(8, 6, 5)
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(pixels, masks), dense=True), val_size=0, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert torch.allclose(batch.x, pixels[batch.index].float() / 255)
    assert torch.equal(batch.y, masks[batch.index])


@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 6, 5), (5, 6, 5), (3, 2, 6, 5)])
def test_other_tensors_of_8_bits_stay_as_they_are(shape):
    values = torch.ones(8, *shape, dtype=torch.uint8)
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(values, torch.arange(8) % 2)), val_size=0, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert torch.equal(batch.x, values)


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "uint8", ">f8"])
@pytest.mark.parametrize("named", [False, True])
def test_arrays_of_one_dimension_are_rows(kind, named):
    """Rows of a table, embeddings or tokens: no pictures of one row, and whole numbers stay whole."""
    values = (np.random.default_rng(0).normal(size=(6, 5)) * 9).astype(kind)
    rows = values[:, ::-1]
    items = [{"features": row, "label": n % 2} if named else (row, n % 2) for n, row in enumerate(rows)]
    source = DatasetSource(items)
    assert source.train_transform is None and source.eval_transform is None
    data = SemiSupervisedDataModule(source, val_size=2, batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.x.dtype == (torch.float32 if "f" in kind else getattr(torch, kind))
            np.testing.assert_array_equal(batch.x, rows[batch.index].astype(np.float32 if "f" in kind else kind))
    pictures = DatasetSource([(values, 0)])  # of two dimensions, as before
    assert pictures.train_transform is not None


def test_a_transform_gets_an_array_of_one_dimension_as_it_is():
    def half(row):
        assert isinstance(row, np.ndarray) and row.dtype == np.float64
        return row / 2

    source = DatasetSource([(np.arange(3.0) + n, n % 2) for n in range(6)])
    for batch in SemiSupervisedDataModule(source, val_size=0, train_transform=half).train_dataloader():
        assert torch.equal(batch.x, (torch.arange(3) + batch.index[:, None]).float() / 2)


def test_a_picture_of_8_bits_among_several_inputs_stays_as_it_is():
    class Two(Pictures):
        def __getitem__(self, index):
            return {"image": self.pixels[index], "age": torch.tensor([1.0]), "label": index % 2}

    data = SemiSupervisedDataModule(DatasetSource(Two(None)), val_size=0, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert batch.x["image"].dtype == torch.uint8


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.rand(3), 0


class NoLength(Dataset):
    def __getitem__(self, index):
        return torch.rand(3), 0


@pytest.mark.parametrize("name", ["train", "test", "unlabeled"])
@pytest.mark.parametrize("dataset", [Stream(), NoLength()])
def test_datasets_without_index_or_length(name, dataset):
    parts = {"train": tensors(torch.tensor([0, 1]))} | {name: dataset}
    with pytest.raises(InputError, match=f"{name} must be a map-style dataset, .*got {type(dataset).__name__}"):
        DatasetSource(**parts)


def test_classes_of_folders_that_lack_some(tmp_path):
    """torchvision counts the classes of each folder by itself: dog is 1 there and 0 here."""
    for place in ("train/cat", "train/dog", "train/emu", "test/dog", "other/yak"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / "0.png")
    train, test, other = (TorchvisionFolder(str(tmp_path / name)) for name in ("train", "test", "other"))
    parts = DatasetSource(train, Subset(test, [0])).load()
    assert (parts.test.targets.tolist(), parts.class_names) == ([1], ["cat", "dog", "emu"])
    assert DatasetSource(train, test, class_names=["Katze", "Hund", "Emu"]).load().test.targets.tolist() == [1]
    with pytest.raises(InputError, match="test: its class 'yak' is none of the training part's classes, cat, dog, emu"):
        DatasetSource(train, other).load()
    with pytest.raises(InputError, match="same classes"):
        DatasetSource(ConcatDataset([train, test])).load()


def test_class_names_in_another_order():
    train = tensors(torch.tensor([0, 1]), classes=["cat", "dog"])
    with pytest.raises(InputError, match="class_names must have the order of the dataset's classes"):
        DatasetSource(train, class_names=["dog", "cat"]).load()
    assert DatasetSource(train, class_names=["cat", "dog", "emu"]).load().class_names == ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        (["a", "b"], torch.tensor([0, 1]), None, "test: its labels must be texts, as those of train.*got numbers"),
        (torch.tensor([0, 1]), ["a", "b"], None, "test: its labels must be numbers.*got texts"),
        (["a", "b"], ["a", "c"], None, "Dicts: item 1 has the class 'c', none of a, b"),
        (["a", "b"], None, ["b", "c"], "Dicts: item 0 has the class 'a', none of b, c"),
    ],
)
def test_test_labels_of_another_kind(train, test, names, message):
    kinds = {list: Dicts, torch.Tensor: tensors, type(None): lambda labels: None}
    parts = [kinds[type(labels)](labels) for labels in (train, test)]
    with pytest.raises(InputError, match=message):
        DatasetSource(*parts, class_names=names).load()


def test_test_names_with_given_class_names():
    source = DatasetSource(tensors(torch.tensor([0, 1])), Dicts(["b", "a"]), class_names=["a", "b"])
    assert source.load().test.targets.tolist() == [1, 0]


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_metrics_leave_out_test_samples_without_a_label(task):
    labels = {
        "multiclass": torch.tensor([0, 1, 0, 1, -1, -1]),
        "multilabel": torch.tensor([[0, 1], [1, 0], [0, -1], [1, 1], [-1, -1], [-1, -1]]),
        "binary": torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0, -100.0]),
    }[task]
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1 if task == "binary" else 2))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    found = []
    for size in (6, 4):
        data = SemiSupervisedDataModule(
            DatasetSource(tensors(labels), tensors(labels[:size])), val_size=0, batch_size=4
        )
        (metrics,) = Trainer(**options).test(SupervisedModule(network, task=task), data, verbose=False)
        found.append(metrics)
    assert found[0] == pytest.approx(found[1])
    assert "test/accuracy" in found[0]


class Made(Dataset):
    """Named by a class path in YAML."""

    def __init__(self, size: int, step: float = 1.0):
        self.size = size
        self.step = step

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3,), index * self.step), index % 2


def test_a_dataset_of_ones_own_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"class_path": f"{__name__}.Made", "init_args": {"size": 20, "step": 0.5}}
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}
    content = {
        "name": "made",
        "trainer": {"accelerator": "cpu", "fast_dev_run": True, "enable_progress_bar": False},
        "model": {"class_path": "SupervisedModule", "init_args": {"student": linear}},
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {"source": {"class_path": "DatasetSource", "init_args": {"train": train}}},
        },
    }
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(content))
    data = DistillCLI(["fit", "--config", "made.yaml"]).datamodule
    assert data.image(3).tolist() == [1.5, 1.5, 1.5]


class Alone(Dataset):
    """Images alone."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index, dtype=torch.uint8)


class TestWithoutTraining:
    """The unlabeled part is the training part."""

    @pytest.mark.parametrize("labels", [torch.arange(6) % 3, (torch.arange(12).view(6, 2) % 3 > 0).long()])
    def test_validation_has_labels(self, labels):
        labeled = TensorDataset(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), labels)
        data = SemiSupervisedDataModule(DatasetSource(unlabeled=Alone(), val=labeled, test=labeled), batch_size=10)
        data.setup("fit")
        batches = [*data.train_dataloader()]
        assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == [*range(30)]
        assert not any(is_labeled(batch.y).any() for batch in batches)
        assert batches[0].x.dtype == torch.float32  # the default transforms of pictures
        for loader in (data.val_dataloader(), data.test_dataloader()):
            (batch,) = loader
            assert torch.equal(batch.y.long(), labels)

    def test_test_alone_and_none(self):
        labeled = TensorDataset(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 3)
        parts = DatasetSource(unlabeled=Alone(), test=labeled, class_names=["a", "b", "c"]).load()
        assert (parts.class_names, parts.val, parts.test.targets.tolist()) == ([*"abc"], None, [0, 1, 2] * 2)
        parts = DatasetSource(unlabeled=Alone()).load()
        assert (parts.class_names, parts.val, parts.test) == (None, None, None)
        assert parts.train.targets.tolist() == [-100] * 30

    def test_neither_and_dense(self):
        with pytest.raises(InputError, match=r"^train or unlabeled must be a dataset, got neither$"):
            DatasetSource()
        with pytest.raises(InputError, match=r"^dense: a training part is needed"):
            DatasetSource(unlabeled=Alone(), dense=True).load()
