"""ABCModule: the objective by hand, the masks, resume, hidden labels, long tails, complaints."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    ABCModule,
    Batch,
    DatasetSource,
    FixedThreshold,
    FreeMatch,
    InputError,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.batch import LabelKind
from kd_lightning.losses import LogitAdjustmentLoss
from kd_lightning.modules._shared.row_draws import uniform_of_rows

FEATURES, CLASSES = 5, 3
COUNTS = [40, 10, 4]
Y = torch.tensor([0, -100, 1, 2, -100, 0, -100, -100, 0, 1, -100, -100, -100, 0, -100])
UNLABELED = (Y == -100).nonzero().flatten().tolist()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """The labels of a datamodule."""

    def __init__(self, counts=COUNTS):
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def visible_labels(self):
        return self.labels


def make(weight=0.7, balanced=0.5, threshold=0.45, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    module = ABCModule(net, weight, balanced, threshold, **kwargs).double()
    module.balance_classes(Counted())
    return module


def batch(strong=True, rows=slice(None), **kwargs):
    x, views = randn(len(Y), FEATURES) * 2, randn(len(Y), FEATURES, seed=1) * 2
    index, view = torch.arange(len(Y)) * 7 + 3, torch.full_like(Y, 5)
    return Batch(x[rows], Y[rows], index[rows], view[rows], x_strong=views[rows] if strong else None, **kwargs)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def by_hand(module, batch, progress=0.0, tau=0.45):
    """Both terms of the balanced classifier, row by row; and the features and logits that they use."""
    first, second = module.student[0], module.student[2]

    def logits(x):
        hidden = np.tanh(first.weight.detach().numpy() @ x + first.bias.detach().numpy())
        return second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()

    r = min(COUNTS) / np.array(COUNTS)
    hard, soft, labeled, unlabeled, accepted = 0.0, 0.0, 0, 0, 0
    strong = batch.x if batch.x_strong is None else batch.x_strong
    draws = module._draws(batch).tolist()
    for row, x in enumerate(batch.x.numpy()):
        u, y = draws[row], int(batch.y[row])
        q = softmax(logits(x))
        if y >= 0:
            labeled += 1
            hard -= np.log(q[y]) * (u < r[y])
        else:
            unlabeled += 1
            inside = q.max() >= tau and u < 1 - progress * (1 - r[q.argmax()])
            accepted += inside
            soft -= inside * (q * np.log(softmax(logits(strong[row].numpy())))).sum()
    return hard / labeled, soft / unlabeled, accepted


class TestObjective:
    @pytest.mark.parametrize("strong", [True, False])
    @pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
    def test_by_hand(self, strong, progress, monkeypatch):
        module, rows = make(), batch(strong)
        monkeypatch.setattr(ABCModule, "_progress", lambda self: progress)
        terms = module.losses(rows)
        hard, soft, accepted = by_hand(module, rows, progress)
        assert 0 < accepted < len(UNLABELED)
        assert {name: term.weight for name, term in terms.items()} == {
            "hard": 1.0, "unsupervised": 0.7, "balanced_hard": 0.5, "balanced_unsupervised": 0.5
        }  # fmt: skip
        assert terms["balanced_hard"].value.item() == pytest.approx(hard, rel=1e-10)
        assert terms["balanced_unsupervised"].value.item() == pytest.approx(soft, rel=1e-10)

    @pytest.mark.parametrize("strong", [True, False])
    def test_the_other_terms_are_those_of_the_base_classifier(self, strong):
        selection = partial(FixedThreshold, 0.5)
        module, rows = make(selection=selection()), batch(strong)
        terms = module.losses(rows)
        net = nn.Sequential(*module.student[:2], module.base_classifier)
        expected = PseudoLabelModule(net, 0.7, selection=selection()).losses(rows)
        for name, term in expected.items():
            assert terms[name].weight == term.weight
            assert terms[name].value.item() == pytest.approx(term.value.item(), rel=1e-12)

    def test_each_classifier_has_the_gradient_of_its_terms(self):
        module = make()
        terms = module.losses(batch())
        both = {"base": module.base_classifier.weight, "balanced": module.student[2].weight}
        for name, term in terms.items():
            found = torch.autograd.grad(term.value, [*both.values(), module.student[0].weight], retain_graph=True,
                                        allow_unused=True)  # fmt: skip
            own = dict(zip([*both, "features"], found, strict=True))
            mine, other = ("balanced", "base") if name.startswith("balanced") else ("base", "balanced")
            assert own[mine].abs().sum() > 0
            assert own[other] is None or not own[other].any()
            assert own["features"].abs().sum() > 0

    def test_the_pseudo_labels_have_no_gradient(self):
        """Finite differences of the strong view's loss alone."""
        module, rows = make(threshold=0.0), batch()
        value = module.losses(rows)["balanced_unsupervised"].value
        q = module.student(rows.x[UNLABELED]).detach().softmax(1)
        log_p = module.student(rows.x_strong[UNLABELED]).log_softmax(1)
        weight = module.student[2].weight
        expected = torch.autograd.grad(-(q * log_p).sum() / len(UNLABELED), weight)[0]
        assert torch.autograd.grad(value, weight)[0].numpy() == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-12)

    @pytest.mark.parametrize("cut", [1, 4, 8])
    def test_shares_of_two_processes_add_up(self, cut):
        """Means over the batches of the step, as the loader sets them: half of both sums is the whole."""
        means = {"mean_labels": 7 / 2, "mean_rows": len(Y) / 2}
        module = make()
        whole, parts = module.losses(batch()), []
        for rows in (slice(0, cut), slice(cut, None)):
            parts.append(module.losses(batch(rows=rows, **means)))
        for name, term in whole.items():
            both = sum(part[name].value.item() for part in parts) / 2
            assert both == pytest.approx(term.value.item(), rel=1e-10), name

    def test_coarse_labels_bound_the_pseudo_label(self):
        module, rows = make(threshold=0.0), batch()
        candidates = torch.zeros(len(Y), CLASSES, dtype=torch.bool)
        candidates[1, [1, 2]] = True
        kind = torch.where(Y == -100, LabelKind.MISSING, LabelKind.CLEAN).to(torch.int8)
        kind[1] = LabelKind.COARSE
        coarse = Batch(rows.x, Y, rows.index, rows.view, kind=kind, candidates=candidates, x_strong=rows.x_strong)
        value = module.losses(coarse)["balanced_unsupervised"].value.item()
        q = module.student(rows.x[UNLABELED]).detach().softmax(1)
        q[0] = q[0] * torch.tensor([0, 1, 1]) / q[0, 1:].sum()
        log_p = module.student(rows.x_strong[UNLABELED]).log_softmax(1).detach()
        assert value == pytest.approx(-(q * log_p).sum().item() / len(UNLABELED), rel=1e-6)

    @pytest.mark.parametrize("y", [torch.full_like(Y, -100), Y.clamp_min(0)], ids=["no label", "all labeled"])
    def test_batches_of_one_kind(self, y):
        module, rows = make(), batch()
        terms = module.losses(Batch(rows.x, y, rows.index, rows.view, x_strong=rows.x_strong))
        empty = "balanced_hard" if (y < 0).all() else "balanced_unsupervised"
        assert terms[empty].value.item() == 0
        module.training_step(Batch(rows.x, y, rows.index, rows.view, x_strong=rows.x_strong), 0).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


