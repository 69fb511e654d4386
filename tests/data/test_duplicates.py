"""Exact duplicates: found, counted, refused, and kept on one side."""

import random
import time
import warnings
from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning.data import CoarseLabels, DatasetSource, SemiSupervisedDataModule
from kd_lightning.data.duplicates import find_duplicates, handle_duplicates, keep_together
from kd_lightning.data.identity import Identities, identify
from kd_lightning.data.sources.digits import Digits
from kd_lightning.data.sources.fake_data import FakeData
from kd_lightning.data.split_setup import check_duplicates
from kd_lightning.data.splits import Split, make_split, wrong_sample
from kd_lightning.errors import InputError


def split_of(labeled=(), unlabeled=(), val=(), **more):
    return Split([*labeled], [*unlabeled], [*val], seed=0, data="", **more)


def parts_of(train, test=None, unlabeled=None, paths=False):
    parts = {"train": train, "test": test, "unlabeled": unlabeled}
    return {
        name: Identities([f"{name}/{n}.jpg" if paths else "" for n in range(len(part))], [*part])
        for name, part in parts.items()
        if part is not None
    }


def sides_of(split, train, pool=()):
    """The contents of each side."""
    used = {*split.labeled, *split.unlabeled, *split.held_out}
    training = {train[n].partition("#")[0] for n in used if n < len(train)}
    extra = {pool[n] for n in range(len(pool)) if n + len(train) not in split.left_out}
    return training | extra, {train[n].partition("#")[0] for n in split.val}


# Found.


def test_copies_of_each_pair_of_sides():
    parts = parts_of(["a", "b", "a#2", "c", "d"], test=["c", "e", "b"], unlabeled=["e", "f"], paths=True)
    found = find_duplicates(parts, split_of([0, 1], [4], [2, 3]))
    leaks = {pair: (leak.contents, leak.first, leak.second) for pair, leak in found.leaks.items()}
    assert leaks == {
        ("validation", "training"): (1, 1, 1),
        ("test", "validation"): (1, 1, 1),
        ("test", "training"): (2, 2, 2),
    }
    assert found.leaks["validation", "training"].example == ("train/2.jpg", "train/0.jpg")
    assert found.within == {"training": 0, "validation": 0, "test": 0}
    text = found.describe()
    assert "\n" not in text
    for part in ("train/2.jpg = train/0.jpg", "2 test samples are copies of 2 training samples"):
        assert part in text


def test_a_sample_without_a_file_is_named_by_side_and_index():
    found = find_duplicates(parts_of(["a", "b"], test=["b"], unlabeled=["x", "a"]), split_of([1], [], [0]))
    assert found.leaks["test", "training"].example == ("test sample 0", "training sample 1")
    assert found.leaks["validation", "training"].example == ("validation sample 0", "unlabeled sample 1")


def test_held_out_samples_are_in_training_and_left_out_ones_are_nowhere():
    parts = parts_of(["a", "a#2", "b", "b#2"], unlabeled=["a"])
    assert [*find_duplicates(parts, split_of([], [2], [1, 3], held_out=[0])).leaks] == [("validation", "training")]
    assert find_duplicates(parts, split_of([], [0], [], left_out=[1, 2, 3, 4])).describe() == ""


def test_of_the_unlabeled_part_only_labeled_samples_count_where_it_is_no_pool():
    parts = parts_of(["a", "b"], unlabeled=["b", "b"])
    split = split_of([0, 3], [], [1], label_rows=[[3, 0, "clean", 1.0]])
    found = [find_duplicates(parts, split, whole_pool=whole).leaks["validation", "training"] for whole in (True, False)]
    assert [leak.second for leak in found] == [2, 1]
    unused = split_of([0], [], [1])
    assert handle_duplicates("refuse", unused, parts, whole_pool=False) is unused
    assert handle_duplicates("together", unused, parts, whole_pool=False).left_out == [2, 3]  # as where it is the pool


def test_copies_within_one_side_are_counted_and_no_leak():
    found = find_duplicates(parts_of(["a", "a#2", "a#3", "b", "b#2"], ["x", "x#2"]), split_of([0, 1, 2], [], [3, 4]))
    assert found.leaks == {}
    assert found.within == {"training": 2, "validation": 1, "test": 1}
    assert "2 in training" in found.describe_within()


