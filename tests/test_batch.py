"""Batch: conversion, selection of rows, and moving to a device."""

from collections import UserDict, namedtuple

import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Batch, InputError
from kd_lightning.batch import LabelKind, class_labels, is_labeled
from kd_lightning.inputs import tensors_of
from kd_lightning.teacher_outputs import TeacherOutputs

X, Y = torch.randn(4, 3), torch.arange(4)
NAN = float("nan")
Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    ("given", "y"),
    [((X, Y), Y), ([X, Y], Y), (Pair(X, Y), Y), ((X,), None), ([X], None), (X, None)],
    ids=["tuple", "list", "named tuple", "tuple of x", "list of x", "x"],
)
def test_takes_the_batches_of_loaders(given, y):
    batch = Batch.from_any(given)
    assert batch.x is X
    assert batch.y is y
    assert (batch.index, batch.view, batch.mean_labels, len(batch)) == (None, None, None, 4)


@pytest.mark.parametrize("y", [torch.tensor([2]), torch.tensor([1.0]), torch.tensor([[0.0, 1.0]]), None])
def test_padding_is_no_sample(y):
    batch = Batch(X[:1], y, index=torch.tensor([0]), labeled=torch.tensor([0]))
    padding = batch.as_padding()
    assert (batch.is_padding, padding.is_padding) == (False, True)
    assert padding.y is None or not is_labeled(padding.y).any()
    assert not len(padding.labeled)
    assert not Batch(X[:1], y).is_padding
    assert not Batch(X, index=Y).is_padding


def test_takes_a_batch_as_it_is():
    batch = Batch(X, index=Y)
    assert Batch.from_any(batch) is batch


def test_takes_a_plain_loaders_batches():
    (batch,) = (Batch.from_any(item) for item in DataLoader(TensorDataset(X, Y), batch_size=4))
    assert torch.equal(batch.x, X)
    assert torch.equal(batch.y, Y)


IDS, MASK = torch.ones(4, 7, dtype=torch.long), torch.ones(4, 7, dtype=torch.long)
IMAGES = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "mask", "y"])
def test_takes_a_mapping_with_labels_under_the_usual_keys(key):
    batch = Batch.from_any({"image": IMAGES, key: Y, "path": ["a", "b", "c", "d"], "crs": None})
    assert batch.x is IMAGES  # one tensor stays a tensor
    assert batch.y is Y


@pytest.mark.parametrize(
    ("given", "x", "y"),
    [
        ({"input_ids": IDS, "attention_mask": MASK, "labels": Y}, {"input_ids": IDS, "attention_mask": MASK}, Y),
        (UserDict(input_ids=IDS, attention_mask=MASK, labels=Y), {"input_ids": IDS, "attention_mask": MASK}, Y),
        ({"x": IDS, "mask": MASK, "label": Y}, {"x": IDS, "mask": MASK}, Y),
        ({"x": IDS, "mask": MASK, "y": Y}, {"x": IDS, "mask": MASK}, Y),
        ({"input_ids": IDS, "attention_mask": MASK, "labels": None}, {"input_ids": IDS, "attention_mask": MASK}, None),
        ([{"image": IMAGES, "label": Y}], IMAGES, Y),
        (({"ids": IDS, "mask": MASK}, Y), {"ids": IDS, "mask": MASK}, Y),
        (((IMAGES, IDS), Y), (IMAGES, IDS), Y),
        ([[IMAGES, IDS], Y], (IMAGES, IDS), Y),
        ((X, Y, ["a", "b", "c", "d"], {"rate": 16000}), X, Y),
        ((X, None), X, None),
        ((IDS, IDS.clone()), IDS, IDS),  # labels of tokens
        ((IMAGES, IMAGES[:, 0].long()), IMAGES, IMAGES[:, 0].long()),  # a mask of a segmentation
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_takes_nested_inputs(given, x, y):
    batch = Batch.from_any(given)
    assert type(batch.x) is type(x)
    same = [torch.equal(one, other) for one, other in zip(tensors_of(batch.x), tensors_of(x), strict=True)]
    assert same
    assert all(same)
    assert batch.y is y or torch.equal(batch.y, y)
    assert len(batch) == 4


def test_takes_the_inputs_of_teachers_out_of_a_mapping():
    batch = Batch.from_any({"image": IMAGES, "teacher_inputs": {"ids": IDS}, "label": Y})
    assert batch.x is IMAGES
    assert batch.teacher_inputs == {"ids": IDS}
    assert batch.teacher_x == {"ids": IDS}
    assert Batch(X).teacher_x is X


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, "a"), r"got \['Tensor', 'str'\]; the module's unpack"),
        ((X, {"boxes": X}), r"got \['Tensor', '\{boxes: Tensor\}'\]"),
        ((), r"got \[\]"),
        (None, "got NoneType"),
        ({"label": Y}, r"a batch is \{label: Tensor\}, but no input is a tensor"),
        ({"x": X, "label": [0, 1]}, r"but label is .*, no tensor"),
        (
            [IMAGES, IMAGES.clone()],
            r"images \[4, 3, 8, 8\] and \[4, 3, 8, 8\] of one kind, which are no inputs and labels",
        ),
        ([IMAGES, IMAGES[..., :4]], r"images \[4, 3, 8, 8\] and \[4, 3, 8, 4\] of one kind"),
        ((IDS, MASK, Y), r"integers \[4, 7\], \[4, 7\] and more, so that its labels are not known"),
    ],
)
def test_refuses_the_rest(given, message):
    with pytest.raises(InputError, match=message):
        Batch.from_any(given)


