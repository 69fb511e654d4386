"""Stored outputs of teachers for samples whose inputs are a mapping or tuple of tensors."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.data import Dataset

from kd_lightning import DatasetSource, DistillModule, EnsembleDistillModule, SemiSupervisedDataModule, Teacher
from kd_lightning.batch import Batch
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.teacher_outputs import TeacherOutputs

SIZE, LENGTH, WORDS, CLASSES = 40, 5, 30, 3
IDS = torch.randint(WORDS, (SIZE, LENGTH), generator=torch.Generator().manual_seed(2))
MASK = (torch.arange(LENGTH) < 1 + torch.arange(SIZE)[:, None] % LENGTH).long()


class Texts(Dataset):
    """Of each sample the names come in another order."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        inputs = [("input_ids", IDS[index]), ("attention_mask", MASK[index])]
        if self.kind == "tuple":
            return tuple(tensor for _, tensor in inputs), index % CLASSES
        item = dict(inputs[:: 1 if index % 2 else -1]) | {"labels": index % CLASSES}
        if self.kind == "teacher_inputs":
            item["teacher_inputs"] = {"input_ids": IDS[index] // 2, "attention_mask": MASK[index]}
        return item


class Drop(nn.Module):
    """A random transform that leaves out tokens."""

    def forward(self, inputs):
        is_tuple = isinstance(inputs, tuple)
        ids, mask = inputs if is_tuple else (inputs["input_ids"], inputs["attention_mask"])
        mask = mask * (torch.rand(LENGTH) < 0.7)
        return (ids, mask) if is_tuple else {**inputs, "attention_mask": mask}


class Scores(nn.Module):
    """Sums of the words' scores. A sample's logits depend on that sample alone, to the bit."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(WORDS, CLASSES)
        self.computed = 0

    def forward(self, input_ids, attention_mask):
        self.computed += len(input_ids)
        return (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(dim=1)


def fit(trainer, module, kind, workers=0, callbacks=()):
    seed_everything(3, verbose=False)
    data = SemiSupervisedDataModule(
        DatasetSource(Texts(kind)),
        labeled=4,
        val_size=2,
        num_views=2,
        batch_size=8,
        num_workers=workers,
        train_transform=Drop(),
    )
    trainer(max_epochs=3, callbacks=[*callbacks]).fit(module, datamodule=data)
    return {name: value.clone() for name, value in module.student.state_dict().items()}


def assert_same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in one)


METHODS = {
    "distill": lambda **cache: DistillModule(Scores(0), Teacher(Scores(1), **cache)),
    "ensemble": lambda **cache: EnsembleDistillModule(Scores(0), [Teacher(Scores(n), **cache) for n in (1, 2)]),
}
FAST = {("mapping", "distill"), ("tuple", "ensemble"), ("teacher_inputs", "distill")}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param(kind, make, id=f"{kind}-{name}", marks=[] if (kind, name) in FAST else pytest.mark.slow)
        for kind in ("mapping", "tuple", "teacher_inputs")
        for name, make in METHODS.items()
    ],
)
def test_equal_to_the_live_run_to_the_bit(kind, make, quiet_trainer, tmp_path):
    expected = fit(quiet_trainer, make(), kind)
    evaluated = 6  # validation samples, of which the teacher's outputs are computed
    for workers, filled in ((0, False), (2, True)):
        module = make(cache=tmp_path / "cache", cache_dtype="float32")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="cache: ")
            assert_same(fit(quiet_trainer, module, kind, workers), expected)
        for teacher in getattr(module, "ensemble", None) or [module.teacher]:
            table = 0 if filled else -(-(SIZE - evaluated) * 2 // 8) * 8
            assert teacher.network.computed == evaluated + 2 * 8 + table  # the sample that is compared twice


class Change(Callback):
    """Changes the inputs of each batch after the loader made it."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.change(batch)


def in_place(batch):
    batch.x["input_ids"].remainder_(7)


def replaced(batch):
    batch.x["input_ids"] = batch.x["input_ids"] % 7


def renamed(batch):
    batch.x = dict(zip([*batch.x][::-1], batch.x.values(), strict=True))


def in_another_order(batch):
    batch.x = dict([*batch.x.items()][::-1])


@pytest.mark.parametrize("change", [in_place, replaced, renamed, in_another_order])
def test_changed_inputs_get_their_own_outputs(change, quiet_trainer, tmp_path):
    callbacks = [Change(change)]
    expected = fit(quiet_trainer, METHODS["distill"](), "mapping", callbacks=callbacks)
    module = METHODS["distill"](cache=tmp_path, cache_dtype="float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit(quiet_trainer, module, "mapping", callbacks=callbacks)
    assert_same(found, expected)
    refused = any("cache: the inputs of a batch are not those" in str(one.message) for one in caught)
    assert refused == (change is not in_another_order)


def test_teacher_inputs_that_change(quiet_trainer, tmp_path):
    def change(batch):
        batch.teacher_inputs["input_ids"] = batch.teacher_inputs["input_ids"] + 1

    expected = fit(quiet_trainer, METHODS["distill"](), "teacher_inputs", callbacks=[Change(change)])
    module = METHODS["distill"](cache=tmp_path, cache_dtype="float32")
    with pytest.warns(UserWarning, match="cache: the inputs of a batch are not those"):
        assert_same(fit(quiet_trainer, module, "teacher_inputs", callbacks=[Change(change)]), expected)


def test_noted_inputs_have_names():
    x = {"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}
    outputs = TeacherOutputs({}, inputs=torch.zeros(2, dtype=torch.long))
    outputs.note_inputs(x)
    batch = Batch(x, teacher=outputs)
    assert outputs.are_of({"b": x["b"], "a": x["a"]})
    assert not outputs.are_of({"a": x["b"], "b": x["a"]})
    assert not outputs.are_of({"b": x["a"], "a": x["b"]})
    assert not outputs.are_of((x["a"], x["b"]))
    assert batch.select(torch.tensor([1])).teacher.are_of(batch.select(torch.tensor([1])).x) is False
    rows = batch.select(torch.tensor([1]))
    assert rows.teacher.are_of(rows.x)
    x["a"].add_(1)
    assert not outputs.are_of(x)


def test_hashes_of_rows():
    a, b = IDS[:4], MASK[:4]
    hashes = hash_rows({"a": a, "b": b})
    assert (hash_rows({"b": b, "a": a}) == hashes).all()
    for other in ({"a": b, "b": a}, {"a": a, "c": b}, (a, b), {"a": a, "b": (b,)}, {"a": a}):
        assert not (hash_rows(other) == hashes).any()
    changed = b.clone()
    changed[2, 0] += 1
    assert (hash_rows({"a": a, "b": changed}) == hashes).tolist() == [True, True, False, True]
    assert (hash_rows({"a": a[1:3], "b": b[1:3]}) == hashes[1:3]).all()
    constant = hash_rows({"a": a, "scale": torch.tensor(2.0)})
    assert not (hash_rows({"a": a, "scale": torch.tensor(3.0)}) == constant).any()
