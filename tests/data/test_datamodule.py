"""SemiSupervisedDataModule: no hidden label in any batch, the right images, one split from start to resume."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, Digits, DistillModule, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.sources import Part
from kd_lightning.data.splits import make_split
from kd_lightning.models import DigitsCNN
from kd_lightning.pseudo_labels import PseudoLabels

TARGETS = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unlabeled": "source"}, "no unlabeled part"),
        ({"unlabeled": "test"}, "no test part"),
        ({"unlabeled": "some"}, "unlabeled must be one of rest, none, source, test, got 'some'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
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


def test_no_test_part():
    with pytest.raises(InputError, match="DatasetSource has no test part"):
        SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(80, 3), TARGETS))).test_dataloader()


def test_no_validation_part():
    assert SemiSupervisedDataModule(Digits(), val=0).val_dataloader() == []


def test_of_many_labels_each_may_be_missing():
    y = torch.randint(2, (20, 3))
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(20, 4), y)), labeled=0.5, val=0)
    labels = data.visible_labels()
    known = data.split.labeled
    assert len(known) == 10
    assert torch.equal(labels[known], y[known].float())
    assert labels[data.split.unlabeled].isnan().all()


class TestSplitFile:
    @pytest.fixture
    def fit(self, quiet_trainer, tmp_path, monkeypatch, student):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

        def run(seed=0, path=None, **kwargs):
            data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled="none", seed=seed)
            trainer = quiet_trainer(limit_val_batches=0, **kwargs)
            trainer.fit(SupervisedModule(student), datamodule=data, ckpt_path=path)
            return data, trainer

        return run

    def test_lies_beside_the_run(self, fit, tmp_path):
        data, _ = fit(enable_checkpointing=True)
        assert json.loads((tmp_path / "split.json").read_text())["hash"] == data.split.hash
        assert [*tmp_path.rglob("split.json")] == [tmp_path / "split.json"]  # none in the current folder
        again = SemiSupervisedDataModule(Digits(), labeled=tmp_path / "split.json", val=7, seed=9)
        again.setup("")
        assert again.split == data.split

    @pytest.mark.parametrize("arguments", [{}, {"enable_checkpointing": True, "fast_dev_run": True}])
    def test_not_where_a_run_leaves_nothing(self, fit, tmp_path, arguments):
        fit(**arguments)
        assert not [*tmp_path.rglob("split.json")]

    def test_resuming_on_another_split_is_refused(self, fit, tmp_path):
        _, trainer = fit()
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        with pytest.raises(InputError, match="the checkpoint was trained on another split; resume with the same"):
            fit(seed=1, path=tmp_path / "c.ckpt", max_epochs=2)
        fit(path=tmp_path / "c.ckpt", max_epochs=2)

    def test_another_split_on_another_rank_is_refused(self, fit, monkeypatch):
        monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.broadcast", lambda *args: "rank 0's")
        with pytest.raises(InputError, match="rank 0 drew another split than rank 0: is its data the same"):
            fit()


class TestPool:
    @pytest.mark.parametrize("unlabeled", ["rest", "none", "source", "test"])
    def test_indices_images_and_hidden_truth(self, unlabeled):
        source = DatasetSource(
            TensorDataset(torch.arange(80.0).unsqueeze(1), TARGETS),
            TensorDataset(torch.arange(200.0, 212.0).unsqueeze(1), torch.arange(12) % 3),
            TensorDataset(torch.arange(300.0, 330.0).unsqueeze(1)),
        )
        data = SemiSupervisedDataModule(source, labeled=2, unlabeled=unlabeled)
        pool = data.unlabeled_indices()
        expected = {"rest": data.split.unlabeled, "none": [], "source": [*range(80, 110)], "test": [*range(80, 92)]}
        assert pool == expected[unlabeled]
        start = {"source": 220, "test": 120}.get(unlabeled, 0)
        assert [data.image(index).item() for index in pool] == [index + start for index in pool]
        truth = data.hidden_truth(torch.tensor([*pool, 0]))
        known = {"rest": lambda: TARGETS[pool].tolist(), "test": lambda: [0, 1, 2] * 4, "source": lambda: [-100] * 30}
        assert truth.tolist() == [*known.get(unlabeled, list)(), 0]
        assert data.path(0) is None

    def test_loader_gives_labeled_and_unlabeled_images_without_augmentation(self):
        data = SemiSupervisedDataModule(Digits(), labeled=3, batch_size=256, strong_transform=torch.nn.Identity())
        batches = list(data.pool_dataloader())
        index = torch.cat([batch.index for batch in batches])
        y = torch.cat([batch.y for batch in batches])
        assert sorted(index.tolist()) == sorted(data.split.labeled + data.split.unlabeled)
        assert sorted(index[y != -100].tolist()) == data.split.labeled
        assert torch.equal(y, data.visible_labels()[index])
        assert all(batch.x_strong is None for batch in batches)
        assert torch.equal(batches[1].x[5], data.image(int(batches[1].index[5])))

    def test_loader_hands_no_pseudo_label_back(self):
        data = SemiSupervisedDataModule(Digits(), labeled=3, batch_size=2000)
        index = torch.tensor(data.unlabeled_indices())
        yes = torch.ones_like(index, dtype=torch.bool)
        data.set_pseudo_labels(PseudoLabels(index, index * 0, index.float(), yes, yes, 0, 0))
        (batch,) = data.pool_dataloader()
        assert int((batch.y != -100).sum()) == 30
        (batch,) = data.train_dataloader()
        assert int((batch.y != -100).sum()) == len(batch)

    @pytest.mark.parametrize("stream", [None, 8])
    @pytest.mark.parametrize("unlabeled", ["rest", "test"])
    def test_no_batch_has_hidden_truth(self, unlabeled, stream):
        data = SemiSupervisedDataModule(
            Digits(), labeled=3, unlabeled=unlabeled, labeled_batch_size=stream, strong_transform=torch.nn.Identity()
        )
        for batch in (*data.train_dataloader(), *data.pool_dataloader()):
            labeled = torch.isin(batch.index, torch.tensor(data.split.labeled))
            assert torch.equal(batch.y != -100, labeled)
            assert torch.equal(batch.y[labeled], data.hidden_truth(batch.index[labeled]))
            assert (batch.kind, batch.soft) == (None, None)

    def test_held_out_labels_join_it(self, tmp_path):
        source = DatasetSource(TensorDataset(torch.rand(80, 3), TARGETS), unlabeled=TensorDataset(torch.rand(30, 3)))
        split = make_split(TARGETS, 4, 0.1, seed=0)
        held = replace(split, labeled=split.labeled[1:], held_out=split.labeled[:1])
        held.save(tmp_path / "split.json")
        for unlabeled, more in (("rest", split.unlabeled), ("none", []), ("source", [*range(80, 110)])):
            data = SemiSupervisedDataModule(source, labeled=tmp_path / "split.json", unlabeled=unlabeled)
            assert data.unlabeled_indices() == sorted([*held.held_out, *more])
            assert data.visible_labels()[held.held_out[0]] == -100
            assert data.hidden_truth(torch.tensor(held.held_out)).tolist() == TARGETS[held.held_out].tolist()

    def test_of_many_labels(self):
        y = torch.randint(2, (20, 3))
        data = SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(20, 4), y)), labeled=0.5, val=0)
        assert torch.equal(data.hidden_truth(torch.arange(20)), y)
        index = torch.tensor(data.unlabeled_indices())
        with pytest.raises(InputError, match="pseudo-labels are for samples of one class each"):
            data.set_pseudo_labels(PseudoLabels(index, index * 0, index.float(), index > 0, index > 0, 0, 0))

    def test_another_fit_starts_without_labels(self, quiet_trainer, student):
        data = SemiSupervisedDataModule(Digits(), labeled=3, batch_size=2000)
        index = torch.tensor(data.unlabeled_indices())
        yes = torch.ones_like(index, dtype=torch.bool)
        data.set_pseudo_labels(PseudoLabels(index, index * 0, index.float(), yes, yes, 0, 0))
        quiet_trainer(limit_val_batches=0).fit(SupervisedModule(student), datamodule=data)
        (batch,) = data.train_dataloader()
        assert int((batch.y != -100).sum()) == 30


class TestChangedPool:
    def fit(self, quiet_trainer, more, path=None, **kwargs):
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        source = DatasetSource(TensorDataset(torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), y))
        source.unlabeled = TensorDataset(more)
        data = SemiSupervisedDataModule(source, **{"val": 0, "unlabeled": "source"} | kwargs)
        trainer = quiet_trainer(max_epochs=1 if path is None else 2)
        trainer.fit(SupervisedModule(torch.nn.Linear(3, 3)), datamodule=data, ckpt_path=path)
        return trainer

    @pytest.mark.parametrize(
        "change",
        [lambda x: x[:-1], lambda x: x.flip(0), lambda x: x + torch.eye(5)[:, :3], lambda x: x[[0] * 5]],
    )
    def test_is_refused(self, quiet_trainer, tmp_path, change):
        more = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
        self.fit(quiet_trainer, more).save_checkpoint(tmp_path / "c.ckpt")
        with pytest.raises(InputError, match="the unlabeled pool has changed since the checkpoint .its hash differs"):
            self.fit(quiet_trainer, change(more), tmp_path / "c.ckpt")
        self.fit(quiet_trainer, more.clone(), tmp_path / "c.ckpt")

    def test_another_pool_of_the_same_split_is_refused(self, quiet_trainer, tmp_path):
        more = torch.rand(5, 3)
        self.fit(quiet_trainer, more, labeled=1).save_checkpoint(tmp_path / "c.ckpt")
        with pytest.raises(InputError, match="the unlabeled pool has changed"):
            self.fit(quiet_trainer, more, tmp_path / "c.ckpt", labeled=1, unlabeled="rest")

    def test_checkpoints_from_before_pools_were_noted_go_on(self, quiet_trainer, tmp_path):
        trainer = self.fit(quiet_trainer, torch.rand(5, 3))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
        del checkpoint["SemiSupervisedDataModule"]["pool"]
        torch.save(checkpoint, tmp_path / "c.ckpt")
        self.fit(quiet_trainer, torch.rand(5, 3), tmp_path / "c.ckpt")


@pytest.mark.parametrize("size", [0, 64, 65, -1])
def test_labeled_batch_that_leaves_no_room(size):
    with pytest.raises(InputError, match=f"labeled_batch_size .* at least 1 and below batch_size, 64, got {size}"):
        SemiSupervisedDataModule(Digits(), labeled_batch_size=size)


@pytest.mark.parametrize("arguments", [{}, {"labeled": 3, "unlabeled": "none"}])
def test_two_streams_of_which_one_is_empty(arguments):
    data = SemiSupervisedDataModule(Digits(), labeled_batch_size=8, **arguments)
    with pytest.raises(InputError, match="batches of labeled and unlabeled images, but none is unlabeled"):
        data.train_dataloader()


def test_two_streams_of_fewer_labels_than_a_batch_has(quiet_trainer, student):
    data = SemiSupervisedDataModule(Digits(), labeled=1, labeled_batch_size=24, batch_size=256, val=0.1)
    pool = data.unlabeled_indices()
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches[:-1]] == [256] * (len(batches) - 1)
    assert sorted(torch.cat([batch.index[24:] for batch in batches]).tolist()) == pool
    for batch in batches:
        assert (batch.y[:24] != -100).all()
        assert batch.mean_labels == 24
        assert torch.bincount(batch.index[:24]).max() == 3  # 10 labeled ones, two times or three
    quiet_trainer(max_epochs=1).fit(SupervisedModule(student), datamodule=data)
