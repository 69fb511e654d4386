"""Stored outputs of teachers for maps (C, H, W), and for token sequences of different lengths (T, V)."""

import json
import os
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DatasetSource, DistillModule, InputError, SemiSupervisedDataModule, Teacher
from kd_lightning.batch import Batch
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.data.views.teacher_outputs import FillingCollate, ViewOutputs
from kd_lightning.losses import KDLoss

SAMPLES, WORDS, CLASSES, BATCH = 40, 30, 6, 8
LENGTHS = 2 + torch.arange(SAMPLES) * 7 % 11


def ids_of(index):
    return torch.randint(1, WORDS, (int(LENGTHS[index]),), generator=torch.Generator().manual_seed(index))


def padded(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def batch_of(indices):
    """Pad to the longest of these samples alone."""
    ids = [ids_of(index) for index in indices]
    labels = nn.utils.rnn.pad_sequence([row % CLASSES for row in ids], True, -100)
    x = {"input_ids": padded(ids), "attention_mask": padded([torch.ones_like(row) for row in ids])}
    index = torch.tensor(indices)
    return Batch(x, labels, index=index, view=torch.zeros_like(index))


class Table:
    """The views of all samples, one each."""

    def __init__(self):
        self.outputs = ViewOutputs(np.arange(SAMPLES), 1)

    def __len__(self):
        return SAMPLES

    def parts(self):
        return {"samples": "tokens"}

    def read(self, batches, seed=0):
        return (batch_of([*map(int, rows)]) for rows in batches)

    def finish(self, batch):
        return batch


class Tokens(LightningDataModule):
    batch_size = BATCH

    def __init__(self, workers=0):
        super().__init__()
        self.table, self.workers = Table(), workers

    def train_views(self):
        return self.table

    def train_dataloader(self):
        collate = FillingCollate(batch_of, self.table.outputs)
        return DataLoader(range(SAMPLES), BATCH, shuffle=True, collate_fn=collate, num_workers=self.workers)


class Tagger(nn.Module):
    """The logits of a token depend on that token alone, to the bit. Padding gives other logits than 0."""

    def __init__(self, seed, classes=CLASSES, words=WORDS):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(words, classes)
        self.sizes = []

    def forward(self, input_ids, attention_mask):
        self.sizes.append(len(input_ids))
        return 3 * self.words(input_ids)


def fit(trainer, data=None, soft_loss=None, class_dim=-1, network=Tagger, **cache):
    module = DistillModule(network(0), Teacher(network(1), **cache), class_dim=class_dim, soft_loss=soft_loss)
    seed_everything(3, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cache: ")
        trainer(max_epochs=2).fit(module, datamodule=data or Tokens())
    return module


def assert_same(one, other):
    one, other = one.student.state_dict(), other.student.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def folder_of(module):
    (folder,) = module.teacher.cache_folders.values()
    return folder


def test_tokens_of_different_lengths_equal_the_live_run_to_the_bit(quiet_trainer, tmp_path):
    live = fit(quiet_trainer)
    for workers, filled in ((0, False), (2, True)):
        module = fit(quiet_trainer, Tokens(workers), cache=tmp_path, cache_dtype="float32")
        assert_same(module, live)
        table = 0 if filled else SAMPLES
        assert sum(module.teacher.network.sizes) == 2 * BATCH + table  # the sample that is compared twice


def test_each_row_has_the_length_of_its_own_sequence(quiet_trainer, tmp_path):
    module = fit(quiet_trainer, cache=tmp_path, cache_dtype="float32")
    size = sum(file.stat().st_size for file in folder_of(module).glob("outputs-*"))
    places = 8 * (SAMPLES + -(-SAMPLES // BATCH))  # at most
    assert 0 <= size - (16 * SAMPLES + 4 * CLASSES * int(LENGTHS.sum())) <= places


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_top_logits_of_each_token_against_probabilities_written_out(dtype, quiet_trainer, tmp_path):
    module = fit(quiet_trainer, cache=tmp_path, cache_dtype=dtype, cache_top_k=2)
    batch = module.trainer.datamodule.table.outputs.fill(batch_of([5, 3, 30]))
    held = batch.teacher.outputs["teacher"]
    assert held.dtype == torch.uint8  # whole logits are made where they are used
    found = module.teacher.stored(batch)
    live = module.teacher.compute(batch)
    assert found.shape == live.shape
    for row, mine, length in zip(live.double(), found.double(), LENGTHS[[5, 3, 30]], strict=True):
        assert (mine[length:] == 0).all()
        for logits, stored in zip(row[:length], mine[:length], strict=True):
            p, q = logits.softmax(0), stored.softmax(0)
            order = p.argsort(descending=True)
            expected = torch.cat([p[order[:2]], p[order[2:]].sum().expand(4) / 4])
            torch.testing.assert_close(q[order], expected, rtol=4e-3 if dtype == "float16" else 1e-5, atol=1e-7)


def test_top_logits_of_all_but_one_class_train_as_all(quiet_trainer, tmp_path):
    live = fit(quiet_trainer, soft_loss=KDLoss(1.0))
    module = fit(quiet_trainer, soft_loss=KDLoss(1.0), cache=tmp_path, cache_dtype="float32", cache_top_k=CLASSES - 1)
    for one, other in zip(module.student.parameters(), live.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("damage", ["checksum", "bytes", "gone", "short", "part"])
def test_a_killed_or_damaged_fill_is_completed(damage, quiet_trainer, tmp_path):
    live = fit(quiet_trainer)
    folder = folder_of(fit(quiet_trainer, cache=tmp_path, cache_dtype="float32"))
    files = sorted(folder.glob("outputs-*"))
    assert files
    if damage == "checksum":  # killed before it was written
        (folder / "chunks").write_bytes(bytes((folder / "chunks").stat().st_size))
    elif damage == "bytes":
        data = bytearray(files[0].read_bytes())
        data[-3] ^= 1
        files[0].write_bytes(bytes(data))
    elif damage == "gone":
        files[0].unlink()
    elif damage == "short":
        os.truncate(files[0], 40)
    else:
        (folder / f"{files[0].name}.part").write_bytes(b"killed")
        files[0].unlink()
    module = fit_without_filter(quiet_trainer, tmp_path)
    assert_same(module, live)
    assert sum(module.teacher.network.sizes) == 2 * BATCH + SAMPLES
    assert not [*folder.glob("*.part")]
    assert sum(fit(quiet_trainer, cache=tmp_path, cache_dtype="float32").teacher.network.sizes) == 2 * BATCH


def fit_without_filter(trainer, root):
    module = DistillModule(Tagger(0), Teacher(Tagger(1), cache=root, cache_dtype="float32"), class_dim=-1)
    seed_everything(3, verbose=False)
    trainer(max_epochs=2).fit(module, datamodule=Tokens())
    return module


def test_another_text_makes_another_table(quiet_trainer, tmp_path, monkeypatch):
    first = folder_of(fit(quiet_trainer, cache=tmp_path))
    own = ids_of
    monkeypatch.setattr(sys.modules[__name__], "ids_of", lambda index: (own(index) + 1) % WORDS)
    module = fit(quiet_trainer, cache=tmp_path)
    assert folder_of(module) != first
    assert sum(module.teacher.network.sizes) == 2 * BATCH + SAMPLES


class Large(Tokens):
    """Sequences of one length, without a mask."""

    batch_size, words, tokens = 2, 50_000, 128

    def __init__(self):
        super().__init__()
        self.table.read = lambda batches, seed=0: (self.batch_of([*map(int, rows)]) for rows in batches)
        self.table.outputs = ViewOutputs(np.arange(4), 1)
        self.table.__class__ = type("Four", (Table,), {"__len__": lambda table: 4})

    def batch_of(self, indices):
        index = torch.tensor(indices)
        x = torch.randint(self.words, (4, self.tokens), generator=torch.Generator().manual_seed(0))[index]
        return Batch(x, (x + 1) % self.words, index=index, view=torch.zeros_like(index))

    def train_dataloader(self):
        return DataLoader(range(4), 2, collate_fn=FillingCollate(self.batch_of, self.table.outputs))


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.head = nn.Embedding(Large.words, 2), nn.Linear(2, Large.words)

    def forward(self, x):
        return self.head(self.words(x))


@pytest.mark.slow
def test_a_large_vocabulary_is_never_stored_whole(quiet_trainer, tmp_path):
    module, k = fit(quiet_trainer, Large(), network=Model, cache=tmp_path, cache_top_k=8), 8
    assert (folder_of(module) / "outputs").stat().st_size == 4 * (16 + Large.tokens * (2 * (k + 1) + 4 * k))
    batch = module.trainer.datamodule.table.outputs.fill(module.trainer.datamodule.batch_of([3, 1]))
    assert batch.teacher.outputs["teacher"].nbytes < 20_000
    assert batch.teacher["teacher"].shape == (2, Large.tokens, Large.words)


class Words(Dataset):
    """Every third sequence has no label."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        ids = ids_of(index)
        labels = torch.full_like(ids, -100) if index % 3 == 0 else ids % CLASSES
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("top_k", [None, CLASSES - 1])
def test_sequences_of_the_datamodule(top_k, quiet_trainer, tmp_path):
    def data():
        source = DatasetSource(Words(), dense=True)
        return SemiSupervisedDataModule(source, num_views=2, labeled=10, val_size=4, batch_size=BATCH)

    live = fit(quiet_trainer, data(), soft_loss=KDLoss(1.0))
    for filled in (False, True):
        options = {"cache": tmp_path, "cache_dtype": "float32", "cache_top_k": top_k}
        module = fit(quiet_trainer, data(), soft_loss=KDLoss(1.0), **options)
        computed = sum(module.teacher.network.sizes)
        assert computed < 3 * BATCH + 4 if filled else computed > SAMPLES
        if top_k is None:
            assert_same(module, live)
        for one, other in zip(module.student.parameters(), live.student.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


# Maps.


class Maps(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(1, CLASSES, 1)

    def forward(self, x):
        return 3 * self.layer(x)


class Pictures(Tokens):
    """Pictures of 4 x 5 pixels."""

    def __init__(self):
        super().__init__()
        self.x = torch.randn(SAMPLES, 1, 4, 5, generator=torch.Generator().manual_seed(0))
        self.table.read = lambda batches, seed=0: (self.batch_of([*map(int, rows)]) for rows in batches)

    def batch_of(self, indices):
        index = torch.tensor(indices)
        x = self.x[index]
        return Batch(x, (x[:, 0] > 0).long(), index=index, view=torch.zeros_like(index))

    def train_dataloader(self):
        return DataLoader(range(SAMPLES), BATCH, collate_fn=FillingCollate(self.batch_of, self.table.outputs))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_maps_come_back_in_their_shape(dtype, quiet_trainer, tmp_path):
    live = fit(quiet_trainer, Pictures(), class_dim=1, network=Maps)
    data = Pictures()
    module = fit(quiet_trainer, data, class_dim=1, network=Maps, cache=tmp_path, cache_dtype=dtype)
    if dtype == "float32":
        assert_same(module, live)
    batch = data.table.outputs.fill(data.batch_of([7, 0, 39]))
    live = module.teacher.compute(batch)
    tolerance = {"rtol": 0, "atol": 0} if dtype == "float32" else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(module.teacher.stored(batch), live, **tolerance)


def test_top_logits_of_each_pixel(quiet_trainer, tmp_path):
    data = Pictures()
    module = fit(quiet_trainer, data, class_dim=1, network=Maps, cache=tmp_path, cache_dtype="float32", cache_top_k=2)
    batch = data.table.outputs.fill(data.batch_of([7, 0, 39]))
    found, live = module.teacher.stored(batch), module.teacher.compute(batch)
    assert found.shape == live.shape == (3, CLASSES, 4, 5)
    p, q = live.double().softmax(1), found.double().softmax(1)
    order = p.argsort(1, descending=True)
    expected = torch.cat([p.sort(1, descending=True)[0][:, :2], p.sort(1)[0][:, :4].mean(1, keepdim=True)], 1)
    torch.testing.assert_close(q.gather(1, order)[:, :3], expected, rtol=1e-5, atol=1e-7)


# What the loader makes of packed outputs.


def test_packed_outputs_go_where_the_batch_goes(quiet_trainer, tmp_path):
    module = fit(quiet_trainer, cache=tmp_path, cache_top_k=2)
    outputs = module.trainer.datamodule.table.outputs
    batch = outputs.fill(batch_of([5, 3, 30, 8]))
    whole = batch.teacher["teacher"]
    rows = torch.tensor([2, 0])
    assert torch.equal(batch.select(rows).teacher["teacher"], whole[rows])
    first, second = batch.split([1, 3])
    assert torch.equal(torch.cat([first.teacher["teacher"], second.teacher["teacher"]]), whole)
    assert torch.equal(pickle.loads(pickle.dumps(batch.teacher))["teacher"], whole)
    assert batch.to("meta").teacher.outputs["teacher"].device.type == "meta"


# Hashes.


def test_hash_does_not_depend_on_how_far_a_batch_is_padded():
    alone = [hash_rows(batch_of([index]).x)[0] for index in range(SAMPLES)]
    together = hash_rows(batch_of([*range(SAMPLES)]).x)
    assert alone == together.tolist()
    assert len({*alone}) == SAMPLES


def test_hash_counts_each_token_and_the_length():
    x = batch_of([0, 5, 9]).x
    expected = hash_rows(x)
    for row, length in enumerate(LENGTHS[[0, 5, 9]].tolist()):
        for place in range(length):
            ids = x["input_ids"].clone()
            ids[row, place] += 1
            assert (hash_rows(x | {"input_ids": ids}) != expected).nonzero()[0].tolist() == [row]
        longer = {name: nn.functional.pad(part, (0, 2)) for name, part in x.items()}
        longer["attention_mask"][row, length] = 1  # a token of the number of padding
        assert (hash_rows(longer) != expected).nonzero()[0].tolist() == [row]


def test_hash_counts_what_lies_after_the_mask_if_it_is_no_padding():
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[1, 1, 0, 0]])
    one = hash_rows({"input_ids": ids, "attention_mask": mask})
    other = hash_rows({"input_ids": ids.flip(1).flip(1) + torch.tensor([0, 0, 0, 1]), "attention_mask": mask})
    assert one != other


def test_tokens_before_the_mask_count():
    mask = torch.tensor([[0, 0, 1, 1]])
    one = hash_rows({"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": mask})
    assert one != hash_rows({"input_ids": torch.tensor([[5, 6]]), "attention_mask": mask[:, 2:]})


# What cannot be stored.


def test_lengths_without_a_mask_are_refused(quiet_trainer, tmp_path):
    class Plain(Tagger):
        def forward(self, x):
            return super().forward(x, None)

    data = Tokens()

    def without_mask(rows):
        batch = batch_of([*map(int, rows)])
        return Batch(batch.x["input_ids"], batch.y, index=batch.index, view=batch.view)

    data.table.read = lambda batches, seed=0: map(without_mask, batches)
    with pytest.raises(InputError, match="must have one shape for all samples, got .* the inputs attention_mask"):
        fit(quiet_trainer, data, network=Plain, cache=tmp_path)


def test_top_logits_without_class_dim_are_refused(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match=r"cache_top_k needs logits \(B, C\), or the class_dim of the module"):
        fit(quiet_trainer, class_dim=None, cache=tmp_path, cache_top_k=2)


def test_top_k_of_all_classes_is_refused(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match="cache_top_k must be at least 1 and below the number of classes, 6, got 6"):
        fit(quiet_trainer, cache=tmp_path, cache_top_k=CLASSES)


@pytest.mark.slow
def test_two_processes_fill_one_table(table_of_two_processes):
    folder = table_of_two_processes(__file__)
    chunk = json.loads((folder / "cache.json").read_text())["chunk"]
    assert len([*folder.glob("outputs-*")]) == -(-SAMPLES // chunk)
