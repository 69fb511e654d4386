"""Samplers: every sample comes, no batch has one row, ranks have equal batches, and the longer stream decides."""

from collections import Counter
from itertools import chain, product

import pytest
import torch

from kd_lightning import InputError
from kd_lightning.data.views.samplers import (
    EvenClasses,
    TrainingBatches,
    TwoStreamSampler,
    ViewSampler,
    _generator,
    check_sizes,
)

PLAIN = [*product([1, 2, 3, 9, 10, 11, 12, 13, 19, 37], [1, 2, 3, 9, 50], [1, 2, 3], [1, 2])]
STREAMS = [*product([1, 2, 7, 20], [1, 2, 13, 40, 41], [1, 2, 4], [1, 3, 12], [1, 2, 3], [1, 2])]


def plain(size, world=1, rank=0, views=1, epoch=0):
    sampler = ViewSampler(size, views_per_epoch=views, num_views=None, seed=3, num_replicas=world, rank=rank)
    sampler.set_epoch(epoch)
    return sampler


def two_streams(labeled, unlabeled, sizes, world=1, rank=0, views=1, epoch=0, num_views=None):
    sampler = TwoStreamSampler(
        labeled,
        unlabeled,
        labeled_batch=sizes[0],
        unlabeled_batch=sizes[1],
        views_per_epoch=views,
        num_views=num_views,
        seed=3,
        num_replicas=world,
        rank=rank,
    )
    sampler.set_epoch(epoch)
    return sampler


def listed(batch):
    """The keys of a batch as tuples."""
    return [*map(tuple, batch.tolist())]


def batches(sampler, size):
    made = TrainingBatches(sampler, size)
    found = [listed(batch) for batch in made]
    assert len(found) == len(made)
    assert len(sampler) == sum(map(len, found))
    return found


