"""Inputs of networks: how they are called, and what is known of them."""

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.inputs import arguments_of, call, describe, device_of, map_inputs, rows_of, tensors_of

A, B = torch.zeros(4, 2), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("x", "args", "kwargs"),
    [(A, (A,), {}), ((A, B), (A, B), {}), ([A, B], (A, B), {}), ({"a": A, "b": B}, (), {"a": A, "b": B})],
)
def test_call(x, args, kwargs):
    assert arguments_of(x) == (args, kwargs) if x is not A else True
    got = []
    call(lambda *a, **k: got.append((a, k)), x)
    assert [id(part) for part in got[0][0]] == [id(part) for part in args]
    assert {name: id(part) for name, part in got[0][1].items()} == {name: id(part) for name, part in kwargs.items()}


@pytest.mark.parametrize("x", [A, (A, B), {"a": A, "b": (B, {"c": A})}])
def test_rows_device_and_tensors(x):
    assert rows_of(x) == 4
    assert device_of(x) == torch.device("cpu")
    changed = map_inputs(lambda tensor: tensor + 1, x)
    assert type(changed) is type(x)
    for before, after in zip(tensors_of(x), tensors_of(changed), strict=True):
        assert torch.equal(before + 1, after)


def test_what_is_no_tensor_stays():
    assert map_inputs(torch.clone, {"a": A, "n": 3, "none": None})["n"] == 3
    assert isinstance(map_inputs(torch.clone, [A]), list)


@pytest.mark.parametrize("x", [{"a": A, "b": A[:2]}, {}, (torch.tensor(1.0),)])
def test_no_number_of_rows(x):
    with pytest.raises(InputError, match="tensors of one number of rows"):
        rows_of(x)


def test_describe():
    assert describe((A, {"b": B, "n": 3})) == "([4, 2], {b: [4, 3], n: int})"
