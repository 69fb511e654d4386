"""Splits: stratified, nested, saved with their hash."""

import hashlib
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.data.identity import Identities
from kd_lightning.data.splits import Split, make_split

TARGETS = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)


@pytest.mark.parametrize(("labeled", "expected"), [(4, [4, 4, 4]), (0.5, [22, 9, 4]), (None, [45, 18, 9])])
def test_split_is_stratified(labeled, expected):
    split = make_split(TARGETS, labeled, 0.1, seed=0)
    assert torch.bincount(TARGETS[split.labeled]).tolist() == expected
    assert torch.bincount(TARGETS[split.val]).tolist() == [5, 2, 1]
    assert sorted(split.labeled + split.unlabeled + split.val) == list(range(80))


def test_splits_of_one_seed_are_nested():
    few, more = make_split(TARGETS, 2, 0.1, seed=1), make_split(TARGETS, 6, 0.1, seed=1)
    assert set(few.labeled) < set(more.labeled)
    assert few.val == more.val
    assert make_split(TARGETS, 2, 0.1, seed=2).val != few.val


@pytest.mark.parametrize(
    ("labeled", "val", "message"),
    [
        (10, 0.1, "labeled: 10 per class, but class 'c' has 9 samples"),
        (2, 11, "val_size: 11 per class, but class 'c' has 10 samples"),
        (2, 10, "val_size: 10 leaves class 'c' no training sample of its 10"),
        (0.0, 0.1, "labeled: a fraction"),
        (1.5, 0.1, "labeled: a fraction"),
        (2, -0.1, "val_size: a fraction"),
    ],
)
def test_invalid_sizes(labeled, val, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make_split(TARGETS, labeled, val, 0, ["a", "b", "c"])


def test_saved_split(tmp_path):
    split = make_split(TARGETS, 2, 0.1, seed=1)
    path = tmp_path / "split.json"
    split.save(path)
    assert Split.load(path, TARGETS) == split
    with pytest.raises(InputError, match="other data"):
        Split.load(path, TARGETS.flip(0))
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(InputError, match="changed after"):
        Split.load(path, TARGETS)
    path.write_text("{")
    with pytest.raises(InputError, match="not a split file"):
        Split.load(path, TARGETS)
    assert replace(split, seed=2).hash != split.hash


ROW = [3, 1, "clean", 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": [0, 1, 80]}, "labeled must hold samples 0 ... 79, got 80"),
        ({"val": [0, 10**30]}, "val must hold samples 0 ... 79, got 10"),
        ({"unlabeled": [5, -1]}, "unlabeled must hold samples 0 ... 79, got -1"),
        ({"labeled": [0, 1, 0]}, "labeled holds sample 0 twice"),
        ({"labeled": [0, 1], "unlabeled": [2, 1], "val": []}, "sample 1 is in labeled and in unlabeled"),
        ({"labeled": [0, 1], "unlabeled": [2], "val": [2]}, "sample 2 is in unlabeled and in val"),
        ({"labeled": [0, 1], "unlabeled": [2], "val": [], "held_out": [1]}, "sample 1 is in labeled and in held_out"),
        ({"labeled": [0, "1"]}, "labeled must hold the numbers of samples, got '1'"),
        ({"labeled": [0, 1.0]}, "labeled must hold the numbers of samples, got 1.0"),
        ({"labeled": [0, True]}, "labeled must hold the numbers of samples, got True"),
        ({"labeled": [0, None]}, "labeled must hold the numbers of samples, got None"),
        ({"labeled": [0, [1]]}, r"labeled must hold the numbers of samples, got \[1\]"),
        ({"labeled": "012"}, "labeled must be a list, got '012'"),
        ({"val": None}, "val must be a list, got None"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"data": 3}, "data must be a text, got 3"),
        ({"label_rows": [ROW[:3]]}, r"label_rows must hold \[index, label, kind, weight\] each, got \[3, 1, 'clean'\]"),
        ({"label_rows": [7]}, "label_rows must hold .*got 7"),
        ({"label_rows": [["3", *ROW[1:]]]}, "label_rows must hold the numbers of samples, got '3'"),
        ({"label_rows": [[-3, *ROW[1:]]]}, "label_rows must hold samples 0 ... 79, got -3"),
        ({"label_rows": [ROW, ROW]}, "label_rows holds sample 3 twice"),
    ],
)
def test_parts_that_are_no_partition(tmp_path, changes, message):
    """The hash of such a file can be right."""
    path = tmp_path / "split.json"
    replace(make_split(TARGETS, 2, 0.1, seed=1), **changes).save(path)
    with pytest.raises(InputError, match=f"labeled: .*split.json: {message}"):
        Split.load(path, TARGETS)