class TestLastBatch:
    @pytest.mark.parametrize(
        ("rows", "size", "expected"),
        [
            (37, 9, [9, 9, 9, 10]),  # one row joins
            (38, 9, [9, 9, 9, 9, 2]),  # two don't
            (36, 9, [9, 9, 9, 9]),
            (10, 9, [10]),
            (3, 2, [3]),
            (5, 2, [2, 3]),
            (1, 9, [1]),  # nothing to join
            (3, 1, [1, 1, 1]),  # as asked for
            (8, 9, [8]),
        ],
    )
    def test_sizes(self, rows, size, expected):
        assert [*map(len, batches(plain(rows), size))] == expected

    @pytest.mark.parametrize("views", [1, 2])
    def test_every_sample_on_every_number_of_processes(self, views):
        for size, batch, world, v in PLAIN:
            if v != views:
                continue
            shares = [batches(plain(size, world, rank, views, epoch=2), batch) for rank in range(world)]
            sizes = [[*map(len, share)] for share in shares]
            assert all(one == sizes[0] for one in sizes), (size, batch, world)
            rows = sum(sizes[0])
            assert rows == -(-size * views // world)
            assert 1 not in sizes[0] or batch == 1 or rows == 1
            assert max(sizes[0]) <= batch + (batch > 1)
            assert all(one == batch for one in sizes[0][:-1])
            seen = Counter(chain(*chain(*shares)))
            assert seen.keys() == {(n, v) for n in range(size) for v in range(2 * views, 3 * views)}
            if world == 1:
                assert set(seen.values()) == {1}

    def test_rest_of_an_epoch_at_every_position(self):
        for size, batch in product([1, 2, 9, 10, 37, 38], [1, 2, 3, 9]):
            whole = batches(plain(size), batch)
            made = TrainingBatches(plain(size), batch)
            for skip in range(len(whole) + 1):
                made.skip = skip
                assert [listed(one) for one in made] == whole[skip:], (size, batch, skip)
                assert len(made) == len(whole)

    def test_two_processes_join_alike(self):
        """37 rows are 19 on each of two processes, which is two batches of 9 and one row."""
        shares = [batches(plain(37, 2, rank), 9) for rank in range(2)]
        assert [[*map(len, share)] for share in shares] == [[9, 10], [9, 10]]


def keys_by_hand(labeled, unlabeled, sizes, world, views, epoch, num_views):
    """Batches of all processes together where the unlabeled stream decides: one row after the other."""
    sampler = ViewSampler(unlabeled, views_per_epoch=views, num_views=num_views, seed=3, num_replicas=world, rank=0)
    sampler.set_epoch(epoch)
    rest = [(position + labeled, view) for position, view in sampler.keys().tolist()]
    first, second = sizes[0] * world, sizes[1] * world
    steps = -(-len(rest) // second)
    found = []
    for step in range(steps):
        for row in range(first):
            number, place = divmod((epoch * steps + step) * first + row, labeled)
            order = torch.randperm(labeled, generator=_generator(3, -1 - number))
            found.append((int(order[place]), number if num_views is None else number % num_views))
        found += rest[step * second : (step + 1) * second]
    return found


class TestLongerStream:
    def test_order_where_the_unlabeled_one_decides(self):
        for labeled, unlabeled, first, second, world, views in STREAMS:
            if labeled > 7 or unlabeled > 13:
                continue
            for epoch, num_views in ((0, None), (3, 2)):
                args = labeled, unlabeled, (first, second), world, views, epoch, num_views
                samplers = [
                    two_streams(labeled, unlabeled, (first, second), world, rank, views, epoch, num_views)
                    for rank in range(world)
                ]
                if samplers[0].longer == "labeled":
                    continue
                expected = keys_by_hand(*args)
                for rank, sampler in enumerate(samplers):
                    assert [*sampler] == expected[rank::world], args

    def test_lengths_and_every_sample(self):
        seen_longer = Counter()
        for labeled, unlabeled, first, second, world, views in STREAMS:
            args = labeled, unlabeled, (first, second), world, views
            samplers = [two_streams(labeled, unlabeled, (first, second), world, rank, views) for rank in range(world)]
            shares = [batches(sampler, first + second) for sampler in samplers]
            sizes = [[*map(len, share)] for share in shares]
            assert all(one == sizes[0] for one in sizes), args
            steps = max(-(-labeled * views // (first * world)), -(-unlabeled * views // (second * world)))
            assert len(sizes[0]) == samplers[0].steps == steps
            assert min(sizes[0]) >= 2
            assert all(one == first + second for one in sizes[0][:-1])
            longer = samplers[0].longer
            seen_longer[longer] += 1
            seen = Counter(key for key in chain(*chain(*shares)) if (key[0] < labeled) == (longer == "labeled"))
            positions = range(labeled) if longer == "labeled" else range(labeled, labeled + unlabeled)
            assert seen.keys() == {(n, v) for n in positions for v in range(views)}, args
            if world == 1:
                assert set(seen.values()) == {1}
            for share in shares:
                for batch in share:
                    labels = [position < labeled for position, _ in batch]
                    assert labels == sorted(labels, reverse=True)
                    assert any(labels) and not all(labels)
                for batch in share[:-1]:
                    assert sum(position < labeled for position, _ in batch) == first
        assert min(seen_longer.values()) > 300  # both cases

    def test_a_tiny_pool_no_longer_decides(self):
        """40 labeled samples and a pool of 5 were one step an epoch."""
        made = [batches(two_streams(40, 5, (4, 12), epoch=epoch), 16) for epoch in range(3)]
        assert [*map(len, made)] == [10, 10, 10]
        for epoch, share in enumerate(made):
            assert sorted(key for batch in share for key in batch[:4]) == [(n, epoch) for n in range(40)]
        pool = [key for share in made for batch in share for key in batch[4:]]
        passes = [pool[n : n + 5] for n in range(0, len(pool), 5)]
        for number, keys in enumerate(passes):  # equally often, across the ends of epochs, in new orders and views
            assert sorted(keys) == [(40 + n, number) for n in range(5)]
        assert len({tuple(n for n, _ in keys) for keys in passes}) > 30

    def test_last_batch_where_the_labeled_stream_decides(self):
        made = batches(two_streams(9, 5, (4, 3)), 7)
        assert [[position < 9 for position, _ in batch].count(True) for batch in made] == [4, 4, 1]
        assert [len(batch) for batch in made] == [7, 7, 4]

    def test_processes_share_the_batches_of_one(self):
        for epoch in range(2):
            one = batches(two_streams(16, 5, (4, 6), epoch=epoch), 10)
            two = [batches(two_streams(16, 5, (2, 3), 2, rank, epoch=epoch), 5) for rank in range(2)]
            for alone, *shares in zip(one, *two, strict=True):
                assert sorted(alone) == sorted(chain(*shares))

    def test_equal_lengths_leave_it_to_the_unlabeled_one(self):
        assert two_streams(8, 24, (4, 12)).longer == "unlabeled"
        assert two_streams(9, 24, (4, 12)).longer == "labeled"

    def test_views_come_round(self):
        for epoch in range(3):
            keys = [*two_streams(6, 2, (2, 2), epoch=epoch, num_views=2)]
            assert {view for position, view in keys if position < 6} == {epoch % 2}
            assert {view for position, view in keys if position >= 6} == {0, 1}


class TestDescribe:
    @pytest.mark.parametrize(
        ("sampler", "size", "expected"),
        [
            (plain(37), 9, "4 steps of 9 rows (10 in the last)"),
            (plain(38), 9, "5 steps of 9 rows (2 in the last)"),
            (plain(36), 9, "4 steps of 9 rows"),
            (plain(5), 9, "1 step of 5 rows"),
            (plain(37, 2), 9, "2 steps of 9 rows on each of 2 processes (10 in the last)"),
            (plain(18, views=2), 9, "4 steps of 9 rows, with 2 views of each sample"),
            (
                two_streams(40, 1038, (8, 64)),
                72,
                "17 steps of 8 labeled and 64 unlabeled rows (14 unlabeled in the last); the unlabeled samples decide "
                "its length, the labeled ones come 3.4 times",
            ),
            (
                two_streams(42, 5, (4, 12)),
                16,
                "11 steps of 4 labeled and 12 unlabeled rows (2 labeled in the last); the labeled samples decide "
                "its length, the unlabeled ones come 26.4 times",
            ),
            (
                two_streams(3, 5, (4, 12), 1),
                16,
                "1 step of 4 labeled and 5 unlabeled rows; the unlabeled samples decide its length, the labeled ones "
                "come 1.33 times",
            ),
        ],
    )
    def test_one_line(self, sampler, size, expected):
        assert sampler.describe(len(TrainingBatches(sampler, size)), size) == f"an epoch has {expected}"

    def test_numbers_are_those_of_the_batches(self):
        for labeled, unlabeled, world in product([1, 5, 12], [1, 4, 13], [1, 2, 3]):
            sampler = two_streams(labeled, unlabeled, (2, 3), world)
            made = batches(sampler, 5)
            text = sampler.describe(len(made), 5)
            assert f"has {len(made)} step" in text
            repeated = [key for batch in made for key in batch if (key[0] < labeled) != (sampler.longer == "labeled")]
            size = unlabeled if sampler.longer == "labeled" else labeled
            assert f"{len(repeated) * world / size:.3g} times" in text


@pytest.mark.parametrize("value", [2.5, "4", True, 0, -1])
@pytest.mark.parametrize("name", ["batch_size", "labeled_batch_size", "num_views", "views_per_epoch"])
def test_sizes_that_are_none(name, value):
    sizes = {"batch_size": 8, "labeled_batch_size": 4, "num_views": 2, "views_per_epoch": 1, "num_workers": 0}
    check_sizes(**sizes)
    with pytest.raises(InputError, match=f"^{name} must be .*, got {value!r}"):
        check_sizes(**sizes | {name: value})


class TestEvenClasses:
    LABELS = torch.tensor([0] * 50 + [1] * 7 + [2] * 2)

    def sampler(self, kind, world=1, rank=0, epoch=0, num_views=None, views=1):
        options = {"views_per_epoch": views, "num_views": num_views, "seed": 3, "num_replicas": world, "rank": rank}
        options["even"] = EvenClasses(self.LABELS, 3)
        if kind == "one":
            made = ViewSampler(len(self.LABELS) + 11, **options)
        else:
            unlabeled = 11 if kind == "labeled" else 400
            made = TwoStreamSampler(len(self.LABELS), unlabeled, labeled_batch=4, unlabeled_batch=6, **options)
        made.set_epoch(epoch)
        return made

    @pytest.mark.parametrize(("kind", "world", "views"), product(["one", "labeled", "unlabeled"], [1, 2, 3], [1, 2]))
    def test_each_class_comes_equally_often(self, kind, world, views):
        keys = self.sampler(kind, world, views=views).keys()
        positions = keys[keys[:, 0] < 59, 0]
        counts = torch.bincount(self.LABELS[positions], minlength=3)
        assert counts.max() - counts.min() <= 1
        for number in range(3):  # and within a class each sample
            own = torch.bincount(positions, minlength=59)[number == self.LABELS]
            assert own.max() - own.min() <= 1

    @pytest.mark.parametrize("kind", ["one", "labeled", "unlabeled"])
    def test_the_others_stay_as_they_are(self, kind):
        even = self.sampler(kind).keys()
        plain_one = self.sampler(kind)
        plain_one.even = None
        plain = plain_one.keys()
        assert torch.equal(even[even[:, 0] >= 59], plain[plain[:, 0] >= 59])
        assert torch.equal(even[:, 0] < 59, plain[:, 0] < 59)

    @pytest.mark.parametrize(("kind", "world"), product(["one", "labeled", "unlabeled"], [1, 2, 3]))
    def test_no_view_of_a_sample_comes_twice(self, kind, world):
        keys = torch.cat([self.sampler(kind, world, epoch=epoch).keys() for epoch in range(4)])
        labeled = listed(keys[keys[:, 0] < 59])
        assert len({*labeled}) == len(labeled)
        assert max(view for _, view in listed(self.sampler(kind, num_views=5).keys()) if view) <= 4

    def test_epochs_differ_and_repeat(self):
        first, second = (self.sampler("one", epoch=epoch).keys() for epoch in (0, 1))
        assert torch.equal(first, self.sampler("one").keys())
        assert not torch.equal(first[:, 0], second[:, 0])

    def test_ranks_share_the_epoch(self):
        shares = [listed(self.sampler("unlabeled", 2, rank).share()) for rank in range(2)]
        whole = listed(self.sampler("unlabeled", 2).keys())
        assert [*chain.from_iterable(zip(*shares, strict=True))] == whole

    def test_it_is_said(self):
        assert "labeled samples are drawn evenly by class" in self.sampler("one").describe(10, 7)
