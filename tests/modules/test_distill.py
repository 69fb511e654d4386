"""DistillModule: the objective by hand, what is logged and cached, and resuming."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Digits,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    SeedEveryStep,
    SemiSupervisedDataModule,
    SoftWeightAnnealing,
    Teacher,
)
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN

NAN = float("nan")


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[: len(x)] + 0 * x.sum()


class Counting(nn.Module):
    """Counts its forwards."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def by_hand(task, student, teacher, y, temperature):
    """Hard and soft term in float64, entry by entry."""
    s, t, y = (a.double().numpy() for a in (student, teacher, y))
    if task == "multiclass":
        p, q, r = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (s, s / temperature, t / temperature))
        hard = [-np.log(p[i, int(c)]) for i, c in enumerate(y) if c != -100]
        soft = [sum(r[i] * np.log(r[i] / q[i])) for i in range(len(s))]
    else:
        p, q, r = (1 / (1 + np.exp(-z)) for z in (s, s / temperature, t / temperature))
        known = [at for at in np.ndindex(y.shape) if not np.isnan(y[at]) and y[at] != -100]
        hard = [-np.log(p[at] if y[at] else 1 - p[at]) for at in known]
        soft = r * np.log(r / q) + (1 - r) * np.log((1 - r) / (1 - q))
    return np.mean(hard), temperature**2 * np.mean(soft)


CASES = {
    "multiclass": ((5, 4), torch.tensor([0, -100, 3, 1, -100])),
    "multilabel": ((3, 4), torch.tensor([[0, 1, 1, 0], [NAN, NAN, NAN, NAN], [1, NAN, 0, 1]])),
    "binary": ((4,), torch.tensor([0, 1, -100, 1])),
}


class TestObjective:
    @pytest.mark.parametrize("task", CASES)
    @pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.9, 4.0), (0.0, 2.0), (1.0, 20.0)])
    def test_by_hand(self, task, weight, temperature):
        shape, y = CASES[task]
        torch.manual_seed(0)
        student, teacher = torch.randn(shape) * 2, torch.randn(shape) * 2
        hard, soft = by_hand(task, student, teacher, y, temperature)
        soft_loss = KDLoss(temperature, task)
        module = DistillModule(Fixed(student), Fixed(teacher), task=task, soft_weight=weight, soft_loss=soft_loss)
        loss = module.training_step((torch.zeros(len(y), 2), y), 0)  # without a Trainer
        assert loss.item() == pytest.approx((1 - weight) * hard + weight * soft, rel=1e-5)

    @pytest.mark.parametrize("task", CASES)
    def test_defaults(self, task):
        shape, y = CASES[task]
        student, teacher = torch.randn(shape), torch.randn(shape)
        hard, soft = by_hand(task, student, teacher, y, 4.0)
        loss = DistillModule(Fixed(student), Fixed(teacher), task=task).training_step((torch.zeros(len(y), 2), y), 0)
        assert loss.item() == pytest.approx(0.5 * hard + 0.5 * soft, rel=1e-5)

    @pytest.mark.parametrize("task", CASES)
    def test_without_labels_the_soft_term_stays(self, task):
        shape, y = CASES[task]
        none = torch.full(y.shape, NAN if y.is_floating_point() else -100)
        student, teacher = torch.randn(shape), torch.randn(shape)
        net = Fixed(student)
        module = DistillModule(net, Fixed(teacher), task=task, soft_weight=0.9)
        loss = module.training_step((torch.zeros(len(y), 2), none), 0)
        loss.backward()
        assert loss.item() == pytest.approx(0.9 * by_hand(task, student, teacher, y, 4.0)[1], rel=1e-5)
        assert net.logits.grad.isfinite().all()
        assert net.logits.grad.abs().min() > 0

    def test_temperature_leaves_the_balance(self):
        """For high temperatures the soft gradient is that of centred logits, whatever the temperature."""
        student, teacher = torch.randn(6, 5), torch.randn(6, 5)
        gap = (student - teacher).double()
        limit = 0.5 * (gap - gap.mean(1, keepdim=True)) / 5 / 6
        for temperature in (50.0, 400.0):
            net = Fixed(student)
            loss = KDLoss(temperature)
            module = DistillModule(net, Fixed(teacher), soft_loss=loss, soft_weight=0.5)
            module.training_step(torch.zeros(6, 2), 0).backward()
            assert net.logits.grad.double() == pytest.approx(limit, abs=0.03 * limit.abs().max().item())

    def test_losses_of_ones_own(self):
        seen = []

        class Soft(nn.Module):
            def forward(self, student, teacher, target):
                seen.append((student.shape, teacher.shape, target.tolist(), teacher.requires_grad))
                return student.sum() * 0 + 3

        class Hard(nn.Module):
            def forward(self, logits, target):
                return logits.sum() * 0 + 5

        module = DistillModule(
            Fixed(torch.zeros(3, 2)), Fixed(torch.ones(3, 2)), soft_loss=Soft(), hard_loss=Hard(), soft_weight=0.25
        )
        assert module.training_step((torch.zeros(3, 1), torch.tensor([0, -100, 1])), 0).item() == 0.75 * 5 + 0.25 * 3
        assert seen == [((3, 2), (3, 2), [0, -100, 1], False)]