def test_inputs_of_different_lengths_have_no_number_of_rows():
    with pytest.raises(InputError, match=r"one number of rows, got \{a: \[4, 3\], b: \[3, 3\]\}"):
        len(Batch({"a": X, "b": X[:3]}))


def test_unpacks_as_a_pair():
    x, y = Batch(X, Y, index=Y)
    assert x is X
    assert y is Y


@pytest.mark.parametrize("form", [lambda x: {"a": x, "b": (x + 1, x + 2)}, lambda x: (x, {"a": x + 1})])
def test_rows_of_nested_inputs_stay_together(form):
    batch = Batch(form(X), Y, index=Y, teacher_inputs=form(X), labeled=Y)
    expected = [*tensors_of(form(X))]
    for part, rows in [(batch.select(torch.tensor([2, 0])), [2, 0]), (batch.select(Y > 1), [2, 3])]:
        assert all(torch.equal(t, e[rows]) for t, e in zip(tensors_of(part.x), expected, strict=True))
        assert all(torch.equal(t, e[rows]) for t, e in zip(tensors_of(part.teacher_inputs), expected, strict=True))
        assert part.y.tolist() == rows
    parts = [*batch.split([1, 3])]
    assert [len(part) for part in parts] == [1, 3]
    assert all(torch.equal(t, e[1:]) for t, e in zip(tensors_of(parts[1].x), expected, strict=True))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert {t.device.type for t in [*tensors_of(moved.x), *tensors_of(moved.teacher_inputs)]} == {"meta"}
    assert type(moved.x) is type(batch.x)


def test_class_labels_of_probabilities():
    y = torch.tensor([[0.1, 0.9], [NAN, NAN], [0.6, 0.4]])
    assert class_labels(y).tolist() == [1, -100, 0]
    assert class_labels(Y) is Y


def test_lightning_moves_every_tensor():
    teacher = TeacherOutputs({"teacher": X + 1}, {"teacher": "a folder"}, Y)
    moved = move_data_to_device(Batch(X, Y, index=Y, view=Y, mean_labels=1.5, teacher=teacher), torch.device("meta"))
    assert (moved.teacher["teacher"].device.type, moved.teacher.inputs.device.type) == ("meta", "meta")
    assert moved.teacher.sources == {"teacher": "a folder"}
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in (moved.x, moved.y, moved.index, moved.view)} == {"meta"}
    assert moved.mean_labels == 1.5
    assert X.device.type == "cpu"


@pytest.mark.parametrize(("device", "blocking"), [("cpu", True), ("mps", True), ("cuda", False), ("meta", False)])
def test_blocks_only_where_it_must(monkeypatch, device, blocking):
    seen = []

    def to(tensor, device, non_blocking=False):
        seen.append((device, non_blocking))
        return tensor

    elsewhere = [torch.empty(4, device="meta" if device == "cpu" else "cpu") for _ in range(2)]
    monkeypatch.setattr(torch.Tensor, "to", to)
    Batch(*elsewhere).to(device)
    assert seen == [(torch.device(device), not blocking)] * 2


def test_what_is_there_stays_and_the_batch_is_a_copy():
    batch = Batch(X, Y, index=Y, teacher=TeacherOutputs({"teacher": X}, {}, Y))
    moved = batch.to("cpu")
    assert moved is not batch  # a hook may set its fields
    assert (moved.x is X, moved.y is Y, moved.teacher["teacher"] is X) == (True, True, True)
    moved.x = X + 1
    assert batch.x is X


