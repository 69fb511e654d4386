"""SupervisedModule: the hard term by hand, optimiser and scheduler, what it logs, and what it refuses."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Batch,
    CoarseLabels,
    DatasetSource,
    Digits,
    DistillModule,
    InputError,
    SemiSupervisedDataModule,
    SupervisedModule,
    SymmetricNoise,
)
from kd_lightning.batch import LabelKind
from kd_lightning.losses import EarlyLearningLoss, GeneralizedCrossEntropyLoss, KDLoss, LabelKindLoss

NAN = float("nan")
SGD = partial(torch.optim.SGD, lr=0.1)


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[: len(x)] + 0 * x.sum()


def hard_by_hand(task, logits, y):
    """Mean over the known labels, and its gradient, entry by entry in float64."""
    z, y = logits.double().numpy(), y.double().numpy()
    losses, gradient = [], np.zeros_like(z)
    if task == "multiclass":
        for i, label in enumerate(y):
            if label != -100 and not np.isnan(label):
                p = np.exp(z[i] - z[i].max())
                p /= p.sum()
                losses.append(-np.log(p[int(label)]))
                gradient[i] = p - np.eye(len(p))[int(label)]
    else:
        z, gradient = z.reshape(y.shape), gradient.reshape(y.shape)
        for at in np.ndindex(y.shape):
            if y[at] != -100 and not np.isnan(y[at]):
                p = 1 / (1 + np.exp(-z[at]))
                losses.append(-y[at] * np.log(p) - (1 - y[at]) * np.log(1 - p))
                gradient[at] = p - y[at]
    return np.mean(losses), gradient.reshape(logits.shape) / len(losses)


LABELS = {
    "multiclass": ("multiclass", (5, 4), torch.tensor([0, -100, 3, 1, -100])),
    "multiclass, floats": ("multiclass", (3, 4), torch.tensor([0.0, NAN, 3.0])),
    "multiclass, int32": ("multiclass", (3, 4), torch.tensor([0, -100, 3], dtype=torch.int32)),
    "multilabel": ("multilabel", (3, 4), torch.tensor([[0, 1, 1, 0], [NAN, NAN, NAN, NAN], [1, NAN, 0, 1]])),
    "multilabel, integers": ("multilabel", (2, 3), torch.tensor([[0, 1, -100], [1, 0, 1]])),
    "multilabel, whole rows": ("multilabel", (2, 3), torch.tensor([[0, 1.0, 0], [NAN, NAN, NAN]])),
    "binary": ("binary", (4,), torch.tensor([0, 1, -100, 1])),
    "binary, floats": ("binary", (4,), torch.tensor([0, 1, NAN, 1])),
    "binary, columns": ("binary", (4, 1), torch.tensor([[0], [1], [-100], [1]])),
    "binary, one column": ("binary", (4, 1), torch.tensor([0.0, 1.0, NAN, 1.0])),
    "binary, bool": ("binary", (3, 1), torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("case", LABELS)
def test_hard_term_by_hand(case):
    task, shape, y = LABELS[case]
    torch.manual_seed(0)
    logits = torch.randn(shape) * 3
    expected, gradient = hard_by_hand(task, logits, y)
    net = Fixed(logits)
    loss = SupervisedModule(net, task=task).training_step((torch.zeros(len(y), 2), y), 0)  # without a Trainer
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert net.logits.grad.numpy() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "y"),
    [
        ("multiclass", None),
        ("multiclass", torch.full((4,), -100)),
        ("multilabel", torch.full((4, 3), NAN)),
        ("binary", torch.full((4,), NAN)),
    ],
)
def test_no_label_gives_zero_in_the_graph(task, y):
    net = nn.Linear(2, 1 if task == "binary" else 3)
    x = torch.randn(4, 2) * 1e30  # nothing that overflows may leak in
    loss = SupervisedModule(net, task=task).training_step(x if y is None else (x, y), 0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(net.weight.grad, torch.zeros_like(net.weight))
    assert torch.equal(net.bias.grad, torch.zeros_like(net.bias))


def test_scaled_to_the_labels_of_the_whole_step():
    """Three labels here, 1.5 on average elsewhere: this batch weighs twice."""
    logits, y = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    module = SupervisedModule(Fixed(logits))
    alone = module.training_step(Batch(torch.zeros(4, 1), y), 0)
    scaled = module.training_step(Batch(torch.zeros(4, 1), y, mean_labels=1.5), 0)
    assert scaled.item() == pytest.approx(2 * alone.item())


def test_half_precision_logits_are_computed_in_float():
    logits, y = torch.tensor([[12.0, -3.0], [0.3, 0.1]]), torch.tensor([1, 0])
    for dtype in (torch.float16, torch.bfloat16):
        value, _ = SupervisedModule(nn.Identity()).compute_hard_loss(logits.to(dtype), Batch(logits, y))
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(hard_by_hand("multiclass", logits.to(dtype), y)[0], rel=1e-6)


def test_hard_loss_of_ones_own_sees_labeled_rows_alone():
    seen = []

    class Own(nn.Module):
        def forward(self, logits, target):
            seen.append((logits.shape, target.tolist()))
            return logits.sum() * 0 + 7

    module = SupervisedModule(Fixed(torch.zeros(3, 2)), hard_loss=Own())
    assert module.training_step((torch.zeros(3, 1), torch.tensor([0, -100, 1])), 0).item() == 7
    assert seen == [((2, 2), [0, 1])]
    smooth = SupervisedModule(Fixed(torch.zeros(3, 2)), hard_loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    assert smooth.training_step((torch.zeros(3, 1), torch.tensor([0, 1, -100])), 0).item() == pytest.approx(np.log(2))


def weak_batch(weighted=True):
    """Two rows of each kind of label, in no order, and weights."""
    kinds = [LabelKind.NOISY, LabelKind.CLEAN, LabelKind.COARSE, LabelKind.MISSING, LabelKind.PSEUDO]
    kind = torch.tensor([*kinds, *kinds[::-1]], dtype=torch.int8)
    candidates = torch.zeros(10, 4, dtype=torch.bool)
    candidates[2, [0, 3]] = candidates[7, [1, 2, 3]] = True
    y = torch.tensor([3, 0, -100, -100, 2, 1, -100, -100, 0, 2])
    weight = torch.tensor([0.5, 1.0, 2.0, 9.0, 0.0, 1.5, 9.0, 0.25, 1.0, 3.0]) if weighted else None
    return Batch(torch.zeros(10, 1), y, torch.arange(10), kind=kind, candidates=candidates, weight=weight)


def weak_by_hand(logits, batch, noisy_q=None):
    """Each label counts the same, weights multiply: the hard term and its gradient, row by row in float64.

    Of noisy labels it is generalised cross-entropy where there is a q.
    """
    loss, gradient, labels = 0.0, np.zeros(logits.shape), 0
    for i, z in enumerate(logits.double().numpy()):
        chosen = batch.candidates[i].numpy() if batch.y[i] == -100 else np.arange(logits.shape[1]) == int(batch.y[i])
        if not chosen.any():
            continue
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        inside = p[chosen].sum()
        value, slope = -np.log(inside), p - chosen * p / inside
        if noisy_q is not None and batch.kind[i] == LabelKind.NOISY:
            value, slope = (1 - inside**noisy_q) / noisy_q, slope * inside**noisy_q
        share = 1.0 if batch.weight is None else batch.weight[i].item()
        loss, labels = loss + share * value, labels + 1
        gradient[i] = share * slope
    return loss / labels, gradient / labels


class TestWeakLabels:
    """Clean, noisy, coarse, missing and pseudo rows in one batch."""

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("q", [None, 0.7])
    def test_by_hand(self, weighted, q):
        torch.manual_seed(0)
        logits, batch = torch.randn(10, 4).double() * 2, weak_batch(weighted)
        expected, gradient = weak_by_hand(logits, batch, q)
        net = Fixed(logits)
        loss = None if q is None else LabelKindLoss(GeneralizedCrossEntropyLoss(q))
        module = SupervisedModule(net, hard_loss=loss)
        found = module.training_step(batch, 0)
        found.backward()
        assert found.item() == pytest.approx(expected, rel=1e-12)
        assert net.logits.grad.numpy() == pytest.approx(gradient, abs=1e-14)
        assert module.compute_hard_loss(net.logits, batch)[1] == 8

    @pytest.mark.parametrize("cut", [0, 2, 4, 9])
    def test_shares_of_a_step_add_up(self, cut):
        """Two processes, or accumulated batches, which Lightning averages; one may have no row."""
        torch.manual_seed(0)
        logits, batch = torch.randn(10, 4).double(), weak_batch()
        net = Fixed(logits)
        module = SupervisedModule(net, hard_loss=LabelKindLoss(GeneralizedCrossEntropyLoss()))
        for rows in (torch.arange(cut), torch.arange(cut, 10)):
            part = batch.select(rows)
            part.mean_labels = 4.0
            (module.hard_term(net.logits[rows], part) / 2).backward()
        assert net.logits.grad.numpy() == pytest.approx(weak_by_hand(logits, batch, 0.7)[1], abs=1e-14)

    def test_accumulated_batches_make_one_big_one(self, quiet_trainer):
        """As the datamodule hands them out."""
        torch.manual_seed(0)
        net = nn.Linear(5, 4, bias=False)
        source = DatasetSource(TensorDataset(torch.randn(46, 5), torch.arange(46) % 4))
        coarse = CoarseLabels({"low": [0, 1], "high": [2, 3]}, fraction=0.5)
        data = SemiSupervisedDataModule(
            source, labeled=4, coarse=coarse, label_noise=SymmetricNoise(0.5), val_size=0, batch_size=12
        )
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, number):
                seen.append(batch)

        start = net.weight.detach().clone()
        trainer = quiet_trainer(accumulate_grad_batches=4, callbacks=[Watch()])
        trainer.fit(SupervisedModule(net, optimizer=SGD), datamodule=data)
        assert trainer.global_step == 1 and len(seen) == 4 and len({len(batch) for batch in seen}) == 2
        names = ("x", "y", "kind", "candidates")
        whole = Batch(**{name: torch.cat([getattr(batch, name) for batch in seen]) for name in names})
        assert set(whole.kind.tolist()) == {LabelKind.NOISY, LabelKind.COARSE, LabelKind.MISSING}
        _, gradient = weak_by_hand(whole.x @ start.t(), whole)
        assert ((start - net.weight) / 0.1).detach().numpy() == pytest.approx(gradient.T @ whole.x.numpy(), abs=1e-5)

    def test_coarse_labels_alone(self):
        batch = weak_batch()
        batch.y, logits = None, torch.randn(10, 4)
        rest = weak_batch()
        rest.y[:] = -100
        expected, _ = weak_by_hand(logits, rest)
        assert SupervisedModule(Fixed(logits)).training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)

    def test_no_coarse_label_in_this_batch(self):
        batch = weak_batch()
        batch.candidates[:] = False
        logits = torch.randn(10, 4)
        expected, _ = weak_by_hand(logits, batch)
        assert SupervisedModule(Fixed(logits)).training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)
        nothing = batch.select(torch.tensor([3, 6]))
        loss = SupervisedModule(Fixed(logits)).training_step(nothing, 0)
        assert loss == 0 and loss.requires_grad

    def test_the_soft_term_sees_all_rows(self):
        torch.manual_seed(0)
        logits, teacher, batch = torch.randn(10, 4).double(), torch.randn(10, 4).double(), weak_batch()
        terms = DistillModule(Fixed(logits), Fixed(teacher), soft_weight=0.3).losses(batch)
        assert terms["hard"].value.item() == pytest.approx(weak_by_hand(logits, batch)[0])
        torch.testing.assert_close(terms["soft"].value, KDLoss(4.0)(logits, teacher))

    def test_weights_of_the_binary_task(self):
        logits, y = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, -100, 0])
        module = SupervisedModule(Fixed(logits), task="binary")
        found = module.training_step(Batch(torch.zeros(3, 1), y, weight=torch.tensor([2.0, 9.0, 0.5])), 0)
        expected = (2 * np.log1p(np.exp(-2.0)) + 0.5 * np.log1p(np.exp(0.5))) / 2
        assert found.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("task", "fields", "message"),
        [
            (
                "multilabel",
                {"weight": torch.ones(2)},
                r"weights must be .* and not in the multilabel task; got \[2\] for multilabel",
            ),
            ("multiclass", {"weight": torch.ones(2, 1)}, r"weights must be one a row, \(B,\) = \[2\], .* \[2, 1\]"),
            ("binary", {"weight": torch.ones(3)}, r"weights must be one a row, \(B,\) = \[2\], .* \[3\] for binary"),
            (
                "multilabel",
                {"candidates": torch.ones(2, 3) > 0},
                "coarse labels are for the multiclass task; multilabel",
            ),
            ("binary", {"candidates": torch.ones(2, 3) > 0}, "coarse labels are for the multiclass task; binary"),
            (
                "multiclass",
                {"candidates": torch.ones(2, 4) > 0},
                r"candidates of shape \[2, 4\] do not fit .* \[2, 3\]",
            ),
            ("multiclass", {"candidates": torch.ones(1, 3) > 0}, r"candidates of shape \[1, 3\] do not fit"),
        ],
    )
    @pytest.mark.parametrize("labeled", [True, False])
    def test_what_does_not_fit(self, task, fields, message, labeled):
        y = {"multiclass": torch.tensor([0, 1]), "binary": torch.tensor([0, 1]), "multilabel": torch.ones(2, 3)}[task]
        logits = torch.zeros(2) if task == "binary" else torch.zeros(2, 3)
        batch = Batch(torch.zeros(2, 1), y if labeled else None, **fields)
        with pytest.raises(InputError, match=message):
            SupervisedModule(Fixed(logits), task=task).training_step(batch, 0)

    @pytest.mark.parametrize("task", ["binary", "multilabel"])
    def test_losses_of_one_class_each(self, task):
        y, logits = torch.tensor([[0], [1]]), torch.zeros(2, 1)
        for loss in (GeneralizedCrossEntropyLoss(), LabelKindLoss(GeneralizedCrossEntropyLoss())):
            module = SupervisedModule(Fixed(logits), task=task, hard_loss=loss)
            with pytest.raises(InputError, match=r"a hard loss takes logits \(B, C\) and class indices \(B,\)"):
                module.training_step((torch.zeros(2, 1), y), 0)

    def test_weights_need_rows(self):
        class Own(nn.Module):
            def forward(self, logits, target):
                return logits.sum()

        with pytest.raises(InputError, match="hard_loss: Own has no reduction"):
            SupervisedModule(Fixed(torch.zeros(10, 4)), hard_loss=Own()).training_step(weak_batch(), 0)


class TestEarlyLearning:
    """A stateful hard loss, through a run."""

    def make(self, seed=0, wrap=lambda loss: loss, **kwargs):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return SupervisedModule(net, hard_loss=wrap(EarlyLearningLoss()), optimizer=SGD, **kwargs)

    def data(self):
        x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        part = TensorDataset(x, torch.arange(40) % 10)
        source = DatasetSource(part, test=part)
        return SemiSupervisedDataModule(source, labeled=2, label_noise=SymmetricNoise(0.4), val_size=0, batch_size=16)

    def test_gets_the_labeled_rows(self):
        logits, batch = torch.randn(10, 4).double(), weak_batch(weighted=False)
        module = SupervisedModule(Fixed(logits), hard_loss=EarlyLearningLoss())
        found = module.training_step(batch, 0)
        known, loss = batch.y != -100, EarlyLearningLoss(reduction="none")
        rows = loss(logits[known], batch.y[known], known.nonzero().flatten())
        torch.testing.assert_close(module.hard_loss.averages, loss.averages)
        coarse = batch.select(torch.tensor([2, 7]))
        expected = (rows.sum() + 2 * weak_by_hand(logits[[2, 7]], coarse)[0]) / 8
        torch.testing.assert_close(found.detach(), expected)

    def test_runs_without_any_label(self, monkeypatch):
        """Other processes may have labels, and wait."""
        seen, module = [], SupervisedModule(Fixed(torch.zeros(2, 4)), hard_loss=EarlyLearningLoss())
        module.hard_loss.averages = torch.zeros(9, 4)
        monkeypatch.setattr(module.hard_loss, "_update", lambda index, p: seen.append((len(index), len(p))))
        batch = Batch(torch.zeros(2, 1), torch.tensor([-100, -100]), torch.arange(2))
        loss = module.training_step(batch, 0)
        assert seen == [(0, 0)]
        assert loss == 0 and loss.requires_grad

    @pytest.mark.parametrize("wrap", [lambda loss: loss, LabelKindLoss])
    def test_resume_is_exact(self, quiet_trainer, tmp_path, wrap):
        whole, part, resumed = self.make(wrap=wrap), self.make(wrap=wrap), self.make(1, wrap=wrap)
        quiet_trainer(max_epochs=3).fit(whole, datamodule=self.data())
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(part, datamodule=self.data())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        quiet_trainer(max_epochs=3).fit(
            resumed, datamodule=self.data(), ckpt_path=tmp_path / "c.ckpt", weights_only=True
        )
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        (memory,) = [part.averages for part in resumed.hard_loss.modules() if isinstance(part, EarlyLearningLoss)]
        assert memory.sum(dim=1).max() > 0.5

    def test_checkpoint_serves_test_and_predict(self, quiet_trainer, tmp_path):
        module, trainer = self.make(), quiet_trainer()
        trainer.fit(module, datamodule=self.data())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        expected = quiet_trainer().test(module, datamodule=self.data(), verbose=False)
        found = quiet_trainer().test(
            self.make(1), datamodule=self.data(), ckpt_path=tmp_path / "c.ckpt", verbose=False, weights_only=True
        )
        assert found == expected
        x = torch.randn(4, 1, 8, 8)
        predicted = quiet_trainer().predict(
            self.make(1), DataLoader(x, 4), ckpt_path=tmp_path / "c.ckpt", weights_only=True
        )
        torch.testing.assert_close(predicted[0], module.eval()(x).softmax(dim=1))

    def test_plain_loader_has_no_index(self, quiet_trainer, loader):
        with pytest.raises(InputError, match="index is required by EarlyLearningLoss"):
            quiet_trainer().fit(self.make(), loader())


@pytest.mark.parametrize(
    ("task", "shape", "y", "message"),
    [
        ("multiclass", (2, 3), torch.tensor([0, 3]), r"0 ... 2 \(the student gives \[3\] logits\), or -100 .* got 3$"),
        ("multiclass", (2, 3), torch.tensor([0, -1]), "0 ... 2 .* got -1$"),
        ("binary", (2,), torch.tensor([0, 2]), r"0 ... 1 \(the student gives 1 logits\), .* got 2$"),
        ("binary", (2, 1), torch.tensor([0.0, -100.0]), r"-100 \(NaN where floats\) for a missing one; got -100$"),
        ("multilabel", (1, 3), torch.tensor([[0, 1, 2]]), "0 ... 1 .* got 2$"),
        ("multilabel", (1, 3), torch.tensor([[-1, 1, NAN]]), "0 ... 1 .* got -1$"),
        ("multiclass", (2, 3), torch.tensor([[0], [1]]), r"multiclass labels of shape \[2, 1\] do not fit .*\[2, 3\]"),
        (
            "multiclass",
            (2,),
            torch.tensor([0, 1]),
            r"multiclass labels of shape \[2\] do not fit logits of shape \[2\]",
        ),
        ("multilabel", (2, 3), torch.tensor([0, 1]), r"multilabel labels of shape \[2\] do not fit"),
        ("multilabel", (2, 3), torch.zeros(2, 4), r"shape \[2, 4\] do not fit logits of shape \[2, 3\]"),
        ("binary", (2, 2), torch.tensor([0, 1]), r"binary labels of shape \[2\] do not fit"),
    ],
)
def test_labels_that_do_not_fit(task, shape, y, message):
    module = SupervisedModule(Fixed(torch.zeros(shape)), task=task)
    for step in (module.training_step, module.validation_step):
        with pytest.raises(InputError, match=message):
            step((torch.zeros(len(y), 1), y), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "ordinal"}, "task must be one of multiclass, multilabel, binary, regression, got 'ordinal'"),
        ({"lr_interval": "day"}, "lr_interval must be one of epoch, step, got 'day'"),
    ],
)
def test_constructor_checks(student, arguments, message):
    with pytest.raises(InputError, match=message):
        SupervisedModule(student, **arguments)


class TestOptimiser:
    def test_gets_what_requires_a_gradient(self, student):
        student[0].requires_grad_(False)
        (group,) = SupervisedModule(student).configure_optimizers().param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in student.parameters() if p.requires_grad}
        assert len(group["params"]) == len(list(student.parameters())) - 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"optimizer": partial(torch.optim.SGD, lr=-1.0)}, "optimizer: Invalid learning rate: -1"),
            ({"optimizer": partial(torch.optim.SGD, lr=0.1, betas=3)}, "optimizer: .*betas"),
            ({"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o)}, "lr_scheduler: .*step_size"),
        ],
    )
    def test_bad_values(self, quiet_trainer, loader, student, arguments, message):
        with pytest.raises(InputError, match=message):
            quiet_trainer().fit(SupervisedModule(student, **arguments), loader())

    def test_frozen_student(self, student):
        with pytest.raises(InputError, match="optimizer: optimizer got an empty parameter list"):
            SupervisedModule(student.requires_grad_(False)).configure_optimizers()

    @pytest.mark.parametrize(
        ("interval", "accumulate", "expected"),
        [
            ("epoch", 1, [0.1] * 3 + [0.05] * 3),
            ("step", 1, [0.1 * 0.5**k for k in range(6)]),
            ("step", 2, [0.1, 0.1, 0.05, 0.025, 0.025, 0.0125]),
        ],
    )
    def test_scheduler_interval(self, quiet_trainer, loader, student, interval, accumulate, expected):
        class Rates(Callback):
            seen = []

            def on_train_batch_start(self, trainer, *_):
                self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
        module = SupervisedModule(student, optimizer=SGD, lr_scheduler=halve, lr_interval=interval)
        rates = Rates()
        rates.seen = []
        quiet_trainer(max_epochs=2, callbacks=[rates], accumulate_grad_batches=accumulate).fit(module, loader())
        assert rates.seen == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("make", "monitor"),
        [
            (torch.optim.lr_scheduler.ReduceLROnPlateau, "val/loss"),
            (partial(ReduceLROnPlateau, monitor="val/accuracy", mode="max"), "val/accuracy"),
        ],
    )
    def test_plateau_follows_its_monitor(self, quiet_trainer, loader, make, monitor):
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # no batch statistics, which would move
        frozen = partial(torch.optim.SGD, lr=1e-6)  # nothing gets better
        module = SupervisedModule(student, optimizer=frozen, lr_scheduler=partial(make, patience=0, factor=0.1))
        trainer = quiet_trainer(max_epochs=4)
        trainer.fit(module, loader(), loader(8))
        (config,) = trainer.lr_scheduler_configs
        assert (config.monitor, config.reduce_on_plateau) == (monitor, True)
        assert config.scheduler.best == pytest.approx(trainer.callback_metrics[monitor].item(), rel=1e-3)
        assert trainer.optimizers[0].param_groups[0]["lr"] < 2e-8


class TestCharts:
    def test_hard_is_a_mean_over_labels(self, quiet_trainer):
        logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
        y = torch.tensor([0, -100, 1, 0, -100, -100])  # one label, then two, then none
        net = nn.Linear(2, 2, bias=False)
        net.weight.data = torch.eye(2)
        trainer = quiet_trainer()
        still = partial(torch.optim.SGD, lr=0.0)
        trainer.fit(SupervisedModule(net, optimizer=still), DataLoader(TensorDataset(logits, y), 2))
        expected = hard_by_hand("multiclass", logits, y)[0]
        assert trainer.callback_metrics["train/hard"].item() == pytest.approx(expected, rel=1e-6)
        batches = [hard_by_hand("multiclass", logits[s], y[s])[0] for s in (slice(0, 2), slice(2, 4))]
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(sum(batches) / 3, rel=1e-6)

    def test_names_and_several_loaders(self, quiet_trainer, loader, student):
        trainer = quiet_trainer()
        unlabeled = loader(8, labels=torch.full((8,), -100))
        trainer.fit(SupervisedModule(student), loader(), [loader(), loader(7), unlabeled])
        figures = ("loss", "accuracy", "balanced_accuracy", "f1", "calibration_error")
        names = {"train/loss", "train/loss_step", "train/hard"}
        names |= {f"val/{name}{number}" for name in figures for number in ("", "/1")}
        assert {name for name in trainer.callback_metrics if "/recall_" not in name} == names
        alone = quiet_trainer().validate(SupervisedModule(student), loader(7), verbose=False)[0]
        for name in figures:
            found = trainer.callback_metrics[f"val/{name}/1"].item()
            assert found == pytest.approx(alone[f"val/{name}"], rel=1e-6)

    def test_without_validation(self, quiet_trainer, loader, student):
        trainer = quiet_trainer()
        trainer.fit(SupervisedModule(student), loader())
        assert set(trainer.callback_metrics) == {"train/loss", "train/loss_step", "train/hard"}

    def test_an_interrupted_validation_is_forgotten(self, quiet_trainer, loader, student):
        module = SupervisedModule(student)
        whole = quiet_trainer().validate(module, loader(), verbose=False)

        class Stop(Callback):
            def on_validation_batch_end(self, *_):
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            quiet_trainer(callbacks=[Stop()]).validate(module, loader(12, 8), verbose=False)
        assert quiet_trainer().validate(module, loader(), verbose=False) == whole


class Elsewhere(Logger):
    """A logger with the interface of Weights & Biases', and nowhere to put figures."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.metrics, self.hyperparameters = folder, [], {}

    @property
    def name(self):
        return "project"

    @property
    def version(self):
        return "a1b2c3"

    @property
    def save_dir(self):
        return self.folder

    @property
    def experiment(self):
        return object()  # a run: no add_figure

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters.update(params)

    def watch(self, model, log="gradients", log_freq=100, log_graph=True):
        pass

    def log_image(self, key, images, step=None, **kwargs):
        pass


