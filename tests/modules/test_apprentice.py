"""ApprenticeModule: the paper's objective by hand, what each network learns, optimisers, checkpoints, command line."""

import copy
import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ActivationCalibration,
    ApprenticeModule,
    Digits,
    InputError,
    SemiSupervisedDataModule,
    SoftWeightAnnealing,
    SupervisedModule,
    Teacher,
    load_weights,
)
from kd_lightning.__main__ import main
from kd_lightning.cli.complete_config import drop_missing_teacher
from kd_lightning.losses import EarlyLearningLoss, KDLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.calibration import activation_ranges, is_calibrated
from kd_lightning.quantization.layers import quantize
from kd_lightning.teachers import ExportedNetwork

NAN = float("nan")
SCHEMES = ("joint", "fixed_teacher", "finetune")
LABELS = torch.tensor([3, -100, 1, 4, -100, -100, 9, 2, 6, -100, -100, -100])  # in batches of 4: 3, 2 and 1


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[: len(x)] + 0 * x.sum()


def by_hand(task, student, teacher, y, alpha, beta, gamma, mutual):
    """The objective and its gradients on both networks' logits, from the formula, in float64.

    H(z_T, p_A) less the teacher's entropy, as everywhere here, which has the same gradient.
    """
    s, t, y = (a.double().numpy() for a in (student, teacher, y))

    def probabilities(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True) if task == "multiclass" else 1 / (1 + np.exp(-z))

    p, q = probabilities(s), probabilities(t)
    known = ~np.isnan(y) & (y != -100)
    if task == "multiclass":
        target, mask = np.eye(s.shape[1])[np.where(known, y, 0).astype(int)], known[:, None]
    else:
        target, mask = np.where(known, y, 0), known
    count, entries = known.sum(), len(s) if task == "multiclass" else s.size

    def cross_entropy(a, b):
        return -a * np.log(b) - (0 if task == "multiclass" else (1 - a) * np.log(1 - b))

    def hard(p):
        return (mask * cross_entropy(target, p)).sum() / count, mask * (p - target) / count

    def soft(p, q):
        return (cross_entropy(q, p) - cross_entropy(q, q)).sum() / entries, (p - q) / entries

    value = beta * hard(p)[0] + gamma * soft(p, q)[0] + alpha * hard(q)[0]
    of_student, of_teacher = beta * hard(p)[1] + gamma * soft(p, q)[1], alpha * hard(q)[1]
    if mutual:
        value, of_teacher = value + alpha * gamma * soft(q, p)[0], of_teacher + alpha * gamma * soft(q, p)[1]
    return value, of_student, of_teacher


CASES = {
    "multiclass": ((5, 4), torch.tensor([0, -100, 3, 1, -100])),
    "multilabel": ((3, 4), torch.tensor([[0, 1, 1, 0], [NAN, NAN, NAN, NAN], [1, NAN, 0, 1]])),
    "binary": ((4,), torch.tensor([0, 1, -100, 1])),
}


def logits_for(task):
    shape, y = CASES[task]
    torch.manual_seed(0)
    return torch.randn(shape).double() * 2, torch.randn(shape).double() * 2, y