def test_pseudo_labels_move_and_are_pinned(monkeypatch):
    whole = Batch(X, Y, kind=Y, soft=X, x_strong=X, mean_labels=1.5, mean_pseudo=0.5, mean_rows=4.0)
    moved = move_data_to_device(whole, torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = whole.pin_memory()
    for name in ("kind", "soft", "x_strong"):
        assert getattr(moved, name).device.type == "meta"
        assert torch.equal(getattr(pinned, name), getattr(whole, name) + 1)
    for batch in (moved, pinned):
        assert (batch.mean_labels, batch.mean_pseudo, batch.mean_rows, batch.index) == (1.5, 0.5, 4.0, None)


def test_label_kinds_are_numbers():
    kinds = torch.tensor([0, 1, 2], dtype=torch.int8)
    assert [LabelKind(number) for number in kinds.tolist()] == [LabelKind.CLEAN, LabelKind.MISSING, LabelKind.PSEUDO]
    assert (kinds == LabelKind.PSEUDO).tolist() == [False, False, True]


def test_pins_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # without a GPU it raises
    pinned = Batch(X, Y, index=Y, mean_labels=1.5).pin_memory()
    assert torch.equal(pinned.x, X + 1)
    assert torch.equal(pinned.y, Y + 1)
    assert torch.equal(pinned.index, Y + 1)
    assert (pinned.view, pinned.mean_labels) == (None, 1.5)
    assert torch.equal(Batch(X, teacher={"teacher": X}).pin_memory().teacher["teacher"], X + 1)


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False, True, True]), torch.tensor([3, 0, 3]), torch.tensor([], dtype=torch.long)]
)
def test_some_of_the_rows(rows):
    part = Batch(X, Y, index=Y + 10, view=Y + 20, mean_labels=1.5).select(rows)
    for found, whole in ((part.x, X), (part.y, Y), (part.index, Y + 10), (part.view, Y + 20)):
        assert torch.equal(found, whole[rows])
    assert part.mean_labels == 1.5  # a mean over the optimiser step, the same for each part of the batch
    assert len(part) == len(X[rows])
    whole = Batch(X, kind=Y, soft=X + 1, x_strong=X + 2, mean_labels=torch.tensor(2.0), mean_pseudo=1.0, mean_rows=4.5)
    part = whole.select(rows)
    for name in ("kind", "soft", "x_strong"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert (part.mean_labels, part.mean_pseudo, part.mean_rows) == (2, 1, 4.5)
    teacher = TeacherOutputs({"teacher": X + 3}, {"teacher": "a folder"}, Y)
    part = Batch(X, teacher=teacher).select(rows)
    assert torch.equal(part.teacher["teacher"], X[rows] + 3)
    assert torch.equal(part.teacher.inputs, Y[rows])
    assert part.teacher.sources == teacher.sources
    part = Batch(X).select(rows)
    assert (part.y, part.index, part.view, part.mean_labels) == (None, None, None, None)


@pytest.mark.parametrize(
    ("y", "known"),
    [
        (torch.tensor([0, -100, 3]), [True, False, True]),
        (torch.tensor([0.0, float("nan"), 1.0]), [True, False, True]),
        (torch.tensor([[-100, 1], [-100, -100]]), [[False, True], [False, False]]),
        (torch.tensor([True, False]), [True, True]),
        (torch.tensor([0, 156], dtype=torch.uint8), [True, True]),  # 156 is -100 modulo 256
    ],
)
def test_is_labeled(y, known):
    assert is_labeled(y).tolist() == known


def test_inputs_of_a_split_are_aligned():
    """Products of others differ in the last bit with their place in memory."""
    x = torch.arange(250.0).view(50, 5)
    pieces = [*Batch(x, torch.arange(50), x_strong={"a": x}).split([10, 16, 24])]
    assert torch.equal(torch.cat([piece.x for piece in pieces]), x)
    assert torch.equal(torch.cat([piece.x_strong["a"] for piece in pieces]), x)
    assert all(tensor.data_ptr() % 64 == 0 for one in pieces for tensor in (one.x, one.x_strong["a"]))
    wide = torch.zeros(8, 16)
    shared = [piece.x.data_ptr() - wide.data_ptr() for piece in Batch(wide).split([3, 5])]
    assert shared == [0, 3 * 64]  # no copy