def test_samples_of_the_unlabeled_part_need_a_label_row(tmp_path):
    split = make_split(TARGETS, 2, 0.1, seed=1).with_label_rows([(90, 1, "clean", 1.0)])
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json", TARGETS) == split
    replace(split, label_rows=[]).save(tmp_path / "split.json")
    with pytest.raises(InputError, match="labeled must hold samples 0 ... 79, got 90"):
        Split.load(tmp_path / "split.json", TARGETS)


def test_missing_split_file(tmp_path):
    with pytest.raises(InputError, match="labeled: no split file at .*gone.json; allowed: a split file, a count per"):
        Split.load(tmp_path / "gone.json", TARGETS)


def test_many_labels_are_split_by_fraction():
    targets = torch.randint(2, (40, 3), generator=torch.Generator().manual_seed(0))
    split = make_split(targets, 0.5, 0.25, seed=0)
    assert [len(part) for part in (split.val, split.labeled, split.unlabeled)] == [10, 15, 15]
    assert sorted(split.labeled + split.unlabeled + split.val) == list(range(40))
    for labeled, val in ((5, 0.1), (0.5, 3)):
        with pytest.raises(InputError, match="must be fractions where a sample has many labels, got a count per class"):
            make_split(targets, labeled, val, seed=0)


def test_class_without_a_sample():
    targets = torch.tensor([0, 0, 0, 2, 2, 2])
    with pytest.raises(InputError, match="labeled: 1 per class, but class 'b' has no training sample"):
        make_split(targets, 1, 0, 0, ["a", "b", "c"])
    assert make_split(targets, 0.3, 0, 0).val == []


def test_held_out_labels_are_part_of_a_split(tmp_path):
    split = make_split(TARGETS, 3, 0.1, seed=1)
    held = replace(split, labeled=split.labeled[2:], held_out=split.labeled[:2])
    assert held.hash != replace(held, held_out=[]).hash
    held.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json", TARGETS) == held