class TestObjective:
    @pytest.mark.parametrize("task", CASES)
    @pytest.mark.parametrize("scheme", [*SCHEMES, "mutual"])
    @pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.5), (0.3, 0.8), (2.0, 0.0), (1.0, 1.0)])
    def test_by_hand(self, task, scheme, alpha, gamma):
        student, teacher, y = logits_for(task)
        apprentice, master = Fixed(student), Fixed(teacher)
        how = {"scheme": "joint", "mutual": True} if scheme == "mutual" else {"scheme": scheme}
        module = ApprenticeModule(apprentice, master, **how, task=task, teacher_weight=alpha, soft_weight=gamma)
        loss = module.training_step((torch.zeros(len(y), 2).double(), y), 0)  # without a Trainer
        loss.backward()
        learns = scheme in ("joint", "mutual")
        expected = by_hand(task, student, teacher, y, alpha * learns, 1 - gamma, gamma, scheme == "mutual")
        assert loss.item() == pytest.approx(expected[0], rel=1e-9)
        assert apprentice.logits.grad.numpy() == pytest.approx(expected[1], abs=1e-9)
        if learns:
            assert master.logits.grad.numpy() == pytest.approx(expected[2], abs=1e-9)
        else:
            assert master.logits.grad is None
            assert not master.logits.requires_grad

    def test_defaults_are_the_papers(self):
        student, teacher, y = logits_for("multiclass")
        module = ApprenticeModule(Fixed(student), Fixed(teacher))
        loss = module.training_step((torch.zeros(5, 2).double(), y), 0)
        assert loss.item() == pytest.approx(by_hand("multiclass", student, teacher, y, 1.0, 0.5, 0.5, False)[0])

    def test_binary_logits_of_either_shape(self):
        student, teacher, y = logits_for("binary")
        module = ApprenticeModule(Fixed(student[:, None]), Fixed(teacher), task="binary")
        loss = module.training_step((torch.zeros(4, 2).double(), y), 0)
        assert loss.item() == pytest.approx(by_hand("binary", student, teacher, y, 1.0, 0.5, 0.5, False)[0])

    @pytest.mark.parametrize("task", CASES)
    @pytest.mark.parametrize("mutual", [False, True])
    @pytest.mark.parametrize("labels", ["missing", "none"])
    def test_without_labels(self, task, mutual, labels):
        """The soft term stays; the teacher has nothing to learn from, and gets no NaN."""
        student, teacher, y = logits_for(task)
        missing = torch.full(y.shape, NAN if y.is_floating_point() else -100)
        apprentice, master = Fixed(student), Fixed(teacher)
        x = torch.zeros(len(y), 2).double()
        module = ApprenticeModule(apprentice, master, task=task, mutual=mutual)
        loss = module.training_step((x, missing) if labels == "missing" else x, 0)
        loss.backward()
        soft = [by_hand(task, student, teacher, y, 1.0, 0.0, gamma, mutual) for gamma in (0.5, 0.0)]
        value, of_student, of_teacher = (one - other for one, other in zip(*soft, strict=True))
        assert loss.item() == pytest.approx(value)
        assert apprentice.logits.grad.numpy() == pytest.approx(of_student, abs=1e-9)
        assert master.logits.grad.numpy() == pytest.approx(of_teacher, abs=1e-9)

    def test_losses_of_ones_own(self):
        seen = []

        class Soft(nn.Module):
            def forward(self, student, teacher, target):
                seen.append((student.requires_grad, teacher.requires_grad, target.tolist()))
                return student.sum() * 0 + 3

        class Hard(nn.Module):
            def forward(self, logits, target):
                return logits.sum() * 0 + 5

        module = ApprenticeModule(
            Fixed(torch.zeros(3, 2)),
            Fixed(torch.ones(3, 2)),
            mutual=True,
            soft_loss=Soft(),
            hard_loss=Hard(),
            soft_weight=0.25,
            teacher_weight=2.0,
        )
        loss = module.training_step((torch.zeros(3, 1), torch.tensor([0, -100, 1])), 0)
        assert loss.item() == 0.75 * 5 + 0.25 * 3 + 2 * (5 + 0.25 * 3)
        assert seen == [(True, False, [0, -100, 1])] * 2


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"scheme": "D"}, "scheme must be one of joint, fixed_teacher, finetune, got 'D'"),
            (
                {"scheme": "fixed_teacher", "teacher_optimizer": Adam},
                "teacher_optimizer is for scheme joint.*, got",
            ),
            ({"scheme": "finetune", "mutual": True}, "mutual is for scheme joint.*got scheme finetune"),
            ({"initial_weights": "a.pt"}, "initial_weights are for scheme finetune, got scheme joint"),
            ({"scheme": "fixed_teacher", "initial_weights": "a.pt"}, "for scheme finetune, got scheme fixed_teacher"),
            ({"scheme": "finetune", "initial_weights": "gone.pt"}, "no weights file at gone.pt"),
            ({"teacher_weight": 0.0}, "teacher_weight must be above 0, got 0.0"),
            ({"teacher_weight": -1.0}, "teacher_weight must be above 0, got -1.0"),
            ({"teacher_weight": NAN}, "teacher_weight must be above 0, got nan"),
            ({"soft_weight": 1.1}, r"soft_weight must lie in \[0, 1\], got 1.1"),
            ({"task": "binary", "soft_loss": KDLoss()}, "soft_loss is for the multiclass task"),
        ],
    )
    def test_arguments(self, student, teacher, arguments, message):
        with pytest.raises(InputError, match=message):
            ApprenticeModule(student, teacher, **arguments)

    def test_teachers_that_cannot_learn(self, student, teacher):
        with pytest.raises(InputError, match="hard_loss: EarlyLearningLoss stores values of samples"):
            ApprenticeModule(nn.Linear(2, 2), nn.Linear(2, 2), "joint", hard_loss=EarlyLearningLoss())
        with pytest.raises(InputError, match="teacher and student must be two networks"):
            ApprenticeModule(student, student)
        with pytest.raises(InputError, match="give the network itself, not a frozen Teacher around it"):
            ApprenticeModule(student, Teacher(teacher))  # which freezes it
        with pytest.raises(InputError, match="none of its parameters requires a gradient"):
            ApprenticeModule(student, teacher)

    def test_teacher_with_other_outputs(self, quiet_trainer, loader, student):
        for validation in (loader(), None):
            with pytest.raises(InputError, match=r"got \[9\] from the teacher and \[10\] from the student"):
                quiet_trainer().fit(ApprenticeModule(student, DigitsCNN(8, num_classes=9)), loader(), validation)

    @pytest.mark.parametrize("scheme", SCHEMES[:2])
    def test_training_without_a_teacher(self, quiet_trainer, loader, student, scheme):
        module = ApprenticeModule(student, None, scheme, teacher_optimizer=Adam if scheme == "joint" else None)
        (found,) = quiet_trainer().test(module, loader(), verbose=False)
        assert "test/accuracy" in found
        assert "test/teacher_accuracy" not in found
        with pytest.raises(InputError, match="training needs the teacher; teacher=None is for test and predict alone"):
            quiet_trainer().fit(module, loader())

    def test_optimizers(self, quiet_trainer, loader, student, teacher):
        for arguments, message in {
            "optimizer": "^optimizer: Invalid learning rate: -1",
            "teacher_optimizer": "^(optimizer: )?teacher_optimizer: Invalid learning rate: -1",
        }.items():
            given = {"teacher_optimizer": SGD} | {arguments: partial(Adam, lr=-1)}
            with pytest.raises(InputError, match=message):
                quiet_trainer().fit(ApprenticeModule(student, teacher, **given), loader())
        module = ApprenticeModule(student, teacher, teacher_optimizer=torch.optim.LBFGS)
        with pytest.raises(InputError, match="LBFGS evaluates the loss several times"):
            quiet_trainer().fit(module, loader())

    def test_callback_sets_a_bad_weight(self, student, teacher):
        module = ApprenticeModule(student, teacher)
        module.soft_weight = 1.5
        with pytest.raises(InputError, match=r"soft_weight must lie in \[0, 1\], got 1.5"):
            module.training_step(torch.zeros(2, 1, 8, 8), 0)