@pytest.fixture(params=["multiclass", "multilabel", "binary"])
def setting(request, loader):
    """A task, a network for it, and data with its labels."""
    outputs = {"multiclass": 10, "multilabel": 3, "binary": 1}[request.param]
    labels = {"multilabel": torch.randint(2, (12, 3)), "binary": torch.arange(12) % 2}.get(request.param)
    return request.param, nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), loader(labels=labels)


def test_confusion_matrix_in_tensorboard(quiet_trainer, tmp_path, setting):
    task, net, data = setting
    quiet_trainer(logger=TensorBoardLogger(tmp_path, "", "")).test(
        SupervisedModule(net, task=task), [data, data], verbose=False
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["test/confusion_matrix", "test/confusion_matrix/1"]
    assert len(events.Images("test/confusion_matrix")[0].encoded_image_string) > 5000
    assert {"test/accuracy", "test/f1", "test/loss", "test/calibration_error"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("folder", ["there", None])
def test_other_loggers(quiet_trainer, loader, tmp_path, student, folder):
    logger = Elsewhere(folder and str(tmp_path / folder))
    trainer = quiet_trainer(logger=[logger, CSVLogger(tmp_path)], log_every_n_steps=1)
    module = SupervisedModule(student)
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    expected = {"task": "multiclass", "lr_interval": "epoch", "class_dim": None, "causal": False}
    assert logger.hyperparameters == expected
    logged = set().union(*logger.metrics)
    assert {"train/loss", "train/hard", "val/accuracy", "test/accuracy"} <= logged


def test_without_a_logger(quiet_trainer, loader, student):
    trainer = quiet_trainer(logger=False)
    module = SupervisedModule(student)
    trainer.fit(module, loader(), loader())
    assert "test/accuracy" in trainer.test(module, loader(), verbose=False)[0]


def test_transductive_figures_carry_the_prefix(quiet_trainer, student):
    data = SemiSupervisedDataModule(Digits(), labeled=5, unlabeled="test", batch_size=300)
    (found,) = quiet_trainer().test(SupervisedModule(student), datamodule=data, verbose=False)
    assert found
    assert all(name.startswith("transductive/test/") for name in found)


def test_predicts_probabilities(quiet_trainer, setting):
    task, net, data = setting
    z = net(data.dataset.tensors[0]).detach().double().numpy()
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True) if task == "multiclass" else 1 / (1 + np.exp(-z))
    found = torch.cat(quiet_trainer().predict(SupervisedModule(net, task=task), data))
    assert found.shape == ((12,) if task == "binary" else z.shape)
    assert found.numpy().reshape(z.shape) == pytest.approx(expected, abs=1e-6)


def test_reload(quiet_trainer, loader, tmp_path, student):
    trainer = quiet_trainer()
    module = SupervisedModule(student, task="multilabel", lr_interval="step")
    trainer.fit(module, loader(labels=torch.randint(2, (12, 10))))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    fresh = copy.deepcopy(student)
    fresh[0].weight.data.zero_()
    again = SupervisedModule.load_from_checkpoint(tmp_path / "c.ckpt", student=fresh, weights_only=True)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert (again.task, again.lr_interval) == ("multilabel", "step")


class TestCheckpointsOutsideOfATrainer:
    @pytest.fixture
    def path(self, quiet_trainer, tmp_path):
        trainer = quiet_trainer()
        trainer.strategy.connect(SupervisedModule(nn.Linear(4, 3)))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        return tmp_path / "c.ckpt"

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            (nn.Linear(5, 3), r"1 of another shape: student.weight \[3, 4\] in the file, \[3, 5\] in the model"),
            (
                nn.Sequential(nn.Linear(4, 3)),
                "2 missing: student.0.weight, student.0.bias; 2 unexpected: student.weight",
            ),
        ],
    )
    def test_another_student(self, path, student, message):
        with pytest.raises(InputError, match=f"^the weights do not fit SupervisedModule: {message}") as caught:
            SupervisedModule.load_from_checkpoint(path, student=student)
        assert "\n" not in str(caught.value)

    def test_not_strict(self, path):
        wider = nn.Sequential()
        wider.weight, wider.more = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(2))
        found = SupervisedModule.load_from_checkpoint(path, student=wider, strict=False)
        assert found.student.weight.any()

    def test_compiled_names(self, path):
        class Compiled(nn.Module):
            def __init__(self):
                super().__init__()
                self._orig_mod = nn.Linear(4, 3)

        state = torch.load(path, weights_only=True)["state_dict"]
        found = SupervisedModule.load_from_checkpoint(path, student=Compiled())
        assert torch.equal(found.student._orig_mod.weight, state["student.weight"])