@pytest.mark.parametrize("later", [("held_out", "label_rows", "pool"), ("label_rows", "pool")])
def test_split_files_without_the_later_fields(tmp_path, later):
    """Their hash is still valid."""
    split = make_split(TARGETS, 3, 0.1, seed=1)
    split = split if "held_out" in later else replace(split, labeled=split.labeled[2:], held_out=split.labeled[:2])
    first = ("labeled", "unlabeled", "val", "seed", "data", "held_out", "label_rows")
    fields = {name: value for name, value in asdict(split).items() if name in first and name not in later}
    fields |= {} if "pool" in later else {"pool": ""}
    fields["hash"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (tmp_path / "split.json").write_text(json.dumps(fields))
    assert Split.load(tmp_path / "split.json", TARGETS) == split


class TestLabelRows:
    SPLIT = Split(labeled=[0, 1, 2], unlabeled=[3, 4, 5], val=[6], seed=0, data="", held_out=[7])

    @pytest.mark.parametrize(
        ("rows", "labeled", "unlabeled"),
        [
            ([], [0, 1, 2], [3, 4, 5]),
            ([(4, 1, "clean", 1.0)], [0, 1, 2, 4], [3, 5]),
            ([(4, 1, "noisy", 1.0), (9, 1, "clean", 1.0)], [0, 1, 2, 4, 9], [3, 5]),
            ([(1, 2, "clean", 1.0)], [0, 1, 2], [3, 4, 5]),  # a corrected label
            ([(1, -1, "missing", 1.0)], [0, 2], [1, 3, 4, 5]),
            ([(1, "low", "coarse", 1.0), (4, "low", "coarse", 1.0)], [0, 2], [1, 3, 4, 5]),
            ([(7, 1, "clean", 1.0)], [0, 1, 2], [3, 4, 5]),  # stays held out
            ([(9, -1, "missing", 1.0)], [0, 1, 2], [3, 4, 5]),
        ],
    )
    def test_labeled_and_unlabeled(self, rows, labeled, unlabeled):
        split = self.SPLIT.with_label_rows(rows)
        assert (split.labeled, split.unlabeled, split.val, split.held_out) == (labeled, unlabeled, [6], [7])
        assert split.label_rows == [list(row) for row in rows]
        assert split.with_label_rows(rows) == split  # the same file twice
        assert (split.hash != self.SPLIT.hash) == bool(rows)

    def test_later_ones_add_to_earlier_ones(self):
        first = self.SPLIT.with_label_rows([(4, 1, "clean", 1.0), (0, -1, "missing", 1.0)])
        second = first.with_label_rows([(5, 2, "clean", 1.0), (0, 2, "noisy", 0.5)])
        assert second.labeled == [0, 1, 2, 4, 5]
        assert second.label_rows == [[0, 2, "noisy", 0.5], [4, 1, "clean", 1.0], [5, 2, "clean", 1.0]]

    def test_are_saved(self, tmp_path):
        names = Identities([f"{n}.png" for n in range(100)], [f"{n:016x}" for n in range(100)])
        split = replace(make_split(TARGETS, 2, 0.1, seed=1)).with_label_rows([(90, "low", "coarse", 0.25)])
        split = replace(split, samples=Identities(names.paths[:80], names.contents[:80]), pool=names)
        split.save(tmp_path / "split.json")
        assert Split.load(tmp_path / "split.json", TARGETS) == split
        text = (tmp_path / "split.json").read_text()
        for change in (("0.25", "0.5"), ("low", "high"), ("3.png", "4.png")):
            (tmp_path / "split.json").write_text(text.replace(*change))
            with pytest.raises(InputError, match="changed after"):
                Split.load(tmp_path / "split.json", TARGETS)

    def test_for_validation_stay_there(self):
        split = self.SPLIT.with_label_rows([(4, 1, "clean", 1.0), (6, 1, "clean", 1.0)])
        assert split.val == self.SPLIT.val
        assert 6 in split.val
        assert 6 not in split.labeled
        assert 6 not in split.unlabeled


def everything(split):
    return sorted(split.labeled + split.unlabeled + split.val + split.held_out + split.left_out)


class TestSamplesWithoutALabel:
    @pytest.mark.parametrize(
        "targets",
        [
            torch.tensor([0, 1, -100, 0, 1, -100] * 10),
            torch.tensor([0, 1, math.nan, 0, 1, math.nan] * 10),
            torch.tensor([[0, 1], [1, math.nan], [math.nan] * 2, [1, 1], [math.nan, 0], [math.nan] * 2] * 10),
        ],
    )
    @pytest.mark.parametrize("labeled", [None, 0.5])
    def test_are_unlabeled(self, targets, labeled):
        split = make_split(targets, labeled, 0.25, seed=3)
        nothing = {index for index in range(60) if index % 6 in (2, 5)}
        assert nothing <= {*split.unlabeled}
        assert everything(split) == [*range(60)]
        assert len(split.val) == 10
        strata = 1 if targets.is_floating_point() else 2
        assert len(split.labeled) == (30 if labeled is None else {1: 15, 2: 16}[strata])

    def test_change_nothing_for_the_others(self):
        """The same samples are chosen as without them."""
        whole = make_split(TARGETS, 0.4, 0.1, seed=5)
        more = make_split(torch.cat([TARGETS, torch.full((9,), -100)]), 0.4, 0.1, seed=5)
        assert (more.labeled, more.val) == (whole.labeled, whole.val)
        assert more.unlabeled == [*whole.unlabeled, *range(80, 89)]

    @pytest.mark.parametrize("names", [None, ["a", "b"]])
    def test_all(self, names):
        targets = torch.full((5,), -100)
        for labeled in (None, 0):
            split = make_split(targets, labeled, 0.5, 0, names)
            assert (split.unlabeled, split.labeled, split.val) == ([*range(5)], [], [])
        for labeled in (3, 0.5):
            with pytest.raises(InputError, match=f"labeled: {labeled}, but no training sample has a label"):
                make_split(targets, labeled, 0.5, 0, names)
            assert make_split(targets, labeled, 0.5, 0, names, at_most=True).labeled == []
        assert everything(make_split(torch.full((5, 3), math.nan), None, 0.5, 0)) == [*range(5)]


def test_a_count_of_floats():
    with pytest.raises(InputError, match="must be fractions where a sample has a float as label, got a count"):
        make_split(torch.tensor([0.0, 1.0]), 1, 0, seed=0)


def test_the_order_of_draws_stays():
    """The indices that earlier versions sampled."""
    split = make_split(torch.tensor([2, 0, 1, 2, 2, 0, 1, 0, 4, 4]), 1, 0, seed=7, at_most=True)
    assert everything(split) == [*range(10)]
    generator, expected = torch.Generator().manual_seed(7), []
    for c in range(5):
        members = (torch.tensor([2, 0, 1, 2, 2, 0, 1, 0, 4, 4]) == c).nonzero().flatten()
        expected += members[torch.randperm(len(members), generator=generator)].tolist()[:1]
    assert split.labeled == sorted(expected)


class TestAtMost:
    """Classes of 50, 20, 10, 3 and 1 samples; the sixth has none."""

    TARGETS = torch.tensor([0] * 50 + [1] * 20 + [2] * 10 + [3] * 3 + [4])
    NAMES = ["a", "b", "c", "d", "e", "f"]

    def split(self, labeled, val_size, at_most=True):
        return make_split(self.TARGETS, labeled, val_size, 0, self.NAMES, at_most=at_most)

    def counts(self, split):
        return [torch.bincount(self.TARGETS[part], minlength=5).tolist() for part in (split.labeled, split.val)]

    @pytest.mark.parametrize(
        ("labeled", "val_size", "expected"),
        [
            (4, 0.1, [[4, 4, 4, 2, 1], [5, 2, 1, 1, 0]]),
            (12, 0.9, [[5, 2, 1, 1, 1], [45, 18, 9, 2, 0]]),
            (12, 0, [[12, 12, 10, 3, 1], [0] * 5]),
            (0.5, 0.1, [[22, 9, 4, 1, 1], [5, 2, 1, 1, 0]]),
            (None, 0.1, [[45, 18, 9, 2, 1], [5, 2, 1, 1, 0]]),
            (0, 0.1, [[0] * 5, [5, 2, 1, 1, 0]]),
        ],
    )
    def test_takes_what_there_is(self, labeled, val_size, expected):
        split = self.split(labeled, val_size)
        assert self.counts(split) == expected
        assert everything(split) == [*range(84)]

    def test_smaller_sets_are_nested(self):
        few, more = self.split(2, 0.1), self.split(20, 0.1)
        assert {*few.labeled} < {*more.labeled}
        assert few.val == more.val

    def test_equals_the_plain_split_where_that_is_possible(self):
        targets = self.TARGETS[:80]
        assert make_split(targets, 4, 0.1, 0, at_most=True) == make_split(targets, 4, 0.1, 0)

    @pytest.mark.parametrize(
        ("labeled", "val_size", "message"),
        [
            (4, 0, "labeled: 4 per class, but class 'd' has 3 samples for it; .*labeled_at_most: true"),
            (1, 0, "labeled: 1 per class, but class 'f' has no training sample.*labeled_at_most: true"),
            (1, 0.1, "val_size: 0.1 leaves class 'e' no training sample of its 1; labeled_at_most: true"),
        ],
    )
    def test_is_named_where_it_would_help(self, labeled, val_size, message):
        with pytest.raises(InputError, match=message):
            self.split(labeled, val_size, at_most=False)

    @pytest.mark.parametrize(
        ("labeled", "val_size", "message"),
        [
            (-1, 0.1, "labeled: -1 per class"),
            (4, 4, "val_size: 4 per class, but class 'd' has 3 samples"),
            (4, 1.0, "val_size: 1.0 leaves class 'a' no training sample of its 50$"),
            (4, 1, "val_size: 1 leaves class 'e' no training sample of its 1$"),
        ],
    )
    def test_errors_that_stay(self, labeled, val_size, message):
        with pytest.raises(InputError, match=message):
            self.split(labeled, val_size)


def test_too_few_class_names():
    with pytest.raises(InputError, match=r"class_names must name all classes, 0 ... 2, got 2 names"):
        make_split(TARGETS, 1, 0, 0, ["a", "b"])


def test_many_classes_are_quick():
    assert make_split(torch.tensor([2**40, 3] * 3), 0.5, 0, seed=0).labeled
    targets = torch.arange(200_000) % 50_000
    split = make_split(targets, 1, 0.25, seed=0)
    assert [len(part) for part in (split.labeled, split.unlabeled, split.val)] == [50_000, 100_000, 50_000]


def test_a_file_of_a_later_version(tmp_path):
    make_split(torch.arange(30) % 3, 2, 2, 0).save(tmp_path / "split.json")
    content = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(InputError, match="format must be 1 or 2, got 3"):
        Split.load(tmp_path / "split.json", torch.arange(30) % 3)


def test_samples_that_are_no_names(tmp_path):
    make_split(torch.arange(30) % 3, 2, 2, 0).save(tmp_path / "split.json")
    content = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps(content | {"samples": "x"}))
    with pytest.raises(InputError, match="samples must hold paths and contents, got 'x'"):
        Split.load(tmp_path / "split.json", torch.arange(30) % 3)
