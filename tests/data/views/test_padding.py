"""Token sequences of different lengths: batches are padded to the longest of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.views.dataset import ViewDataset, collate
from kd_lightning.data.views.nested import pad_alike, stack_inputs, stack_labels

SIZE, CLASSES = 21, 3
LENGTHS = [1 + number * 5 % 7 for number in range(SIZE)]
IDS = [
    torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(n)) + number for number, n in enumerate(LENGTHS)
]


class Sentences(Dataset):
    """Sentences of different lengths, with one label each or one for each token (``dense``)."""

    def __init__(self, dense=False, teacher=False, numbers=range(SIZE), missing=()):
        self.dense, self.teacher, self.numbers, self.missing = dense, teacher, [*numbers], missing

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        ids = IDS[number]
        item = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "boxes": ids.unsqueeze(1).repeat(1, 2).float(),
        }
        if self.teacher:
            item["teacher_inputs"] = {"input_ids": ids.repeat(2), "attention_mask": torch.ones(2 * len(ids))}
        item["labels"] = (ids % CLASSES).tolist() if self.dense else number % CLASSES
        if number in self.missing:
            item["labels"] = None
        return item


class Drop(nn.Module):
    """Replaces random tokens by 0; the length stays."""

    def forward(self, inputs):
        kept = (torch.rand(len(inputs["input_ids"])) < 0.7).long()
        return {**inputs, "input_ids": inputs["input_ids"] * kept}


class Cut(nn.Module):
    """Drops the last token of a longer sentence."""

    def forward(self, inputs):
        length = max(1, len(inputs["input_ids"]) - 1)
        return {name: inputs[name][:length] for name in inputs if name != "teacher_inputs"}


def check(batch, teacher=False):
    """Compare a batch with the sentences."""
    lengths = [LENGTHS[n] for n in batch.index.tolist()]
    assert batch.x["input_ids"].shape == (len(batch), max(lengths)) == batch.x["attention_mask"].shape
    assert batch.x["boxes"].shape == (len(batch), max(lengths), 2)
    for row, (number, length) in enumerate(zip(batch.index.tolist(), lengths, strict=True)):
        assert torch.equal(batch.x["input_ids"][row, :length], IDS[number])
        assert torch.equal(batch.x["boxes"][row, :length, 1].long(), IDS[number])
        assert batch.x["attention_mask"][row].tolist() == [1] * length + [0] * (max(lengths) - length)
        for value in batch.x.values():
            assert (value[row, length:] == 0).all()
        if teacher:
            assert torch.equal(batch.teacher_inputs["input_ids"][row, : 2 * length], IDS[number].repeat(2))
            assert batch.teacher_inputs["attention_mask"][row].sum() == 2 * length


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_batches_are_as_long_as_their_longest_sentence(workers, dense):
    source = DatasetSource(Sentences(dense, True), Sentences(dense, True, range(4)), dense=dense)
    data = SemiSupervisedDataModule(
        source, labeled=2 if not dense else 7, val_size=3 if dense else 1, batch_size=4, num_workers=workers
    )
    widths = set()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.pool_dataloader(), data.test_dataloader()]
    for number, loader in enumerate(loaders):
        for batch in loader:
            check(batch, teacher=True)
            widths.add(batch.x["input_ids"].shape[1])
            for row, index in enumerate(batch.index.tolist()) if dense else ():
                seen = number in (1, 3) or index in data.split.labeled
                length = LENGTHS[index]
                expected = (IDS[index] % CLASSES).tolist() if seen else [-100] * length
                assert batch.y[row].tolist() == expected + [-100] * (batch.y.shape[1] - length)
    assert len(widths) > 1


@pytest.mark.parametrize("dense", [False, True])
def test_views_do_not_depend_on_the_batch(dense):
    """The tokens of a view are the same in a batch of any length, and for both views."""
    source = DatasetSource(Sentences(dense), dense=dense)

    def views(**kwargs):
        data = SemiSupervisedDataModule(source, train_transform=Drop(), strong_transform=Drop(), val_size=0, **kwargs)
        found = {}
        for batch in data.train_dataloader():
            for row, (index, view) in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
                both = [x["input_ids"][row, : LENGTHS[index]].tolist() for x in (batch.x, batch.x_strong)]
                found[index, view] = both
        return found

    expected = views(batch_size=4)
    assert views(batch_size=SIZE) == views(batch_size=5, num_workers=2) == expected
    assert any(weak != strong for weak, strong in expected.values())


def test_a_strong_view_may_be_shorter_where_a_sentence_has_one_label():
    data = SemiSupervisedDataModule(DatasetSource(Sentences()), strong_transform=Cut(), val_size=0, batch_size=4)
    for batch in data.train_dataloader():
        check(batch)
        for row, index in enumerate(batch.index.tolist()):
            length = max(1, LENGTHS[index] - 1)
            assert torch.equal(batch.x_strong["input_ids"][row, :length], IDS[index][:length])
            assert int(batch.x_strong["attention_mask"][row].sum()) == length
    data = SemiSupervisedDataModule(DatasetSource(Sentences(True), dense=True), strong_transform=Cut(), batch_size=4)
    with pytest.raises(InputError, match="strong_transform must leave dense labels where they are"):
        [*data.train_dataloader()]


def test_the_pad_token_of_a_source():
    class Padded(Source):
        def load(self):
            return DatasetSource(Sentences()).load()._replace(pad_token=7)

    data = SemiSupervisedDataModule(Padded(), val_size=0, batch_size=5, strong_transform=Cut())
    for loader in (data.train_dataloader(), data.pool_dataloader()):
        for batch in loader:
            for x in filter(None, (batch.x, batch.x_strong)):
                assert (x["input_ids"][x["attention_mask"] == 0] == 7).all()
            assert (batch.x["boxes"][batch.x["attention_mask"] == 0] == 0).all()
    assert Parts(None).pad_token == 0


def test_a_sentence_without_labels():
    """Of token labels None means unlabeled; the labels of its row are -100 as long as its sentence is."""
    source = DatasetSource(Sentences(True, missing=(0, 3)), dense=True)
    data = SemiSupervisedDataModule(source, val_size=0, batch_size=4)
    data.setup("")
    assert data.split.unlabeled == [0, 3]
    for batch in data.train_dataloader():
        check(batch)
        assert batch.y.shape == batch.x["input_ids"].shape
        rows = [row for row, index in enumerate(batch.index.tolist()) if index in (0, 3)]
        assert (batch.y[rows] == -100).all()


def test_labels_of_another_length_than_their_sentence():
    class Wrong(Sentences):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item | {"labels": [*item["labels"], 0]} if index == 5 else item

    data = SemiSupervisedDataModule(DatasetSource(Wrong(True), dense=True), val_size=0, batch_size=SIZE)
    with pytest.raises(InputError, match=r"dense: sample 5 must have a label for each token .* \[5\], got \[6\]"):
        next(iter(data.train_dataloader()))


def test_what_is_not_padded():
    ragged = [{"ids": torch.ones(n), "attention_mask": torch.ones(2)} for n in (2, 3)]
    with pytest.raises(InputError, match=r"ids of samples .* return a mapping of tensors with their attention_mask"):
        stack_inputs(ragged)
    with pytest.raises(InputError, match="one shape"):  # of another length than its mask
        stack_inputs([{"ids": torch.ones(n), "attention_mask": torch.ones(n + n // 3)} for n in (2, 3)])
    fixed = [{"topic": torch.ones(3), "attention_mask": torch.ones(n)} for n in (2, 3)]
    assert stack_inputs(fixed)["topic"].shape == (2, 3)  # not of the tokens, though 3 is the length of one
    both = {"ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "topic": torch.ones(2, 5)}
    short = {name: part[:, :2] if name != "topic" else part for name, part in both.items()}
    one, other = pad_alike(both, short)
    assert one is both or torch.equal(one["ids"], both["ids"])
    assert other["ids"].tolist() == [[1, 1, 0]] * 2 == other["attention_mask"].tolist()
    assert other["topic"].shape == (2, 5)
    assert stack_labels([torch.zeros(2), torch.zeros(1)]).isnan().tolist() == [[False, False], [False, True]]


def test_single_views_are_stacked_and_padded():
    views = ViewDataset([Sentences()], torch.arange(SIZE), None, 0)
    joined = collate([views[n] for n in range(4)])
    assert torch.equal(joined.x["input_ids"], views.__getitems__([*range(4)]).x["input_ids"])
