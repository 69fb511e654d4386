"""Samples whose inputs are a mapping or tuple of tensors, from a user's dataset to the batch."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.data import extract_batch_size
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule
from kd_lightning.data.sources.items import Entries
from kd_lightning.data.transforms import RandomHorizontalFlip
from kd_lightning.data.views.dataset import ViewDataset, collate
from kd_lightning.data.views.nested import split_teacher_inputs, stack_inputs, to_inputs

SIZE, LENGTH, CLASSES = 24, 6, 3
IDS = torch.randint(1, 50, (SIZE, LENGTH), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(LENGTH) < torch.arange(SIZE)[:, None] % LENGTH + 1).long()


class Texts(Dataset):
    """Token numbers and a mask, as a mapping, a pair with a mapping, or a pair with a tuple."""

    def __init__(self, kind="mapping", numbers=range(SIZE), labeled=True):
        self.kind = kind
        self.numbers = [*numbers]
        self.labeled = labeled

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        ids, mask, label = IDS[number], MASK[number], number % CLASSES
        if self.kind == "mapping":
            item = {"path": Path(f"/data/{number}.txt"), "input_ids": ids, "attention_mask": mask, "id": 7}
            item |= {"idx": index}
            return item | ({"labels": label} if self.labeled else {})
        inputs = (ids, mask) if self.kind == "tuple" else {"attention_mask": mask, "input_ids": ids}
        return (inputs, label) if self.labeled else (inputs,)


class DropTokens(nn.Module):
    """A random transform of one sample, which gets all of its inputs."""

    def forward(self, inputs):
        ids = inputs["input_ids"] if isinstance(inputs, dict) else inputs[0]
        kept = ids * (torch.rand(LENGTH) < 0.7) + random.randrange(2)
        if isinstance(inputs, dict):
            inputs["input_ids"] = kept  # in place, as many transforms do
            return inputs
        return kept, inputs[1]


def make(kind="mapping", **kwargs):
    defaults = {"val_size": 2, "batch_size": 5, "labeled": 2}
    return SemiSupervisedDataModule(DatasetSource(Texts(kind), Texts(kind, range(4))), **(defaults | kwargs))


def parts(x):
    """Numbers and mask of a batch of any kind."""
    return (x["input_ids"], x["attention_mask"]) if isinstance(x, dict) else x


@pytest.mark.parametrize("kind", ["mapping", "pair", "tuple"])
def test_every_loader_gives_each_sample_its_inputs(kind):
    data = make(kind)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "pool": data.pool_dataloader()}
    for name, loader in (loaders | {"test": data.test_dataloader()}).items():
        seen = []
        for batch in loader:
            ids, mask = parts(batch.x)
            assert type(batch.x) is (tuple if kind == "tuple" else dict)
            assert len(batch.x) == 2
            assert torch.equal(ids, IDS[batch.index])
            assert torch.equal(mask, MASK[batch.index])
            known = batch.y != -100
            assert torch.equal(batch.y[known], batch.index[known] % CLASSES)
            assert len(batch) == len(batch.index) == extract_batch_size(batch)
            seen += batch.index.tolist()
        assert len(seen) == len({*seen}) == {"train": 18, "val": 6, "pool": 18, "test": 4}[name]
    assert {int(y) for batch in loaders["train"] for y in batch.y} == {-100, *range(CLASSES)}


@pytest.mark.parametrize("kind", ["mapping", "pair", "tuple"])
def test_views_are_replayable_for_any_number_of_workers(kind):
    def views(workers, skip=0):
        data = make(kind, train_transform=DropTokens(), strong_transform=DropTokens(), num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        loader.load_state_dict({"epoch": 1, "batches": skip})
        return [(batch.index, batch.view, *parts(batch.x), *parts(batch.x_strong)) for batch in loader]

    torch.manual_seed(0)
    first, state = views(0), torch.get_rng_state()
    assert any(not torch.equal(ids, IDS[index]) for index, _, ids, *_ in first)
    assert any(not torch.equal(ids, strong) for _, _, ids, _, strong, _ in first)
    torch.rand(3), random.random()
    for other, rest in ((views(0), first), (views(2), first), (views(1, skip=2), first[2:])):
        assert len(other) == len(rest)
        for one, two in zip(other, rest, strict=True):
            assert all(map(torch.equal, one, two))
    torch.manual_seed(0)
    views(0)
    assert torch.equal(torch.get_rng_state(), state)  # global generators stay as they are
    assert torch.equal(Texts()[0]["input_ids"], IDS[0])


def test_which_sample_is_which_is_a_matter_of_content(tmp_path):
    """A split follows its samples into another order, other folders and another order of names."""
    data = make()
    data.save_split(tmp_path / "split.json")
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1)).tolist()
    for kind in ("mapping", "pair"):  # "id" is no part of the pairs' content
        other = make(kind, labeled=str(tmp_path / "split.json"))
        other.source.train = Texts(kind, order)
        if kind == "pair":
            with pytest.raises(InputError, match="split.json"):
                other.setup("")
            continue
        other.setup("")
        for part in ("labeled", "val", "unlabeled"):
            assert sorted(order[n] for n in getattr(other.split, part)) == sorted(getattr(data.split, part))
    contents = [make(kind).identities("train").contents for kind in ("mapping", "pair", "tuple")]
    assert all(len({*one}) == SIZE for one in contents)

    class Sorted(Texts):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return dict(sorted(inputs.items(), reverse=True)), label

    assert SemiSupervisedDataModule(DatasetSource(Sorted("pair"))).identities("train").contents == contents[1]


def test_a_label_file_follows_the_content(tmp_path):
    data = make(val_size=0)
    data.setup("")
    rows = [f"{data.content(index)},{(index + 1) % CLASSES}" for index in data.split.unlabeled]
    (tmp_path / "labels.csv").write_text("\n".join(["content,label", *rows]))
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1)).tolist()
    data.save_split(tmp_path / "split.json")
    other = make(labeled=str(tmp_path / "split.json"), label_file=str(tmp_path / "labels.csv"), batch_size=99)
    other.source.train = Texts(numbers=order)
    (batch,) = other.train_dataloader()
    number = torch.tensor(order)[batch.index]
    given = torch.isin(number, torch.tensor(data.split.unlabeled))
    assert 0 < given.sum() < SIZE
    assert torch.equal(batch.y, (number + given) % CLASSES)
    assert torch.equal(batch.x["input_ids"], IDS[number])


def test_changed_inputs_are_noticed_on_resume(tmp_path):
    class Files(Texts):
        """Files with a text beside each."""

        def __init__(self, folder, extra=0):
            super().__init__("pair")
            self.paths = [folder / f"{number}.txt" for number in self.numbers]
            for number, path in enumerate(self.paths):
                path.write_text(str(number))
            self.extra = extra

        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return {**inputs, "input_ids": inputs["input_ids"] + self.extra * (index == 4)}, label

    one, same, other = (SemiSupervisedDataModule(DatasetSource(Files(tmp_path, extra))).samples for extra in (0, 0, 1))
    assert one.identities[0].paths[3].endswith("/3.txt")
    assert one.images_hash == same.images_hash != other.images_hash


def test_copies_are_found():
    data = make(val_size=0, duplicates="together", labeled=None)
    data.source.train = Texts(numbers=[*range(12), 3])
    data.source.test = Texts(numbers=[5, 20])
    data.setup("")
    assert data.split.left_out == [5]
    assert data.identities("train").contents[12] == data.identities("train").contents[3] + "#2"


def test_joined_and_chosen_datasets_and_unlabeled_ones():
    joined = ConcatDataset([Subset(Texts("pair"), [4, 2, 9]), Texts("pair", [11, 12])])
    source = DatasetSource(joined, unlabeled=Texts("pair", [20, 21], labeled=False))
    data = SemiSupervisedDataModule(source, val_size=0, unlabeled="source", batch_size=99)
    (batch,) = data.train_dataloader()
    numbers = torch.tensor([4, 2, 9, 11, 12, 20, 21])
    assert torch.equal(batch.x["input_ids"], IDS[numbers[batch.index]])
    expected = torch.tensor([*(numbers[:5] % CLASSES), -100, -100])
    assert torch.equal(batch.y, expected[batch.index])


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def first_batch(*items, **kwargs):
    data = SemiSupervisedDataModule(DatasetSource(Items(*items)), val_size=0, batch_size=99, **kwargs)
    return next(iter(data.train_dataloader()))


def test_arrays_and_lists_become_tensors_and_texts_are_left_out():
    def item(n):
        return {
            "ids": [n, 2],
            "mask_of": np.array([n, 0], dtype=">i4")[::-1],
            "inner": {"size": torch.tensor(n), "name": "x"},
            "pair": [torch.ones(2), torch.zeros(1)],
            "text": "words",
            "age": 3.5,
            "shape": (4, 4),
            "label": n,
        }

    batch = first_batch(item(0), item(1))
    order = batch.index.argsort()
    x = batch.x
    assert [*x] == ["ids", "mask_of", "inner", "pair"]
    assert x["ids"][order].tolist() == [[0, 2], [1, 2]]
    assert x["mask_of"][order].tolist() == [[0, 0], [0, 1]]
    assert x["inner"].keys() == {"size"}
    assert x["inner"]["size"][order].tolist() == [0, 1]
    assert [part.shape for part in x["pair"]] == [(2, 2), (2, 1)]


def test_one_tensor_of_a_mapping_is_the_input():
    ids = torch.arange(3)
    assert isinstance(first_batch(*({"tokens": ids, "label": n} for n in (0, 1))).x, torch.Tensor)
    assert isinstance(first_batch(*({"tokens": ids, "path": "a", "label": n} for n in (0, 1))).x, torch.Tensor)
    assert first_batch(*(({"tokens": ids}, n) for n in (0, 1))).x.keys() == {"tokens"}


def test_inputs_of_teachers():
    small, large = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 8, 8)
    batch = first_batch(*({"image": small[n], "teacher_inputs": large[n], "label": n} for n in (0, 1)))
    assert torch.equal(batch.x, small[batch.index])
    assert torch.equal(batch.teacher_x, large[batch.index])
    pictures = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in large]

    class Both(nn.Module):
        def forward(self, inputs):
            image = v2.functional.to_image(inputs["teacher_inputs"]).float()
            return {"image": image[:, ::2, ::2], "teacher_inputs": {"x": image}}

    items = [{"image": picture, "teacher_inputs": picture, "label": n} for n, picture in enumerate(pictures)]
    batch = first_batch(*items, train_transform=Both(), strong_transform=Both())
    assert [*batch.x] == [*batch.x_strong] == ["image"]  # what a transform returns stays a mapping
    assert torch.equal(batch.teacher_inputs["x"], (large[batch.index] * 255).byte().float())
    with pytest.raises(InputError, match="besides teacher_inputs"):
        split_teacher_inputs({"teacher_inputs": small})


def test_a_transform_gets_texts_and_pictures():
    class Tokens(nn.Module):
        def forward(self, inputs):
            text = inputs["text"]
            return {"ids": torch.tensor([ord(sign) for sign in text]), "size": torch.tensor(inputs["picture"].size)}

    items = [{"text": text, "picture": Image.new("L", (3, 2)), "label": n} for n, text in enumerate(("ab", "cd"))]
    batch = first_batch(*items, train_transform=Tokens())
    assert batch.x["ids"].tolist() == [[ord(sign) for sign in ("ab", "cd")[n]] for n in batch.index]
    assert batch.x["size"].tolist() == [[3, 2]] * 2
    with pytest.raises(InputError, match=r"picture of sample \d is a picture \(L, \(3, 2\)\); give a transform"):
        first_batch(*items)
    with pytest.raises(InputError, match=r"got \{text: str\} for sample"):
        first_batch(*({"text": "a", "label": n} for n in (0, 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_of_different_lengths_need_padding(workers):
    items = [({"input_ids": torch.ones(2 + n), "mask": torch.ones(2)}, n) for n in (0, 1)]
    message = r"input_ids of samples after .* one shape and type, got \[\(2,\), \(3,\)\]; pad it to one length in the d"
    with pytest.raises(InputError, match=message) as caught:
        first_batch(*items, num_workers=workers)
    assert "\n" not in str(caught.value)

    class Pad(nn.Module):
        def forward(self, inputs):
            return {**inputs, "input_ids": F.pad(inputs["input_ids"], (0, 3 - len(inputs["input_ids"])))}

    assert first_batch(*items, train_transform=Pad(), num_workers=workers).x["input_ids"].sum() == 5
    with pytest.raises(InputError, match=r"must have one shape and type, got .*; pad it to one length"):
        first_batch(*((torch.ones(2 + n), n) for n in (0, 1)))
    with pytest.raises(InputError, match=r"must have the same entries, got \{a, b\} and \{a\}"):
        first_batch(({"a": torch.ones(1)}, 0), ({"b": torch.ones(1), "a": torch.ones(1)}, 1))
    with pytest.raises(InputError, match=r"ids of sample \d must be numbers of one shape"):
        first_batch(*({"ids": [[1], [1, 2]], "label": n} for n in (0, 1)))


def test_whole_batch_transforms_take_images_alone():
    message = r"^whole-batch transforms take images alone, but the inputs of item \d+ of Texts are .* input_ids: \[6\]"
    with pytest.raises(InputError, match=message) as caught:
        next(iter(make(train_transform=RandomHorizontalFlip()).train_dataloader()))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"item 0 of Texts are \(\[6\], \[6\]\)"):
        next(iter(make("tuple", eval_transform=RandomHorizontalFlip()).test_dataloader()))


def test_a_strong_view_has_the_shapes_of_the_first():
    class Short(nn.Module):
        def forward(self, inputs):
            return {"input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"]}

    with pytest.raises(InputError, match=r"returns, got \{input_ids: \[2\], .* and \{attention_mask: \[6\]"):
        next(iter(make("pair", strong_transform=Short()).train_dataloader()))


def test_two_inputs_are_not_taken_for_a_label():
    masks = MASK.clone()
    with pytest.raises(InputError, match=r"item 0 of TensorDataset begins with \[6\] and \[6\] of one kind"):
        SemiSupervisedDataModule(DatasetSource(TensorDataset(IDS, masks, torch.arange(SIZE) % 3))).setup("")
    with pytest.raises(InputError, match=r"begins with \[3, 4, 4\] and \[3, 4, 4\]"):
        first_batch(*((torch.rand(3, 4, 4), torch.rand(3, 4, 4)) for _ in range(2)))


def test_the_inputs_are_announced(caplog):
    with caplog.at_level("INFO"):
        DatasetSource(Texts())
        DatasetSource(Items({"image": Image.new("L", (2, 2)), "boxes": torch.ones(4), "id": 3, "label": 1}))
        DatasetSource(Items({"image": np.zeros((2, 2)), "label": 1}, {"image": np.zeros((2, 2)), "label": 1}))
    text = caplog.text
    assert text.count("left out") == 1
    assert "inputs of a sample are {path: PosixPath, input_ids: [6], attention_mask: [6]" in text
    assert "left out: boxes (" in text


def test_form_of_inputs():
    assert to_inputs(Entries(a=torch.ones(1), b="x"), 0).keys() == {"a"}
    assert isinstance(stack_inputs([Entries(a=torch.ones(1))]), Entries)
    with pytest.raises(InputError, match="got list for sample 3"):
        to_inputs([1, 2], 3)
    for kind in ("mapping", "pair", "tuple"):
        views = ViewDataset([Texts(kind)], torch.arange(3), DropTokens(), 0, strong_transform=DropTokens())
        single, both = views[1], views.__getitems__([0, 1])
        assert parts(single.x)[0].shape == (LENGTH,)
        joined = collate([views[0], single])
        for name in ("x", "x_strong"):
            assert all(map(torch.equal, parts(getattr(joined, name)), parts(getattr(both, name))))
    listed = first_batch(*(([torch.ones(2), torch.zeros(3)], n) for n in (0, 1))).x
    assert [part.shape for part in listed] == [(2, 2), (2, 3)]
    assert ViewDataset([Texts()], torch.arange(3), None, 0, strong_transform=DropTokens()).more_tensors == 2
    assert ViewDataset([Items((torch.rand(1, 2, 2), 0))], torch.arange(1), None, 0).more_tensors == 0
