import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.tensors import hash_rows, values_of

X = torch.arange(12.0).reshape(3, 2, 2)


def test_each_row_has_its_hash():
    hashes = hash_rows(X)
    assert (hashes.dtype, hashes.shape) == (np.uint64, (3,))
    assert len({*hashes.tolist()}) == 3
    np.testing.assert_array_equal(hash_rows(X[[2, 0, 2]]), hashes[[2, 0, 2]])  # whatever the other rows are
    for number in range(3):
        for place in range(4):
            other = X.clone()
            other[number].view(-1)[place] += 1e-6 + 1e-6 * other[number].view(-1)[place]
            assert (hash_rows(other) != hashes).nonzero()[0].tolist() == [number]


@pytest.mark.parametrize(
    "same",
    [X.transpose(1, 2).contiguous().transpose(1, 2), X.requires_grad_(False).clone().requires_grad_(), X.clone()[:]],
)
def test_memory_layout_does_not_count(same):
    np.testing.assert_array_equal(hash_rows(same), hash_rows(X))


@pytest.mark.parametrize("other", [X.flatten(1), X.double(), X.int(), X.view(torch.int32), X[..., None], -X])
def test_type_and_shape_count(other):
    assert (hash_rows(other) != hash_rows(X)).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_types_of_numbers(dtype):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype)
    assert len({*hash_rows(x).tolist()}) == 2


def test_rows_without_values():
    assert hash_rows(torch.empty(0, 3)).shape == (0,)
    assert len({*hash_rows(torch.empty(2, 0)).tolist()}) == 1
    assert len({*hash_rows(torch.tensor([1.0, 2.0])).tolist()}) == 2


def nested(values, layout):
    return torch.nested.nested_tensor([torch.tensor(values), torch.ones(3)], layout=layout)


def fake():
    with FakeTensorMode():
        return torch.ones(2)


def quantized(scale):
    return torch.quantize_per_tensor(torch.ones(2), scale, 0, torch.quint8)


def by_channel(scale):
    return torch.quantize_per_channel(torch.ones(2, 2), torch.tensor([scale, 1]), torch.zeros(2), 0, torch.qint8)


ODD = {
    "coordinates": [torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse() for x in (1, 2)],
    "places of coordinates": [torch.tensor([[0.0, x], [1.0 - x, 0.0]]).to_sparse() for x in (1, 0)],
    "csr": [torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse_csr() for x in (1, 2)],
    "csc": [torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse_csc() for x in (1, 2)],
    "bsr": [torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse_bsr((1, 1)) for x in (1, 2)],
    "nested": [nested([x, 2.0], torch.strided) for x in (1.0, 2.0)],
    "jagged": [nested([x, 2.0], torch.jagged) for x in (1.0, 2.0)],
    "quantized": [quantized(0.1), quantized(0.2)],
    "quantized by channel": [by_channel(0.1), by_channel(0.2)],
    "meta": [torch.ones(size, device="meta") for size in (2, 3)],
    "complex": [torch.tensor([1 + 1j]), torch.tensor([1 + 1j]).conj()],
    "float8": [torch.tensor([x]).to(torch.float8_e5m2) for x in (1.0, 2.0)],
    "lazy": [nn.LazyLinear(3).weight, nn.LazyLinear(3, dtype=torch.float64).weight],
    "fake": [fake(), torch.ones(2)],
}


@pytest.mark.filterwarnings("ignore:")
@pytest.mark.parametrize("pair", ODD.values(), ids=ODD)
def test_tensors_of_any_kind(pair):
    first, other = pair
    assert fingerprint(first) == fingerprint(first) != fingerprint(other)
    if values_of(first) is not None or first.layout == torch.sparse_coo:
        assert fingerprint(first) == fingerprint(first.clone())


def test_only_plain_tensors_have_values():
    assert [values_of(t) is None for t in (X, torch.ones(2, device="meta"), X.to_sparse(), fake())] == [
        False,
        True,
        True,
        True,
    ]
    with pytest.raises(
        InputError, match="cache: a transform must return dense tensors .*, got torch.sparse_coo on cpu"
    ):
        hash_rows(X.to_sparse())
