"""Hinton's omitted digit: no 3 teaches, and no test image chooses the bias."""

import importlib

import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import Digits, SemiSupervisedDataModule
from kd_lightning.data.sources.source import Part


@pytest.fixture(scope="module")
def benchmark(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        return importlib.import_module("omitted_digit")


class Blanked(Digits):
    """With other test images: all white, all labeled 0."""

    def load(self):
        parts = super().load()
        images, targets = torch.zeros(len(parts.test.images), 1, 8, 8), torch.zeros_like(parts.test.targets)
        return parts._replace(test=Part(TensorDataset(images), targets))


def test_no_3_is_in_the_transfer_set(benchmark):
    data = SemiSupervisedDataModule(Digits(), val_size=0.25, batch_size=64, seed=0)
    transfer = benchmark.transfer_set(data)
    transfer.setup("")
    parts = Digits().load()
    digit_of = {
        image.numpy().tobytes(): int(digit)
        for (image,), digit in zip(parts.train.images, parts.train.targets, strict=True)
    }
    served = transfer.train_dataloader().dataset
    found = [digit_of[served.images[0][index][0].numpy().tobytes()] for index in served.indices]
    known = [int(parts.train.targets[index]) for index in data.split.labeled]
    assert sorted(found) == sorted(digit for digit in known if digit != 3)
    assert 3 in known and 3 in parts.train.targets[data.split.val]
    assert {int(digit) for batch in transfer.train_dataloader() for digit in batch.y} == {0, 1, 2, 4, 5, 6, 7, 8, 9}
    assert transfer.train_transform is data.train_transform


@pytest.mark.parametrize("seed", range(12))
def test_offset_is_the_best_of_all(benchmark, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (80,), generator=generator)
    logits = torch.randn(80, 10, generator=generator) + 2 * torch.nn.functional.one_hot(targets, 10)
    logits[:, 3] -= 4

    def right(offset):
        return int((benchmark.raised(logits, offset).argmax(dim=1) == targets).sum())

    chosen = benchmark.best_offset(logits, targets)
    assert right(chosen) >= max(right(offset) for offset in torch.linspace(-10, 20, 601).tolist()) > right(0.0)


def test_offset_lies_in_the_middle(benchmark):
    """Two 3s that need more than 1 and 2; other digits that stand up to 5, 8 and 9."""
    logits = torch.zeros(5, 10)
    logits[:, 3] = torch.tensor([-1.0, -2.0, -5.0, -8.0, -9.0])
    assert benchmark.best_offset(logits, torch.tensor([3, 3, 0, 0, 0])) == 3.5


def test_no_test_image_chooses(benchmark, monkeypatch):
    real = benchmark.run_seed(0, epochs=1)
    monkeypatch.setattr(benchmark, "Digits", Blanked)
    blanked = benchmark.run_seed(0, epochs=1)
    students = [name for name in real if name != "teacher"]
    assert [real[name]["offset"] for name in students] == [blanked[name]["offset"] for name in students]
    assert [real[name]["all_after"] for name in students] != [blanked[name]["all_after"] for name in students]
    assert len(benchmark.table({0: real, 1: real})) == 2 + 3 * len(real) + 2
    assert "0 % of 3s are right (paper: 86.8 %)" in benchmark.remark({0: real})
