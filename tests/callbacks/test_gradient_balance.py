"""GradientBalance: norms by hand, training to the bit as without it, resumes, processes."""

import json
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DistributedSampler

from kd_lightning import Digits, GradientBalance, InputError, SeedEveryStep, SemiSupervisedDataModule, teach
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import DistillModule, SupervisedModule
from kd_lightning.runs.csv_logger import ResumableCSVLogger, read_metrics
from kd_lightning.teachers.training_checks import gradient_norms


class Recorder(CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.found = []

    def log_metrics(self, metrics, step=None):
        if values := {name: value for name, value in metrics.items() if name.startswith("gradient/")}:
            self.found.append((step, values))


def module(student, teacher, **options):
    options = {"soft_weight": 0.3, "optimizer": lambda p: torch.optim.SGD(p, 0.1)} | options
    return DistillModule(student, teacher, **options)


class ByHand(Callback):
    """Computes the gradients of the first step of each epoch by two backward passes of a copy's losses."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx:
            return
        buffers = {name: value.clone() for name, value in pl_module.student.named_buffers()}
        norms = {}
        for name in ("hard", "soft"):
            pl_module.zero_grad()
            weight, value = pl_module.losses(pl_module.unpack(batch))[name]
            (weight * value).backward()
            grads = [p.grad.double() for p in pl_module.student.parameters()]
            norms[f"gradient/{name}"] = math.sqrt(sum(float((g**2).sum()) for g in grads))
            pl_module.zero_grad()
        for name, value in pl_module.student.named_buffers():
            value.copy_(buffers[name])
        self.found.append(norms)


def test_norms(quiet_trainer, student, teacher, loader, tmp_path):
    logger, hand = Recorder(tmp_path), ByHand()
    quiet_trainer(max_epochs=3, logger=logger, callbacks=[hand, GradientBalance()]).fit(
        module(student, teacher), loader()
    )
    assert [step for step, _ in logger.found] == [0, 3, 6]
    for (_, values), expected in zip(logger.found, hand.found, strict=True):
        assert values == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_to_the_bit(quiet_trainer, student, teacher, loader, tmp_path):
    """Also of networks with dropout and BatchNorm."""
    results = []
    for callbacks in ([], [GradientBalance()]):
        torch.manual_seed(3)
        one = module(nn.Sequential(nn.Dropout(0.3), deepcopy(student)), teacher)
        trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2, logger=Recorder(tmp_path), callbacks=callbacks)
        trainer.fit(one, loader())
        results.append(one.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_module_that_is_left_as_it_was(quiet_trainer, student, teacher, loader, tmp_path):
    one = module(student, teacher)
    quiet_trainer(logger=Recorder(tmp_path), callbacks=[GradientBalance()]).fit(one, loader())
    assert "step_terms" not in vars(one)


class Stop(Callback):
    """Ends the fit in the middle of an epoch, within a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.at:
            raise KeyError("stop")

    def __init__(self, at):
        self.at = at


@pytest.mark.parametrize("at", [3, 4])
def test_exact_resume(at, quiet_trainer, teacher, tmp_path):
    """A resumed run logs what an unbroken one does, whether it was stopped at an epoch's first step or later."""

    def fit(folder, *more, **options):
        torch.manual_seed(0)
        one = module(DigitsCNN(4, dropout=0.2), teacher)
        purge = options.pop("purge", None)
        logger = ResumableCSVLogger(tmp_path / folder, name="a", version="v", purge_step=purge)
        save = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [SeedEveryStep(7), GradientBalance(), save, *more]
        settings = {"max_epochs": 3, "limit_train_batches": 3, "enable_checkpointing": True}
        data = SemiSupervisedDataModule(Digits(), labeled=3, batch_size=16, seed=1)
        quiet_trainer(logger=logger, callbacks=callbacks, **settings).fit(one, data, **options)
        return [
            {k: v for k, v in row.items() if k == "step" or k.startswith("gradient/")}
            for row in read_metrics(tmp_path / folder / "a" / "v" / "metrics.csv")
            if "gradient/hard" in row
        ]

    whole = fit("whole")
    assert [row["step"] for row in whole] == [0, 3, 6]
    with pytest.raises(KeyError):
        fit("broken", Stop(at))
    assert fit("broken", ckpt_path=str(tmp_path / f"broken/step={at}.ckpt"), purge=at) == whole


class Lit(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_taught_module(quiet_trainer, student, teacher, loader, tmp_path):
    """Its norms are those of a DistillModule."""
    found = []
    for one in (module(deepcopy(student), teacher), teach(Lit(deepcopy(student)), teacher, soft_weight=0.3)):
        logger = Recorder(tmp_path)
        quiet_trainer(max_epochs=2, logger=logger, callbacks=[GradientBalance()]).fit(one, loader())
        found.append([values for _, values in logger.found])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_without_a_teacher(quiet_trainer, student, loader, tmp_path):
    logger = Recorder(tmp_path)
    quiet_trainer(logger=logger, callbacks=[GradientBalance()]).fit(SupervisedModule(student), loader())
    assert [[*values] for _, values in logger.found] == [["gradient/hard"]]


def test_half_precision(quiet_trainer, student, teacher, loader, tmp_path):
    logger = Recorder(tmp_path)
    quiet_trainer(logger=logger, precision="bf16-mixed", callbacks=[GradientBalance()]).fit(
        module(student, teacher), loader()
    )
    assert all(0 < value < math.inf for value in logger.found[0][1].values())


class Reentrant(nn.Module):
    """Computes its layers again in the backward pass."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return checkpoint(self.network, x.requires_grad_(), use_reentrant=True)


def test_a_network_without_single_gradients(quiet_trainer, student, teacher, loader, tmp_path):
    """It trains as without the callback, and a warning names the reason once."""
    logger = Recorder(tmp_path)
    trainer = quiet_trainer(max_epochs=2, logger=logger, callbacks=[GradientBalance()])
    with pytest.warns(UserWarning, match="GradientBalance: no gradient of a single term: ") as warned:
        trainer.fit(module(Reentrant(student), teacher), loader())
    assert trainer.global_step == 6 and not logger.found
    assert len([one for one in warned if "GradientBalance" in str(one.message)]) == 1


def test_refused(quiet_trainer, student, loader):
    with pytest.raises(InputError, match="GradientBalance needs a module of kd_lightning, or one .* got Lit"):
        quiet_trainer(callbacks=[GradientBalance()]).fit(Lit(student), loader())
    trainer = quiet_trainer()
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(InputError, match="shards the weights, but GradientBalance needs whole ones"):
        GradientBalance().setup(trainer, SupervisedModule(student), "fit")


SCRIPT = """
import json
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import GradientBalance
from kd_lightning.modules import DistillModule
from kd_lightning.models import DigitsCNN


class Recorder(CSVLogger):
    found = []

    def log_metrics(self, metrics, step=None):
        self.found += [values] if (values := {k: v for k, v in metrics.items() if k.startswith("gradient/")}) else []


world = int(sys.argv[1])
torch.manual_seed(0)
student, teacher = DigitsCNN(4).eval(), DigitsCNN(8)
x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
module = DistillModule(student, teacher, soft_weight=0.3, optimizer=lambda p: torch.optim.SGD(p, 0.1))
logger = Recorder(".")
options = {"accelerator": "cpu", "devices": world, "strategy": "ddp" if world > 1 else "auto", "max_epochs": 2}
trainer = Trainer(**options, logger=logger, callbacks=[GradientBalance()], enable_progress_bar=False,
                  enable_checkpointing=False, enable_model_summary=False)
trainer.fit(module, DataLoader(TensorDataset(x, y), 4))
if trainer.is_global_zero:
    with open(f"found_{world}.json", "w") as file:
        json.dump([Recorder.found, trainer.global_step], file)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes(processes, tmp_path, monkeypatch):
    """Each epoch is logged once, and the mean over the shares is the mean of the two first batches' norms."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    processes.run_ranks(
        ["train.py", "2"], PL_GLOBAL_SEED="0"
    )  # Lightning's sampler reads it; an earlier test may set it
    found, steps = json.loads((tmp_path / "found_2.json").read_text())
    assert steps == 4 and len(found) == 2
    torch.manual_seed(0)
    student, teacher = DigitsCNN(4).eval(), DigitsCNN(8)
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    norms = []
    for rank in range(2):
        rows = [*DistributedSampler(range(16), 2, rank)][:4]  # Lightning shuffles the shares
        one = module(student, teacher)
        terms = one.losses(one.unpack((x[rows], y[rows])))
        norms.append(gradient_norms(terms, [*student.parameters()]))
    for name, value in found[0].items():
        expected = sum(one[name.removeprefix("gradient/")] for one in norms) / 2
        assert value == pytest.approx(expected, rel=1e-4)