def test_copies_with_different_labels():
    parts = parts_of(["a", "a#2", "b", "b#2"], test=["b"], paths=True)
    targets = {"train": torch.tensor([0, 1, 2, 2]), "test": torch.tensor([2])}
    found = find_duplicates(parts, split_of([0, 2], [], [1, 3]), targets)
    assert found.leaks["validation", "training"].conflicts == 1
    assert found.leaks["validation", "training"].example == ("train/1.jpg", "train/0.jpg")
    assert found.leaks["test", "training"].conflicts == 0
    assert "1 of 2 contents with different labels" in found.describe()


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([-100, 1, 1]),
        torch.tensor([float("nan"), 0.5, 0.5]),
        torch.tensor([[float("nan"), 1.0], [0.0, float("nan")], [0.0, 1.0]]),
        torch.tensor([[-100, 1], [0, 1], [0, -100]]),
    ],
)
def test_missing_labels_are_not_different(targets):
    found = find_duplicates(parts_of(["a", "a#2", "a#3"]), split_of([0, 2], [], [1]), {"train": targets})
    assert found.leaks["validation", "training"].conflicts == 0


def test_labels_of_several_entries_that_differ():
    targets = {"train": torch.tensor([[-100, 1], [0, 1], [1, 1]])}
    found = find_duplicates(parts_of(["a", "a#2", "a#3"]), split_of([0, 2], [], [1]), targets)
    assert found.leaks["validation", "training"].conflicts == 1


def test_samples_without_a_content_are_not_equal_and_said(recwarn):
    parts = parts_of(["", "", ""], test=["", ""])
    split = split_of([0, 1], [], [2])
    assert handle_duplicates("together", split, parts) is split
    assert find_duplicates(parts, split).leaks == {}
    said = [str(w.message) for w in recwarn]
    assert len(said) == 2 and "the train part" in said[0] and "the test part" in said[1]


def test_files_and_samples_in_memory_are_not_compared_in_silence(recwarn):
    parts = parts_of(["a"], paths=True) | {"test": Identities([""], ["b"])}
    handle_duplicates("count", split_of([0]), parts)
    assert any("files (train)" in str(w.message) and "in memory (test)" in str(w.message) for w in recwarn)


def test_a_part_without_samples_or_test(recwarn):
    handle_duplicates("refuse", split_of([0]), parts_of(["a"]))
    handle_duplicates("refuse", split_of([0]), parts_of(["a"], test=[], unlabeled=[]))
    assert not recwarn.list