class TestMasks:
    def test_each_row_is_in_at_times_if_there_is_one_view(self, quiet_trainer):
        """With ``num_views: 1`` all steps show the same view, but not the same rows."""
        seen: dict[int, set[bool]] = {}

        class Draws(Callback):
            def on_train_batch_start(self, trainer, module, batch, *args):
                for index, draw in zip(batch.index.tolist(), module._draws(batch).tolist(), strict=True):
                    seen.setdefault(index, set()).add(draw < 0.5)

        quiet_trainer(max_epochs=12, callbacks=[Draws()]).fit(net_module(), datamodule=tail(num_views=1))
        assert len(seen) > 200
        assert np.mean([len(both) == 2 for both in seen.values()]) > 0.95

    def test_another_seed_draws_other_rows(self):
        rows, module = batch(), make()
        first = module._draws(rows)
        assert torch.equal(module._draws(rows), first)
        counted = Counted()
        counted.seed = 1
        module.balance_classes(counted)
        assert (module._draws(rows) != first).all()

    def test_labeled_rows_are_balanced(self):
        """Of 100:1 labels as many rows of each class are in."""
        labels = Counted([1000, 100, 10]).labels
        ratios = torch.tensor([0.01, 0.1, 1.0])
        inside = torch.zeros(3)
        for view in range(40):
            draws = uniform_of_rows(Batch(labels, None, torch.arange(len(labels)), torch.full_like(labels, view)), 0, 0)
            inside += torch.bincount(labels[draws < ratios[labels]], minlength=3)
        assert (inside / 40).tolist() == pytest.approx([10, 10, 10], rel=0.15)

    def test_progress_is_that_of_the_epochs(self, quiet_trainer):
        seen = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, module, *args):
                seen.append(module._progress())

        quiet_trainer(max_epochs=4, callbacks=[Look()], limit_train_batches=1).fit(net_module(), datamodule=tail())
        assert seen == [0, 0.25, 0.5, 0.75]
        for epochs in (-1, 100):  # what ends the run counts
            seen.clear()
            trainer = quiet_trainer(max_epochs=epochs, max_steps=4, callbacks=[Look()])
            trainer.fit(net_module(), datamodule=tail())
            assert seen == [0, 0.25, 0.5, 0.75]


