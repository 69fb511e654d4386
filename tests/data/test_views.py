"""Views are replayable, their order follows from the seed, and the loader resumes and knows its labels."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, Digits, InputError, SemiSupervisedDataModule
from kd_lightning.data.views import ShareSampler, ViewDataset, ViewSampler, collate


class Noise(nn.Module):
    """Draws from all three generators that transforms use."""

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
    sampler = ViewSampler(4, copies=2, views=3, seed=0, num_replicas=1, rank=0)
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
        return list(ViewSampler(12, copies=1, views=None, seed=5, num_replicas=world, rank=rank))

    one, first, second = make(1, 0), make(2, 0), make(2, 1)
    for step in range(3):
        half = slice(2 * step, 2 * step + 2)
        assert sorted(one[4 * step : 4 * step + 4]) == sorted(first[half] + second[half])


@pytest.mark.parametrize(("size", "world"), [(10, 3), (9, 3), (2, 3)])
def test_evaluation_counts_each_sample_once(size, world):
    shares = [list(ShareSampler(size, num_replicas=world, rank=rank)) for rank in range(world)]
    assert all(shares)
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
    """What a loader asks of a Trainer."""

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


def test_transform_that_gives_no_tensor():
    dataset = ViewDataset([Digits().load().train.images], torch.arange(50), lambda image: image.numpy(), seed=0)
    with pytest.raises(InputError, match="a transform must give a tensor, got ndarray for sample 7"):
        dataset[7]


def test_samples_of_several_shapes():
    one = torch.tensor(0)
    samples = [Batch(torch.zeros(shape), index=one, view=one) for shape in ((1, 8, 8), (1, 8, 9), (1, 8, 8))]
    with pytest.raises(InputError, match=r"one shape after their transform, got \[\(1, 8, 8\), \(1, 8, 9\)\]"):
        collate(samples)