class TestBadInput:
    @pytest.mark.parametrize("weight", [1.5, -0.1, NAN])
    def test_soft_weight(self, student, teacher, weight):
        with pytest.raises(InputError, match=r"soft_weight must lie in \[0, 1\], got"):
            DistillModule(student, teacher, soft_weight=weight)
        module = DistillModule(student, teacher)
        module.soft_weight = weight  # as a callback does
        with pytest.raises(InputError, match=r"soft_weight must lie in \[0, 1\], got"):
            module.training_step(torch.zeros(2, 1, 8, 8), 0)

    def test_soft_loss_of_another_task(self, student, teacher):
        with pytest.raises(InputError, match="soft_loss is for the multiclass task, but the module's task is binary"):
            DistillModule(student, teacher, task="binary", soft_loss=KDLoss())

    @pytest.mark.parametrize("outputs", [9, 11, 1])
    @pytest.mark.parametrize("validation", [True, False])
    def test_teacher_with_other_outputs(self, quiet_trainer, loader, student, outputs, validation):
        module = DistillModule(student, nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)))
        message = rf"same number of outputs, got \[{outputs}\] from the teacher and \[10\] from the student"
        with pytest.raises(InputError, match=message):
            quiet_trainer().fit(module, loader(), loader() if validation else None)

    def test_without_a_teacher(self, quiet_trainer, loader, student):
        module = DistillModule(student, None)
        (found,) = quiet_trainer().test(module, loader(), verbose=False)
        assert "test/accuracy" in found
        assert not [name for name in found if "teacher" in name or "agreement" in name]
        assert torch.cat(quiet_trainer().predict(module, loader())).sum(1) == pytest.approx(torch.ones(12))
        with pytest.raises(InputError, match="training needs the teacher; teacher=None is for test and predict alone"):
            quiet_trainer().fit(module, loader())


class TestCharts:
    def test_names_and_unweighted_terms(self, quiet_trainer):
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
        still = partial(torch.optim.SGD, lr=0.0)
        trainer = quiet_trainer()
        trainer.fit(DistillModule(Table(s), Table(t), soft_weight=0.3, optimizer=still), data, [data, data])
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        figures = ["loss", "accuracy", "f1", "calibration_error", "agreement", "teacher_kl", "teacher_accuracy"]
        figures.append("balanced_accuracy")
        recalls = {name for name in found if name.startswith("val/recall_")}
        assert {*recalls} == {f"val/recall_{n}{loader}" for n in sorted({*y[y >= 0].tolist()}) for loader in ("", "/1")}
        found = {name: value for name, value in found.items() if name not in recalls}
        names = {f"val/{name}{number}" for name in figures for number in ("", "/1")}
        assert set(found) == names | {"train/loss", "train/loss_step", "train/hard", "train/soft", "soft_weight"}
        hard, soft = by_hand("multiclass", s, t, y, 4.0)
        assert found["train/hard"] == pytest.approx(hard, rel=1e-5)  # the mean over labels, not over batches
        assert found["train/soft"] == pytest.approx(soft, rel=1e-5)
        assert found["soft_weight"] == pytest.approx(0.3)
        parts = [by_hand("multiclass", s[i : i + 2], t[i : i + 2], y[i : i + 2], 4.0) for i in (0, 2, 4)]
        parts.append((0.0, by_hand("multiclass", s[6:], t[6:], torch.tensor([0, 0]), 4.0)[1]))
        assert found["train/loss"] == pytest.approx(np.mean([0.7 * h + 0.3 * f for h, f in parts]), rel=1e-5)
        assert found["val/loss"] == pytest.approx(hard, rel=1e-5)
        assert found["val/teacher_kl"] == pytest.approx(by_hand("multiclass", s, t, y, 1.0)[1], rel=1e-5)
        known = y != -100
        assert found["val/accuracy"] == pytest.approx((s.argmax(1) == y)[known].float().mean().item())
        assert found["val/teacher_accuracy"] == pytest.approx((t.argmax(1) == y)[known].float().mean().item())
        assert found["val/agreement"] == pytest.approx((s.argmax(1) == t.argmax(1)).float().mean().item())


