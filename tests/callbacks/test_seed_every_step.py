"""SeedEveryStep: random numbers depend on step, rank and seed, and on nothing else."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from kd_lightning import InputError, SeedEveryStep, SupervisedModule
from kd_lightning.models import DigitsCNN


class RandomNumbers(SupervisedModule):
    """Records a random number of each step."""

    def losses(self, batch):
        self.seen.append(torch.rand(1).item())
        return super().losses(batch)


@pytest.fixture
def sample(quiet_trainer, loader):
    def run(burn=1, rank=0, **kwargs):
        torch.manual_seed(burn)
        module = RandomNumbers(DigitsCNN(4))
        module.seen = []
        trainer = quiet_trainer(max_epochs=2, callbacks=[SeedEveryStep(**kwargs)])
        trainer.strategy.global_rank = rank
        trainer.fit(module, loader())
        return module.seen

    return run


def test_same_seed_repeats_and_steps_seeds_and_ranks_differ(sample):
    seen = sample(burn=1, seed=3)
    assert sample(burn=2, seed=3) == seen
    others = sample(seed=4) + sample(seed=3, rank=1) + sample(seed=0)
    assert len({*seen, *others}) == 4 * 6


def test_the_order_of_an_epoch_is_that_of_all_processes(quiet_trainer, loader):
    """A sampler that shuffles by a global generator would else give samples to two processes, and others to none."""

    class Order(Callback):
        def on_train_epoch_start(self, trainer, module):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))

    drawn = []
    for rank in (0, 1):
        for part in (torch.manual_seed, np.random.seed, random.seed):
            part(rank)  # what the processes have drawn before need not be the same
        trainer = quiet_trainer(max_epochs=2, callbacks=[SeedEveryStep(3), Order()])
        trainer.strategy.global_rank = rank
        trainer.fit(SupervisedModule(DigitsCNN(4)), loader())
    assert drawn[:2] == drawn[2:]
    assert len({*sum(drawn[:2], ())}) == 6  # each epoch has its own


def test_seed_of_the_run(sample, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert sample(burn=1) != sample(burn=2)  # no seed is set
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # as seed_everything sets it
    assert sample(burn=1) == sample(burn=2) == sample(seed=3)
    assert sample(seed=4) != sample(seed=3)  # the argument takes precedence


def test_only_the_generator_of_the_device_is_seeded(sample, monkeypatch):
    """On the CPU, torch.manual_seed would spend a tenth of a millisecond on accelerators that are not in use."""
    monkeypatch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)  # of the fixture
    seen = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seen.append)
    assert sample(seed=3) == sample(burn=2, seed=3)
    assert not seen


def test_a_fit_with_another_seed_does_not_resume(quiet_trainer, loader, student, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of another test
    trainer = quiet_trainer(callbacks=[SeedEveryStep(1)])
    trainer.fit(SupervisedModule(student), loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = quiet_trainer(callbacks=[SeedEveryStep(2)], max_epochs=2)
    with pytest.raises(InputError, match="^seed_everything: the checkpoint was trained with 1, got 2; resume with"):
        other.fit(SupervisedModule(student), loader(), ckpt_path=tmp_path / "c.ckpt")
    for seed in (1, None):
        again = quiet_trainer(callbacks=[SeedEveryStep(seed)], max_epochs=2)
        again.fit(SupervisedModule(student), loader(), ckpt_path=tmp_path / "c.ckpt")
    quiet_trainer(callbacks=[SeedEveryStep(2)]).test(SupervisedModule(student), loader(), ckpt_path=tmp_path / "c.ckpt")
