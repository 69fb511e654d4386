"""Labels: what training may see, pseudo-labels in the table, and what is refused."""

from dataclasses import replace

import pytest
import torch

from kd_lightning import Batch, CoarseLabels, InputError, PairNoise, SymmetricNoise
from kd_lightning.batch import LabelKind
from kd_lightning.data.labels.build import build_labels, mask_labels
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.splits import Split, make_split
from kd_lightning.pseudo_labels.table import PseudoLabels

NAN = float("nan")
VISIBLE = torch.tensor([4, -100, -100, 2, -100, -100])


def table(index, label, accepted, soft=None):
    index, label, accepted = torch.tensor(index), torch.tensor(label), torch.tensor(accepted)
    return PseudoLabels(index, label, torch.ones(len(index)), accepted, accepted == 0, 0, 0, soft)


def fill(labels, index):
    index = torch.tensor(index)
    return labels.fill(Batch(index.float(), index=index))


def test_before_any():
    batch = fill(LabelTable(VISIBLE), [3, 1, 0])
    assert (batch.y.tolist(), batch.kind, batch.soft) == ([2, -100, 4], None, None)


def test_accepted_ones_are_filled_in():
    labels = LabelTable(VISIBLE)
    labels.set_pseudo_labels(table([1, 2, 4], [3, 1, 0], [True, False, True]))
    batch = fill(labels, [5, 4, 3, 2, 1, 0, 1])
    assert batch.y.tolist() == [-100, 0, 2, -100, 3, 4, 3]
    kinds = [
        LabelKind.MISSING,
        LabelKind.PSEUDO,
        LabelKind.CLEAN,
        LabelKind.MISSING,
        LabelKind.PSEUDO,
        LabelKind.CLEAN,
        LabelKind.PSEUDO,
    ]
    assert batch.kind.tolist() == kinds
    assert batch.soft is None
    assert labels.visible.tolist() == VISIBLE.tolist() == [4, -100, -100, 2, -100, -100]


def test_soft_ones_lie_at_their_samples():
    labels, soft = LabelTable(VISIBLE), torch.rand(3, 5)
    labels.set_pseudo_labels(table([5, 1, 2], [3, 1, 0], [True, False, True], soft))
    batch = fill(labels, [0, 1, 2, 3, 4, 5])
    none = torch.zeros(5)
    assert torch.equal(batch.soft, torch.stack([none, none, soft[2], none, none, soft[0]]))