class TestProbe:
    @pytest.mark.parametrize("kind", [DistillModule, EnsembleDistillModule])
    def test_an_interrupted_fit_reports_nothing_later(self, quiet_trainer, loader, student, teacher, monkeypatch, kind):
        """Its probe stays on the teacher, which another module uses."""

        class Fault(Callback):
            def on_train_start(self, trainer, pl_module):
                raise ZeroDivisionError

        reports = []
        for name in ("distill", "ensemble"):
            monkeypatch.setattr(f"kd_lightning.modules.{name}.report", lambda *args: reports.append(args))
        frozen = Teacher(teacher)
        first = kind(student, frozen if kind is DistillModule else [frozen])
        with pytest.raises(ZeroDivisionError):
            quiet_trainer(callbacks=[Fault()], num_sanity_val_steps=0).fit(first, loader())
        quiet_trainer().fit(DistillModule(student, frozen), loader())
        assert len(reports) == 1


class TestKeptOutputs:
    def data(self, **kwargs):
        return SemiSupervisedDataModule(Digits(), labeled=5, batch_size=256, val_size=0.5, **kwargs)

    def test_computed_once_where_samples_are_known(self, quiet_trainer, student, teacher):
        counting = Counting(teacher)
        quiet_trainer(max_epochs=3, limit_train_batches=1).fit(DistillModule(student, counting), self.data())
        assert counting.calls == 3 * 1 + 3  # a step in each epoch; 598 validation images are three batches

    def test_computed_anew_where_they_take_too_much_memory(self, quiet_trainer, student, teacher, monkeypatch):
        """The first of the three batches fits, 256 x 10 numbers of four bytes."""
        monkeypatch.setattr("kd_lightning.modules._shared.evaluations._MOST_STORED", 12_000)
        counting = Counting(teacher)
        trainer = quiet_trainer(max_epochs=3, limit_train_batches=1, num_sanity_val_steps=0)
        trainer.fit(DistillModule(student, counting), self.data())
        assert counting.calls == 3 * 1 + 1 + 3 * 2

    def test_computed_anew_where_they_are_not(self, quiet_trainer, loader, student, teacher):
        counting = Counting(teacher)
        trainer = quiet_trainer(max_epochs=3, limit_train_batches=1, num_sanity_val_steps=0)
        trainer.fit(DistillModule(student, counting), loader(), loader(8))
        assert counting.calls == 3 * 1 + 3 * 2

    def test_other_images_of_the_same_index(self, quiet_trainer, student, teacher):
        class Dark(nn.Module):
            def forward(self, x):
                return -x

        module = DistillModule(student, teacher)
        found = [
            quiet_trainer().validate(module, datamodule=self.data(eval_transform=transform), verbose=False)[0]
            for transform in (None, Dark(), None)
        ]
        fresh = DistillModule(student, teacher)
        expected = quiet_trainer().validate(fresh, datamodule=self.data(eval_transform=Dark()), verbose=False)[0]
        assert found[1] == expected
        assert found[0] == found[2] != expected


class TestCheckpoint:
    @pytest.fixture
    def trained(self, quiet_trainer, loader, tmp_path, student, teacher):
        def make():
            fresh = copy.deepcopy(student)
            for parameter in fresh.parameters():
                parameter.data.fill_(0.1)
            return fresh

        trainer = quiet_trainer()
        module = DistillModule(student, teacher, soft_weight=0.4)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        return module, make, tmp_path / "c.ckpt"

    @pytest.mark.parametrize("with_teacher", [True, False])
    def test_reloads(self, trained, teacher, with_teacher):
        module, make, path = trained
        again = DistillModule.load_from_checkpoint(
            path, student=make(), teacher=teacher if with_teacher else None, weights_only=True
        )
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(again.eval()(x), module.eval()(x))
        assert again.soft_weight == 0.4

    def test_another_teacher(self, quiet_trainer, loader, trained, teacher):
        _, make, path = trained
        other = copy.deepcopy(teacher)
        other[-1].bias.data += 1e-6
        with pytest.raises(InputError, match=r"teacher: the checkpoint was trained with another teacher \(fingerprint"):
            quiet_trainer(max_epochs=2).fit(DistillModule(make(), other), loader(), ckpt_path=path)
        moved = Teacher(teacher, classes=[*range(1, 10), 0])
        with pytest.raises(InputError, match="resume with the same weights, attributes, preprocess and classes"):
            quiet_trainer(max_epochs=2).fit(DistillModule(make(), moved), loader(), ckpt_path=path)
        quiet_trainer().test(DistillModule(make(), other), loader(), ckpt_path=path, verbose=False)
        quiet_trainer().predict(DistillModule(make(), other), loader(), ckpt_path=path)
        same = Teacher(copy.deepcopy(teacher))
        quiet_trainer(max_epochs=2).fit(DistillModule(make(), same), loader(), ckpt_path=path)


