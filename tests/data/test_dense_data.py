"""The datamodule of dense labels: splits, counts, identity, and what makes no sense with them."""

import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from kd_lightning import (
    ClassSubset,
    CoarseLabels,
    DatasetSource,
    FixedThreshold,
    InputError,
    PseudoLabelModule,
    RotatedClasses,
    SemiSupervisedDataModule,
    SupervisedModule,
    SymmetricNoise,
)
from kd_lightning.data.evaluation_batches import evaluation_batches
from kd_lightning.data.samples import Samples
from kd_lightning.data.sources.source import Part, Parts, Source
from kd_lightning.pseudo_labels.table import PseudoLabels

COUNT, CLASSES = 20, 3
IMAGES = torch.randn(COUNT, 2, 4, 5, generator=torch.Generator().manual_seed(3))
MASKS = torch.randint(0, CLASSES, (COUNT, 4, 5), generator=torch.Generator().manual_seed(4))
TEST = TensorDataset(IMAGES[:6] + 1, MASKS[:6])


def source(masks=MASKS, images=IMAGES, **kwargs):
    return DatasetSource(TensorDataset(images, masks), TEST, dense=True, **({"class_names": [*"abc"]} | kwargs))


def make(masks=MASKS, *, images=IMAGES, **kwargs):
    return SemiSupervisedDataModule(source(masks, images), **({"labeled": 5, "val_size": 4, "batch_size": 3} | kwargs))


def module():
    torch.manual_seed(0)
    return SupervisedModule(nn.Conv2d(2, CLASSES, 1), class_dim=1)


def masks_with(missing):
    masks = MASKS.clone()
    masks[missing] = -1
    return masks


class TestSplit:
    def test_numbers_count_samples(self):
        """Whatever the number of class names is."""
        data = make(masks_with([3, 7]))
        data.setup("")
        split = data.split
        assert len(split.labeled) == 5 and len(split.val) == 4 and len(split.unlabeled) == 11
        assert {3, 7} <= {*split.unlabeled}
        more = make(masks_with([3, 7]), labeled=9)
        more.setup("")
        assert {*split.labeled} < {*more.split.labeled}
        assert split.val == more.split.val
        half = make(labeled=0.5, val_size=0.2)
        half.setup("")
        assert (len(half.split.labeled), len(half.split.val)) == (8, 4)

    def test_more_than_there_are(self):
        with pytest.raises(
            InputError, match=r"^labeled: 50, but 16 samples have a label for it; allowed: 0 ... 16, or"
        ):
            make(labeled=50).setup("")
        data = make(labeled=50, labeled_at_most=True)
        data.setup("")
        assert len(data.split.labeled) == 16

    def test_a_saved_split_follows_the_samples(self, tmp_path):
        data = make()
        data.setup("")
        data.save_split(tmp_path / "split.json")
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
        other = make(MASKS[order], images=IMAGES[order], labeled=str(tmp_path / "split.json"))
        other.setup("")
        assert {int(order[n]) for n in other.split.labeled} == {*data.split.labeled}
        for batch in other.train_dataloader():
            for row, number in enumerate(batch.index.tolist()):
                expected = MASKS[order[number]] if number in other.split.labeled else torch.full((4, 5), -100)
                assert torch.equal(batch.y[row], expected)

    def test_its_hash_depends_on_the_masks(self):
        hashes = set()
        for masks in (MASKS, MASKS.flip(0), masks_with([1]), torch.where(MASKS == 1, 2, MASKS)):
            data = make(masks)
            data.setup("")
            hashes.add(data.split.hash)
            assert make(masks).samples.label_contents == data.samples.label_contents
        assert len(hashes) == 4
        one, other = (make(images=IMAGES) for _ in range(2))
        one.setup(""), other.setup("")
        assert one.split.hash == other.split.hash

    def test_a_random_dataset_has_no_contents(self):
        class Flips(Dataset):
            def __len__(self):
                return 9

            def __getitem__(self, index):
                flip = torch.rand(()) < 0.5
                pair = IMAGES[index], MASKS[index]
                return tuple(part.flip(-1) if flip else part for part in pair)

        random = DatasetSource(Flips(), dense=True)
        state = torch.get_rng_state()
        assert random.load().train.label_contents == [""] * 9
        assert torch.equal(torch.get_rng_state(), state)