@pytest.mark.parametrize("given", [None, torch.tensor([2.0, 1.0, 1.0, 0.5, 1.0, 3.0])])
def test_weights(given):
    """They lie beside those of a label file, and are in no hash."""
    labels = LabelTable(VISIBLE, weight=given)
    before, plain = labels.hash, torch.ones(6) if given is None else given.clone()
    labels.set_pseudo_labels(table([5, 1, 2], [3, 1, 0], [0.25, 0.0, 1.0]))
    expected = plain.clone()
    expected[[2, 5]] = torch.tensor([1.0, 0.25])
    batch = fill(labels, range(6))
    assert batch.weight.tolist() == expected.tolist()
    assert (batch.kind == LabelKind.PSEUDO).tolist() == [False, False, True, False, False, True]
    labels.set_pseudo_labels(table([5, 1, 2], [3, 1, 0], [True, False, True]))  # the next round has none
    weight = fill(labels, range(6)).weight
    assert weight is None if given is None else weight.tolist() == [2.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert labels.hash == before
    assert given is None or torch.equal(given, plain)


class TestSeveralLabels:
    """Pseudo-labels of single labels of a sample."""

    VISIBLE = torch.tensor([[1, 0, NAN], [NAN] * 3, [NAN] * 3, [0, 1, 1]])

    @staticmethod
    def table(index, output, label, accepted):
        accepted = torch.tensor(accepted).float()
        rows = [torch.tensor(values) for values in (index, label)]
        parts = rows[0], rows[1].float(), accepted, accepted, accepted > 1, 0, 0, None
        return PseudoLabels(*parts, torch.tensor(output))

    def filled(self, **kwargs):
        labels = LabelTable(self.VISIBLE, **kwargs)
        labels.set_pseudo_labels(self.table([0, 1, 1, 2], [2, 0, 2, 1], [1, 1, 0, 1], [1, 1, 1, 0]))
        return labels

    def test_fills_in_the_accepted_ones(self):
        labels = self.filled()
        batch = fill(labels, [3, 2, 1, 0])
        expected = torch.tensor([[0, 1, 1], [NAN] * 3, [1, NAN, 0], [1, 0, 1]])
        torch.testing.assert_close(batch.y, expected, equal_nan=True)
        clean, missing, pseudo = LabelKind.CLEAN, LabelKind.MISSING, LabelKind.PSEUDO
        kinds = [[clean] * 3, [missing] * 3, [pseudo, missing, pseudo], [clean, clean, pseudo]]
        assert batch.kind.tolist() == kinds
        assert batch.weight is None
        labels.set_pseudo_labels(self.table([2], [0], [1], [1]))  # replaces all
        assert fill(labels, [0, 1]).y.isnan().sum() == 4

    def test_counts(self):
        labels, index = self.filled(), torch.tensor([0, 1, 2, 3, 0])
        assert labels.count_up_to(index)[[0, 1, 2, 3, 5]].tolist() == [
            [0, 0, 0],
            [3, 1, 0],
            [5, 3, 0],
            [5, 3, 0],
            [11, 4, 0],
        ]
        assert labels.count_up_to(index[:0]).tolist() == [[0, 0, 0]]

    def test_mixed_with_a_given_label_it_stays_a_pseudo_label(self):
        labels = self.filled()
        index, partner = torch.tensor([0, 3, 1]), torch.tensor([3, 0, 0])
        batch = Batch(index.float(), index=index, partner=partner, share=torch.full((3,), 0.75))
        batch = labels.fill(batch)
        clean, missing, pseudo = LabelKind.CLEAN, LabelKind.MISSING, LabelKind.PSEUDO
        assert batch.kind.tolist() == [[clean, clean, pseudo], [clean, clean, pseudo], [pseudo, missing, pseudo]]
        torch.testing.assert_close(batch.y[0], torch.tensor([0.75, 0.25, 1.0]))
        assert labels.count_up_to(index, partner)[-1].tolist() == [8, 4, 0]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (([0], [1], [1], [1]), "sample 0 has a label already"),
            (([4], [1], [1], [1]), "samples must be 0 ... 3, got 4"),
            (([1], [1], [1], [0.5]), "weights must be 0 or 1 where samples have several labels"),
        ],
    )
    def test_refused(self, rows, message):
        with pytest.raises(InputError, match=f"pseudo-labels: {message}"):
            LabelTable(self.VISIBLE).set_pseudo_labels(self.table(*rows))

    def test_of_samples_with_one_class(self):
        with pytest.raises(InputError, match="one for each, torch.int64; got several for each, torch.float32"):
            LabelTable(VISIBLE).set_pseudo_labels(self.table([1], [1], [1], [1]))


def test_new_ones_replace_all_earlier_ones():
    labels = LabelTable(VISIBLE)
    labels.set_pseudo_labels(table([1, 2], [3, 1], [True, True], torch.rand(2, 5)))
    labels.set_pseudo_labels(table([1, 2], [4, 4], [False, True]))
    batch = fill(labels, [1, 2])
    assert (batch.y.tolist(), batch.kind.tolist(), batch.soft) == (
        [-100, 4],
        [LabelKind.MISSING, LabelKind.PSEUDO],
        None,
    )
    labels.set_pseudo_labels(table([1, 2], [4, 4], [False, False], torch.rand(2, 5)))
    batch = fill(labels, [1, 2, 3])
    assert (batch.y.tolist(), batch.soft.sum().item()) == ([-100, -100, 2], 0)


def test_batches_that_were_filled_stay_as_they_are():
    labels = LabelTable(VISIBLE)
    labels.set_pseudo_labels(table([1], [3], [True]))
    batch = fill(labels, [1])
    labels.set_pseudo_labels(table([1], [2], [True]))
    assert batch.y.tolist() == [3]


def test_empty_table():
    labels = LabelTable(VISIBLE)
    none = torch.empty(0, dtype=torch.long)
    labels.set_pseudo_labels(PseudoLabels(none, none, none.float(), none.bool(), none.bool(), 0, 0))
    assert fill(labels, [1, 3]).y.tolist() == [-100, 2]


