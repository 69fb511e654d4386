"""Class numbers by name or number, in every way to write them."""

import pytest

from kd_lightning.data.labels.class_numbers import ClassNumbers
from kd_lightning.errors import InputError


@pytest.mark.parametrize(
    ("names", "text", "number"),
    [
        (["cat", "dog"], "dog", 1),
        (["cat", "dog"], "1", 1),
        (["cat", "dog"], "1.0", 1),
        (["cat", "dog"], "2", None),
        (["cat", "dog"], "-1", None),
        (["cat", "dog"], "1_0", None),
        (["cat", "dog"], "1e999999999", None),
        (["cat", "dog"], "nan", None),
        (["caf\u00e9", "cat"], "cafe\u0301", 0),  # made on macOS
        (["cafe\u0301", "cat"], "caf\u00e9", 0),
        # names that are numbers: never an index
        (["1", "2", "3"], "1", 0),
        (["1", "2", "3"], "0", None),
        (["01", "02", "10"], "1", 0),  # as spreadsheets write it
        (["01", "02", "10"], "2.0", 1),
        (["01", "1"], "1", 1),
        (["01", "1"], "1.0", None),
        (["1.0", "2.0", "3.0"], "1", 0),
        (["-1", "1"], "1", 1),
        (["-1", "0"], "0", 1),
        (["12345678901234567890", "12345678901234567891"], "12345678901234567891", 1),
        (["0", "1", "10", "2"], "2", 3),
        (["inf", "nan"], "1", 1),
    ],
)
def test_find(names, text, number):
    if number is None:
        with pytest.raises(InputError, match="is no class; there are"):
            ClassNumbers(names).find(text)
    else:
        assert ClassNumbers(names).find(text) == number


@pytest.mark.parametrize("names", [["cat", "dog", "car"], ["0", "1", "2"]])
def test_numbers_that_count_from_1(names):
    numbers = ClassNumbers(names)
    for texts in (["1", "2", "3"], ["3", "1"], ["3.0"]):
        with pytest.raises(InputError, match=r"0 ... 2 \(0 = .*\), got .* 3, which seem to count from 1"):
            numbers.check_first_number(texts)
    for texts in (["0", "3"], ["1", "2"], ["4", "1"], ["cat", "3"], []):
        numbers.check_first_number(texts)


def test_names_may_count_from_1():
    ClassNumbers(["1", "2", "3"]).check_first_number(["1", "2", "3"])


def test_meaning_of_numbers():
    assert ClassNumbers(["cat", "dog", "car"]).describe(["2", "1", "dog", "1.0"]) == (
        "numbers mean classes: 1 = dog, 2 = car"
    )
    assert ClassNumbers(["cat", "dog"]).describe(["dog", "7", "-1"]) == ""
    assert ClassNumbers(["0", "1"]).describe(["0", "1"]) == ""
    assert ClassNumbers(["5", "6"]).describe(["5"]) == ""
    many = ClassNumbers([f"n{number}" for number in range(30)])
    assert many.describe([*map(str, range(30))]).endswith("19 = n19, ...")
