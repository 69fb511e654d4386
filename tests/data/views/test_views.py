"""Views: replay, order by seed, resuming in mid-epoch, labels and step means, and the table of views."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from kd_lightning import Batch, CoarseLabels, Digits, InputError, SemiSupervisedDataModule
from kd_lightning.batch import LabelKind
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.views.dataset import ViewDataset, collate, uses_torch_rng_only
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.samplers import ShareSampler, TwoStreamSampler, ViewSampler
from kd_lightning.data.views.table import ViewTable
from kd_lightning.pseudo_labels.table import PseudoLabels


class Noise(nn.Module):
    """Uses all three generators that transforms may use."""

    def forward(self, x):
        return x + torch.rand(1) + random.random() + np.random.rand()


def pixels(dataset, keys, workers=0, batch=3):
    loader = DataLoader(dataset, batch, sampler=keys, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    found = [(int(i), int(v)) for b in batches for i, v in zip(b.index, b.view, strict=True)]
    return dict(zip(found, torch.cat([b.x for b in batches]), strict=True))


@pytest.fixture
def views():
    return ViewDataset([Digits().load().train.images], torch.arange(50), Noise(), seed=3)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_same_view_same_pixels(views, workers):
    keys = [(i, v) for i in range(8) for v in range(2)]
    expected = pixels(views, keys)
    torch.rand(7), random.random(), np.random.rand()
    again = pixels(views, list(reversed(keys)), workers, batch=5)
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[key], again[key]) for key in keys)


def test_other_views_samples_and_seeds_differ(views):
    noise = [(views[key].x - views.images[0][key[0]][0]).mean().item() for key in [(0, 0), (0, 1), (1, 0)]]
    views.seed = 4
    noise.append((views[0, 0].x - views.images[0][0][0]).mean().item())
    assert len({round(value, 6) for value in noise}) == 4


def test_generators_are_left_alone(views):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    views.__getitems__([(0, 0), (1, 5)])
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_order_of_views_over_epochs():
    sampler = ViewSampler(4, views_per_epoch=2, num_views=3, seed=0, num_replicas=1, rank=0)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert sorted(keys) == sorted((p, v % 3) for p in range(4) for v in (2 * epoch, 2 * epoch + 1))
        seen.append(tuple(p for p, _ in keys))
    assert len(set(seen)) == 3
    sampler.set_epoch(0)
    assert tuple(p for p, _ in sampler) == seen[0]


def test_two_ranks_share_the_batch_of_one():
    def make(world, rank):
        return list(ViewSampler(12, views_per_epoch=1, num_views=None, seed=5, num_replicas=world, rank=rank))

    one, first, second = make(1, 0), make(2, 0), make(2, 1)
    for step in range(3):
        half = slice(2 * step, 2 * step + 2)
        assert sorted(one[4 * step : 4 * step + 4]) == sorted(first[half] + second[half])


@pytest.mark.parametrize(("size", "world"), [(10, 3), (9, 3), (2, 3)])
def test_evaluation_counts_each_sample_once(size, world):
    shares = [list(ShareSampler(size, num_replicas=world, rank=rank)) for rank in range(world)]
    assert all(shares)
    loaders = [
        ViewLoader(
            ViewDataset([[torch.zeros(1)] * size], torch.arange(size), None, 0),
            LabelTable(torch.arange(size)),
            sampler=ShareSampler(size, num_replicas=world, rank=rank),
            batch_size=2,
        )
        for rank in range(world)
    ]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(n for batch in batches for n in batch.index.tolist() if n >= 0) == list(range(size))
    assert sorted(n for batch in batches for n in batch.y.tolist() if n != -100) == list(range(size))
    assert sum(batch.is_padding for batch in batches) == max(world - size, 0)
    assert all(len(batch.labeled) == 0 for batch in batches if batch.is_padding)
    if size >= world:
        assert sorted(p for share in shares for p in share) == list(range(size))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_in_mid_epoch(workers):
    def loader():
        data = SemiSupervisedDataModule(Digits(), labeled=10, num_workers=workers, batch_size=256)
        made = data.train_dataloader()
        made.sampler.set_epoch(2)
        return made

    first = loader()
    stream = iter(first)
    for _ in range(2):
        next(stream)
    state = first.state_dict()
    rest = list(stream)
    second = loader()
    second.load_state_dict(state)
    again = list(second)
    assert len(rest) == len(again) == 3
    for one, other in zip(rest, again, strict=True):
        for name in ("x", "y", "index", "view"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    second.load_state_dict(second.state_dict())  # at the epoch's end: the next one starts at its beginning
    second.sampler.set_epoch(3)
    assert len(list(second)) == 5


class Steps:
    """The attributes of a Trainer that a loader reads."""

    accumulate_grad_batches = 2
    num_training_batches = 5


@pytest.mark.parametrize("trainer", [None, Steps()])
def test_labels_of_an_optimiser_step(trainer):
    data = SemiSupervisedDataModule(Digits(), labeled=10, batch_size=256)
    loader = data.train_dataloader()
    loader.trainer = trainer
    batches = list(loader)
    counts = [int((batch.y != -100).sum()) for batch in batches]
    assert sum(counts) == 100
    windows = [[k] for k in range(5)] if trainer is None else [[0, 1], [2, 3], [4]]
    for window in windows:
        for k in window:
            assert batches[k].mean_labels == sum(counts[j] for j in window) / len(window)


def test_transform_that_returns_no_tensor():
    dataset = ViewDataset([Digits().load().train.images], torch.arange(50), lambda image: image.numpy(), seed=0)
    with pytest.raises(InputError, match="a transform must return a tensor, got ndarray for sample 7"):
        dataset[7]


def test_samples_of_several_shapes():
    one = torch.tensor(0)
    samples = [Batch(torch.zeros(shape), index=one, view=one) for shape in ((1, 8, 8), (1, 8, 9), (1, 8, 8))]
    with pytest.raises(InputError, match=r"one shape.*got \[\(1, 8, 8\), \(1, 8, 9\)\]"):
        collate(samples)


class TestTwoStreams:
    SIZES = [
        # labeled, unlabeled, labeled and unlabeled rows in a batch of all processes together
        (10, 40, 4, 12),  # all fits
        (3, 40, 8, 12),  # a batch has every labeled sample several times
        (10, 41, 4, 12),  # the last batch is short
        (2, 5, 4, 12),  # one batch only, shorter than a batch
        (1, 1, 2, 2),
    ]

    @staticmethod
    def make(sizes, world=1, rank=0, epoch=0, views_per_epoch=1, num_views=None, seed=0):
        labeled, unlabeled, first, rest = sizes
        sampler = TwoStreamSampler(
            labeled,
            unlabeled,
            labeled_batch=first // world,
            unlabeled_batch=rest // world,
            views_per_epoch=views_per_epoch,
            num_views=num_views,
            seed=seed,
            num_replicas=world,
            rank=rank,
        )
        sampler.set_epoch(epoch)
        return sampler

    @staticmethod
    def batches(sampler, size):
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return [keys[n : n + size] for n in range(0, len(keys), size)]

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("views_per_epoch", [1, 2])
    def test_ratio_and_an_epoch_is_one_pass(self, sizes, views_per_epoch):
        labeled, unlabeled, first, rest = sizes
        for epoch in range(3):
            batches = self.batches(self.make(sizes, epoch=epoch, views_per_epoch=views_per_epoch), first + rest)
            assert len(batches) == -(-unlabeled * views_per_epoch // rest)
            seen = []
            for batch in batches:
                assert all(position < labeled for position, _ in batch[:first])
                assert all(position >= labeled for position, _ in batch[first:])
                seen += batch[first:]
            assert [len(batch) for batch in batches[:-1]] == [first + rest] * (len(batches) - 1)
            views = range(epoch * views_per_epoch, (epoch + 1) * views_per_epoch)
            assert sorted(seen) == sorted((labeled + n, v) for n in range(unlabeled) for v in views)

    @pytest.mark.parametrize("sizes", SIZES)
    def test_labeled_samples_come_equally_often(self, sizes):
        """Each pass in a new order and view, across the ends of epochs."""
        labeled, _, first, rest = sizes
        stream = []
        for epoch in range(12):
            for batch in self.batches(self.make(sizes, epoch=epoch), first + rest):
                stream += batch[:first]
        passes = [stream[n : n + labeled] for n in range(0, len(stream), labeled)]
        for number, keys in enumerate(passes[:-1]):
            assert sorted(keys) == [(position, number) for position in range(labeled)]
        if labeled > 5:
            orders = {tuple(position for position, _ in keys) for keys in passes[:-1]}
            assert len(orders) == len(passes) - 1

    @pytest.mark.parametrize("sizes", SIZES)
    def test_processes_share_the_batches_of_one(self, sizes):
        labeled, unlabeled, first, rest = sizes
        for epoch in range(2):
            one = self.batches(self.make(sizes, epoch=epoch), first + rest)
            two = [self.batches(self.make(sizes, 2, rank, epoch), (first + rest) // 2) for rank in range(2)]
            assert len(two[0]) == len(two[1]) == len(one)
            for step, (alone, *shares) in enumerate(zip(one, *two, strict=True)):
                assert len(shares[0]) == len(shares[1])
                both = shares[0] + shares[1]
                if step == len(one) - 1 and unlabeled % 2:  # filled up to equal shares
                    assert set(both) >= set(alone)
                    assert len(both) == len(alone) + 1
                else:
                    assert sorted(both) == sorted(alone)
                for share in shares:
                    assert sum(position < labeled for position, _ in share) == first // 2

    def test_three_processes_and_a_pool_smaller_than_they_are(self):
        sizes = (2, 2, 3, 3)
        shares = [list(self.make(sizes, 3, rank)) for rank in range(3)]
        assert [len(share) for share in shares] == [2, 2, 2]
        assert {position for share in shares for position, _ in share} == {0, 1, 2, 3}

    def test_order_follows_from_seed_and_pass(self):
        def order(**kwargs):
            return list(self.make((10, 40, 4, 12), **kwargs))

        assert order() == order()
        assert order() != order(seed=1)
        assert [p for p, _ in order()] != [p for p, _ in order(epoch=1)]

    def test_views_come_round(self):
        for epoch in range(5):
            keys = list(self.make((3, 6, 6, 6), epoch=epoch, num_views=2))
            assert {view for position, view in keys if position >= 3} == {epoch % 2}
            assert sorted(keys[:6]) == [(position, view) for position in range(3) for view in range(2)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_loader_goes_on_in_mid_epoch(self, workers):
        def loader():
            data = SemiSupervisedDataModule(
                Digits(),
                labeled=2,
                labeled_batch_size=64,  # more than there are
                batch_size=320,
                num_workers=workers,
                strong_transform=Noise(),
            )
            made = data.train_dataloader()
            made.sampler.set_epoch(2)
            return made

        first = loader()
        whole = list(first)
        pool = len(first.dataset) - 20
        assert [len(batch) for batch in whole] == [320] * 4 + [64 + pool - 4 * 256]
        for start in (1, 4, 5):
            stream = iter(first)
            for _ in range(start):
                next(stream)
            state = first.state_dict()
            second = loader()
            second.load_state_dict(state)
            again = list(second)
            assert len(again) == 5 - start
            for one, other in zip(whole[start:], again, strict=True):
                for name in ("x", "y", "index", "view", "x_strong"):
                    assert torch.equal(getattr(one, name), getattr(other, name))
                assert (one.mean_labels, one.mean_rows) == (other.mean_labels, other.mean_rows)


@pytest.mark.parametrize("trainer", [None, Steps()])
@pytest.mark.parametrize("stream", [None, 32])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_means_of_an_optimiser_step(trainer, stream, world, fraction, monkeypatch):
    """Counted over the batches of all processes, with pseudo- and coarse labels, and where the last batch is short."""
    coarse = None if fraction is None else CoarseLabels({"low": [0, 1, 2], "high": [*range(3, 10)]}, fraction)
    loaders = []
    for rank in range(world):
        options = {"batch_size": 256 // world, "labeled_batch_size": stream, "train_transform": nn.Identity()}
        data = SemiSupervisedDataModule(Digits(), labeled=10, coarse=coarse, **options)
        monkeypatch.setattr(data, "_world_size_and_rank", lambda rank=rank: (world, rank))
        index = torch.tensor(data.unlabeled_indices())
        accepted = index % 3 == 0
        data.set_pseudo_labels(PseudoLabels(index, index % 10, index.float(), accepted, accepted, 0, 0))
        loaders.append(data.train_dataloader())
        loaders[-1].trainer = trainer
    shares = [list(loader) for loader in loaders]
    steps = len(shares[0])
    assert [len(share) for share in shares] == [steps] * world
    window = 1 if trainer is None else 2
    last = steps if trainer is None else min(steps, trainer.num_training_batches)
    for first in range(0, last, window):
        part = [batch for share in shares for batch in share[first : min(first + window, last)]]
        labels = sum(int((batch.y != -100).sum()) for batch in part)
        pseudo = sum(int((batch.kind == LabelKind.PSEUDO).sum()) for batch in part)
        groups = 0 if coarse is None else sum(int(batch.candidates.any(dim=1).sum()) for batch in part)
        assert (groups > 0) == (coarse is not None)
        for batch in part:
            assert batch.mean_labels == pytest.approx((labels + groups) / len(part))
            assert batch.mean_coarse == pytest.approx(groups / len(part))
            assert batch.mean_pseudo == pytest.approx(pseudo / len(part))
            assert batch.mean_rows == pytest.approx(sum(map(len, part)) / len(part))


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_a_later_epoch_are_the_new_ones(workers):
    data = SemiSupervisedDataModule(Digits(), labeled=10, batch_size=256, num_workers=workers)
    loader = data.train_dataloader()
    assert all(batch.kind is None for batch in loader)
    index = torch.tensor(data.unlabeled_indices())
    for label in (3, 4):
        yes = torch.ones_like(index, dtype=torch.bool)
        data.set_pseudo_labels(PseudoLabels(index, torch.full_like(index, label), index.float(), yes, ~yes, 0, 0))
        for batch in loader:
            pseudo = batch.kind == LabelKind.PSEUDO
            assert torch.equal(pseudo, torch.isin(batch.index, index))
            assert (batch.y[pseudo] == label).all()
    stream = iter(loader)  # also within an epoch, with batches that workers have loaded ahead
    next(stream)
    data.set_pseudo_labels(PseudoLabels(index, index * 0, index.float(), yes, ~yes, 0, 0))
    batch = next(stream)
    assert (batch.y[batch.kind == LabelKind.PSEUDO] == 0).all()


class TestStrongView:
    @pytest.fixture
    def two(self):
        return ViewDataset([Digits().load().train.images], torch.arange(50), Noise(), 3, strong_transform=Noise())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_is_replayable(self, two, workers):
        keys = [(i, v) for i in range(8) for v in range(2)]
        (expected,) = DataLoader(two, 16, sampler=keys, collate_fn=collate)
        loader = DataLoader(two, 5, sampler=keys[::-1], num_workers=workers, collate_fn=collate)
        again = torch.cat([batch.x_strong for batch in loader]).flip(0)
        assert torch.equal(expected.x_strong, again)

    def test_differs_from_the_weak_one_and_between_views(self, two):
        noise = [(two[i, v].x_strong - two.images[0][i][0]).mean().item() for i in range(3) for v in range(3)]
        noise += [(two[i, v].x - two.images[0][i][0]).mean().item() for i in range(3) for v in range(3)]
        assert len({round(value, 6) for value in noise}) == 18

    def test_leaves_the_weak_one_and_generators_alone(self, two, views):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        assert torch.equal(two[5, 1].x, views[5, 1].x)
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected

    @pytest.mark.parametrize("workers", [0, 1])
    def test_of_another_shape(self, workers):
        data = SemiSupervisedDataModule(Digits(), strong_transform=nn.Flatten(0), num_workers=workers)
        message = r"strong_transform must return the shape that train_transform returns, got \[64\] and \[1, 8, 8\]$"
        with pytest.raises(InputError, match=message) as error:
            next(iter(data.train_dataloader()))
        assert "\n" not in str(error.value)


class Own(nn.Module):
    def forward(self, x):
        return x + random.random() + np.random.rand()


class Subclass(v2.RandomCrop):
    pass


@pytest.mark.parametrize(
    "transform",
    [
        None,
        nn.Identity(),
        v2.Compose([v2.RandomCrop(32, padding=4), v2.ToDtype(torch.float32, scale=True)]),
        v2.RandomApply([v2.ColorJitter(0.1)]),
        v2.RandAugment(),
    ],
)
def test_known_transforms_use_torch_rng_only(transform):
    """The state of the other generators stays the same."""
    assert uses_torch_rng_only(transform)
    if transform is not None:
        before = random.getstate(), np.random.get_state()[1].tolist()
        for _ in range(20):
            transform(torch.rand(3, 40, 40))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize(
    "transform",
    [
        Own(),
        Subclass(3),
        abs,
        v2.Lambda(abs),
        v2.Compose([v2.RandomHorizontalFlip(), v2.Compose([Own()])]),
        v2.Compose([abs]),
        v2.RandomApply([Own()]),
        nn.Sequential(nn.ReLU(), Own()),
    ],
)
def test_others_may_use_any_generator(transform):
    assert not uses_torch_rng_only(transform)


@pytest.mark.parametrize("strong", [None, Own()])
def test_every_generator_is_replayed_if_one_of_two_transforms_may_use_it(strong):
    data = ViewDataset(
        [Digits().load().train.images], torch.arange(50), v2.Compose([Own()]), 3, strong_transform=strong
    )
    first = data[4, 1]
    random.seed(9)
    np.random.seed(9)
    second = data[4, 1]
    assert torch.equal(first.x, second.x)
    assert random.random() == random.Random(9).random()  # restored
    mixed = ViewDataset([Digits().load().train.images], torch.arange(50), v2.RandomCrop(8), 3, strong_transform=Own())
    assert torch.equal(mixed[4, 1].x_strong, mixed[4, 1].x_strong)


class TestViewTable:
    @pytest.fixture
    def table(self):
        indices = torch.tensor([7, 3, 11, 5])
        return ViewTable(ViewDataset([Digits().load().train.images], indices, Noise(), seed=3), num_views=3)

    def test_every_row_is_found_again(self, table):
        rows = [11, 0, 5, 5, 7]
        (batch,) = table.read([rows])
        assert batch.index.tolist() == [11, 3, 5, 5, 7]  # by index: 3, 5, 7, 11
        assert batch.view.tolist() == [2, 0, 2, 2, 1]
        assert table.outputs.rows(batch).tolist() == rows
        assert len(table) == 12

    def test_rows_do_not_depend_on_the_order_of_the_samples(self, table):
        other = ViewTable(ViewDataset(table.dataset.images, torch.tensor([3, 5, 7, 11]), table.dataset.transform, 3), 3)
        (one,), (two,) = table.read([range(12)]), other.read([range(12)])
        assert torch.equal(one.x, two.x)
        assert table.parts() == other.parts()

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_loader_leaves_the_generator_alone(self, table, workers):
        table.num_workers = workers
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        assert sum(len(batch) for batch in table.read([[0, 1], [2]])) == 3
        assert torch.equal(torch.rand(1), expected)

    def test_endless_views_are_no_table(self):
        data = SemiSupervisedDataModule(Digits())
        assert data.train_views() is None
        assert len(data.pool_views()) == 1078
