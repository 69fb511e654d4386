"""The training loader: a lone row at an epoch's end, resuming beside it, and the means of its step."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, Digits, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.transforms import strong_digits
from kd_lightning.pseudo_labels.table import PseudoLabels

CLASSES = 3


def samples(count=37, test=10, **kwargs):
    """A datamodule of numbered samples, all labeled and in training."""
    x = torch.randn(count + test, 4, generator=torch.Generator().manual_seed(5))
    parts = [TensorDataset(part, torch.arange(len(part)) % CLASSES) for part in x.split([count, test])]
    return SemiSupervisedDataModule(DatasetSource(*parts), **({"val_size": 0, "batch_size": 9} | kwargs))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


class Seen(Callback):
    """The rows of each training batch, and the index of each sample."""

    def __init__(self):
        self.rows, self.index = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(len(batch))
        self.index.append(batch.index.tolist())


class Stop(Callback):
    """Interrupts a fit after some batches."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            raise KeyboardInterrupt


class Steps:
    """The attributes of a Trainer that a loader reads."""

    accumulate_grad_batches = 3
    num_training_batches = 100
    limit_train_batches = 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lone_row_joins_the_batch_before(workers):
    loader = samples(num_workers=workers).train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found = [*loader]
        assert len(loader) == 4
        assert [*map(len, found)] == [9, 9, 9, 10]
        assert sorted(torch.cat([batch.index for batch in found]).tolist()) == [*range(37)]


@pytest.mark.parametrize(("count", "size", "expected"), [(3, 1, [1, 1, 1]), (1, 9, [1]), (38, 9, [9, 9, 9, 9, 2])])
def test_other_sizes_stay(count, size, expected):
    assert [*map(len, samples(count, batch_size=size).train_dataloader())] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_position(workers):
    """With the batch that the lone row joined still to come, and after it; the next epoch is whole."""

    def loader():
        made = samples(num_workers=workers).train_dataloader()
        made.sampler.set_epoch(1)
        return made

    whole = [*loader()]
    first = loader()
    stream = iter(first)
    for position in range(5):
        state = first.state_dict()
        second = loader()
        second.load_state_dict(state)
        if position:  # before the first batch, the loader does not know the epoch
            assert state == {"epoch": 1, "batches": position}
            again = [*second]
            assert [batch.index.tolist() for batch in again] == [batch.index.tolist() for batch in whole[position:]]
            assert [batch.mean_rows for batch in again] == [batch.mean_rows for batch in whole[position:]]
            assert len(second) == 4
            second.sampler.set_epoch(2)
            assert [*map(len, second)] == [9, 9, 9, 10]
        next(stream, None)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("trainer", [None, Steps()])
def test_means_of_the_step_of_a_lone_row(world, trainer, monkeypatch):
    shares = []
    for rank in range(world):
        data = samples(labeled=4, batch_size=9 if world == 1 else 6)  # 37 rows, or 19 on each process
        monkeypatch.setattr(data, "_world_size_and_rank", lambda rank=rank: (world, rank))
        loader = data.train_dataloader()
        loader.trainer = trainer
        shares.append([*loader])
    sizes = [[*map(len, share)] for share in shares]
    assert sizes == ([[9, 9, 9, 10]] if world == 1 else [[6, 6, 7]] * 2)
    window, last = (1 if trainer is None else 3), len(sizes[0])
    for first in range(0, last, window):
        part = [batch for share in shares for batch in share[first : first + window]]
        for batch in part:
            assert batch.mean_rows == pytest.approx(sum(map(len, part)) / len(part))
            assert batch.mean_labels == pytest.approx(sum(int((b.y != -100).sum()) for b in part) / len(part))


@pytest.mark.parametrize("part", ["test", "predict", "pool"])
def test_evaluation_loaders_stay_as_they_are(part):
    """A network in eval mode takes one row; the order and the sizes of these batches are those of the samples."""
    data = samples(37, test=37, labeled=4)
    found = [*getattr(data, f"{part}_dataloader")()]
    assert [*map(len, found)] == [9, 9, 9, 9, 1]
    if part != "pool":
        assert torch.cat([batch.index for batch in found]).tolist() == [*range(37)]