def state_equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class TestTeacherLearnsAlone:
    """In scheme A the soft term does not reach the teacher: to the bit it learns what it learns by itself."""

    def test_gradients(self, loader, student, teacher):
        alone = copy.deepcopy(teacher)
        batch = next(iter(loader(labels=LABELS)))
        ApprenticeModule(student, teacher, soft_weight=0.9).training_step(batch, 0).backward()
        SupervisedModule(alone).training_step(batch, 0).backward()
        for mine, other in zip(teacher.parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)

    @pytest.mark.parametrize("kind", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.01)], ids=["SGD", "Adam"])
    @pytest.mark.parametrize("separate", [True, False])
    def test_weights_after_several_epochs(self, quiet_trainer, loader, student, teacher, kind, separate):
        alone, before = copy.deepcopy(teacher), copy.deepcopy(teacher)
        own = {"optimizer": partial(Adam, lr=0.02), "teacher_optimizer": kind} if separate else {"optimizer": kind}
        module = ApprenticeModule(student, teacher, soft_weight=0.9, **own)
        quiet_trainer(max_epochs=3).fit(module, loader(labels=LABELS))
        quiet_trainer(max_epochs=3).fit(SupervisedModule(alone, optimizer=kind), loader(labels=LABELS))
        assert state_equal(teacher, alone)
        assert not torch.equal(teacher[-1].weight, before[-1].weight)

    def test_not_in_mutual_learning(self, quiet_trainer, loader, student, teacher):
        alone = copy.deepcopy(teacher)
        quiet_trainer().fit(ApprenticeModule(student, teacher, mutual=True), loader())
        quiet_trainer().fit(SupervisedModule(alone), loader())
        assert not state_equal(teacher, alone)

    def test_teacher_weight_scales_its_steps(self, quiet_trainer, loader, student, teacher):
        alone = copy.deepcopy(teacher)
        module = ApprenticeModule(student, teacher, teacher_weight=4.0, optimizer=partial(SGD, lr=0.01))
        quiet_trainer().fit(module, loader())
        quiet_trainer().fit(SupervisedModule(alone, optimizer=partial(SGD, lr=0.04)), loader())
        for mine, other in zip(teacher.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(mine, other, atol=1e-6)

    def test_frozen_parts_stay(self, quiet_trainer, loader, student, teacher):
        teacher[0].weight.requires_grad_(False)
        first, last = teacher[0].weight.clone(), teacher[-1].weight.clone()
        for own in (None, Adam):
            module = ApprenticeModule(student, teacher, teacher_optimizer=own)
            quiet_trainer().fit(module, loader())
            assert torch.equal(teacher[0].weight, first)
            assert not torch.equal(teacher[-1].weight, last)


class TestOptimizers:
    @pytest.mark.parametrize("mutual", [False, True])
    @pytest.mark.parametrize("kinds", [(SGD, Adam), (Adam, SGD)], ids=["SGD, Adam", "Adam, SGD"])
    def test_written_out(self, quiet_trainer, loader, student, teacher, kinds, mutual):
        """Two optimisers, one scheduler, accumulation and clipping, as a plain loop; mutual: deep mutual learning."""
        mine, theirs = copy.deepcopy(student), copy.deepcopy(teacher)
        first, second = partial(kinds[0], lr=0.05), partial(kinds[1], lr=0.02)
        module = ApprenticeModule(
            student,
            teacher,
            soft_weight=0.4,
            teacher_weight=0.7,
            mutual=mutual,
            optimizer=first,
            teacher_optimizer=second,
            lr_scheduler=partial(StepLR, step_size=1, gamma=0.5),
        )
        trainer = quiet_trainer(max_epochs=3, accumulate_grad_batches=2, gradient_clip_val=0.5)
        trainer.fit(module, loader(16))

        optimizers = first(mine.parameters()), second(theirs.parameters())
        clipped = 0
        for epoch in range(3):
            optimizers[0].param_groups[0]["lr"], optimizers[1].param_groups[0]["lr"] = 0.05 / 2**epoch, 0.02 / 2**epoch
            for number, (x, y) in enumerate(loader(16)):
                s, t = mine.train()(x), theirs.train()(x)
                log_s, log_t = s.log_softmax(1), t.log_softmax(1)
                loss = 0.6 * F.cross_entropy(s, y) + 0.7 * F.cross_entropy(t, y)
                fixed = log_t.detach()
                loss = loss + 0.4 * (fixed.exp() * (fixed - log_s)).sum() / len(x)
                if mutual:
                    fixed = log_s.detach()
                    loss = loss + 0.7 * 0.4 * (fixed.exp() * (fixed - log_t)).sum() / len(x)
                (loss / 2).backward()
                if number % 2:
                    norm = nn.utils.clip_grad_norm_([*mine.parameters(), *theirs.parameters()], 0.5)
                    clipped += norm > 0.5
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        assert clipped
        assert trainer.global_step == 6
        for learned, expected in ((student, mine), (teacher, theirs)):
            for one, two in zip(learned.parameters(), expected.parameters(), strict=True):
                assert torch.allclose(one, two, atol=1e-4)  # Adam makes much of gradients of about 0

    @pytest.mark.parametrize("own", [None, Adam])
    def test_every_parameter_once(self, student, teacher, own):
        module = ApprenticeModule(student, teacher, teacher_optimizer=own)
        groups = module.configure_optimizers().param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in [*student.parameters(), *teacher.parameters()])
        assert len(groups) == (1 if own is None else 2)

    def test_plateau(self, quiet_trainer, loader, student, teacher):
        module = ApprenticeModule(
            student,
            teacher,
            optimizer=partial(SGD, lr=0.01),
            teacher_optimizer=partial(Adam, lr=0.001),
            lr_scheduler=partial(ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.9),
        )
        trainer = quiet_trainer(max_epochs=3)
        trainer.fit(module, loader(), loader())
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == pytest.approx([1e-4, 1e-5])


MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


class StoppedError(Exception):
    pass


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise StoppedError


def one_cycle(optimizer):
    return OneCycleLR(optimizer, [0.05, 0.02], total_steps=20, cycle_momentum=False)


def _states_equal(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_states_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_states_equal, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


FAST_RESUMES = {("SGD, Adam", True, 5), ("Adam, SGD", False, 1), ("one", True, 5)}  # each pair, schedule and step once


class TestResume:
    def fit(self, quiet_trainer, folder, kinds, scheduler, stop=None, path=None):
        torch.manual_seed(0)
        module = ApprenticeModule(
            quantize(DigitsCNN(4), 4),
            DigitsCNN(8),
            optimizer=kinds[0],
            teacher_optimizer=kinds[1],
            lr_scheduler=scheduler,
            lr_interval="step",
        )
        # 240 training images: seven batches in each epoch, four steps
        data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=36, seed=1)
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [ActivationCalibration(), saves] + ([] if stop is None else [Stop(stop)])
        trainer = quiet_trainer(
            max_epochs=3,
            limit_val_batches=1,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            enable_checkpointing=True,
            callbacks=callbacks,
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path)
        except StoppedError:
            assert stop is not None
        return module, trainer.optimizers[0].state_dict()

    @pytest.mark.parametrize(
        ("kinds", "scheduler", "step"),
        [
            pytest.param(
                kinds,
                scheduler,
                step,
                id=f"{name}-{'one_cycle' if scheduler else None}-{step}",
                marks=[] if (name, bool(scheduler), step) in FAST_RESUMES else pytest.mark.slow,
            )
            for name, kinds in {
                "SGD, Adam": (MOMENTUM, Adam),
                "Adam, SGD": (Adam, MOMENTUM),
                "one": (Adam, None),
            }.items()
            for scheduler in (None, one_cycle)
            for step in (1, 5)
        ],
    )
    def test_bit_for_bit(self, quiet_trainer, tmp_path, kinds, scheduler, step):
        if kinds[1] is None and scheduler is not None:
            scheduler = partial(OneCycleLR, max_lr=0.05, total_steps=20)
        whole, optimizer = self.fit(quiet_trainer, tmp_path / "whole", kinds, scheduler)
        stopped, _ = self.fit(quiet_trainer, tmp_path / "parts", kinds, scheduler, stop=step)
        path = tmp_path / "parts" / f"step={step}.ckpt"
        assert path.is_file()
        resumed, after = self.fit(quiet_trainer, tmp_path / "parts", kinds, scheduler, path=path)
        assert state_equal(resumed, whole)
        assert not state_equal(stopped, whole)
        assert _states_equal(after, optimizer)
        if kinds[1] is not None:
            assert {frozenset(state) for state in after["state"].values()} == {
                frozenset({"momentum_buffer"}),
                frozenset({"step", "exp_avg", "exp_avg_sq"}),
            }


