"""TeacherOutputs: whether x is the tensor that they belong to is known without a hash, and nothing casts them."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision

from kd_lightning import Batch
from kd_lightning.teacher_outputs import TeacherOutputs

X, Y = torch.randn(4, 3), torch.arange(4)


@pytest.fixture
def batch():
    batch = Batch(X.clone(), Y, teacher=TeacherOutputs({"teacher": X}, {}, Y))
    assert not batch.teacher.are_of(batch.x)
    batch.teacher.note_inputs(batch.x)
    assert batch.teacher.are_of(batch.x)
    return batch


def test_moves_and_selections_are_followed(batch):
    for other in (batch.to("cpu"), batch.to("meta"), batch.select(torch.tensor([2, 0])), replace(batch, y=None)):
        assert other.teacher.are_of(other.x)
    assert not batch.to("meta").teacher.are_of(batch.x)


def test_what_changes_x_is_another_tensor(batch):
    assert not (other := batch.map(lambda tensor: tensor + 1)).teacher.are_of(other.x)


def test_another_tensor_is_noticed(batch):
    batch.x = batch.x.clone()
    assert not batch.teacher.are_of(batch.x)
    assert not batch.to("meta").teacher.are_of(batch.x)


def test_a_change_in_place_is_noticed_also_after_a_move(batch):
    batch.x.mul_(2)
    for other in (batch, batch.to("cpu"), batch.to("meta"), batch.select(Y)):
        assert not other.teacher.are_of(other.x)


def test_a_copy_is_another_tensor(batch):
    for other in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert not other.teacher.are_of(other.x)


def test_inference_tensors_are_never_known():
    with torch.inference_mode():
        batch = Batch(X.clone(), teacher=TeacherOutputs({"teacher": X}))
        batch.teacher.note_inputs(batch.x)
        assert not batch.teacher.are_of(batch.x)


@pytest.mark.parametrize("plugin", [HalfPrecision("16-true"), HalfPrecision("bf16-true"), DoublePrecision()])
def test_precision_plugins_cast_no_stored_outputs(plugin):
    batch = plugin.convert_input(Batch(X, teacher={"teacher": X}))
    assert batch.x.dtype != X.dtype
    assert batch.teacher["teacher"] is X
    assert "teacher" in batch.teacher
    assert "teachers.0" not in batch.teacher
