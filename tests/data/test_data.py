"""What the data promise: replayable views, honest splits, and no hidden label in any batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import DatasetSource, Digits, DistillModule, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.sources import Part
from kd_lightning.data.splits import Split, make_split
from kd_lightning.data.views import ShareSampler, ViewDataset, ViewSampler, collate
from kd_lightning.models import DigitsCNN


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


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("unlabeled", ["rest", "test"])
def test_hidden_labels_change_nothing(quiet_trainer, taught, unlabeled):
    def train(permute):
        data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled=unlabeled, batch_size=256)
        data.setup("")
        if permute:
            parts = data._parts
            hidden = torch.tensor(data.split.unlabeled)
            targets = parts.train.targets.clone()
            targets[hidden] = targets[hidden.roll(1)]
            assert not torch.equal(targets, parts.train.targets)
            test = Part(parts.test.images, parts.test.targets.roll(1))
            data._parts = parts._replace(train=Part(parts.train.images, targets), test=test)
        torch.manual_seed(0)
        student = DigitsCNN(4)
        module = DistillModule(student, DigitsCNN(8)) if taught else SupervisedModule(student)
        quiet_trainer(max_epochs=2).fit(module, datamodule=data)
        return torch.cat([tensor.flatten().float() for tensor in student.state_dict().values()])

    assert torch.equal(train(permute=False), train(permute=True))


def test_visible_labels_change_something(quiet_trainer):
    """The test above can fail."""
    data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled="none")
    data.setup("")
    labels = data.visible_labels()
    known = (labels != -100).nonzero().flatten()
    assert known.tolist() == data.split.labeled
    assert len(known) == 30


def test_transductive_figures_say_so(quiet_trainer, student):
    data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled="test", batch_size=256)
    trainer = quiet_trainer()
    trainer.fit(SupervisedModule(student), datamodule=data)
    names = set(trainer.test(trainer.lightning_module, datamodule=data, verbose=False)[0])
    assert "transductive/test/accuracy" in names
    assert not any(name.startswith("test/") for name in names)


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
        (10, 0.1, "labeled: 10 per class asked, but class 'c' has 9 to give"),
        (2, 11, "val: 11 per class asked, but class 'c' has 10 to give"),
        (2, 10, "val: 10 leaves class 'c' no training sample of its 10"),
        (0.0, 0.1, "labeled: a fraction"),
        (1.5, 0.1, "labeled: a fraction"),
        (2, -0.1, "val: a fraction"),
    ],
)
def test_split_that_cannot_be(labeled, val, message):
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
    with pytest.raises(InputError, match="no split file"):
        Split.load(path, TARGETS)
    assert replace(split, seed=2).hash != split.hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unlabeled": "source"}, "no unlabeled part"),
        ({"unlabeled": "test"}, "no test part"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"views": 0}, "views must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_datamodule_that_cannot_be(arguments, message):
    source = DatasetSource(TensorDataset(torch.rand(80, 3), TARGETS))
    with pytest.raises(InputError, match=message):
        SemiSupervisedDataModule(source, **arguments).setup("")


def test_unlabeled_part_of_the_source():
    source = DatasetSource(TensorDataset(torch.rand(80, 3), TARGETS), unlabeled=TensorDataset(torch.rand(30, 3) + 5))
    loader = SemiSupervisedDataModule(source, labeled=2, unlabeled="source", batch_size=99).train_dataloader()
    (batch,) = list(loader)
    assert len(batch) == 6 + 30
    assert torch.equal(batch.x.mean(dim=1) > 3, batch.y == -100)