class TestJointCheckpoint:
    @pytest.fixture
    def trained(self, quiet_trainer, loader, tmp_path, student, teacher):
        trainer = quiet_trainer(max_epochs=2)
        module = ApprenticeModule(student, teacher, soft_weight=0.4, teacher_weight=2.0, mutual=True)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        return module, tmp_path / "c.ckpt"

    def test_teacher_loads_alone(self, trained):
        module, path = trained
        loaded = load_weights(DigitsCNN(8), path, prefix="teacher.")
        assert state_equal(loaded, module.teacher)
        assert state_equal(load_weights(DigitsCNN(4), path), module.student)
        assert not torch.load(path, weights_only=True).get("teacher_fingerprint")

    def test_without_the_teacher(self, quiet_trainer, loader, trained):
        module, path = trained
        expected = quiet_trainer().test(module, loader(), verbose=False)[0]
        for network in (None, DigitsCNN(8)):
            again = ApprenticeModule(DigitsCNN(4), network)
            found = quiet_trainer().test(again, loader(), ckpt_path=path, verbose=False)[0]
            assert ("test/teacher_accuracy" in found) == (network is not None)
            assert found == {name: expected[name] for name in found}
            assert state_equal(again.student, module.student)
        predicted = quiet_trainer().predict(ApprenticeModule(DigitsCNN(4), None), loader(), ckpt_path=path)
        assert torch.cat(predicted).sum(1) == pytest.approx(torch.ones(12))

    @pytest.mark.parametrize("with_teacher", [True, False])
    def test_reloads(self, trained, with_teacher):
        module, path = trained
        network = DigitsCNN(8) if with_teacher else None
        again = ApprenticeModule.load_from_checkpoint(path, student=DigitsCNN(4), teacher=network, weights_only=True)
        assert state_equal(again.student, module.student)
        assert again.teacher is None or state_equal(again.teacher, module.teacher)
        assert (again.scheme, again.soft_weight, again.teacher_weight, again.mutual) == ("joint", 0.4, 2.0, True)

    def test_resuming_without_the_teacher(self, quiet_trainer, loader, trained):
        module = ApprenticeModule(DigitsCNN(4), None, teacher_optimizer=SGD)
        with pytest.raises(InputError, match="training needs the teacher"):
            quiet_trainer(max_epochs=3).fit(module, loader(), ckpt_path=trained[1])

    def test_teacher_of_another_shape(self, quiet_trainer, loader, trained):
        with pytest.raises(InputError, match="the checkpoint does not fit ApprenticeModule: .*teacher"):
            quiet_trainer().test(ApprenticeModule(DigitsCNN(4), DigitsCNN(6)), loader(), ckpt_path=trained[1])


