"""Coarse labels: which classes a superclass holds, and which samples get one."""

import pytest
import torch

from kd_lightning import CoarseLabels, InputError, PairNoise

ANIMALS = ["cat", "dog", "car", "ship"]
GROUPS = {"animal": ["dog", "cat"], "vehicle": ["ship", "car"]}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (GROUPS, ANIMALS),
        ({"animal": [1, 0], "vehicle": [2, 3]}, ANIMALS),
        ({"animal": ["cat", 1], "vehicle": [3, "car"]}, ANIMALS),
        ({"low": ["0", "1"], "high": ["2", 3]}, None),
        # names that are numbers: quoted a name, else an index
        ({"a": ["9", "10"], "b": [2, 3]}, ["10", "9", "8", "7"]),
    ],
)
def test_members(groups, names):
    found = CoarseLabels(groups).members(4, names)
    assert found.tolist() == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"animal": ["cat"], "vehicle": ["car", "ship"]}, "coarse: class 'dog' is in no superclass"),
        (GROUPS | {"pet": ["cat"]}, "coarse: class 'cat' is in two superclasses, or twice in 'pet'"),
        ({"animal": ["cat", "dog", 0], "vehicle": [2, 3]}, "class 'cat' is in two superclasses, or twice in 'animal'"),
        (GROUPS | {"plant": []}, "coarse: 'plant' holds no class"),
        (GROUPS | {"plant": ["oak"]}, r"coarse: 'plant' holds 'oak', which is not a class; allowed: \['cat', 'dog',"),
        (GROUPS | {"plant": [4]}, "coarse: 'plant' holds 4, which is not a class.*an int is an index, and 0 is 'cat'"),
        (GROUPS | {"plant": [-1]}, "coarse: 'plant' holds -1, which is not a class"),
        ({}, "coarse: class 'cat' is in no superclass"),
    ],
)
def test_invalid_groups(groups, message):
    with pytest.raises(InputError, match=message):
        CoarseLabels(groups).members(4, ANIMALS)


def test_an_int_that_is_also_a_name():
    """Folders 0 ... 10 are sorted as texts, so that the class with index 2 is 10."""
    names = [*map(str, sorted(range(11), key=str))]
    with pytest.raises(InputError, match="'low' holds 2, the index of class '10' and the name of another class"):
        CoarseLabels({"low": [0, 1, 2], "high": [*range(3, 11)]}).members(11, names)
    members = CoarseLabels({"low": ["0", "1", "2"], "high": [*map(str, range(3, 11))]}).members(11, names)
    assert [int(names[n]) for n in members[0].nonzero().flatten()] == [0, 1, 2]


def test_unicode():
    """Names made on macOS are decomposed."""
    coarse = CoarseLabels({"d\u00e9": ["cafe\u0301"], "x": ["tea"]})
    assert coarse.members(2, ["caf\u00e9", "tea"]).tolist() == [[True, False], [False, True]]
    assert CoarseLabels({"de\u0301": ["a"]}).names == ["d\u00e9"]
    with pytest.raises(InputError, match="two superclasses have the same name"):
        CoarseLabels({"d\u00e9": ["a"], "de\u0301": ["b"]})


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match=rf"coarse: fraction must lie in \[0, 1\], got {fraction}"):
        CoarseLabels(GROUPS, fraction)


def test_selection():
    candidates = [*range(3, 200, 2)]
    selected = {
        share: CoarseLabels(GROUPS, share).select(candidates, 200, seed=0).tolist() for share in (0, 0.3, 0.7, 1)
    }
    assert [len(found) for found in selected.values()] == [0, 24, 71, 99]  # each index is sampled by itself
    assert selected[1] == candidates
    assert {*selected[0.3]} < {*selected[0.7]}
    assert selected[0.3] == sorted(selected[0.3])
    assert selected[0.3] != CoarseLabels(GROUPS, 0.3).select(candidates, 200, seed=1).tolist()
    assert CoarseLabels(GROUPS, 0.5).select([], 200, seed=0).tolist() == []


def test_selection_stays_when_others_get_fine_labels():
    coarse, candidates = CoarseLabels(GROUPS, 0.5), [*range(200)]
    before = {*coarse.select(candidates, 200, seed=0).tolist()}
    labeled = {*range(0, 200, 10)}
    after = {*coarse.select([index for index in candidates if index not in labeled], 200, seed=0).tolist()}
    assert before - labeled == after


def test_selection_is_even():
    counts = sum(
        torch.bincount(CoarseLabels(GROUPS, 0.25).select(range(40), 40, seed=seed), minlength=40) for seed in range(400)
    )
    assert 3800 < counts.sum() < 4200  # 4000 expected, 3.6 standard deviations
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, 4.6 standard deviations


def test_selection_is_independent_of_noise_of_the_same_seed():
    selected = CoarseLabels(GROUPS, 0.5).select(range(2000), 2000, seed=0)
    wrong = PairNoise(0.5).sample(torch.zeros(2000, dtype=torch.long), 2, seed=0)
    assert 400 < wrong[selected].sum() < 600  # 500 expected, 6.3 standard deviations
