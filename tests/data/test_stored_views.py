"""A datamodule that reads its pictures from a store: the same samples, fewer reads, and a resume that compares."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kd_lightning import (
    Digits,
    DistillModule,
    ImageFolder,
    InputError,
    PredictionWriter,
    SemiSupervisedDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.data.sources import image_loader, pixels
from kd_lightning.data.transforms import strong_photos

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


@pytest.fixture
def photos(tmp_path):
    """24 smooth pictures in two classes, with two more for the test part."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 2)):
        for name in ("cats", "dogs"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
                small.resize((50 + number, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
    return tmp_path


def datamodule(photos, stored=True, size=16, **options):
    source = ImageFolder(str(photos / "train"), str(photos / "test"), image_size=size)
    options = {"batch_size": 8, "val_size": 4} | options
    return SemiSupervisedDataModule(source, decoded=photos / "store" if stored else None, **options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))


def refuse_to_decode(monkeypatch):
    def refuse(*args):
        raise AssertionError("a file is decoded")

    monkeypatch.setattr(pixels, "decode_image", refuse)
    monkeypatch.setattr(image_loader, "_to_picture", refuse)


def test_evaluation_equals_that_of_the_files(photos):
    """The stored short side is that of the evaluation, so that the resize has nothing left to do."""
    for size in (16, 28):
        stored, files = datamodule(photos, size=size), datamodule(photos, stored=False, size=size)
        assert stored.decoded_side == size * 8 // 7
        for name in ("val_dataloader", "test_dataloader", "pool_dataloader"):
            for one, other in zip(getattr(stored, name)(), getattr(files, name)(), strict=True):
                assert torch.equal(one.x, other.x)
                assert torch.equal(one.y, other.y)


def test_training_sees_the_same_crops_of_smaller_pictures(photos):
    stored, files = datamodule(photos), datamodule(photos, stored=False)
    for one, other in zip(stored.train_dataloader(), files.train_dataloader(), strict=True):
        assert torch.equal(one.index, other.index)
        assert not torch.equal(one.x, other.x)
        both = torch.stack([one.x.flatten(), other.x.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9  # the same places of the same pictures


@pytest.mark.parametrize(
    "option",
    [
        {"train_transform": v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])},
        {"strong_transform": strong_photos(16)},
        {"eval_transform": v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])},
    ],
)
def test_full_size_for_own_transforms(photos, option):
    """Pictures of full size are those of the files, for transforms of whole batches and of single images."""
    stored, files = datamodule(photos, **option), datamodule(photos, stored=False, **option)
    assert stored.decoded_side is None
    assert datamodule(photos, decoded_side=20, **option).decoded_side == 20
    for name in ("train_dataloader", "val_dataloader"):
        for one, other in zip(getattr(stored, name)(), getattr(files, name)(), strict=True):
            assert torch.equal(one.x, other.x)
            assert one.x_strong is None or torch.equal(one.x_strong, other.x_strong)


@pytest.mark.parametrize("workers", [0, 2])
def test_later_epochs_and_fits_decode_nothing(photos, monkeypatch, workers):
    def fit(epochs):
        teacher = Teacher(network(), cache=photos / "outputs")
        data = datamodule(photos, num_views=2, num_workers=workers)
        trainer = Trainer(max_epochs=epochs, default_root_dir=photos / "runs", **QUIET)
        module = DistillModule(network(), teacher)
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        return module.student[2].weight.detach().clone()

    first = fit(3)
    refuse_to_decode(monkeypatch)
    assert torch.equal(fit(3), first)


def test_a_resume_with_another_short_side_is_refused(photos):
    def fit(checkpoint=None, **options):
        trainer = Trainer(max_epochs=2 if checkpoint else 1, default_root_dir=photos / "runs", **QUIET)
        trainer.fit(SupervisedModule(network()), datamodule=datamodule(photos, **options), ckpt_path=checkpoint)
        return trainer

    checkpoint = photos / "last.ckpt"
    fit().save_checkpoint(checkpoint)
    fit(checkpoint)
    for options in ({"stored": False}, {"decoded_side": 30}):
        with pytest.raises(InputError, match="decoded_side: the checkpoint was trained with 18, got"):
            fit(checkpoint, **options)


def test_a_replaced_file_is_decoded_again(photos):
    before = next(iter(datamodule(photos, val_size=0).pool_dataloader())).x
    Image.new("RGB", (50, 40), "white").save(photos / "train" / "cats" / "0.jpg")
    data = datamodule(photos, val_size=0)
    data.setup("fit")
    after = next(iter(data.pool_dataloader())).x
    assert (after[0] > 2).all()
    assert torch.equal(after[1:], before[1:])


def test_predictions_name_their_files(photos):
    data = datamodule(photos)
    trainer = Trainer(default_root_dir=photos / "runs", callbacks=[PredictionWriter()], **QUIET)
    trainer.predict(SupervisedModule(network()), datamodule=data)
    (file,) = photos.rglob("predictions.csv")
    with file.open() as opened:
        assert [row["path"] for row in csv.DictReader(opened)] == [
            "cats/0.jpg",
            "cats/1.jpg",
            "dogs/0.jpg",
            "dogs/1.jpg",
        ]


def test_refused_settings(photos):
    with pytest.raises(InputError, match="decoded_side: 20 needs decoded"):
        datamodule(photos, stored=False, decoded_side=20)
    with pytest.raises(InputError, match="decoded"):
        SemiSupervisedDataModule(Digits(), decoded=photos / "store").setup("fit")
