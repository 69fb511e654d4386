"""SemiSupervisedDataModule: no hidden label in any batch, the right images, one split from start to resume."""

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, Digits, DistillModule, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.data.sources import Part
from kd_lightning.models import DigitsCNN

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
