"""SemiSupervisedDataModule: no hidden label in any batch, the right images, one split from start to resume."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import (
    CoarseLabels,
    DatasetSource,
    Digits,
    DistillModule,
    InputError,
    PairNoise,
    SemiSupervisedDataModule,
    SupervisedModule,
    SymmetricNoise,
    Teacher,
)
from kd_lightning.batch import LabelKind
from kd_lightning.cli.main import DistillCLI
from kd_lightning.data.sources.source import Part
from kd_lightning.data.splits import Split, make_split
from kd_lightning.models import DigitsCNN
from kd_lightning.pseudo_labels.table import PseudoLabels

TARGETS = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
COARSE = CoarseLabels({"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]})


@pytest.mark.parametrize(
    ("taught", "unlabeled", "weak"),
    [
        (True, "rest", {}),
        (False, "rest", {}),
        (True, "test", {}),
        (False, "test", {}),
        (False, "rest", {"label_noise": SymmetricNoise(0.4)}),
        (False, "rest", {"coarse": COARSE}),
        (True, "none", {"coarse": COARSE, "label_noise": PairNoise(0.4)}),
    ],
)
def test_hidden_labels_change_nothing(quiet_trainer, taught, unlabeled, weak):
    """Those of one superclass among themselves, where that is known."""

    def train(permute):
        data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled=unlabeled, batch_size=256, **weak)
        data.setup("")
        if permute:
            parts = data._parts
            targets = parts.train.targets.clone()
            members = data.coarse.members(10, None) if data.coarse else torch.ones(1, 10, dtype=torch.bool)
            for group in members:
                hidden = torch.tensor([n for n in data.split.unlabeled if group[targets[n]]])
                targets[hidden] = targets[hidden.roll(1)]
            assert not torch.equal(targets, parts.train.targets)
            test = Part(parts.test.images, parts.test.targets.roll(1))
            data._parts = parts._replace(train=Part(parts.train.images, targets), test=test)
        torch.manual_seed(0)
        student = DigitsCNN(4)
        module = DistillModule(student, DigitsCNN(8)) if taught else SupervisedModule(student)
        quiet_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
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
        ({"views_per_epoch": 0}, "views_per_epoch must be at least 1"),
        ({"num_views": 0}, "num_views must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_invalid_arguments(arguments, message):
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
    assert SemiSupervisedDataModule(Digits(), val_size=0).val_dataloader() == []


def test_of_many_labels_each_may_be_missing():
    y = torch.randint(2, (20, 3))
    data = SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(20, 4), y)), labeled=0.5, val_size=0)
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

        def run(seed=0, path=None, labeled=3, **kwargs):
            data = SemiSupervisedDataModule(Digits(), labeled=labeled, unlabeled="none", seed=seed)
            trainer = quiet_trainer(limit_val_batches=0, **kwargs)
            trainer.fit(SupervisedModule(student), datamodule=data, ckpt_path=path)
            return data, trainer

        return run

    def test_lies_beside_the_run(self, fit, tmp_path):
        data, _ = fit(enable_checkpointing=True)
        saved = json.loads((tmp_path / "split.json").read_text())
        assert {name: saved[name] for name in ("labeled", "unlabeled", "val")} == {
            name: getattr(data.split, name) for name in ("labeled", "unlabeled", "val")
        }
        assert [*tmp_path.rglob("split.json")] == [tmp_path / "split.json"]  # none in the current folder
        again = SemiSupervisedDataModule(Digits(), labeled=tmp_path / "split.json", val_size=7, seed=9)
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
            fit(labeled=4, path=tmp_path / "c.ckpt", max_epochs=2)
        with pytest.raises(InputError, match="^seed: the checkpoint was trained with 0, got 1; resume with the same"):
            fit(seed=1, path=tmp_path / "c.ckpt", max_epochs=2)
        fit(path=tmp_path / "c.ckpt", max_epochs=2)

    def test_another_split_on_another_rank_is_refused(self, fit, monkeypatch):
        monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.broadcast", lambda *args: "rank 0's")
        with pytest.raises(
            InputError, match="rank 0 has other samples or another split than rank 0; all ranks must read the same data"
        ):
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

    def test_loader_has_no_pseudo_labels(self):
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
        data = SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.rand(20, 4), y)), labeled=0.5, val_size=0)
        assert torch.equal(data.hidden_truth(torch.arange(20)), y)
        index = torch.tensor(data.unlabeled_indices())
        with pytest.raises(InputError, match="pseudo-labels must fit the labels .* which are several for each"):
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
        data = SemiSupervisedDataModule(source, **{"val_size": 0, "unlabeled": "source"} | kwargs)
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
        with pytest.raises(InputError, match="the images or the unlabeled pool have changed since the checkpoint"):
            self.fit(quiet_trainer, change(more), tmp_path / "c.ckpt")
        self.fit(quiet_trainer, more.clone(), tmp_path / "c.ckpt")

    def test_another_pool_of_the_same_split_is_refused(self, quiet_trainer, tmp_path):
        more = torch.rand(5, 3)
        self.fit(quiet_trainer, more, labeled=1).save_checkpoint(tmp_path / "c.ckpt")
        with pytest.raises(InputError, match="the unlabeled pool have changed"):
            self.fit(quiet_trainer, more, tmp_path / "c.ckpt", labeled=1, unlabeled="rest")

    def test_checkpoints_without_the_pool_are_accepted(self, quiet_trainer, tmp_path):
        trainer = self.fit(quiet_trainer, torch.rand(5, 3))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
        del checkpoint["SemiSupervisedDataModule"]["samples"]
        torch.save(checkpoint, tmp_path / "c.ckpt")
        self.fit(quiet_trainer, torch.rand(5, 3), tmp_path / "c.ckpt")


@pytest.mark.parametrize("size", [0, 64, 65, -1])
def test_labeled_batch_size_out_of_range(size):
    with pytest.raises(InputError, match=f"labeled_batch_size .* at least 1 and below batch_size, 64, got {size}"):
        SemiSupervisedDataModule(Digits(), labeled_batch_size=size)


@pytest.mark.parametrize("arguments", [{}, {"labeled": 3, "unlabeled": "none"}])
def test_two_streams_need_both_kinds(arguments):
    data = SemiSupervisedDataModule(Digits(), labeled_batch_size=8, **arguments)
    with pytest.raises(
        InputError, match="labeled_batch_size needs labeled and unlabeled images, got no unlabeled ones"
    ):
        data.train_dataloader()


def test_two_streams_of_fewer_labels_than_a_batch_has(quiet_trainer, student):
    data = SemiSupervisedDataModule(Digits(), labeled=1, labeled_batch_size=24, batch_size=256, val_size=0.1)
    pool = data.unlabeled_indices()
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches[:-1]] == [256] * (len(batches) - 1)
    assert sorted(torch.cat([batch.index[24:] for batch in batches]).tolist()) == pool
    for batch in batches:
        assert (batch.y[:24] != -100).all()
        assert batch.mean_labels == 24
        assert torch.bincount(batch.index[:24]).max() == 3  # 10 labeled ones, two times or three
    quiet_trainer(max_epochs=1).fit(SupervisedModule(student), datamodule=data)


class TestWeakLabels:
    @staticmethod
    def everything(loader):
        """By index: y, kind and candidates of all batches."""
        batches = list(loader)
        index = torch.cat([batch.index for batch in batches])
        assert len(index.unique()) == len(index)
        columns = {}
        for name in ("y", "kind", "candidates"):
            parts = [getattr(batch, name) for batch in batches]
            columns[name] = None if parts[0] is None else torch.cat(parts)[index.argsort()]
        return index.sort().values, columns

    @pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"batch_size": 200}])
    def test_noise_is_in_batches_and_the_truth_is_not(self, arguments):
        arguments["train_transform"] = torch.nn.Identity()
        data = SemiSupervisedDataModule(Digits(), labeled=20, label_noise=SymmetricNoise(0.5), seed=3, **arguments)
        index, found = self.everything(data.train_dataloader())
        labeled = torch.tensor(data.split.labeled)
        known = torch.isin(index, labeled)
        truth = data.hidden_truth(index)
        noisy = SymmetricNoise(0.5).sample(data._parts.train.targets, 10, 3)[index]
        assert torch.equal(found["y"], torch.where(known, noisy, -100))
        assert torch.equal(found["kind"], torch.where(known, LabelKind.NOISY, LabelKind.MISSING).to(torch.int8))
        assert 70 < (found["y"] != truth)[known].sum() < 130  # of 200
        assert torch.equal(data.visible_labels()[labeled], found["y"][known])
        assert torch.equal(truth, Digits().load().train.targets[index])

    def test_evaluation_has_the_labels_of_the_source(self):
        data = SemiSupervisedDataModule(Digits(), labeled=5, label_noise=PairNoise(1.0), coarse=COARSE)
        parts = Digits().load()
        for loader, part in ((data.val_dataloader(), parts.train), (data.test_dataloader(), parts.test)):
            for batch in loader:
                assert torch.equal(batch.y, part.targets[batch.index])
                assert (batch.kind, batch.weight, batch.candidates) == (None, None, None)

    @pytest.mark.parametrize("unlabeled", ["rest", "none"])
    @pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
    def test_coarse_labels(self, unlabeled, fraction):
        coarse = CoarseLabels(COARSE.groups, fraction)
        plain = {"train_transform": torch.nn.Identity()}
        data = SemiSupervisedDataModule(Digits(), labeled=5, unlabeled=unlabeled, coarse=coarse, **plain)
        index, found = self.everything(data.train_dataloader())
        is_coarse = found["kind"] == LabelKind.COARSE
        assert is_coarse.sum() == pytest.approx(fraction * len(data.split.unlabeled), rel=0.1)
        assert len(index) == 50 + (is_coarse.sum() if unlabeled == "none" else len(data.split.unlabeled))
        assert torch.equal(found["y"] != -100, torch.isin(index, torch.tensor(data.split.labeled)))
        parity = data.hidden_truth(index) % 2
        expected = (torch.arange(10) % 2 == parity.unsqueeze(1)) & is_coarse.unsqueeze(1)
        assert torch.equal(found["candidates"], expected)
        pool, seen = self.everything(data.pool_dataloader())
        assert pool.tolist() == sorted(data.split.labeled + data.unlabeled_indices())
        both = torch.isin(index, pool)
        assert torch.equal(found["candidates"][both], seen["candidates"])

    def test_labels_of_a_source_that_may_be_wrong(self, tmp_path):
        """Their kind is noisy, except labels of a label file and pseudo-labels."""
        data = SemiSupervisedDataModule(Digits(), labeled=5, noisy=True)
        _, found = self.everything(data.train_dataloader())
        assert torch.equal(found["kind"] == LabelKind.NOISY, found["y"] != -100)
        assert torch.equal(found["kind"] == LabelKind.MISSING, found["y"] == -100)
        first = data.split.labeled[0]
        (tmp_path / "labels.csv").write_text(f"index,label\n{first},3\n")
        data = SemiSupervisedDataModule(Digits(), labeled=5, noisy=True, label_file=tmp_path / "labels.csv")
        index, found = self.everything(data.train_dataloader())
        assert torch.equal(found["kind"] == LabelKind.CLEAN, index == first)
        pool = torch.tensor(data.unlabeled_indices())
        labels = torch.zeros(len(pool), dtype=torch.long)
        some = torch.arange(len(pool)) < 7
        data.set_pseudo_labels(PseudoLabels(pool, labels, torch.ones(len(pool)), some, some, 0, 0))
        index, found = self.everything(data.train_dataloader())
        assert found["kind"].bincount(minlength=5).tolist() == [1, len(pool) - 7, 7, 0, 49]

    def test_coarse_labels_for_samples_that_have_fine_ones(self):
        with pytest.raises(InputError, match="coarse: every image has a fine label, since labeled is not set"):
            SemiSupervisedDataModule(Digits(), coarse=COARSE)
        SemiSupervisedDataModule(Digits(), coarse=CoarseLabels(COARSE.groups, 0.0))

    def test_coarse_labels_alone(self, quiet_trainer, student):
        data = SemiSupervisedDataModule(Digits(), labeled=0, unlabeled="none", coarse=COARSE, batch_size=512)
        quiet_trainer(limit_val_batches=0).fit(SupervisedModule(student), datamodule=data)
        assert all((batch.y == -100).all() and batch.candidates.any(dim=1).all() for batch in data.train_dataloader())

    def test_two_ranks_have_the_labels_of_one(self, monkeypatch):
        def run(world):
            shares = []
            for rank in range(world):
                weak = {"coarse": CoarseLabels(COARSE.groups, 0.5), "label_noise": SymmetricNoise(0.5)}
                data = SemiSupervisedDataModule(Digits(), labeled=5, train_transform=torch.nn.Identity(), **weak)
                monkeypatch.setattr(data, "_world_size_and_rank", lambda rank=rank: (world, rank))
                shares += list(data.train_dataloader())
            index = torch.cat([batch.index for batch in shares])
            order = index.argsort()
            order = order[torch.cat([torch.tensor([True]), index[order].diff() > 0])]  # without the padding of a rank
            return [torch.cat([getattr(b, name) for b in shares])[order] for name in ("y", "kind", "candidates")]

        for one, two in zip(run(1), run(2), strict=True):
            assert torch.equal(one, two)

    def test_resuming_with_other_labels_is_refused(self, quiet_trainer, student, tmp_path):
        def fit(path=None, **weak):
            data = SemiSupervisedDataModule(Digits(), labeled=3, unlabeled="none", **weak)
            trainer = quiet_trainer(limit_val_batches=0, max_epochs=1 if path is None else 2)
            trainer.fit(SupervisedModule(student), datamodule=data, ckpt_path=path)
            return trainer

        path, noise = tmp_path / "c.ckpt", SymmetricNoise(0.4)
        fit(label_noise=noise).save_checkpoint(path)
        for weak in ({}, {"label_noise": PairNoise(0.4)}, {"label_noise": noise, "coarse": COARSE}):
            with pytest.raises(
                InputError, match="was trained on other labels .* same label_noise and coarse, or start"
            ):
                fit(path, **weak)
        fit(path, label_noise=SymmetricNoise(0.4))
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["SemiSupervisedDataModule"]["labels"]  # as in older checkpoints
        torch.save(checkpoint, path)
        fit(path, label_noise=PairNoise(0.4))


class TestLabelFile:
    """80 training images, of which 2 per class are labeled, and 30 of an unlabeled part."""

    COARSE = CoarseLabels({"low": [0, 1], "high": [2]}, fraction=0)

    @pytest.fixture
    def make(self, tmp_path):
        x = torch.arange(110.0).unsqueeze(1)

        def run(rows=None, name="labels.csv", more=x[80:], **kwargs):
            source = DatasetSource(TensorDataset(x[:80], TARGETS), TensorDataset(x[:12], TARGETS[:12]))
            source.unlabeled = None if more is None else TensorDataset(more)
            if rows is not None:
                kwargs["label_file"] = tmp_path / name
                text = [",".join(map(str, row)) for row in (("index", "label", "kind", "weight"), *rows)]
                kwargs["label_file"].write_text("\n".join(text))
            data = SemiSupervisedDataModule(source, **{"labeled": 2, "val_size": 2, "batch_size": 16} | kwargs)
            data.setup("")
            return data

        return run

    @staticmethod
    def free(make, count):
        """Unlabeled training images."""
        return make().split.unlabeled[:count]

    @pytest.mark.parametrize("unlabeled", ["rest", "none", "source"])
    @pytest.mark.parametrize("stream", [None, 4])
    def test_label_rows_of_all_kinds_in_every_mode(self, make, unlabeled, stream):
        first, second, third = self.free(make, 3)
        old = make().split.labeled
        rows = [
            (first, 2, "clean", 0.5),
            (second, "low", "coarse", ""),
            (old[0], 1, "noisy", ""),
            (old[1], "", "missing", ""),
        ]
        rows += [(90, 1, "", ""), (91, "high", "coarse", 2), (92, "", "missing", "")]
        stream = None if unlabeled == "none" and stream else stream
        data = make(rows, unlabeled=unlabeled, coarse=self.COARSE, labeled_batch_size=stream)
        labeled = sorted({*old, first, 90} - {old[1]})
        assert data.split.labeled == labeled
        rest = [n for n in range(80) if n not in {*labeled, *data.split.val}]
        pool = {"rest": rest, "none": [], "source": [n for n in range(80, 110) if n != 90]}[unlabeled]
        assert data.unlabeled_indices() == pool
        trained = sorted({*labeled, *pool, second, 91})
        batches = list(data.train_dataloader())
        rows = {int(i): n for n, i in enumerate(torch.cat([batch.index for batch in batches]))}
        assert sorted(rows) == trained
        x, y, kind, weight, candidates = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("x", "y", "kind", "weight", "candidates")
        )
        for index, row in rows.items():
            assert x[row].item() == index
        expected_rows = {
            first: (2, LabelKind.CLEAN, 0.5),
            second: (-100, LabelKind.COARSE, 1),
            old[0]: (1, LabelKind.NOISY, 1),
        }
        expected_rows |= {
            90: (1, LabelKind.CLEAN, 1),
            91: (-100, LabelKind.COARSE, 2),
            old[2]: (int(TARGETS[old[2]]), LabelKind.CLEAN, 1),
        }
        expected_rows |= {n: (-100, LabelKind.MISSING, 1) for n in (old[1], third, 92) if n in pool}
        for index, expected in expected_rows.items():
            assert (y[rows[index]].item(), kind[rows[index]].item(), weight[rows[index]].item()) == expected
        assert candidates[rows[second]].tolist() == [True, True, False]
        assert candidates[rows[91]].tolist() == [False, False, True]
        assert candidates.sum() == 2 * (list(kind).count(LabelKind.COARSE) - 1) + 1 or stream  # rows may come twice
        assert data.hidden_truth(torch.tensor([old[0], 90])).tolist() == [TARGETS[old[0]], -100]
        seen = {
            int(i): int(label)
            for batch in data.pool_dataloader()
            for i, label in zip(batch.index, batch.y, strict=True)
        }
        assert sorted(seen) == sorted([*labeled, *pool])
        assert (seen[90], seen[first], seen[old[0]]) == (1, 2, 1)

    @pytest.mark.parametrize("unlabeled", ["rest", "source"])
    def test_pseudo_labels_beside_label_rows(self, make, unlabeled):
        (first,) = self.free(make, 1)
        data = make([(90, 1, "", ""), (first, "low", "coarse", "")], unlabeled=unlabeled, coarse=self.COARSE)
        index = torch.tensor(data.unlabeled_indices())
        yes = torch.ones_like(index, dtype=torch.bool)
        data.set_pseudo_labels(PseudoLabels(index, index * 0, index.float(), yes, yes, 0, 0))
        for batch in data.train_dataloader():
            pseudo = batch.kind == LabelKind.PSEUDO
            assert torch.equal(pseudo, torch.isin(batch.index, index))
            assert (batch.y[pseudo] == 0).all()
            assert (batch.y[batch.index == 90] == 1).all()
        with pytest.raises(InputError, match="sample 90 has a label already"):
            data.set_pseudo_labels(PseudoLabels(torch.tensor([90]), yes[:1] * 1, yes[:1] * 1.0, yes[:1], yes[:1], 0, 0))

    def test_rounds(self, make, tmp_path):
        """Each run starts from the split file of the last and adds a label file; no label is lost."""
        first, second = self.free(make, 2)
        one = make([(first, 2, "", ""), (90, 1, "", "")])
        one.save_split(tmp_path / "split.json")
        two = make([(second, 0, "", 0.5), (90, "", "missing", "")], "more.csv", labeled=tmp_path / "split.json")
        assert two.split.labeled == sorted({*one.split.labeled, second} - {90})
        assert 90 not in two.unlabeled_indices()  # the pool is the rest of the training part
        assert two.split.label_rows == [[first, 2, "clean", 1.0], [second, 0, "clean", 0.5], [90, -1, "missing", 1.0]]
        assert two.split.val == make().split.val
        two.save_split(tmp_path / "split.json")
        three = make(labeled=tmp_path / "split.json", unlabeled="source")
        assert three.split == two.split
        assert torch.equal(three.visible_labels(), two.visible_labels())
        assert 90 in three.unlabeled_indices()

    def test_superclasses_go_by_name(self, make, tmp_path):
        (first,) = self.free(make, 1)
        make([(first, "low", "coarse", "")], coarse=self.COARSE).save_split(tmp_path / "split.json")
        other = CoarseLabels({"high": [2], "low": [1, 0]}, fraction=0)
        for coarse in (self.COARSE, other):
            data = make(labeled=tmp_path / "split.json", unlabeled="none", coarse=coarse)
            (batch,) = data.train_dataloader()
            assert batch.candidates[batch.index == first].tolist() == [[True, True, False]]
        with pytest.raises(
            InputError, match="coarse must name the superclasses of the label file, but does not name 'low'"
        ):
            make(labeled=tmp_path / "split.json")
        with pytest.raises(InputError, match="line 2: 'low' is no superclass; there are none: data.coarse names them"):
            make([(first, "low", "coarse", "")])

    @pytest.mark.parametrize("index", [3, 90])
    def test_held_out(self, make, tmp_path, index):
        """``labels --cross-fit`` and ``clean`` hide labels, and read the label file again."""
        split = make([(index, 1, "", 0.5)]).split
        folded = replace(split, labeled=sorted({*split.labeled} - {index}), held_out=[index])
        folded.save(tmp_path / "split.json")
        for unlabeled in ("rest", "none", "source"):
            data = make([(index, 1, "", 0.5)], labeled=tmp_path / "split.json", unlabeled=unlabeled)
            assert data.split == folded
            assert index in data.unlabeled_indices()
            rows = [
                (int(i), int(y)) for batch in data.train_dataloader() for i, y in zip(batch.index, batch.y, strict=True)
            ]
            assert (index, -100) in rows

    def test_label_rows_of_the_validation_part_are_refused(self, make):
        (val, *_), (first,) = make().split.val, self.free(make, 1)
        with pytest.raises(InputError, match=f"labels.csv, line 3: sample {val} is in the validation part"):
            make([(first, 1, "", ""), (val, 1, "", "")])

    def test_test_images_get_no_label(self, make, tmp_path):
        (first,) = self.free(make, 1)
        assert make([(first, 1, "", "")], unlabeled="test").visible_labels()[first] == 1
        with pytest.raises(InputError, match="line 2: there is no sample 85; the data have 0 ... 79"):
            make([(85, 1, "", "")], unlabeled="test")
        make([(85, 1, "", "")]).save_split(tmp_path / "split.json")
        with pytest.raises(InputError, match=r"unlabeled part \(sample 85\), which unlabeled: test leaves out"):
            make(labeled=tmp_path / "split.json", unlabeled="test")

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (None, "which is gone"),
            (torch.rand(30, 1), "only 0 of its 30 samples are here"),
            (torch.rand(31, 1), "only 0 of its 30 samples are here"),
        ],
    )
    def test_label_rows_of_another_unlabeled_part_are_refused(self, make, tmp_path, more, message):
        make([(90, 1, "", "")]).save_split(tmp_path / "split.json")
        with pytest.raises(InputError, match=message):
            make(labeled=tmp_path / "split.json", more=more)
        (first,) = self.free(make, 1)
        make([(first, 1, "", "")]).save_split(
            tmp_path / "split.json"
        )  # rows of the training part are independent of it
        assert make(labeled=tmp_path / "split.json", more=more).visible_labels()[first] == 1

    def test_corrected_file_in_the_same_datamodule(self, make, tmp_path):
        data = make()
        data = SemiSupervisedDataModule(data.source, labeled=2, label_file=tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text("index,label\n3,bird\n")
        for _ in range(2):
            with pytest.raises(InputError, match="line 2: 'bird' is no class"):
                data.setup("fit")
        (tmp_path / "a.csv").write_text("index,label\n3,2\n")
        data.setup("fit")
        assert data.visible_labels()[3] == 2

    def test_resuming_with_another_file_is_refused(self, make, quiet_trainer, tmp_path):
        def fit(path=None, **kwargs):
            data, module = make(unlabeled="none", **kwargs), SupervisedModule(torch.nn.Linear(1, 3))
            trainer = quiet_trainer(limit_val_batches=0, max_epochs=1 if path is None else 2)
            trainer.fit(module, datamodule=data, ckpt_path=path)
            return trainer, data

        path, (first, second) = tmp_path / "c.ckpt", self.free(make, 2)
        trainer, data = fit(rows=[(first, 1, "", "")])
        trainer.save_checkpoint(path)
        data.save_split(tmp_path / "split.json")
        for rows in ([(first, 2, "", "")], [(first, 1, "noisy", "")], [(second, 1, "", "")], [(first, 1, "", 2)], None):
            with pytest.raises(
                InputError, match="another split; resume with the same source, labeled, label_file, val_size, group and"
            ):
                fit(path, rows=rows)
        fit(path, rows=[(first, 1, "", "")])
        fit(path, labeled=tmp_path / "split.json")

    def test_of_many_labels(self, tmp_path):
        (tmp_path / "a.csv").write_text("index,label\n3,1\n")
        source = DatasetSource(TensorDataset(torch.rand(20, 4), torch.randint(2, (20, 3))))
        with pytest.raises(InputError, match="must have a column of zeros and ones for each class, such as 0, since"):
            SemiSupervisedDataModule(source, label_file=tmp_path / "a.csv").setup("")

    def test_old_split_file(self, make, tmp_path):
        split = make().split
        fields = {
            name: value
            for name, value in asdict(split).items()
            if name in ("labeled", "unlabeled", "val", "seed", "data")
        }
        (tmp_path / "split.json").write_text(json.dumps(fields | {"hash": split.hash}))
        assert make([(90, 1, "", "")], labeled=tmp_path / "split.json").split.labeled == [*split.labeled, 90]
        assert Split.load(tmp_path / "split.json", TARGETS) == split


def test_weak_labels_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.csv").write_text("index,label,kind\n3,odd,coarse\n")
    (tmp_path / "config.yaml").write_text(
        """
        name: weak
        trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 0, logger: false,
                  enable_progress_bar: false, enable_model_summary: false}
        checkpoint: {monitor: null}
        model: {class_path: SupervisedModule, init_args: {student: {class_path: DigitsCNN, init_args: {width: 4}}}}
        data:
          class_path: SemiSupervisedDataModule
          init_args:
            source: Digits
            labeled: 2
            label_noise: {class_path: SymmetricNoise, init_args: {rate: 0.5}}
            coarse:
              class_path: CoarseLabels
              init_args: {groups: {even: ["0", 2, "4", 6, 8], odd: [1, "3", 5, "7", "9"]}, fraction: 0}
        """
    )
    data = DistillCLI(["fit", "--config", "config.yaml", "--data.label_file", "labels.csv"]).datamodule
    assert data.split.label_rows == [[3, "odd", "coarse", 1.0]]
    assert data.coarse.groups == {"even": ["0", 2, "4", 6, 8], "odd": [1, "3", 5, "7", "9"]}
    assert data.label_noise.rate == 0.5
    (found,) = [batch.select(batch.index == 3) for batch in data.train_dataloader() if 3 in batch.index]
    assert found.candidates.tolist() == [[False, True] * 5]


class TestBalancedSampler:
    """``sampler: balanced``: each class equally often, resumable, beside stored teacher outputs."""

    def data(self, **arguments):
        x = torch.arange(80.0)[:, None].repeat(1, 3)
        source = DatasetSource(TensorDataset(x, TARGETS))
        return SemiSupervisedDataModule(source, val_size=0, **({"sampler": "balanced", "batch_size": 8} | arguments))

    @pytest.mark.parametrize("arguments", [{}, {"labeled": 0.5}, {"labeled": 0.5, "labeled_batch_size": 3}])
    def test_each_class_comes_equally_often(self, arguments):
        data = self.data(**arguments)
        data.setup("fit")
        batches = [*data.train_dataloader()]
        labels = torch.cat([batch.y[batch.y >= 0] for batch in batches])
        counts = torch.bincount(labels)
        assert counts.max() - counts.min() <= 1
        assert {*data.split.labeled} >= {i for batch in batches for i in batch.index[batch.y >= 0].tolist()}
        for batch in batches:  # the loader counts labels of the drawn samples
            assert batch.mean_labels == (batch.y >= 0).sum()

    def test_resume_is_exact_and_another_sampler_refused(self, quiet_trainer, tmp_path):
        def fit(epochs, made, **kwargs):
            torch.manual_seed(0)
            module = SupervisedModule(torch.nn.Linear(3, 3))
            trainer = quiet_trainer(max_epochs=epochs, limit_train_batches=1.0)
            trainer.fit(module, datamodule=made, **kwargs)
            return trainer, module

        trainer, _ = fit(1, self.data())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        _, resumed = fit(2, self.data(), ckpt_path=tmp_path / "x.ckpt")
        _, whole = fit(2, self.data())
        assert torch.equal(resumed.student.weight, whole.student.weight)
        with pytest.raises(InputError, match="sampler: the checkpoint was trained with balanced, got shuffled"):
            fit(2, self.data(sampler="shuffled"), ckpt_path=tmp_path / "x.ckpt")

    def test_stored_outputs_of_a_teacher(self, quiet_trainer, tmp_path):
        def fit(cache):
            torch.manual_seed(0)
            network, student = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            made = self.data(labeled=0.5, num_views=3)
            trainer = quiet_trainer(max_epochs=2, limit_train_batches=1.0)
            trainer.fit(DistillModule(student, Teacher(network, cache=cache)), datamodule=made)
            return student.weight

        assert torch.allclose(fit(tmp_path / "outputs"), fit(None), atol=1e-6)

    def test_what_cannot_be(self):
        with pytest.raises(InputError, match="sampler must be shuffled or balanced, got 'even'"):
            self.data(sampler="even")
        source = DatasetSource(TensorDataset(torch.rand(4, 3), torch.eye(4)))
        made = SemiSupervisedDataModule(source, val_size=0, sampler="balanced")
        made.setup("fit")
        with pytest.raises(InputError, match="sampler: balanced needs labels of one class each"):
            made.train_dataloader()
        made = self.data(labeled=0)
        made.setup("fit")
        with pytest.raises(InputError, match="sampler: balanced needs labels of one class each"):
            made.train_dataloader()
