"""Labels in one form, whatever a dataset holds."""

import math

import numpy as np
import pytest
import torch

from kd_lightning import InputError
from kd_lightning.data.sources.targets import count_classes, has_label, normalize, to_tensor

NAN = math.nan


def form(labels):
    return normalize(to_tensor(labels, "train"), "train")


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_all_integers_become_int64(dtype):
    found = form(torch.tensor([0, 99, 1, 2]).to(dtype))
    assert (found.dtype, found.tolist()) == (torch.int64, [0, 99, 1, 2])


def test_class_156_of_uint8_is_a_class():
    """156 is -100 modulo 256."""
    for labels in (torch.arange(256, dtype=torch.uint8), np.arange(256, dtype=np.uint8)):
        found = form(labels)
        assert found.tolist() == [*range(256)]
        assert has_label(found).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 1], [0, 2, 1]),
        ([True, False], [1, 0]),
        (np.array([True, False]), [1, 0]),
        (np.array([3, 1, 2])[::-1], [2, 1, 3]),
        (np.array([3, 1], dtype=">i4"), [3, 1]),
        (np.array([3, None, 0], dtype=object), [3, -100, 0]),
        ([np.int16(4), np.uint8(156), 0], [4, 156, 0]),
        ([torch.tensor(4), torch.tensor([0]), 2], "number"),
        ([torch.tensor(4), torch.tensor(0)], [4, 0]),
        ([torch.tensor([4]), torch.tensor([0])], [4, 0]),
        ([np.array(4), np.array(0)], [4, 0]),
        ([[4], [0]], [4, 0]),
        (torch.tensor([[4], [0]]), [4, 0]),
        (torch.tensor([[[4]], [[0]]]), [4, 0]),
        ([[[4]], [[0]]], [4, 0]),
        ([[4], None, [0]], [4, -100, 0]),
        ([1, None, 0], [1, -100, 0]),
        ([1, NAN, 0], [1, -100, 0]),
        ([1, -1, 0], [1, -100, 0]),
        ([1, -100, 1], [1, -100, 1]),
        ([None, None], [-100, -100]),
        ([-1, -1], [-100, -100]),
        ([], []),
    ],
)
def test_classes(labels, expected):
    if expected == "number":
        with pytest.raises(InputError, match=r"one shape, \[1\], but item 0 has a number"):
            form(labels)
        return
    found = form(labels)
    assert (found.dtype, found.tolist()) == (torch.int64, expected)
    assert torch.equal(normalize(found, "train"), found)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 1], [1, 1]], [[0, 1], [1, 1]]),
        ([[0, -1], [1, 0]], [[0, NAN], [1, 0]]),
        (torch.tensor([[0.0, -1.0], [-100.0, 1.0]]), [[0, NAN], [NAN, 1]]),
        (torch.tensor([[0, 1], [-100, -100]]), [[0, 1], [NAN, NAN]]),
        ([[0, 1], None, [None, 0]], [[0, 1], [NAN, NAN], [NAN, 0]]),
        ([torch.tensor([0, 1]), None], [[0, 1], [NAN, NAN]]),
        (torch.tensor([[True, False]]), [[1, 0]]),
        (torch.tensor([0.0, 1.0, -1.0, NAN]), [0, 1, NAN, NAN]),
        (np.array([0.25, -1.0, 1.0]), [0.25, NAN, 1]),
        ([0.0, None, 1.0], [0, NAN, 1]),
        (torch.tensor([0.5, -1.0, 3.0]), [0.5, -1, 3]),  # no zeros and ones: -1 is a value
        (torch.tensor([-2.5, -100.0, 0.0]), [-2.5, -100, 0]),
        (torch.tensor([[0.5, -1.0], [2.0, NAN]]), [[0.5, -1], [2, NAN]]),
        (torch.tensor([[0.5], [1.0]]), [[0.5], [1]]),  # a single label stays a column
        (torch.tensor([0.0, 2.0, 1.0]), [0, 2, 1]),  # floats are not guessed to be classes
    ],
)
def test_zeros_and_ones_and_floats(labels, expected):
    found, wanted = form(labels), torch.tensor(expected)
    assert found.is_floating_point() == (wanted.is_floating_point() or found.is_floating_point())
    torch.testing.assert_close(found.double(), wanted.double(), equal_nan=True)
    torch.testing.assert_close(normalize(found, "train"), found, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    found = form(torch.tensor([0.0, 1.0, 0.25, NAN, -1.0], dtype=dtype))
    assert found.dtype == torch.float32
    assert found.numpy().tolist() == pytest.approx([0, 1, 0.25, NAN, NAN], nan_ok=True)


def test_one_hot_rows_stay_rows():
    assert form(torch.eye(3, dtype=torch.uint8)).shape == (3, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -2], r"train: labels must be class numbers 0, 1, .* item 2 has -2"),
        ([0, 20240131], "item 1 has 20240131"),
        ([0, -99, -100], "item 1 has -99"),
        (torch.tensor([0, 1, -7], dtype=torch.int8), "item 2 has -7"),
        ([[0, 1], [1, 5]], r"labels must be 0, 1, or -1 .*item 1 has \[5\]"),
        ([[0, 1], [-3, 2]], r"item 1 has \[-3, 2\]"),
        ([1, -1, 1], r"-1 and 1 alone \(item 1 has -1\)"),  # two classes of a support vector machine
        (torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), r"-1 and 1 alone \(item 1 has -1\)"),
        ([[1, 1], [1, -1]], r"-1 and 1 alone \(item 1 has -1\)"),
        ([0, {"class": 1}], "item 1 has dict {'class': 1}"),
        ([0, b"cat"], "item 1 has bytes b'cat'"),
        ([0, 1j], "item 1 has complex 1j"),
        (np.array([0, 1j]), "item 0 has complex"),
        ([[0, 1], [0, "x"]], r"a row of labels must hold numbers, but item 1 has \[0, 'x'\]"),
        ([[0, 1], [0, 1, 1]], r"one shape, \[2\], but item 1 has \[3\]"),
        ([[0, 1], 1], r"one shape, \[2\], but item 1 has a number"),
        ([0, 2**70], "at most 64 bits"),
        (torch.tensor(3), r"labels must be \(N,\) or \(N, L\) numbers, got torch.int64 \[\]"),
        (torch.tensor([1j]), "got torch.complex64"),
        ([[], []], r"got torch.float32 \[2, 0\]"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(InputError, match=message) as error:
        form(labels)
    assert "\n" not in str(error.value)


def test_minus_one_is_announced(capfd, caplog):
    with caplog.at_level("INFO"):
        form([0, -1, 1, -1, None])
    assert "2 samples have the label -1, which means missing" in caplog.text + capfd.readouterr().err


def test_samples_with_a_label():
    assert has_label(torch.tensor([0, -100, 156])).tolist() == [True, False, True]
    assert has_label(torch.tensor([0.0, NAN])).tolist() == [True, False]
    assert has_label(torch.tensor([[0, NAN], [NAN, NAN]])).tolist() == [True, False]
    assert has_label(torch.zeros(2, 3, dtype=torch.long)).tolist() == [True, True]


@pytest.mark.parametrize(
    ("targets", "names", "count"),
    [([0, 4, 1], None, 5), ([0, 4, 1], ["a"] * 7, 7), ([-100, -100], None, 0), ([-100], ["a", "b"], 2), ([], None, 0)],
)
def test_number_of_classes(targets, names, count):
    assert count_classes(torch.tensor(targets, dtype=torch.long), names) == count