class StoppedError(Exception):
    pass


class Watch(Callback):
    """Records the parts of each step, and raises at a given step."""

    def __init__(self, stop=None):
        self.stop, self.steps = stop, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        figures = (module.soft_weight, rate, batch.x.sum().item(), batch.index.tolist(), batch.mean_labels)
        self.steps[trainer.current_epoch, batch_idx] = figures

    def on_validation_start(self, trainer, module):
        if self.stop == "last batch" and trainer.current_epoch == 1 and not trainer.sanity_checking:
            raise StoppedError

    def on_train_epoch_end(self, trainer, module):
        if self.stop == "after validation" and trainer.current_epoch == 1:
            raise StoppedError


class TestResume:
    """Interrupted between the last step of an epoch and the next epoch's first; contract/ stops within epochs."""

    def fit(self, folder, accumulate, stop=None, path=None):
        torch.manual_seed(0)
        halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.8)
        interval = "epoch" if accumulate == 1 else "step"
        module = DistillModule(DigitsCNN(4, dropout=0.3), DigitsCNN(8), lr_scheduler=halve, lr_interval=interval)
        # 240 training images: seven batches, the last one short
        data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0.8, batch_size=36, seed=1)
        torch.manual_seed(1 if path is None else 2)  # a resumed process starts with another state
        watch = Watch(stop)
        saves = [
            ModelCheckpoint(folder, "last batch {step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(folder, "after validation {epoch}", save_top_k=-1, save_on_train_epoch_end=False),
        ]
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            accumulate_grad_batches=accumulate,
            limit_val_batches=2,
            callbacks=[watch, SeedEveryStep(seed=7), SoftWeightAnnealing(0.9, 0.1, shape="cosine"), *saves],
        )
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path)
        except StoppedError:
            assert stop is not None
        return module.state_dict(), watch.steps

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_bit_for_bit(self, tmp_path, accumulate):
        whole, steps = self.fit(tmp_path / "whole", accumulate)
        assert len(steps) == 3 * 7
        for where in ("last batch", "after validation"):
            folder = tmp_path / where
            before, first = self.fit(folder, accumulate, stop=where)
            assert len(first) == 2 * 7
            assert not all(torch.equal(before[key], whole[key]) for key in whole)
            last = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
            assert last.stem.startswith(where)
            resumed, rest = self.fit(folder, accumulate, path=last)
            assert rest == {at: figures for at, figures in steps.items() if at[0] == 2}
            assert all(torch.equal(resumed[key], whole[key]) for key in whole), where


def test_accumulated_batches_equal_a_large_one(quiet_trainer):
    """Labels lie unevenly among the batches; contract/ has the same with two processes."""

    def fit(batch_size, accumulate):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        module = DistillModule(student, DigitsCNN(8), soft_weight=0.5, optimizer=partial(torch.optim.SGD, lr=0.2))
        data = SemiSupervisedDataModule(Digits(), labeled=10, batch_size=batch_size, seed=3, val_size=0.1)
        trainer = quiet_trainer(accumulate_grad_batches=accumulate, limit_train_batches=384 // batch_size)
        trainer.fit(module, datamodule=data)
        terms = [trainer.callback_metrics[name].item() for name in ("train/hard", "train/soft")]
        return student[1].weight.detach(), terms

    large, accumulated, small = fit(32, 1), fit(16, 2), fit(16, 1)
    assert torch.allclose(accumulated[0], large[0], atol=1e-5)
    assert accumulated[1] == pytest.approx(large[1], abs=1e-4)
    assert (small[0] - large[0]).abs().max() > 1e-2  # it could fail