class TestFixedTeacher:
    @pytest.mark.parametrize("scheme", SCHEMES[1:])
    def test_frozen_and_out_of_the_checkpoint(self, quiet_trainer, loader, tmp_path, student, teacher, scheme):
        before = copy.deepcopy(teacher)
        torch.save(student.state_dict(), tmp_path / "float.pt")
        how = {"scheme": scheme} | ({"initial_weights": tmp_path / "float.pt"} if scheme == "finetune" else {})
        modes = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                modes.append((module.training, teacher.training))

        trainer = quiet_trainer(callbacks=[Watch()])
        trainer.fit(ApprenticeModule(student, teacher, **how), loader())
        assert state_equal(teacher, before)
        assert modes == [(True, False)] * 3
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        saved = torch.load(tmp_path / "c.ckpt", weights_only=True)
        assert all(key.startswith("student.") for key in saved["state_dict"])
        assert saved["teacher_fingerprint"] == Teacher(before).fingerprint()
        trained, other = copy.deepcopy(student), copy.deepcopy(teacher)
        other[-1].bias.data += 1e-6
        with pytest.raises(InputError, match="teacher: the checkpoint was trained with another teacher"):
            quiet_trainer(max_epochs=2).fit(
                ApprenticeModule(student, other, **how), loader(), ckpt_path=tmp_path / "c.ckpt"
            )
        again = ApprenticeModule(DigitsCNN(4), None, scheme)
        quiet_trainer().test(again, loader(), ckpt_path=tmp_path / "c.ckpt", verbose=False)
        assert state_equal(again.student, trained)


class TestFinetune:
    def test_starts_from_the_file(self, tmp_path, student, teacher):
        torch.save(student.state_dict(), tmp_path / "float.pt")
        torch.manual_seed(9)
        other = DigitsCNN(4)
        for lowered in (other, quantize(other, 4), quantize(other, "ternary", None)):
            module = ApprenticeModule(lowered, teacher, "finetune", initial_weights=tmp_path / "float.pt")
            state = module.student.state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in student.state_dict().items())
            assert set(state) - set(student.state_dict()) == {
                key for key in state if key.endswith("scaling_impl.value")
            }

    def test_refuses_to_start_from_nothing(self, quiet_trainer, loader, student, teacher):
        module = ApprenticeModule(student, teacher, "finetune")
        quiet_trainer().test(module, loader(), verbose=False)
        quiet_trainer().validate(module, loader(), verbose=False)
        with pytest.raises(InputError, match="scheme finetune needs initial_weights: the file of the student's"):
            quiet_trainer().fit(module, loader())

    def test_weights_of_another_network(self, tmp_path, student, teacher):
        torch.save(student.state_dict(), tmp_path / "float.pt")
        with pytest.raises(InputError, match="weights in .*float.pt do not fit DigitsCNN"):
            ApprenticeModule(quantize(DigitsCNN(6), 4), teacher, "finetune", initial_weights=tmp_path / "float.pt")


class TestCharts:
    def test_teacher_accuracy_is_never_stale(self, quiet_trainer, student, teacher):
        """Batches have an index, so a frozen teacher's logits would be cached."""
        data = SemiSupervisedDataModule(Digits(), labeled=20, batch_size=64, val_size=0.3, seed=1)
        found, expected = [], []

        class Watch(Callback):
            def on_validation_end(self, trainer, module):
                found.append(trainer.callback_metrics["val/teacher_accuracy"].item())
                with torch.no_grad():
                    pairs = [(module.teacher(b.x).argmax(1), b.y) for b in trainer.datamodule.val_dataloader()]
                right = torch.cat([guess == y for guess, y in pairs])
                expected.append(right.float().mean().item())

        module = ApprenticeModule(student, teacher, teacher_optimizer=partial(Adam, lr=0.01))
        trainer = quiet_trainer(max_epochs=3, callbacks=[Watch()], num_sanity_val_steps=-1)
        trainer.fit(module, datamodule=data)
        assert found == pytest.approx(expected)
        assert len(set(found)) == 4

    def test_names(self, quiet_trainer, loader, student, teacher):
        trainer = quiet_trainer()
        trainer.fit(ApprenticeModule(student, teacher, mutual=True), loader(), loader())
        found = set(trainer.callback_metrics)
        terms = ("hard", "soft", "teacher_hard", "teacher_soft", "loss")
        assert found >= {f"train/{name}" for name in terms} | {"soft_weight", "val/teacher_accuracy", "val/agreement"}

    def test_means_over_labels(self, quiet_trainer):
        """Both hard terms are means over the labels, however these lie among the batches."""
        torch.manual_seed(0)
        s, t = torch.randn(8, 4), torch.randn(8, 4)
        y = torch.tensor([0, -100, -100, 1, 2, 3, -100, -100])  # 1, 1, 2 and no label in a batch

        class Table(nn.Module):
            """Logits by the row's number."""

            def __init__(self, logits):
                super().__init__()
                self.logits = nn.Parameter(logits)

            def forward(self, x):
                return self.logits[x[:, 0].long()]

        data = DataLoader(TensorDataset(torch.arange(8.0)[:, None], y), batch_size=2)
        trainer = quiet_trainer()
        trainer.fit(ApprenticeModule(Table(s), Table(t), optimizer=partial(SGD, lr=0.0)), data)
        found = trainer.callback_metrics
        assert found["train/hard"].item() == pytest.approx(F.cross_entropy(s, y).item(), rel=1e-5)
        assert found["train/teacher_hard"].item() == pytest.approx(F.cross_entropy(t, y).item(), rel=1e-5)

    def test_annealing(self, quiet_trainer, loader, student, teacher):
        seen = []

        class Noting(ApprenticeModule):
            def losses(self, batch):
                terms = super().losses(batch)
                seen.append({name: term.weight for name, term in terms.items()})
                return terms

        trainer = quiet_trainer(max_epochs=3, callbacks=[SoftWeightAnnealing(0.2, 0.8)])
        trainer.fit(Noting(student, teacher, teacher_weight=3.0, mutual=True), loader())
        for weights, soft in zip(seen, np.repeat([0.2, 0.5, 0.8], 3), strict=True):
            expected = {"hard": 1 - soft, "soft": soft, "teacher_hard": 3.0, "teacher_soft": 3 * soft}
            assert weights == pytest.approx(expected)
        assert trainer.callback_metrics["soft_weight"].item() == pytest.approx(0.8)

    @pytest.mark.parametrize("scheme", SCHEMES[:2])
    def test_both_accuracies_in_one_plot(self, quiet_trainer, loader, tmp_path, student, teacher, scheme):
        trainer = quiet_trainer(logger=TensorBoardLogger(tmp_path, "", ""), log_every_n_steps=1)
        trainer.fit(ApprenticeModule(student, teacher, scheme), loader(), loader())
        events = EventAccumulator(str(tmp_path)).Reload()
        (event,) = events.Tensors("custom_scalars__config__")
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        (chart,) = (chart for category in layout.category for chart in category.chart)
        assert [*chart.multiline.tag] == ["val/accuracy", "val/teacher_accuracy"]
        assert set(chart.multiline.tag) <= set(events.Tags()["scalars"])

    def test_a_plot_that_fails_does_not_end_the_training(self, quiet_trainer, loader, tmp_path, student, teacher):
        board = TensorBoardLogger(tmp_path, "", "")
        board.experiment.add_custom_scalars = lambda layout: 1 / 0
        with pytest.warns(UserWarning, match="plot of both accuracies is left out.*ZeroDivisionError"):
            quiet_trainer(logger=board).fit(ApprenticeModule(student, teacher, "joint"), loader())