def test_counts():
    labels, everyone = LabelTable(VISIBLE), torch.tensor([0, 1, 2, 3, 4, 1])
    assert labels.count_up_to(everyone)[-1].tolist() == [2, 0, 0]
    labels.set_pseudo_labels(table([1, 2, 4], [3, 1, 0], [True, False, True]))
    assert labels.count_up_to(everyone)[-1].tolist() == [5, 3, 0]
    assert labels.count_up_to(everyone[:0])[-1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("visible", "index", "message"),
    [
        (
            torch.full((6, 2), NAN),
            [1, 2],
            "must fit the labels .* which are several for each, .* got one for each",
        ),
        (
            torch.tensor([0.0, NAN, NAN]),
            [1, 2],
            "must fit the labels .* which are one for each, torch.float32; got",
        ),
        (VISIBLE, [1, 6], "samples must be 0 ... 5, got 6"),
        (VISIBLE, [1, 3], "sample 3 has a label already"),
    ],
)
def test_refused(visible, index, message):
    labels = LabelTable(visible)
    with pytest.raises(InputError, match=f"pseudo-labels.*{message}"):
        labels.set_pseudo_labels(table(index, [0, 0], [True, True]))
    assert (labels.y is visible, labels.kind) == (True, None)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        (torch.tensor([3, 1, 2]), [-100, 1, -100, -100]),
        (torch.tensor([3.0, 1.0, 2.0]), [NAN, 1.0, NAN, NAN]),
        (torch.tensor([[0, 1], [1, 1], [0, 0]]), [[NAN, NAN], [1.0, 1.0], [NAN, NAN], [NAN, NAN]]),
    ],
)
def test_mask_labels(truth, expected):
    torch.testing.assert_close(mask_labels(truth, [1], 4), torch.tensor(expected), equal_nan=True)