def test_thousands_of_equal_samples_are_quick_and_the_message_is_short():
    """Blank tiles, for example."""
    size = 60_000
    blank = ["0", *(f"0#{n}" for n in range(2, size + 1))]
    split = split_of(range(size // 2), [], range(size // 2, size))
    start = time.process_time()
    targets = {"train": torch.arange(size) % 2}
    found = find_duplicates(parts_of(blank, test=["0"] * size), split, targets)
    assert time.process_time() - start < 5
    assert len(found.describe()) < 500
    assert found.leaks["test", "training"].first == size


@pytest.mark.parametrize("source", [Digits(), FakeData()])
def test_our_own_sources_have_none(source):
    parts = source.load()
    split = make_split(parts.train.targets, None, 0.1, 0)
    found = find_duplicates({"train": identify(parts.train.images), "test": identify(parts.test.images)}, split)
    assert (found.leaks, sum(found.within.values()), found.gaps) == ({}, 0, [])


# Counted, refused, kept on one side.


def test_count_warns_once_and_changes_nothing(recwarn):
    split = split_of([0], [], [1])
    assert handle_duplicates("count", split, parts_of(["a", "a#2"], paths=True)) is split
    (warning,) = [str(w.message) for w in recwarn]
    assert "1 validation sample is a copy of 1 training sample (train/1.jpg = train/0.jpg)" in warning
    assert "duplicates: together" in warning and "\n" not in warning


def test_refuse():
    with pytest.raises(InputError, match=r"duplicates: refuse, but 1 validation .*train/1.jpg = train/0.jpg"):
        handle_duplicates("refuse", split_of([0], [], [1]), parts_of(["a", "a#2"], paths=True))
    split = split_of([0, 1], [], [2])
    assert handle_duplicates("refuse", split, parts_of(["a", "a#2", "b"])) is split


def test_another_policy_is_refused():
    with pytest.raises(InputError, match="duplicates must be one of count, refuse, together, got 'drop'"):
        handle_duplicates("drop", split_of([0]), parts_of(["a"]))


def test_together_says_what_has_changed(caplog):
    train = ["a", "a#2", *(f"u{n}" for n in range(8))]
    split = split_of([0, *range(2, 8)], [], [1, 8, 9])
    with caplog.at_level("INFO"):
        after = handle_duplicates("together", split, parts_of(train, test=["u0"]))
    assert after.left_out == [2]
    assert "left out 1 (was 0)" in caplog.text and "from validation to training: 1" in caplog.text
    assert handle_duplicates("refuse", after, parts_of(train, test=["u0"])) is after


def test_a_label_file_does_not_bring_back_what_is_left_out(tmp_path):
    """In a datamodule: neither labeled, nor coarse, nor in the pool."""
    pictures = torch.rand(40, 1, 8, 8)
    train, test = TensorDataset(pictures, torch.arange(40) % 4), TensorDataset(pictures[:6], torch.arange(6) % 4)
    (tmp_path / "labels.csv").write_text("index,label,kind\n0,2,clean\n1,low,coarse\n7,2,clean\n")
    coarse = CoarseLabels({"low": [0, 1], "high": [2, 3]}, fraction=0.5)
    arguments = {"labeled": 3, "val_size": 0, "coarse": coarse, "label_file": tmp_path / "labels.csv"}
    for source in (DatasetSource(train, test), DatasetSource(train, test, TensorDataset(pictures[20:]))):
        data = SemiSupervisedDataModule(source, duplicates="together", **arguments)
        data.setup("fit")
        seen = {index for batch in data.train_dataloader() for index in batch.index.tolist()}
        assert seen == {*range(6, 40)}
        assert data.split.left_out[:6] == [*range(6)]


def test_labels_of_a_label_file_are_compared(tmp_path):
    pictures = torch.rand(40, 1, 8, 8)
    train = TensorDataset(pictures, torch.arange(40) % 4)
    test = TensorDataset(pictures[:3], torch.tensor([2, 1, 2]))
    (tmp_path / "labels.csv").write_text("index,label,kind\n0,2,clean\n1,,missing\n3,1,clean\n")
    for file, count in ((None, 1), (tmp_path / "labels.csv", 0)):
        data = SemiSupervisedDataModule(DatasetSource(train, test), val_size=0, label_file=file)
        data.setup("fit")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            check_duplicates("count", data.samples, data.split)
        (text,) = {str(one.message) for one in seen if "duplicates: " in str(one.message)}
        assert ("1 of 3 contents with different labels" in text) == count


# Kept on one side.


def random_data(seed):
    """Contents and labels with many copies, some of another class; copies of the same in the pool and the test part."""
    draw = random.Random(seed)
    kinds = [f"{k:x}" for k in range(draw.choice([12, 40, 200]))]
    train = [draw.choice(kinds) for _ in range(draw.choice([40, 90]))]
    labels = [int(kind, 16) % 3 if draw.random() < 0.9 else draw.randrange(3) for kind in train]
    test = [draw.choice([*kinds, "new"]) for _ in range(draw.choice([0, 3, 10]))]
    pool = [draw.choice([*kinds, "other"]) for _ in range(draw.choice([0, 15]))]
    return train, torch.tensor(labels), pool, test


@pytest.mark.parametrize("seed", range(60))
def test_no_content_stands_on_two_sides(seed):
    train, targets, pool, test = random_data(seed)
    labeled = [None, 0.3, 1.0, 2][seed % 4]
    split = make_split(targets, labeled, 0.2, seed)
    if len({*train} - {*test}) < 2:  # one content cannot stand on two sides
        with pytest.raises(InputError, match="leaves no"):
            keep_together(split, train, pool, test, targets)
        return
    after = keep_together(split, train, pool, test, targets)
    assert after == keep_together(split, train, pool, test, targets)  # the same again
    training, val = sides_of(after, train, pool)
    assert not training & val and not training & {*test} and not val & {*test}
    assert wrong_sample(after, len(train)) == ""
    assert training and val
    assert keep_together(after, train, pool, test, targets) is after
    assert handle_duplicates("refuse", after, parts_of(train, test, pool)) is after
    # what is left out is a copy of a test sample, or of the pool
    assert {train[n] for n in after.left_out if n < len(train)} <= {*test}
    # a class has as many labeled samples as before, unless training has no others
    had = Counter(targets[split.labeled].tolist())
    have = Counter(targets[after.labeled].tolist())
    for number, count in had.items():
        rest = [n for n in after.unlabeled if n < len(train) and targets[n] == number]
        assert have[number] == count or (have[number] < count and not rest) or (have[number] > count and not rest)
    if labeled is None:
        assert not [n for n in after.unlabeled if n < len(train)]


@pytest.mark.parametrize("seed", range(20))
def test_validation_does_not_depend_on_the_labeled_and_smaller_sets_are_subsets(seed):
    train, targets, pool, test = random_data(100 + seed)
    if not {*train} - {*test}:
        return
    few, more, every = (
        keep_together(make_split(targets, labeled, 0.2, seed), train, pool, test, targets)
        for labeled in (0.2, 0.5, None)
    )
    assert few.val == more.val == every.val
    assert few.left_out == more.left_out == every.left_out
    assert {*few.labeled} <= {*more.labeled} <= {*every.labeled}
    without = keep_together(make_split(targets, 0.2, 0.2, seed), train, [], test, targets)
    assert without.val == few.val and without.labeled == few.labeled  # nor on the pool


def test_a_data_set_in_which_every_sample_comes_twice():
    """Validation stays as large as it was."""
    train = [f"{n // 2}" for n in range(400)]
    targets = torch.arange(400) // 2 % 4
    split = make_split(targets, 10, 0.1, 3)
    after = keep_together(split, train, [], [], targets)
    assert Counter(targets[after.val].tolist()) == Counter(targets[split.val].tolist()) == dict.fromkeys(range(4), 10)
    assert Counter(targets[after.labeled].tolist()) == dict.fromkeys(range(4), 10)
    assert after.left_out == []


def test_training_and_validation_lose_the_same_share_to_the_test_part():
    train = [f"{n % 200}" for n in range(400)]  # twice, and half of them are test samples
    targets = torch.arange(400) % 4
    split = make_split(targets, 10, 0.2, 3)
    after = keep_together(split, train, [], [f"{n}" for n in range(100)], targets)
    assert len(after.left_out) == 200
    assert all(8 <= count <= 10 for count in Counter(targets[after.val].tolist()).values())
    assert Counter(targets[after.labeled].tolist()) == dict.fromkeys(range(4), 10)


def test_without_copies_on_two_sides_nothing_changes():
    train = ["a", "a#2", "b", "c"]
    split = split_of([0], [1], [2, 3])
    assert keep_together(split, train, ["x"], ["y", "y#2"], torch.tensor([0, 0, 0, 0])) is split


def test_pool_copies_are_left_out_and_validation_stays():
    """A pool often holds all training images again."""
    train = [f"{n}" for n in range(10)]
    split = split_of(range(8), [], [8, 9])
    after = keep_together(split, train, ["8", "0", "t", "free", "9"], ["t"], torch.zeros(10, dtype=torch.long))
    assert (after.labeled, after.val, after.left_out) == ([*range(8)], [8, 9], [10, 12, 14])


def test_label_rows_and_held_out_samples():
    """A row of a sample that is left out goes; a sample with a row, and one that is held out, never validates."""
    train = ["a", "b", "c", "c#2", "e", "f"]
    rows = [[0, 1, "clean", 1.0], [1, 1, "clean", 1.0], [7, 0, "clean", 1.0]]
    split = split_of([0, 1, 2, 7], [4], [3], held_out=[5], label_rows=rows)
    after = keep_together(split, train, ["x", "a"], ["a"], torch.zeros(6, dtype=torch.long))
    assert after.left_out == [0, 7]
    assert after.label_rows == [[1, 1, "clean", 1.0]]
    assert after.held_out == [5]
    assert after.val == [4]
    assert {1, 2} <= {*after.labeled} and 7 not in after.labeled
    assert wrong_sample(after, 6) == ""


def test_samples_without_a_label_are_never_labeled():
    train = ["a", "a#2", "b", "c", "d"]
    split = split_of([0, 2], [3, 4], [1])
    after = keep_together(split, train, [], ["b"], torch.tensor([0, 0, 0, -100, -100]))
    assert not {3, 4} & {*after.labeled, *after.val}


def test_nothing_left_is_refused():
    split = split_of([0, 1], [], [2])
    with pytest.raises(InputError, match="duplicates: together leaves no training sample"):
        keep_together(split, ["a", "b", "c"], [], ["a", "b", "c"])
    with pytest.raises(InputError, match="duplicates: together leaves no validation sample"):
        keep_together(split, ["a", "a#2", "a#3"], [], [])


@pytest.mark.parametrize("targets", [None, torch.rand(40), (torch.rand(40, 5) > 0.5).long()])
def test_samples_without_one_class_each(targets):
    train = [f"{n // 2}" for n in range(40)]
    split = make_split(torch.zeros(40, dtype=torch.long), 0.5, 0.2, 0)
    after = keep_together(split, train, [], [], targets)
    training, val = sides_of(after, train)
    assert not training & val
    assert len(after.val) == 8 and len(after.labeled) == len(split.labeled)


def test_global_random_state_stays():
    state = torch.get_rng_state()
    keep_together(split_of([0, 2], [], [1]), ["a", "a#2", "b"], [], [])
    assert torch.equal(state, torch.get_rng_state())
