"""Stored teacher outputs in batches."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, SemiSupervisedDataModule
from kd_lightning.batch import Batch
from kd_lightning.cache.codecs import DenseCodec
from kd_lightning.cache.outputs import OutputRows, StoredOutputs
from kd_lightning.cache.row_format import Part, RowFormat
from kd_lightning.cache.store import OutputCache
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.data.views.dataset import collate
from kd_lightning.data.views.teacher_outputs import FillingCollate

SIZE, VIEWS, CLASSES = 20, 3, 4


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand(1)


@pytest.fixture
def data():
    images = torch.arange(SIZE * 6.0).reshape(SIZE, 1, 2, 3)
    source = DatasetSource(TensorDataset(images, torch.arange(SIZE) % 2))
    made = SemiSupervisedDataModule(source, num_views=VIEWS, batch_size=8, val_size=3, train_transform=Noise())
    made.setup("fit")
    return made


def logits_of(x):
    return x.flatten(1)[:, :CLASSES] * 2


def store(table, root, name="teacher", dtype=torch.float32):
    """Store what ``logits_of`` computes for every row."""
    codec = DenseCodec(CLASSES, "float32")
    format = RowFormat(Part(codec, torch.Size([CLASSES]), dtype))
    cache = OutputCache(root, name, table.parts(), len(table), format.row_bytes, chunk=16)
    stored = StoredOutputs(cache, format)
    for number in cache.absent():
        (batch,) = table.read([cache.rows_of(number)])
        hashes = hash_rows(batch.x)
        cache.write(number, stored.encode(OutputRows(hashes, hashes + np.uint64(1), logits_of(batch.x).to(dtype))))
    return stored


@pytest.mark.parametrize("workers", [0, 1])
def test_every_batch_has_its_own(workers, data, tmp_path):
    data.num_workers = workers
    table = data.train_views()
    loader = data.train_dataloader()
    assert {batch.teacher for batch in loader} == {None}
    loader = data.train_dataloader()  # made before they are stored
    stored = {"teachers.0": store(table, tmp_path), "teachers.1": store(table, tmp_path, "b", torch.bfloat16)}
    table.outputs.set(stored)
    count = 0
    for epoch in range(VIEWS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert torch.equal(batch.teacher["teachers.0"], logits_of(batch.x))
            assert torch.equal(batch.teacher["teachers.1"], logits_of(batch.x).bfloat16())
            assert np.array_equal(batch.teacher.inputs.numpy().view(np.uint64), hash_rows(batch.x) + np.uint64(1))
            assert batch.teacher.sources == {name: str(one.folder) for name, one in stored.items()}
            count += len(batch)
    assert count == VIEWS * (SIZE - 6)
    table.outputs.set({})
    assert next(iter(loader)).teacher is None


def test_other_images_have_none_and_one_warning_says_how_many(data, tmp_path):
    table = data.train_views()
    table.outputs.set({"teacher": store(table, tmp_path)})
    (index,) = next(iter(data.train_dataloader())).index[:1]
    images = data.samples.images[0]
    item = images[int(index)]
    (item[0] if isinstance(item, tuple) else item).add_(1)  # in place: the dataset returns views of its tensor
    with pytest.warns(UserWarning, match="cache: 1 of 8 images of a batch") as caught:
        batches = [batch for epoch in range(2) for batch in data.train_dataloader()]
    assert len([w for w in caught if "cache: " in str(w.message)]) == 1
    for batch in batches:
        there = bool((batch.index == index).any())
        assert batch.teacher.changed == there
        assert ("teacher" in batch.teacher) != there
        if not there:
            assert torch.equal(batch.teacher["teacher"], logits_of(batch.x))


def test_one_teacher_may_have_outputs_and_another_none(data, tmp_path):
    table = data.train_views()
    first, other = store(table, tmp_path), store(table, tmp_path, "b")
    changed = np.array(other.cache.read(np.arange(16)))
    changed[:, 0] ^= 1  # of other images
    other.cache.write(0, changed)
    table.outputs.set({"teachers.0": other, "teachers.1": first})
    (batch,) = table.read([[3, 20]])
    table.outputs.fill(batch)
    assert (batch.teacher.changed, [*batch.teacher.outputs]) == (1, ["teachers.1"])


@pytest.mark.parametrize(("index", "view"), [(19, 0), (400, 0), (0, VIEWS), (0, -1)])
def test_views_that_are_not_in_the_table_have_none(index, view, data, tmp_path):
    table = data.train_views()
    table.outputs.set({"teacher": store(table, tmp_path)})
    (batch,) = table.read([[0, 1]])
    batch.index[1], batch.view[1] = (data.split.val[0] if index == 19 else index), view
    table.outputs.fill(batch)
    assert batch.teacher.outputs == {}
    assert table.outputs.rows(batch)[1] == -1 or index == 0


def test_a_copy_in_another_process_reads_the_same(data, tmp_path):
    """As workers get it that are not forked."""
    table = data.train_views()
    collated = FillingCollate(collate, table.outputs)
    table.outputs.set({"teacher": store(table, tmp_path)})
    samples = table.dataset.__getitems__([(0, 1), (5, 2)])
    expected = collated(samples).teacher["teacher"]
    sent = pickle.dumps(collated)
    assert len(sent) < 4000  # neither images nor outputs
    assert torch.equal(pickle.loads(sent)(samples).teacher["teacher"], expected)


def test_the_pool_has_its_own(data, tmp_path):
    data.eval_transform = nn.Identity()
    data.train_views().outputs.set({"teacher": store(data.train_views(), tmp_path)})
    assert {batch.teacher for batch in data.pool_dataloader()} == {None}
    data.pool_views().outputs.set({"teacher": store(data.pool_views(), tmp_path, "pool")})
    for batch in data.pool_dataloader():
        assert torch.equal(batch.teacher["teacher"], logits_of(batch.x))


def test_a_batch_without_index_stays_as_it_is(data, tmp_path):
    table = data.train_views()
    table.outputs.set({"teacher": store(table, tmp_path)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = table.outputs.watch([table.outputs.fill(Batch(torch.ones(2, 1)))])
    assert batch.teacher is None