class TestBuildLabels:
    """Samples 0 ... 5 of the training part, of classes 0 ... 2, and 6 ... 8 of an unlabeled part."""

    TRUTH = torch.tensor([0, 1, 2, 0, 1, 2])
    SPLIT = Split(labeled=[0, 1], unlabeled=[2, 3, 4], val=[5], seed=0, data="")
    COARSE = CoarseLabels({"low": [0, 1], "high": [2]}, fraction=0)

    def build_labels(self, *rows, coarse=COARSE, **kwargs):
        split, held_out = self.SPLIT.with_label_rows(rows), kwargs.pop("held_out", [])
        split = replace(split, labeled=sorted({*split.labeled} - {*held_out}), held_out=held_out)
        return build_labels(self.TRUTH, split, 9, coarse=coarse, **kwargs)

    def test_nothing_weak(self):
        labels = build_labels(self.TRUTH, self.SPLIT, 9)
        assert labels.visible.tolist() == [0, 1, *[-100] * 7]
        assert (labels.kind, labels.weight, labels.group, labels.members, labels.hash) == (None, None, None, None, "")

    def test_all_kinds_in_a_batch(self):
        rows = [(1, 2, "noisy", 0.5), (2, "high", "coarse", 2.0), (3, 1, "clean", 1.0), (7, "low", "coarse", 1.0)]
        batch = fill(self.build_labels(*rows, (8, 2, "clean", 0.0)), range(9))
        k = LabelKind
        assert batch.y.tolist() == [0, 2, -100, 1, -100, -100, -100, -100, 2]
        expected = [k.CLEAN, k.NOISY, k.COARSE, k.CLEAN, k.MISSING, k.MISSING, k.MISSING, k.COARSE, k.CLEAN]
        assert batch.kind.tolist() == expected
        assert batch.weight.tolist() == [1, 0.5, 2, 1, 1, 1, 1, 1, 0]
        none = [False] * 3
        assert batch.candidates.tolist() == [none, none, [False, False, True], *[none] * 4, [True, True, False], none]

    def test_label_rows_come_first(self):
        """Before noise, before a sampled superclass, and before the source's label."""
        labels = self.build_labels(
            (0, 0, "clean", 1.0),
            (1, -1, "missing", 1.0),
            (2, -1, "missing", 1.0),
            (3, "high", "coarse", 1.0),  # though it is of class 0
            coarse=CoarseLabels({"low": [0, 1], "high": [2]}),
            noise=PairNoise(1.0),
        )
        batch = fill(labels, range(6))
        assert batch.y.tolist() == [0, *[-100] * 5]
        assert batch.kind.tolist() == [
            LabelKind.CLEAN,
            LabelKind.MISSING,
            LabelKind.MISSING,
            LabelKind.COARSE,
            LabelKind.COARSE,
            LabelKind.MISSING,
        ]
        assert batch.candidates[3:5].tolist() == [[False, False, True], [True, True, False]]

    @pytest.mark.parametrize("row", [(4, 1, "clean", 3.0), (4, "low", "coarse", 3.0), (7, 1, "noisy", 3.0)])
    def test_held_out_label_rows_are_hidden(self, row):
        labels = self.build_labels(row, held_out=[4, 7])
        batch = fill(labels, [row[0]])
        assert (batch.y.item(), batch.kind.item(), batch.weight) == (-100, LabelKind.MISSING, None)
        assert not batch.candidates.any()

    def test_superclass_of_the_truth(self):
        labels = build_labels(self.TRUTH, self.SPLIT, 9, coarse=CoarseLabels({"high": [2], "low": [0, 1]}))
        batch = fill(labels, range(9))
        coarse = batch.kind == LabelKind.COARSE
        assert coarse.nonzero().flatten().tolist() == [2, 3, 4]
        assert batch.candidates[coarse].tolist() == [[False, False, True], [True, True, False], [True, True, False]]
        assert (batch.y[coarse] == -100).all()
        assert labels.count_up_to(torch.tensor([0, 2, 3, 5]))[-1].tolist() == [3, 0, 2]

    def test_pseudo_labels_beside(self):
        labels = self.build_labels((1, 2, "noisy", 1.0), (2, "high", "coarse", 1.0), coarse=self.COARSE)
        labels.set_pseudo_labels(table([2, 3, 7], [2, 0, 1], [True, False, True]))
        batch = fill(labels, [0, 1, 2, 3, 7])
        assert batch.kind.tolist() == [
            LabelKind.CLEAN,
            LabelKind.NOISY,
            LabelKind.PSEUDO,
            LabelKind.MISSING,
            LabelKind.PSEUDO,
        ]
        assert (batch.y.tolist(), batch.candidates.any().item()) == ([0, 2, 2, -100, 1], False)
        assert labels.count_up_to(torch.tensor([0, 1, 2, 3, 7]))[-1].tolist() == [4, 2, 0]
        labels.set_pseudo_labels(table([2, 3, 7], [2, 0, 1], [False, False, False]))  # the initial labels again
        batch = fill(labels, [2, 7])
        assert (batch.kind.tolist(), batch.candidates.sum().item()) == ([LabelKind.COARSE, LabelKind.MISSING], 1)

    @pytest.mark.parametrize(
        ("rows", "kwargs"),
        [
            ([(1, 2, "clean", 1.0)], {}),
            ([(1, 1, "noisy", 1.0)], {}),
            ([(1, 1, "clean", 0.5)], {}),
            ([(7, 1, "clean", 1.0)], {}),
            ([(2, "low", "coarse", 1.0)], {}),
            ([(2, "high", "coarse", 1.0)], {}),
            ([(2, "low", "coarse", 1.0)], {"coarse": CoarseLabels({"low": [0], "high": [1, 2]}, 0)}),
            ([], {"noise": PairNoise(0.0)}),
            ([], {"noise": PairNoise(1.0)}),
        ],
    )
    def test_hash_changes_with_the_labels(self, rows, kwargs):
        hashes = [self.build_labels(*given, **more).hash for given, more in ((rows, kwargs), (rows, kwargs), ([], {}))]
        assert hashes[0] == hashes[1] != hashes[2]
        labels = self.build_labels(*rows, **kwargs)
        labels.set_pseudo_labels(table([4], [1], [True]))
        assert labels.hash == hashes[0]

    @pytest.mark.parametrize("coarse", [None, CoarseLabels({"a": [0, 1], "high": [2]})])
    def test_superclass_without_a_name(self, coarse):
        with pytest.raises(
            InputError, match="coarse must name the superclasses of the label file, but does not name 'low'"
        ):
            self.build_labels((2, "low", "coarse", 1.0), coarse=coarse)

    @pytest.mark.parametrize("truth", [torch.rand(6), torch.rand(6, 3)])
    @pytest.mark.parametrize("kwargs", [{"noise": PairNoise(0.1)}, {"coarse": COARSE}, {}])
    def test_samples_of_many_labels(self, truth, kwargs):
        split = self.SPLIT if kwargs else self.SPLIT.with_label_rows([(2, 1, "clean", 1.0)])
        with pytest.raises(InputError, match="label_noise, coarse and label_file need samples of one class each"):
            build_labels(truth, split, 9, **kwargs)

    def test_fewer_labels_are_wrong_as_they_are_among_more(self):
        truth = torch.arange(10).repeat(30)
        few, more = (
            build_labels(truth, make_split(truth, count, 0.1, seed=3), 300, noise=SymmetricNoise(0.5))
            for count in (5, 20)
        )
        known = few.visible != -100
        assert torch.equal(few.visible[known], more.visible[known])
        assert 10 < (few.visible != truth)[known].sum() < 40


def test_every_field_survives():
    """The fields for labels, in ``Batch.select``."""
    labels = TestBuildLabels().build_labels((1, 2, "noisy", 0.5), (2, "high", "coarse", 2.0))
    batch = fill(labels, [0, 1, 2])
    part = batch.select(torch.tensor([False, True, True]))
    for name in ("y", "kind", "weight", "candidates"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:])


def test_pinned_batch_has_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # which needs an accelerator
    batch = fill(TestBuildLabels().build_labels((1, 2, "noisy", 0.5), (2, "high", "coarse", 2.0)), [0, 1, 2])
    pinned = batch.pin_memory()
    for name in ("x", "y", "index", "kind", "weight", "candidates"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name))
        assert getattr(pinned, name) is not getattr(batch, name)
