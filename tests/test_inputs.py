"""Inputs of networks: how they are called, and what is known of them."""

import pytest
import torch
from torch import nn

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


class Two(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return a * scale


@pytest.mark.parametrize(
    ("network", "x", "message"),
    [
        (
            nn.Sequential(),
            {"image": A, "index": B},
            "the network Sequential takes (input), but a batch has the inputs image, index",
        ),
        (Two(), {"a": A}, "the network Two takes (a, b, *, scale=1.0), but a batch has the inputs a"),
        (Two(), A, "the network Two takes (a, b, *, scale=1.0), but a batch has 1 input"),
        (nn.Linear(2, 2), (A, B), "the network Linear takes (input), but a batch has 2 inputs"),
    ],
)
def test_arguments_that_a_network_does_not_take(network, x, message):
    with pytest.raises(InputError) as caught:
        call(network, x)
    assert str(caught.value) == f"{message}; the module's unpack(batch) can return other ones"


def test_other_errors_of_a_network_stay():
    class Broken(nn.Module):
        def forward(self, a):
            return Two()(a)

    for network, x in ((Broken(), A), (Broken(), {"a": A})):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
            call(network, x)


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