class TestFit:
    def test_batch_norm_and_a_lone_row(self, quiet_trainer):
        seen = Seen()
        trainer = quiet_trainer(callbacks=[seen], max_epochs=2)
        trainer.fit(SupervisedModule(network()), samples())
        assert seen.rows == [9, 9, 9, 10] * 2
        assert trainer.global_step == 8

    @pytest.mark.parametrize("option", [{"overfit_batches": 1.0}, {"limit_train_batches": 1.0}])
    def test_options_of_the_trainer(self, option, quiet_trainer):
        """Lightning replaces the sampler under ``overfit_batches``."""
        seen = Seen()
        quiet_trainer(callbacks=[seen], **option).fit(SupervisedModule(network()), samples())
        assert seen.rows == [9, 9, 9, 10]

    @pytest.mark.parametrize("limit", [3, 0.75])
    def test_fewer_batches_than_there_are(self, limit, quiet_trainer):
        seen = Seen()
        quiet_trainer(callbacks=[seen], limit_train_batches=limit).fit(SupervisedModule(network()), samples())
        assert seen.rows == [9, 9, 9]

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("stop", [3, 4, 5])
    def test_resume_beside_the_lone_row(self, stop, workers, quiet_trainer, tmp_path):
        """Before the batch that it joined, after it, and in the next epoch: the weights are those of a whole run."""

        def fit(module, *callbacks, **kwargs):
            seen = Seen()
            trainer = quiet_trainer(callbacks=[seen, *callbacks], max_epochs=3)
            data = samples(num_workers=workers)
            trainer.fit(module, data, **kwargs)
            return trainer, seen

        whole = SupervisedModule(network())
        _, expected = fit(whole)
        broken = SupervisedModule(network())
        seen = Seen()
        trainer = quiet_trainer(callbacks=[seen, Stop(stop)], max_epochs=3)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(broken, samples(num_workers=workers))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        resumed = SupervisedModule(network())
        _, rest = fit(resumed, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
        assert seen.index + rest.index == expected.index
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key])

    def test_the_longer_stream_decides(self, quiet_trainer):
        """A pool of 3 and 37 labeled samples were one step an epoch."""
        seen = Seen()
        data = samples(40, labeled=0.91, batch_size=8, labeled_batch_size=4)
        trainer = quiet_trainer(callbacks=[seen])
        trainer.fit(SupervisedModule(network()), data)
        labeled = set(data.split.labeled)
        assert trainer.global_step == -(-len(labeled) // 4)
        assert {index for batch in seen.index for index in batch} == set(range(40))


class TestDescribe:
    def test_of_the_loader(self):
        assert samples().train_dataloader().describe() == "an epoch has 4 steps of 9 rows (10 in the last)"

    @pytest.mark.parametrize(("limit", "taken"), [(1.0, None), (10, None), (3, 3), (1, 1), (0.5, 2)])
    def test_of_a_trainer_with_limits(self, limit, taken, quiet_trainer):
        data = samples()
        data.trainer = trainer = quiet_trainer(limit_train_batches=limit, accumulate_grad_batches=2)
        text = data.train_dataloader().describe()
        assert ("limit_train_batches" in text) == (taken is not None)
        assert taken is None or f"takes {taken} of them" in text
        assert text.endswith("; every 2 are one optimiser step")
        trainer.fit(SupervisedModule(network()), data)
        assert trainer.num_training_batches == (4 if taken is None else taken)


class TestReadTogether:
    """Batches of small images in memory are read several at a time; nobody sees a difference."""

    def loader(self, together, **options):
        data = SemiSupervisedDataModule(Digits(), **{"labeled": 10, "batch_size": 50, "num_views": 2} | options)
        made = data.train_dataloader()
        assert made._training_batches.together > 1
        made._training_batches.together = together
        made.sampler.set_epoch(3)
        return made

    @pytest.mark.parametrize(
        "options", [{}, {"num_workers": 2}, {"labeled_batch_size": 20}, {"strong_transform": strong_digits()}]
    )
    @pytest.mark.parametrize("together", [2, 5, 100])
    def test_the_batches_are_those_read_one_by_one(self, options, together):
        expected, found = ([*self.loader(n, **options)] for n in (1, together))
        assert len(expected) == len(found) > 5
        for one, other in zip(expected, found, strict=True):
            for name, value in vars(one).items():
                there = getattr(other, name)
                assert torch.equal(value, there) if isinstance(value, torch.Tensor) else value == there, name

    @pytest.mark.parametrize("start", [0, 1, 4, 5, 21])
    def test_resume_at_any_batch(self, start):
        expected = [*self.loader(1)]
        loader = self.loader(5)
        loader.load_state_dict({"epoch": 3, "batches": start})
        found = []
        for batch in loader:
            found.append(batch)
            assert loader.state_dict() == {"epoch": 3, "batches": start + len(found)}
        assert [batch.index.tolist() for batch in found] == [batch.index.tolist() for batch in expected[start:]]

    def test_pseudo_labels_that_come_between_batches(self):
        loader = self.loader(100)
        batches = iter(loader)
        first = next(batches)
        hidden = (loader.labels.y == -100).nonzero().flatten()
        yes = torch.ones(len(hidden), dtype=torch.bool)
        loader.labels.set_pseudo_labels(PseudoLabels(hidden, torch.full_like(hidden, 7), yes.float(), yes, yes, 0, 0))
        assert (first.y == -100).any()
        for batch in batches:
            assert not (batch.y == -100).any()
            assert batch.mean_labels == len(batch)