class TestPrecisionAndAverages:
    def test_weight_averaging_beside_calibration(self, quiet_trainer, loader, student, teacher):
        """The mean of weights and ranges is the one that a loop keeps."""
        module = ApprenticeModule(quantize(student, 4), teacher, optimizer=partial(Adam, lr=0.01))
        means = {}

        class Keep(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                for name, p in module.named_parameters():
                    means[name] = 0.5 * means[name] + 0.5 * p.detach() if name in means else p.detach().clone()

        callbacks = [EMAWeightAveraging(decay=0.5), ActivationCalibration(), Keep()]
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, loader(), loader())
        for name, parameter in module.named_parameters():
            assert torch.allclose(parameter, means[name], atol=1e-6), name
        assert all(0 < value.item() < 7.9 for value in activation_ranges(module.student).values())

    @pytest.mark.parametrize("scheme", SCHEMES[:2])
    def test_bf16_mixed(self, quiet_trainer, loader, student, teacher, scheme):
        module = ApprenticeModule(quantize(student, 4), teacher, scheme)
        trainer = quiet_trainer(precision="bf16-mixed", callbacks=[ActivationCalibration()])
        trainer.fit(module, loader(), loader())
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
        assert is_calibrated(module.student)


class TestCommandLine:
    @pytest.fixture
    def written(self, config):
        """The tiny configuration, for each scheme; the student is quantised."""

        def write(scheme):
            config["name"] = scheme
            config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 1, "limit_test_batches": 1}
            config["model"]["class_path"] = "ApprenticeModule"
            arguments = config["model"]["init_args"]
            arguments["scheme"] = scheme
            lowered = {"model": {"class_path": "DigitsCNN", "init_args": {"width": 4}}, "weight_bits": 4}
            arguments["student"] = {"class_path": "kd_lightning.quantization.quantize", "init_args": lowered}
            if scheme == "joint":
                arguments["teacher"] = {"class_path": "DigitsCNN", "init_args": {"width": 8}}
                arguments["teacher_optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
            if scheme == "finetune":
                torch.save(DigitsCNN(4).state_dict(), "float.pt")
                arguments["initial_weights"] = "float.pt"
            Path("c.yaml").write_text(yaml.safe_dump(config))
            return ["--config", "c.yaml"]

        return write

    @pytest.mark.parametrize("scheme", ["joint", pytest.param("finetune", marks=pytest.mark.slow)])
    def test_fit_leaves_ranges_and_test_needs_no_files(self, written, capsys, scheme):
        arguments = written(scheme)
        main(["fit", *arguments])
        folder = Path("runs", scheme, "version_0")
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        student = quantize(DigitsCNN(4), 4)
        assert not is_calibrated(student)
        student.load_state_dict({k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")})
        ranges = activation_ranges(student)
        assert len(ranges) == 2
        assert all(value.item() != 8.0 for value in ranges.values())
        student.load_state_dict(load_file(folder / "student.safetensors"))
        assert all(value.item() != 8.0 for value in activation_ranges(student).values())
        if scheme == "joint":
            load_weights(DigitsCNN(8), folder / "checkpoints" / "last.ckpt", prefix="teacher.")
        with_files = self.measured(arguments, folder)
        for name in ("teacher.pt", "float.pt"):
            Path(name).unlink(missing_ok=True)
        without = self.measured(arguments, folder)
        assert without["test/accuracy"] == with_files["test/accuracy"]
        assert ("test/teacher_accuracy" in without) == (scheme == "joint")
        capsys.readouterr()

    def measured(self, arguments, folder):
        main(["test", *arguments, "--ckpt_path", "last"])
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("test/accuracy")]
        return {name: float(value) for name, value in rows[-1].items() if value and name.startswith("test/")}

    def test_missing_initial_weights_stop_a_fit(self, written, fails):
        arguments = written("finetune")
        Path("float.pt").unlink()
        assert "no weights file at float.pt" in fails("fit", *arguments)
        assert "scheme finetune needs initial_weights" in fails("fit", *arguments, "--model.initial_weights", "null")

    def test_doctor_weighs_the_students_terms_alone(self, written, capsys):
        main(["doctor", *written("joint"), "--model.mutual", "true"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "norms on the student" in line)
        assert "hard" in line
        assert "soft" in line
        assert "teacher" not in line


def test_own_module_with_initial_weights_of_another_kind():
    """The command line drops files that are gone, and nothing else of that name."""
    given = Namespace(model=Namespace(init_args=Namespace(initial_weights=0.5)))
    drop_missing_teacher(given)
    assert given.model.init_args.initial_weights == 0.5


class WithHead(nn.Module):
    """A teacher with an auxiliary head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.main, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return {"out": self.main(x), "aux": self.aux(x)}


class TestJointTeacher:
    X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, -100, 1, 0])

    def test_inputs_of_its_own(self):
        """``teacher_inputs`` of a batch are those of a teacher that trains, too."""
        torch.manual_seed(0)
        student, teacher = nn.Linear(4, 3), nn.Linear(2, 3)
        module = ApprenticeModule(student, teacher, soft_weight=0.5)
        own = self.X[:, :2] + 1
        loss = module.training_step({"x": self.X, "label": self.Y, "teacher_inputs": own}, 0)
        z, t = student(self.X), teacher(own)
        expected = F.cross_entropy(t, self.Y) + 0.5 * F.cross_entropy(z, self.Y) + 0.5 * KDLoss(1.0)(z, t.detach())
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert teacher.weight.grad.abs().max() > 0
        module.eval()
        module.validation_step({"x": self.X, "label": self.Y, "teacher_inputs": own}, 0)

    @pytest.mark.parametrize("weight", [0.0, 0.25])
    def test_auxiliary_heads_learn(self, weight):
        torch.manual_seed(0)
        student, teacher = nn.Linear(4, 3), WithHead()
        module = ApprenticeModule(student, teacher, teacher_weight=2.0, soft_weight=0.5, auxiliary_weight=weight)
        loss = module.training_step((self.X, self.Y), 0)
        z, t = student(self.X), teacher.main(self.X)
        expected = 2 * F.cross_entropy(t, self.Y) + 0.5 * (F.cross_entropy(z, self.Y) + KDLoss(1.0)(z, t.detach()))
        expected = expected + 2 * weight * F.cross_entropy(teacher.aux(self.X), self.Y)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert (teacher.aux.weight.grad is None) == (weight == 0)

    def test_a_file_is_no_network(self):
        with pytest.raises(InputError, match="teacher must be a network, got str"):
            ApprenticeModule(nn.Linear(4, 3), "net.pt2", scheme="joint")

    def test_programs_cannot_train(self):
        program = torch.export.export(nn.Linear(4, 3), (self.X,))
        for form in (program, program.module(), ExportedNetwork(program)):
            with pytest.raises(InputError, match="scheme joint trains it, but a program of torch.export stays in eval"):
                ApprenticeModule(nn.Linear(4, 3), form)
        ApprenticeModule(nn.Linear(4, 3), program, "fixed_teacher")
