from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import SupervisedModule
from kd_lightning.models import DigitsCNN
from kd_lightning.modules._shared.epoch_means import EpochMeans


def test_weighted_means_of_numbers_and_tensors():
    means = EpochMeans()
    assert not means
    values = {"a": [(1.0, 2.0), (4.0, 1.0)], "b": [(torch.tensor(0.5, requires_grad=True), 3.0), (2.5, 1e-9)]}
    for name, pairs in values.items():
        for value, weight in pairs:
            means.add(name, value, weight)
    assert means
    found = means.compute_and_reset(torch.device("cpu"), lambda sums: sums)
    assert {name: float(mean) for name, mean in found.items()} == pytest.approx({"a": 2.0, "b": 0.5})
    assert not found["b"].requires_grad
    assert not means


@pytest.mark.parametrize("waits", [False, True])
def test_sums_of_a_checkpoint_go_on_to_the_bit(waits, monkeypatch):
    """On the CPU as numbers, on other devices as tensors, which no step reads."""
    monkeypatch.setattr("kd_lightning.modules._shared.epoch_means.must_synchronize", lambda tensor: waits)
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand((), generator=generator, requires_grad=True) for _ in range(40)]
    module = SimpleNamespace(trainer=SimpleNamespace(world_size=1, is_global_zero=True))
    results = []
    for stops in ((), (1, 13, 14)):
        means = EpochMeans()
        for step, value in enumerate(values):
            if step in stops:
                checkpoint = {}
                means.store(module, checkpoint)
                assert {type(number) for number in checkpoint["epoch_means"]["loss"]} == {float}
                means = EpochMeans()
                means.restore(module, checkpoint)
            means.add("loss", value, 64.0 - step)
        results.append(means.compute_and_reset(torch.device("cpu"), lambda sums: sums)["loss"].item())
    assert results[0] == results[1]
    weights = [64.0 - step for step in range(40)]
    mean = sum(float(value.detach()) * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    assert results[0] == pytest.approx(mean, rel=1e-6)


def test_a_checkpoint_of_an_earlier_version_goes_on():
    """It holds tensors."""
    means, module = EpochMeans(), SimpleNamespace(trainer=SimpleNamespace(is_global_zero=True))
    means.restore(module, {"epoch_means": {"loss": (torch.tensor(3.0), 2)}})
    means.add("loss", torch.tensor(3.0), 1)
    assert means.compute_and_reset(torch.device("cpu"), lambda sums: sums)["loss"] == 2


def test_processes_are_summed_before_they_are_divided():
    means, other = EpochMeans(), {"a": (10.0, 3.0), "b": (1.0, 1.0)}
    means.add("b", 3.0, 1.0)
    means.add("a", 2.0, 1.0)
    theirs = torch.tensor([[other[name][k] for name in "ab"] for k in (0, 1)])
    found = means.compute_and_reset(torch.device("cpu"), lambda sums: sums + theirs)
    assert {name: float(mean) for name, mean in found.items()} == {"a": 3.0, "b": 2.0}


class Seen(Callback):
    """What other callbacks find at the end of each epoch."""

    def __init__(self):
        self.losses = []

    def on_train_epoch_end(self, trainer, module):
        self.losses.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


@pytest.mark.parametrize("stop", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 5}, {"limit_train_batches": 2}])
def test_the_mean_over_the_rows_of_an_epoch(stop, quiet_trainer):
    """Batches of 4, 4 and 2 rows; with max_steps the last epoch ends after two."""

    class Told(SupervisedModule):
        def training_step(self, batch, batch_idx):
            recorded.append((self.current_epoch, len(batch[0])))
            losses.append(super().training_step(batch, batch_idx))
            return losses[-1]

    recorded, losses, seen = [], [], Seen()
    loader = DataLoader(TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10)), 4)
    quiet_trainer(callbacks=[seen], **{"max_epochs": 2} | stop).fit(Told(DigitsCNN(4)), loader)
    assert len(seen.losses) == 2
    for epoch, found in enumerate(seen.losses):
        mine = [(rows, float(loss)) for (when, rows), loss in zip(recorded, losses, strict=True) if when == epoch]
        mean = sum(rows * loss for rows, loss in mine) / sum(rows for rows, _ in mine)
        assert found["train/loss"] == found["train/hard"] == pytest.approx(mean, rel=1e-6)
        assert found["train/loss_step"] == pytest.approx(mine[-1][1], rel=1e-6)
