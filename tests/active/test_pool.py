"""Outputs for the pool of modules that read and call in their own way, and of modules that are taught."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, DistillModule, InputError, SemiSupervisedDataModule, teach
from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.active.pool import collect_pool_outputs
from kd_lightning.batch import Batch
from kd_lightning.data import CoarseLabels
from kd_lightning.modules import SupervisedModule
from kd_lightning.modules.seams import Seams

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5)


class Scaled(nn.Module):
    """Takes part of the place of a module that changes the inputs."""

    def __init__(self, seed, factor=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.factor = factor

    def forward(self, x):
        return self.layers(x * self.factor)


class Reading(DistillModule):
    """Changes the inputs where it reads a batch."""

    def unpack(self, batch):
        batch = Batch.from_any(batch)
        return Batch(-3 * batch.x, batch.y)  # without index and all else


class Hooked(DistillModule):
    """Changes the inputs where a batch comes to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return Batch(-3 * batch.x, batch.y)  # without index and all else


class Lit(LightningModule):
    """Changes the inputs in its steps."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.net = Scaled(0, 1.0 if factor != 1 else -3.0)

    def forward(self, x):
        return self.net(x)

    def predict(self, batch):
        return self.net(batch[0] * self.factor) if self.factor != 1 else self.net(batch[0])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.predict((x, y)), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/accuracy", (self.predict((x, y)).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Validating(Lit):
    """Its training step sees noise, its validation step does not; no index and no label leads there."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x * self.factor
        return F.cross_entropy(self.net(x if torch.is_grad_enabled() else torch.zeros_like(x)), y)

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        self.predict((x, None))


class Itself(Lit):
    """Calls itself."""

    def predict(self, batch):
        return self(batch[0] * self.factor)


def run(strategy, trainer, make):
    data = TensorDataset(X, Y)
    loop = ActiveLearningLoop(
        make,
        lambda: SemiSupervisedDataModule(DatasetSource(data, data), labeled=3, val_size=0, batch_size=16),
        partial(trainer, max_epochs=2, limit_val_batches=0),
        strategy,
        queries=4,
        rounds=1,
    )
    return loop.run()


STRATEGIES = ["entropy", "bald", "badge", "disagreement"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_module_reads_batches_itself(strategy, quiet_trainer):
    expected = run(strategy, quiet_trainer, lambda: DistillModule(Scaled(0, -3.0), Scaled(1, -3.0)))
    assert len({*expected[0]["queried"]}) == 4
    for kind in (Reading, Hooked):
        assert run(strategy, quiet_trainer, lambda k=kind: k(Scaled(0), Scaled(1))) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_taught_module_changes_inputs_in_its_step(strategy, quiet_trainer):
    """The selection is that of a network that changes them itself. The teacher gets what the network gets."""
    expected = run(strategy, quiet_trainer, lambda: teach(Lit(1), Scaled(1, -3.0)))
    assert len({*expected[0]["queried"]}) == 4
    for module, network in ((Lit, "net"), (Validating, "net"), (Itself, "")):
        assert run(strategy, quiet_trainer, lambda m=module, n=network: teach(m(-3.0), Scaled(1), n)) == expected


class Scores(nn.Module):
    """Returns something else beside its scores."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return {"logits": x, "scores": self.network(x)}


class OfScores(Lit):
    def __init__(self, factor):
        super().__init__(factor)
        self.net = Scores(self.net)

    def predict(self, batch):
        return self.net(batch[0])["scores"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_network_taught_on_a_part_of_what_it_returns(strategy, quiet_trainer):
    expected = run(strategy, quiet_trainer, lambda: teach(Lit(1), Scaled(1, -3.0)))
    found = run(strategy, quiet_trainer, lambda: teach(OfScores(1), Scores(Scaled(1, -3.0)), output="scores"))
    assert found == expected


def test_a_module_of_this_package_may_be_taught(quiet_trainer):
    """Its own ``unpack`` and ``call`` count."""

    class Read(SupervisedModule):
        unpack = Reading.unpack

    expected = run("disagreement", quiet_trainer, lambda: teach(Lit(1), Scaled(1, -3.0)))
    make = partial(Read, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert run("disagreement", quiet_trainer, lambda: teach(make(Scaled(0)), Scaled(1), "student")) == expected


def test_coarse_labels_count_where_a_module_reads_batches_itself():
    parts = TensorDataset(X, Y)
    coarse = CoarseLabels(groups={"low": [0, 1], "high": [2]})
    data = SemiSupervisedDataModule(DatasetSource(parts, parts), labeled=3, val_size=0, coarse=coarse)
    data.setup("fit")
    module = Reading(Scaled(0), Scaled(1))
    _, pool = collect_pool_outputs(module.student, data, "entropy", seams=Seams.of(module))
    possible = pool.probabilities > 0
    assert {tuple(row) for row in possible.tolist()} == {(True, True, False), (False, False, True)}


class Silent(Lit):
    """Logs another figure."""

    def test_step(self, batch, batch_idx):
        self.log("test/acc", torch.tensor(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lit(1), "make_module: Lit has no student"),
        (lambda: teach(Silent(1), Scaled(1)), "make_module: its test must log test/accuracy, got test/acc"),
        (lambda: teach(Lit(1), Scaled(1), class_dim=-1), r"needs a network .* \(B, C\), but teach has class_dim"),
    ],
)
def test_modules_that_cannot(quiet_trainer, make, message):
    with pytest.raises(InputError, match=message):
        run("entropy", quiet_trainer, make)
