"""SeedEveryStep: the same draws whatever went before, other ones for each step, rank and seed."""

import pytest
import torch

from kd_lightning import SeedEveryStep, SupervisedModule
from kd_lightning.models import DigitsCNN


class Draws(SupervisedModule):
    """Notes a random number of each step."""

    def losses(self, batch):
        self.seen.append(torch.rand(1).item())
        return super().losses(batch)


@pytest.fixture
def draw(quiet_trainer, loader):
    def run(burn=1, rank=0, **kwargs):
        torch.manual_seed(burn)
        module = Draws(DigitsCNN(4))
        module.seen = []
        trainer = quiet_trainer(max_epochs=2, callbacks=[SeedEveryStep(**kwargs)])
        trainer.strategy.global_rank = rank
        trainer.fit(module, loader())
        return module.seen

    return run


def test_repeats_and_tells_steps_seeds_and_ranks_apart(draw):
    seen = draw(burn=1, seed=3)
    assert draw(burn=2, seed=3) == seen
    others = draw(seed=4) + draw(seed=3, rank=1) + draw(seed=0)
    assert len({*seen, *others}) == 4 * 6


def test_seed_of_the_run(draw, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert draw(burn=1) != draw(burn=2)  # none was asked for
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # what seed_everything leaves
    assert draw(burn=1) == draw(burn=2) == draw(seed=3)
    assert draw(seed=4) != draw(seed=3)  # one's own wins