MEANS = torch.tensor([[0.0, 1.3], [1.2, -0.7], [-1.2, -0.7]])


def draw_samples(counts, seed):
    """Three classes that overlap."""
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    return MEANS[y] + 0.8 * torch.randn(len(y), 2, generator=torch.Generator().manual_seed(seed)), y


POOLS = {"alike": [400, 40, 4], "uniform": [148, 148, 148], "reversed": [4, 40, 400]}


def tail(pool="alike", labels=(200, 20, 2), shift=0, **kwargs):
    """A 100:1 tail of labels, and a pool whose classes are hidden."""
    (x, y), (u, hidden) = draw_samples(list(labels), 1), draw_samples(POOLS[pool], 2)
    y = torch.cat([y, torch.full_like(hidden, -100)])
    options = {"val_size": 0, "batch_size": 48, "labeled_batch_size": 16, "seed": 0} | kwargs
    return SemiSupervisedDataModule(DatasetSource(TensorDataset(torch.cat([x, u]), y)), **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


def net_module(threshold=0.8, **kwargs):
    adam = partial(torch.optim.Adam, lr=0.01)
    return ABCModule(net(), selection=FixedThreshold(threshold), threshold=threshold, optimizer=adam, **kwargs)


def recalls(network):
    x, y = draw_samples([300] * 3, 9)
    right = network(x).argmax(1) == y
    return [right[y == c].float().mean().item() for c in range(3)]


@pytest.mark.parametrize("pool", POOLS)
def test_long_tail(quiet_trainer, pool):
    """ABC finds the rarest class, whatever the pool's distribution is; logit adjustment does if that is the labels'."""
    found = {}
    plain = partial(PseudoLabelModule, selection=FixedThreshold(0.8), optimizer=partial(torch.optim.Adam, lr=0.01))
    modules = {"plain": plain(net()), "adjusted": plain(net(), hard_loss=LogitAdjustmentLoss()), "ABC": net_module()}
    for name, module in modules.items():
        quiet_trainer(max_epochs=20).fit(module, datamodule=tail(pool))
        found[name] = recalls(module.student)
    means = {name: np.mean(values) for name, values in found.items()}
    assert means["plain"] < 0.75
    assert means["adjusted"] > means["plain"] + 0.03
    assert means["ABC"] > means["plain"] + 0.1
    assert found["ABC"][2] > found["plain"][2] + 0.3
    if pool == "alike":
        assert found["adjusted"][2] > found["plain"][2] + 0.2
    else:
        assert means["ABC"] > means["adjusted"] + 0.1


def test_logit_adjustment_of_a_long_tail(quiet_trainer):
    found = {}
    for name, loss in {"plain": nn.CrossEntropyLoss(), "adjusted": LogitAdjustmentLoss()}.items():
        module = SupervisedModule(net(), hard_loss=loss, optimizer=partial(torch.optim.Adam, lr=0.01))
        quiet_trainer(max_epochs=20).fit(module, datamodule=tail(labeled_batch_size=None, batch_size=32))
        found[name] = recalls(module.student)
    assert np.mean(found["adjusted"]) > np.mean(found["plain"]) + 0.05
    assert found["adjusted"][2] > found["plain"][2] + 0.2


class TestRun:
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_resumes_to_the_bit_in_mid_epoch(self, quiet_trainer, tmp_path, accumulate):
        def fit(path=None):
            module = net_module(0.4)
            checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
            options = {"callbacks": [checkpoints], "enable_checkpointing": True, "accumulate_grad_batches": accumulate}
            trainer = quiet_trainer(max_epochs=2, limit_train_batches=4, **options)
            trainer.fit(module, datamodule=tail(strong_transform=nn.Dropout(0.3)), ckpt_path=path)
            return [*module.state_dict().values()]

        whole = fit()
        for step in (1, 2, 3):
            again = fit(tmp_path / f"step={step}.ckpt")
            assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True)), step

    def test_hidden_labels_change_nothing(self, quiet_trainer):
        class Shift(Callback):
            """Changes the hidden labels, once the split is drawn."""

            def __init__(self, shift):
                self.shift = shift

            def setup(self, trainer, module, stage):
                hidden, targets = trainer.datamodule.split.unlabeled, trainer.datamodule._parts.train.targets
                targets[hidden] = (targets[hidden] + self.shift) % CLASSES

        def fit(shift):
            x, y = draw_samples([30] * 3, 1)
            data = SemiSupervisedDataModule(
                DatasetSource(TensorDataset(x, y)), labeled=4, val_size=0, batch_size=12, labeled_batch_size=4, seed=0
            )
            module = net_module(0.4)
            trainer = quiet_trainer(callbacks=[Shift(shift)])
            trainer.fit(module, datamodule=data)
            assert trainer.callback_metrics["train/balanced_coverage"] > 0.3
            return [*module.state_dict().values()]

        assert all(torch.equal(one, other) for one, other in zip(fit(0), fit(1), strict=True))

    def test_the_student_is_what_is_deployed(self, quiet_trainer, tmp_path):
        module = net_module()
        trainer = quiet_trainer(limit_train_batches=2, enable_checkpointing=True)
        trainer.fit(module, datamodule=tail())
        assert {*module.student.state_dict()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
        x = draw_samples([2, 2, 2], 4)[0]
        assert torch.equal(module(x), module.student(x))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = ABCModule.load_from_checkpoint(tmp_path / "a.ckpt", student=net(), weights_only=False)
        assert loaded.threshold == 0.8
        assert torch.equal(loaded(x), module(x))
        assert torch.equal(loaded.base_classifier.weight, module.base_classifier.weight)
        charts = {
            "train/balanced_hard",
            "train/balanced_unsupervised",
            "train/balanced_coverage",
            "balanced_hard_weight",
        }
        assert charts <= {*trainer.callback_metrics}

    @pytest.mark.parametrize("before", [False, True])
    def test_a_compiled_student(self, before):
        module = make()
        expected = module.losses(batch())
        compiled = torch.compile(module.student, backend="eager")
        if before:
            base = module.base_classifier.state_dict()
            module = ABCModule(compiled, 0.7, 0.5, 0.45).double()
            module.base_classifier.load_state_dict(base)
            module.balance_classes(Counted())
        else:
            module.student = compiled
        for name, term in module.losses(batch()).items():
            assert term.value.item() == pytest.approx(expected[name].value.item(), rel=1e-12)

    def test_a_copy_after_a_step(self):
        """Weight averaging copies the module at the start of each fit."""
        module = make()
        module.losses(batch())
        assert torch.equal(deepcopy(module).base_classifier.weight, module.base_classifier.weight)

    def test_with_a_selection_that_has_state(self, quiet_trainer):
        module = ABCModule(net(), selection=FreeMatch(0.9, 0.1))
        quiet_trainer(limit_train_batches=3).fit(module, datamodule=tail())
        assert {"train/regularizer", "train/balanced_hard"} <= {*module.trainer.callback_metrics}


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_abc import fit_share
fit_share(2)
"""


def fit_share(world, folder="."):
    """Fit on some processes that share the same global batches; the first one saves the weights."""
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision="64-true",
        default_root_dir=folder,
    )  # fmt: skip
    data = tail(batch_size=48 // world, labeled_batch_size=16 // world, strong_transform=nn.Identity())
    module = net_module(0.4)
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        charts = {name: value.item() for name, value in trainer.callback_metrics.items() if name != "train/loss_step"}
        torch.save([module.state_dict(), charts], f"{folder}/{world}.pt")


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_are_one(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(SCRIPT)
    processes.run_ranks(["run.py", str(Path(__file__).parent)])
    fit_share(1)
    (both, charts), (one, expected) = (torch.load(f"{world}.pt", weights_only=True) for world in (2, 1))
    assert both.keys() == one.keys()
    for key, value in one.items():
        assert both[key].numpy() == pytest.approx(value.numpy(), rel=1e-8, abs=1e-10), key
    assert charts == pytest.approx(expected, rel=1e-5)
    assert expected["train/balanced_coverage"] > 0.05


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))

    def forward(self, x):
        return 2 * self.layers(x)


class TestComplaints:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"balanced": -1.0}, "balanced_weight must be finite and at least 0, got -1.0"),
            ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
            ({"class_dim": 1}, "ABCModule is for one label a sample, got class_dim: 1"),
            ({"head": "1"}, "head must name a linear or convolutional layer"),
            ({"task": "binary"}, "task must be multiclass"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(InputError, match=message):
            make(**arguments)

    def test_heads(self):
        with pytest.raises(InputError, match="head: 0 must be a linear layer, got Conv2d"):
            ABCModule(nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        module = ABCModule(Scaled().double())
        module.balance_classes(Counted())
        with pytest.raises(InputError, match="head: 'layers.2' must give the student's logits"):
            module.losses(batch())
        module = make(head="0")
        with pytest.raises(InputError, match="head: '0' must give the student's logits"):
            module.losses(batch())

    def test_logits_are_compared_in_their_own_type(self):
        class Full(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(FEATURES, CLASSES)

            def forward(self, x):
                return self.head(x).float()

        module = ABCModule(Full())
        module.balance_classes(Counted())
        with torch.autocast("cpu", torch.bfloat16):
            assert module.losses(Batch(batch().x.float(), Y))["hard"].value.isfinite()

    def test_a_network_of_nan_has_its_head(self):
        module = make()
        module.student[0].weight.data.fill_(float("nan"))
        assert module.losses(batch())["hard"].value.isnan()

    def test_a_batch_without_rows_does_not_count_as_a_check(self):
        module = ABCModule(Scaled().double())
        module.balance_classes(Counted())
        module.losses(batch(rows=slice(0, 0)))
        with pytest.raises(InputError, match="must give the student's logits"):
            module.losses(batch())

    def test_labels(self, quiet_trainer):
        with pytest.raises(InputError, match="ABCModule needs a label of each class, but there is none of 1"):
            quiet_trainer().fit(net_module(), datamodule=tail(labels=(20, 0, 2)))
        with pytest.raises(InputError, match="ABCModule and data.sampler: balanced both correct the imbalance"):
            quiet_trainer().fit(net_module(), datamodule=tail(sampler="balanced"))
        with pytest.raises(InputError, match="ABCModule counts labels, so it needs a datamodule with visible_labels"):
            quiet_trainer().fit(net_module(), DataLoader(TensorDataset(*draw_samples([4, 4, 4], 1)), 4))
        with pytest.raises(InputError, match=r"ABCModule takes one class a sample, \(B,\), got labels \[15, 3\]"):
            make().losses(Batch(batch().x, torch.eye(3)[Y.clamp_min(0)]))
        module = ABCModule(nn.Linear(FEATURES, CLASSES))
        with pytest.raises(InputError, match="ABCModule counts the labels at the start of a fit"):
            module.losses(Batch(batch().x.float(), Y))
        module.balance_classes(Counted([5, 5]))
        with pytest.raises(InputError, match="ABCModule counted labels of 2 classes, got 3 outputs"):
            module.losses(Batch(batch().x.float(), Y))

    def test_a_run_without_an_end(self, quiet_trainer):
        with pytest.raises(InputError, match="ABCModule needs the length of the run; set trainer.max_epochs"):
            quiet_trainer(max_epochs=-1).fit(net_module(), datamodule=tail())
