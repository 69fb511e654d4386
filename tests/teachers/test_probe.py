"""TeacherProbe in DistillModule: it reports once, costs no forward pass, and changes nothing."""

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.data import Digits
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import DistillModule

PART = Digits().load().train
X, Y = PART.images.tensors[0], PART.targets


class Counting(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


class TestTeacherProbe:
    """The probe in DistillModule."""

    def loaders(self, workers=0):
        generator = torch.Generator().manual_seed(3)  # a second pass over the loader would change its state
        train = DataLoader(TensorDataset(X[:256], Y[:256]), 32, shuffle=True, generator=generator)
        return train, DataLoader(TensorDataset(X[-200:], Y[-200:]), 50, num_workers=workers)

    def fit(self, make_trainer, teacher, probe=True, loaders=None, **kwargs):
        module_kwargs = {k: kwargs.pop(k) for k in ("soft_loss", "task") if k in kwargs}
        torch.manual_seed(0)
        module = DistillModule(DigitsCNN(4, dropout=0.3), teacher, **module_kwargs)
        if not probe:
            module.on_fit_start = lambda: None
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        make_trainer(**kwargs).fit(module, *(loaders or self.loaders()))
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        return module, state

    def messages(self, caplog):
        return [r.getMessage() for r in caplog.records if "soft targets:" in r.getMessage()]

    def test_one_line_and_no_hint(self, healthy, quiet_trainer, caplog, recwarn):
        with caplog.at_level("INFO"):
            self.fit(quiet_trainer, healthy, max_epochs=2)
        (line,) = self.messages(caplog)
        assert re.match(
            r"teacher: [\d.]+% of 100 labels right \(95% interval .* chance \d\d.\d%\); soft targets: entropy", line
        )
        assert not [w for w in recwarn if "doctor" in str(w.message)]

    @pytest.mark.parametrize(
        ("temperature", "network", "hint"),
        [(4.0, DigitsCNN(8), "is it trained"), (1000.0, None, "lower the temperature"), (0.01, None, "raise the")],
    )
    def test_warns(self, healthy, quiet_trainer, temperature, network, hint):
        with pytest.warns(UserWarning, match=hint):
            self.fit(quiet_trainer, network or healthy, soft_loss=KDLoss(temperature))

    def test_few_labels_are_no_verdict(self, quiet_trainer):
        """Two batches of five labels, and a teacher that is untrained."""
        loaders = DataLoader(TensorDataset(X[:10], Y[:10]), 5), DataLoader(TensorDataset(X[10:20], Y[10:20]), 5)
        with pytest.warns(UserWarning, match=r"of 10 labels right \(95% interval .*too few to judge") as caught:
            self.fit(quiet_trainer, DigitsCNN(8), loaders=loaders)
        assert not [w for w in caught if "no better than chance" in str(w.message)]

    @pytest.mark.parametrize("kwargs", [{}, {"num_sanity_val_steps": 0}, {"limit_val_batches": 0}])
    def test_leaves_no_trace(self, healthy, quiet_trainer, kwargs):
        with_probe, state = self.fit(quiet_trainer, Counting(healthy), max_epochs=2, **kwargs)
        without, expected = self.fit(quiet_trainer, Counting(healthy), probe=False, max_epochs=2, **kwargs)
        for name, tensor in with_probe.state_dict().items():
            assert torch.equal(tensor, without.state_dict()[name]), name
        assert torch.equal(state[0], expected[0]) and state[1:] == expected[1:]
        assert with_probe.teacher.network.calls == without.teacher.network.calls  # no further forward pass

    @pytest.mark.parametrize("kwargs", [{"fast_dev_run": True}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 1}])
    def test_reports_wherever_the_batches_come_from(self, healthy, quiet_trainer, caplog, kwargs):
        with caplog.at_level("INFO"):
            self.fit(quiet_trainer, healthy, **kwargs)
        assert len(self.messages(caplog)) == 1

    def test_every_fit_reports_once(self, healthy, quiet_trainer, caplog):
        module = DistillModule(DigitsCNN(4), healthy)
        with caplog.at_level("INFO"):
            for expected in (0, 1, 2):  # the first has but one batch
                train, val = self.loaders()
                if expected == 0:
                    quiet_trainer(max_steps=1).fit(module, train)
                else:
                    quiet_trainer().fit(module, train, val)
                assert len(self.messages(caplog)) == expected

    def test_without_labels(self, healthy, quiet_trainer, caplog):
        loader = DataLoader(X[:64], 32)
        with caplog.at_level("INFO"):
            self.fit(quiet_trainer, healthy, loaders=(loader,))
        (line,) = self.messages(caplog)
        assert line.startswith("teacher: not checked: there are no labels; soft targets: entropy")

    def test_never_an_error(self, healthy, quiet_trainer, caplog):
        class Strange(KDLoss):
            temperature = property(lambda self: {"not": "a number"}, lambda self, value: None)

            def forward(self, student, teacher, target=None):
                return F.mse_loss(student, teacher)

        with caplog.at_level("INFO"):
            module, _ = self.fit(quiet_trainer, healthy, soft_loss=Strange())
        assert module.trainer.state.finished and not self.messages(caplog)