class TestFit:
    def test_counts(self, tmp_path, quiet_trainer):
        data = make(masks_with([3, 7]))
        trainer = quiet_trainer(logger=CSVLogger(tmp_path))
        trainer.fit(module(), data)
        (path,) = tmp_path.rglob("samples.json")
        found = json.loads(path.read_text())
        assert found["classes"] == []
        assert found["samples"]["labeled"] == 5 and found["samples"]["unlabeled"] == 11
        assert found["samples"]["validation"] == 4 and found["samples"]["test"] == 6
        trainer.test(module(), data, verbose=False)
        assert 0 <= trainer.callback_metrics["test/accuracy"] <= 1

    def test_a_resume_with_other_masks(self, tmp_path, quiet_trainer):
        trainer = quiet_trainer()
        trainer.fit(module(), make())
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        with pytest.raises(InputError, match="the checkpoint was trained on another split"):
            quiet_trainer(max_epochs=2).fit(
                module(), make(torch.where(MASKS == 1, 2, MASKS)), ckpt_path=tmp_path / "one.ckpt", weights_only=False
            )
        quiet_trainer(max_epochs=2).fit(module(), make(), ckpt_path=tmp_path / "one.ckpt", weights_only=False)

    def test_duplicates(self):
        images = IMAGES.clone()
        images[8] = TEST.tensors[0][2]
        with pytest.raises(InputError, match="duplicates: refuse"):
            _fit_setup(make(images=images, duplicates="refuse"))
        data = make(images=images, duplicates="together")
        _fit_setup(data)
        assert data.split.left_out == [8]


def _fit_setup(data):
    data.setup("")
    from kd_lightning.data.split_setup import check_duplicates

    return check_duplicates(data.duplicates, data.samples, data.split)


def test_evaluation_batches():
    """Of labeled samples, under evaluation transforms."""
    for kwargs in ({}, {"val_size": 0}):
        data = make(**kwargs)
        data.setup("")
        batches, name = evaluation_batches(data, torch.device("cpu"))
        wanted = data.split.val or data.split.labeled
        assert sorted(n for batch in batches for n in batch.index.tolist()) == sorted(wanted)
        assert all(torch.equal(batch.y, MASKS[batch.index]) for batch in batches)
        assert ("training" in name) == (not data.split.val)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("noisy", True),
        ("label_noise", SymmetricNoise(0.2)),
        ("coarse", CoarseLabels({"ab": ["a", "b"], "c": ["c"]})),
        ("label_file", "labels.csv"),
    ],
)
def test_options_of_one_label_a_sample(option, value):
    with pytest.raises(
        InputError, match=f"^{option} needs one label for a sample, but those of DatasetSource are dense"
    ):
        make(**{option: value}).setup("")


def test_labels_of_whole_samples():
    data = make()
    data.setup("")
    for get in (data.visible_labels, lambda: data.hidden_truth(torch.tensor([0]))):
        with pytest.raises(InputError, match="^DatasetSource: its labels are dense") as caught:
            get()
        assert "\n" not in str(caught.value)
    assert data.absent_classes() == set()
    labels = PseudoLabels(
        torch.tensor([1]), torch.tensor([0]), torch.ones(1), torch.ones(1).bool(), torch.ones(1).bool(), 0, 0
    )
    with pytest.raises(InputError, match="pseudo-labels must fit the labels .* which are dense for each"):
        data.set_pseudo_labels(labels)
    for other in (ClassSubset(source(), [0]), RotatedClasses(source())):
        with pytest.raises(InputError, match="must have one class each"):
            other.load()


def test_a_source_of_ones_own():
    """It returns a part with dense labels, whose contents are hashed when they are needed."""

    class Own(Source):
        train_transform = eval_transform = None

        def load(self):
            return Parts(Part(TensorDataset(IMAGES, MASKS), torch.zeros(COUNT).long(), dense=True))

    data = SemiSupervisedDataModule(Own(), labeled=5, val_size=4, batch_size=3)
    data.setup("")
    assert data.samples.label_contents == make().samples.label_contents
    for batch in data.val_dataloader():
        assert torch.equal(batch.y, MASKS[batch.index])


def test_both_parts_are_dense():
    class Half(DatasetSource):
        def load(self):
            parts = super().load()
            return parts._replace(test=parts.test._replace(dense=False))

    with pytest.raises(InputError, match="the test part of Half: its labels must be of the training part's kind"):
        SemiSupervisedDataModule(Half(TensorDataset(IMAGES, MASKS), TEST, dense=True)).setup("")
    with pytest.raises(InputError, match="void: 255 needs dense"):
        DatasetSource(TensorDataset(IMAGES, MASKS), void=255)


def test_the_pool_of_test_images():
    """In the transductive setting, their labels are for metrics alone."""
    data = make(unlabeled="test")
    data.setup("")
    samples = data.samples
    assert isinstance(samples, Samples) and len(samples) == COUNT + 6
    for batch in data.pool_dataloader():
        hidden = torch.tensor([n not in data.split.labeled for n in batch.index.tolist()])
        assert (batch.y[hidden] == -100).all()
        assert (batch.y[~hidden] != -100).all()


@pytest.mark.parametrize("pool", [{}, {"labeled_batch_size": 1}])
def test_pseudo_labels_of_each_position(quiet_trainer, pool):
    """FixMatch on maps, from the datamodule: its labels are not in memory, and are not needed there."""
    torch.manual_seed(0)
    student = nn.Conv2d(2, CLASSES, 1)
    made = PseudoLabelModule(student, class_dim=1, selection=FixedThreshold(0.34))
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
    trainer.fit(made, datamodule=make(**pool))
    assert trainer.callback_metrics["train/unsupervised"] > 0
