"""PseudoLabelModule: objective and gradient by hand, one forward pass, the average, thresholds, resume, complaints."""

import warnings
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
    AdaMatch,
    Batch,
    CoarseLabels,
    DatasetSource,
    Digits,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    GraphPseudoLabels,
    InputError,
    OpenSetFilter,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    Sharpen,
    SoftMatch,
    SoftWeightAnnealing,
    SupervisedModule,
    TopKPerClass,
)
from kd_lightning.batch import LabelKind
from kd_lightning.pseudo_labels.table import PseudoLabels

ROWS, FEATURES, CLASSES = 9, 5, 4
SGD = partial(torch.optim.SGD, lr=0.5)
Y = torch.tensor([2, -100, -100, 0, -100, 3, -100, -100, 1])
NONE, ALL = torch.full_like(Y, -100), Y.clamp_min(0)


def random_inputs(seed=0, rows=ROWS):
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES, bias=False).double()


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def by_hand(weights, x, clean, targets, strong=None, weight=1.0):
    """Loss and gradient (C, D), row by row.

    ``clean`` maps rows to classes; ``targets`` maps unlabeled rows to what they learn, None where that is nothing.
    """
    weights, x = weights.detach().numpy(), x.numpy()
    strong = x if strong is None else strong.numpy()
    loss, gradient = 0.0, np.zeros_like(weights)
    terms = [(x[row], np.eye(CLASSES)[label], 1 / len(clean)) for row, label in clean.items()]
    terms += [(strong[row], t, weight / len(targets)) for row, t in targets.items() if t is not None]
    for sample, target, share in terms:
        p = softmax(weights @ sample)
        loss -= share * (target * np.log(p)).sum()
        gradient += share * np.outer(p * target.sum() - target, sample)
    return loss, gradient


def own_labels(weights, x, y, threshold=0.0):
    """One-hot decisions for the unlabeled rows, None below the threshold."""
    found = {}
    for row in (y == -100).nonzero().flatten().tolist():
        p = softmax(weights.detach().numpy() @ x[row].numpy())
        found[row] = np.eye(CLASSES)[p.argmax()] if p.max() >= threshold else None
    return found


def given(y):
    return {row: label for row, label in enumerate(y.tolist()) if label != -100}


class TestObjective:
    @pytest.mark.parametrize("strong", [None, random_inputs(1)], ids=["one view", "two views"])
    @pytest.mark.parametrize("threshold", [None, 0.45, 1.0, 1e-6], ids=["Lee", "some", "none accepted", "all"])
    @pytest.mark.parametrize("y", [Y, NONE, ALL], ids=["mixed", "no label", "all labeled"])
    def test_own_labels(self, strong, threshold, y):
        net, x = linear(), random_inputs()
        targets = own_labels(net.weight, x, y, threshold or 0.0)
        if threshold == 0.45 and (y == -100).any():
            assert {target is None for target in targets.values()} == {True, False}
        loss, gradient = by_hand(net.weight, x, given(y), targets, strong, weight=0.7)
        module = PseudoLabelModule(net, 0.7, selection=threshold and FixedThreshold(threshold))
        found = module.training_step(Batch(x, y, x_strong=strong), 0)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-12)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-14)

    @pytest.mark.parametrize("strong", [None, random_inputs(1)], ids=["one view", "two views"])
    @pytest.mark.parametrize("soft", [False, True])
    def test_refreshed_labels(self, strong, soft):
        net, x = linear(), random_inputs()
        kind = torch.where(Y == -100, LabelKind.MISSING, LabelKind.CLEAN).to(torch.int8)
        y, probabilities = Y.clone(), None
        y[[1, 4, 7]], kind[[1, 4, 7]] = torch.tensor([3, 0, 0]), LabelKind.PSEUDO
        targets = {1: np.eye(4)[3], 2: None, 4: np.eye(4)[0], 6: None, 7: np.eye(4)[0]}
        if soft:
            probabilities = torch.zeros(ROWS, CLASSES)
            probabilities[[1, 4, 7]] = torch.rand(3, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
            targets |= {row: probabilities[row].double().numpy() for row in (1, 4, 7)}
        loss, gradient = by_hand(net.weight, x, given(Y), targets, strong, weight=3.0)
        batch = Batch(x, y, kind=kind, soft=probabilities, x_strong=strong, mean_labels=7.0, mean_pseudo=3.0)
        module = PseudoLabelModule(net, 3.0, pseudo_labels="refreshed")
        for _ in range(2):  # an optimiser may ask twice for the loss of a batch
            net.zero_grad()
            found = module.training_step(batch, 0)
            found.backward()
            assert found.item() == pytest.approx(loss, rel=1e-6 if soft else 1e-12)
            assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-6, abs=1e-9)

    def test_refreshed_labels_with_weights(self):
        """Of the pseudo-labels in their term, and of the given labels in the hard one."""
        net, x = linear(), random_inputs()
        kind = torch.where(Y == -100, LabelKind.MISSING, LabelKind.CLEAN).to(torch.int8)
        y, weight = Y.clone(), torch.ones(ROWS)
        y[[1, 4]], kind[[1, 4]], weight[[1, 4]] = torch.tensor([3, 0]), LabelKind.PSEUDO, torch.tensor([0.25, 0.75])
        targets = {1: 0.25 * np.eye(4)[3], 2: None, 4: 0.75 * np.eye(4)[0], 6: None, 7: None}
        loss, gradient = by_hand(net.weight, x, given(Y), targets, weight=3.0)
        batch = Batch(x, y, kind=kind, weight=weight, mean_labels=6.0, mean_pseudo=2.0)
        found = PseudoLabelModule(net, 3.0, pseudo_labels="refreshed").training_step(batch, 0)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-12)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-14)

    def test_before_the_first_refresh_only_labels_are_learned(self):
        net, x = linear(), random_inputs()
        loss, gradient = by_hand(net.weight, x, given(Y), {})
        found = PseudoLabelModule(net, pseudo_labels="refreshed").training_step(Batch(x, Y), 0)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-12)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10)

    def test_own_labels_take_no_notice_of_handed_out_ones(self):
        net, x = linear(), random_inputs()
        y, kind = Y.clone(), torch.where(Y == -100, LabelKind.PSEUDO, LabelKind.CLEAN)
        expected = PseudoLabelModule(net).training_step((x, Y), 0)
        y[Y == -100] = 2
        assert torch.equal(PseudoLabelModule(net).training_step(Batch(x, y, kind=kind), 0), expected)

    @pytest.mark.parametrize("y", [Y, NONE, ALL])
    def test_weight_zero_is_supervised_training(self, y):
        """To the bit."""
        grads = []
        for module in (PseudoLabelModule(linear().float(), 0.0), SupervisedModule(linear().float())):
            loss = module.training_step((random_inputs().float(), y), 0)
            loss.backward()
            grads.append((loss.item(), module.student.weight.grad))
        assert grads[0][0] == grads[1][0]
        assert torch.equal(grads[0][1], grads[1][1])

    def test_a_batch_without_labels_at_all(self):
        net, x = linear(), random_inputs()
        assert PseudoLabelModule(net).training_step(x, 0).item() == pytest.approx(
            PseudoLabelModule(net).training_step((x, NONE), 0).item()
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_computed_in_float(self, dtype):
        class Half(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                return self.net(x).to(dtype)

        net, x = linear(), random_inputs()
        exact = net(x).to(dtype).detach().double()
        expected, _ = by_hand(torch.eye(CLASSES).double(), exact, given(Y), own_labels(torch.eye(CLASSES), exact, Y))
        loss = PseudoLabelModule(Half(net)).training_step((x, Y), 0)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    def test_bfloat16_run(self, quiet_trainer, loader, student):
        trainer = quiet_trainer(precision="bf16-mixed")
        labels = torch.tensor([0, -100, 2] * 4)
        trainer.fit(PseudoLabelModule(student, selection=FixedThreshold(0.01), ema_decay=0.9), loader(labels=labels))
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        assert trainer.callback_metrics["train/coverage"] == 1


def coarse_batch(**kwargs):
    """Two of the unlabeled rows have a coarse label."""
    candidates = torch.zeros(ROWS, CLASSES, dtype=torch.bool)
    candidates[1, [0, 3]] = candidates[6, [1, 2, 3]] = True
    kind = torch.where(Y == -100, LabelKind.MISSING, LabelKind.CLEAN).to(torch.int8)
    kind[[1, 6]] = LabelKind.COARSE
    return Batch(random_inputs(), Y, kind=kind, candidates=candidates, **kwargs)


def coarse_by_hand(weights, batch, threshold=0.0, weight=1.0):
    """Hard term: the fine and the coarse labels; unsupervised: all others, within the candidates of the coarse."""
    given, rest = batch.y != -100, batch.y == -100
    coarse = batch.candidates.any(dim=1).numpy()
    inside, w = batch.candidates.numpy(), weights.detach().double().numpy()
    strong = batch.x if batch.x_strong is None else batch.x_strong
    loss, gradient, labels = 0.0, np.zeros_like(w), int(given.sum()) + coarse.sum()
    for row, x in enumerate(batch.x.double().numpy()):
        p = softmax(w @ x)
        if given[row] or coarse[row]:
            chosen = np.eye(CLASSES)[int(batch.y[row])] if given[row] else inside[row]
            loss -= np.log((chosen * p).sum()) / labels
            gradient += np.outer(p - chosen * p / (chosen * p).sum(), x) / labels
        if rest[row]:
            allowed = p * inside[row] / (p * inside[row]).sum() if coarse[row] else p
            if allowed.max() >= threshold:
                x = strong[row].double().numpy()
                share, p, label = weight / int(rest.sum()), softmax(w @ x), allowed.argmax()
                loss -= share * np.log(p[label])
                gradient += share * np.outer(p - np.eye(CLASSES)[label], x)
    return loss, gradient


class TestCoarse:
    @pytest.mark.parametrize("strong", [None, random_inputs(1)], ids=["one view", "two views"])
    @pytest.mark.parametrize("threshold", [None, 0.45])
    @pytest.mark.parametrize("ema", [None, 0.9])
    def test_by_hand(self, strong, threshold, ema):
        net, batch = linear(), coarse_batch(x_strong=strong)
        loss, gradient = coarse_by_hand(net.weight, batch, threshold or 0.0, weight=0.7)
        selection = threshold and FixedThreshold(threshold)
        found = PseudoLabelModule(net, 0.7, selection=selection, ema_decay=ema).training_step(batch, 0)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-10)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-12)

    def test_the_pseudo_label_is_one_of_the_candidates(self):
        """Where the student's own decision is another."""
        net, batch = linear(), coarse_batch()
        decisions = net(batch.x).argmax(dim=1)
        assert not batch.candidates[[1, 6], decisions[[1, 6]]].all()

    @pytest.mark.parametrize("cut", [1, 2, 7])
    def test_shares_of_a_step_add_up(self, cut):
        net, batch = linear(), coarse_batch()
        module = PseudoLabelModule(net)
        for rows in (torch.arange(cut), torch.arange(cut, ROWS)):
            part = batch.select(rows)
            part.mean_labels, part.mean_coarse, part.mean_rows = 3.0, 1.0, ROWS / 2
            (module.training_step(part, 0) / 2).backward()
        _, gradient = coarse_by_hand(linear().weight, batch)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-12)

    def test_refreshed_labels(self):
        """An accepted one takes the coarse label's place; the other coarse row is in the hard term alone."""
        net, batch = linear(), coarse_batch(mean_labels=6.0, mean_coarse=1.0, mean_pseudo=1.0)
        batch.y, batch.candidates[1] = Y.clone(), False
        batch.y[1], batch.kind[1] = 3, LabelKind.PSEUDO
        found = PseudoLabelModule(net, pseudo_labels="refreshed").losses(batch)
        hard = batch.select(torch.tensor([row for row in range(ROWS) if row != 1]))
        expected, _ = coarse_by_hand(net.weight, hard, threshold=2.0)
        assert found["hard"].value.item() == pytest.approx(expected)
        learned = -np.log(softmax((net.weight @ batch.x[1]).detach().numpy())[3]) / 5  # of all without a clean label
        assert found["unsupervised"].value.item() == pytest.approx(learned)


def two_streams(labeled=(2, 1, 1, 1), rest=7, **kwargs):
    """A source of 4 classes, of which these numbers are labeled, and an unlabeled part."""
    y = torch.arange(CLASSES).repeat_interleave(torch.tensor(labeled))
    part = TensorDataset(random_inputs(3, len(y)).float(), y)
    source = DatasetSource(part, unlabeled=TensorDataset(random_inputs(4, rest).float()))
    return SemiSupervisedDataModule(source, labeled=None, val_size=0, unlabeled="source", **kwargs)


class TestSteps:
    @pytest.mark.parametrize("stream", [None, 2])
    def test_accumulated_batches_make_one_big_one(self, quiet_trainer, stream):
        """Whatever share of labels each has, and where the last batch is short."""
        net = linear().float()
        data = two_streams(rest=9, batch_size=6, labeled_batch_size=stream)
        batches = list(data.train_dataloader())
        assert len({len(batch) for batch in batches}) == 2
        start = net.weight.detach().clone()
        trainer = quiet_trainer(accumulate_grad_batches=len(batches))
        trainer.fit(PseudoLabelModule(net, 2.0, optimizer=SGD), datamodule=data)
        assert trainer.global_step == 1
        x, y = torch.cat([b.x for b in batches]).double(), torch.cat([b.y for b in batches])
        _, gradient = by_hand(start.double(), x, given(y), own_labels(start.double(), x, y), weight=2.0)
        assert ((start - net.weight) / 0.5).detach().numpy() == pytest.approx(gradient, abs=1e-5)

    def test_accumulated_batches_with_coarse_labels(self, quiet_trainer):
        net, seen = linear().float(), []
        coarse = CoarseLabels({"low": [0, 1], "high": [2, 3]}, fraction=0.5)
        source = DatasetSource(TensorDataset(random_inputs(3, 26).float(), torch.arange(26) % CLASSES))
        data = SemiSupervisedDataModule(source, labeled=1, coarse=coarse, val_size=0, batch_size=7)

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, number):
                seen.append(batch)

        start = net.weight.detach().clone()
        trainer = quiet_trainer(accumulate_grad_batches=4, callbacks=[Watch()])
        trainer.fit(PseudoLabelModule(net, 2.0, optimizer=SGD), datamodule=data)
        assert trainer.global_step == 1 and len(seen) == 4
        names = ("x", "y", "candidates")
        whole = Batch(**{name: torch.cat([getattr(batch, name) for batch in seen]) for name in names})
        _, gradient = coarse_by_hand(start, whole, weight=2.0)
        assert ((start - net.weight) / 0.5).detach().numpy() == pytest.approx(gradient, abs=1e-5)

    def test_lees_ramp(self, quiet_trainer):
        ramp = SoftWeightAnnealing(0.0, 3.0, begin_epoch=1, end_epoch=3, attribute="unsupervised_weight")
        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                seen.append(module.unsupervised_weight)

        trainer = quiet_trainer(max_epochs=5, callbacks=[ramp, Watch()])
        trainer.fit(PseudoLabelModule(linear().float()), datamodule=two_streams(batch_size=99))
        assert seen == [0.0, 0.0, 1.5, 3.0, 3.0]
        assert trainer.callback_metrics["unsupervised_weight"] == 3.0

    def test_charts_weigh_in_one_type(self, quiet_trainer, monkeypatch):
        """Processes that add up an int and a float end in a crash."""
        y = torch.tensor([2, -100, -100, 0, 1, 3])  # 2 unlabeled, then none
        module, kinds = PseudoLabelModule(linear().float()), set()
        of_these = ("train/coverage", "train/confidence")
        log = module._record_mean

        def record(name, value, rows, **_):
            kinds.update({type(rows)} if name in of_these else ())
            log(name, value, rows)

        monkeypatch.setattr(module, "_record_mean", record)
        quiet_trainer().fit(module, DataLoader(TensorDataset(random_inputs()[:6].float(), y), 3))
        assert kinds == {float}

    def test_charts(self, quiet_trainer):
        net, x = linear(), random_inputs()
        y = torch.tensor([2, -100, -100, 0, 1, 3, -100, -100, 1])  # three batches: 2, none and 2 unlabeled
        still = partial(torch.optim.SGD, lr=0.0)
        trainer = quiet_trainer()
        trainer.fit(
            PseudoLabelModule(net, selection=FixedThreshold(0.45), optimizer=still), DataLoader(TensorDataset(x, y), 3)
        )
        found = own_labels(net.weight, x, y)
        confidence = [softmax(net.weight.detach().numpy() @ x[row].numpy()).max() for row in found]
        values = trainer.callback_metrics
        assert values["train/confidence"].item() == pytest.approx(np.mean(confidence), rel=1e-5)
        assert values["train/coverage"].item() == pytest.approx(np.mean([c >= 0.45 for c in confidence]))
        assert {"train/loss", "train/hard", "train/unsupervised", "unsupervised_weight"} < set(values)


class Bn(nn.Module):
    """A network with batch statistics, an integer buffer, and a count of its forward passes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES)
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, len(x)))
        return self.last(self.norm(x))


class TestOneForward:
    @pytest.mark.parametrize("pseudo_labels", ["online", "refreshed"])
    @pytest.mark.parametrize("ema", [None, 0.9])
    @pytest.mark.parametrize("two", [False, True])
    @pytest.mark.parametrize("y", [Y, NONE, ALL], ids=["mixed", "no label", "all labeled"])
    def test_batch_statistics_are_those_of_all_rows(self, pseudo_labels, ema, two, y):
        x, strong = random_inputs().float(), random_inputs(1).float() if two else None
        net = Bn()
        module = PseudoLabelModule(net, pseudo_labels=pseudo_labels, ema_decay=ema)
        module.training_step(Batch(x, y, x_strong=strong), 0).backward()
        labeled = x[y != -100]
        through = x if not two or (pseudo_labels == "online" and ema is None) else labeled
        through = torch.cat([through, strong[y == -100]]) if two else through
        assert net.calls == [(True, len(through))]
        assert net.norm.running_mean.tolist() == pytest.approx((0.1 * through.mean(dim=0)).tolist(), abs=1e-6)
        assert net.norm.running_var.tolist() == pytest.approx((0.9 + 0.1 * through.var(dim=0)).tolist(), abs=1e-6)
        if ema is not None:
            averaged = module.ema.module
            count = int((y == -100).sum())
            assert averaged.calls == ([(False, count)] if pseudo_labels == "online" and count else [])
            assert averaged.norm.running_mean.tolist() == [0.0] * FEATURES
            assert all(p.grad is None and not p.requires_grad for p in module.ema.parameters())

    def test_labels_come_from_the_average(self):
        net, x = linear(), random_inputs()
        module = PseudoLabelModule(net, ema_decay=0.9)
        with torch.no_grad():
            module.ema.module.weight.copy_(linear(1).weight)
        targets = own_labels(linear(1).weight, x, Y)
        assert any((targets[row] != label).any() for row, label in own_labels(net.weight, x, Y).items())
        loss, gradient = by_hand(net.weight, x, given(Y), targets)
        found = module.training_step((x, Y), 0)
        found.backward()
        assert found.item() == pytest.approx(loss, rel=1e-12)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10)


class Steps(Callback):
    """Keeps the student's state after each optimiser step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.states):
            self.states.append({name: value.clone() for name, value in module.student.state_dict().items()})


class TestAverage:
    @pytest.mark.parametrize(("decay", "accumulate"), [(0.0, 1), (0.3, 1), (0.999, 1), (0.999, 2)])
    def test_by_hand(self, quiet_trainer, decay, accumulate):
        """Parameters and batch statistics decay alike; integers are copied; once an optimiser step."""
        torch.manual_seed(0)
        module, steps = PseudoLabelModule(Bn(), ema_decay=decay, optimizer=SGD), Steps()
        data = two_streams(rest=14, batch_size=6, labeled_batch_size=2)  # 4 batches an epoch
        trainer = quiet_trainer(max_epochs=2, callbacks=[steps], accumulate_grad_batches=accumulate)
        trainer.fit(module, datamodule=data)
        assert len(steps.states) == 8 // accumulate
        expected = {name: value.double() for name, value in steps.states[0].items()}
        for n, state in enumerate(steps.states[1:], 1):
            share = min(decay, (1 + n) / (10 + n))
            for name, value in state.items():
                old_share = share if value.is_floating_point() else 0.0
                expected[name] = old_share * expected[name] + (1 - old_share) * value.double()
        found = module.ema.module.state_dict()
        assert int(module.ema.n_averaged) == 8 // accumulate
        assert found["norm.num_batches_tracked"].item() == 8
        for name, value in expected.items():
            assert found[name].double().numpy() == pytest.approx(value.numpy(), abs=1e-6), name

    def test_is_in_no_optimiser(self):
        module = PseudoLabelModule(Bn(), ema_decay=0.9)
        (group,) = module.configure_optimizers().param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in module.student.parameters()}


SELECTIONS = {
    "FixedThreshold": lambda: FixedThreshold(0.4),
    "TopKPerClass": lambda: TopKPerClass(1),
    "FlexMatch": lambda: FlexMatch(0.4),
    "FreeMatch": lambda: FreeMatch(0.5, 0.1),
    "SoftMatch": lambda: SoftMatch(momentum=0.5),
    "AdaMatch": lambda: AdaMatch(momentum=0.5),
    "open set": lambda: OpenSetFilter(FixedThreshold(0.3), 0.5),
    "aligned, sharpened": lambda: DistributionAlignment(Sharpen(FlexMatch(0.4)), "labeled", 0.5),
}


@pytest.mark.parametrize("make", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumes_to_the_bit_in_mid_epoch(quiet_trainer, tmp_path, make, accumulate):
    def fit(path=None):
        torch.manual_seed(0)
        adam = partial(torch.optim.Adam, lr=0.05)
        module = PseudoLabelModule(Bn(), 1.0, selection=make(), ema_decay=0.9, optimizer=adam)
        data = two_streams(rest=24, batch_size=6, labeled_batch_size=2, strong_transform=nn.Dropout(0.3), seed=1)
        checkpoints = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = quiet_trainer(
            max_epochs=2, callbacks=[checkpoints], enable_checkpointing=True, accumulate_grad_batches=accumulate
        )
        trainer.fit(module, datamodule=data, ckpt_path=path)
        return module, [*module.state_dict().values()]

    module, whole = fit()
    for step in (1, 2, 4):
        _, again = fit(tmp_path / f"step={step}.ckpt")
        assert len(whole) == len(again)
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True)), step
    started = make()
    started.setup(29, CLASSES, 24)
    moved = zip(started.state_dict().items(), module.selection.state_dict().values(), strict=True)
    for (name, first), last in moved:
        assert torch.equal(first, last) == name.endswith("num_unlabeled"), name


@pytest.mark.parametrize("make", SELECTIONS.values(), ids=SELECTIONS)
def test_hidden_labels_change_nothing(quiet_trainer, make):
    """The weights are the same to the bit, whatever the labels are that training may not see."""

    class Shift(Callback):
        """Changes the hidden labels, once the split is drawn."""

        def __init__(self, shift):
            self.shift = shift

        def setup(self, trainer, module, stage):
            hidden, targets = trainer.datamodule.split.unlabeled, trainer.datamodule._parts.train.targets
            targets[hidden] = (targets[hidden] + self.shift) % CLASSES

    def fit(shift):
        torch.manual_seed(0)
        part = TensorDataset(random_inputs(3, 24).float(), torch.arange(24) % CLASSES)
        data = SemiSupervisedDataModule(
            DatasetSource(part), labeled=2, val_size=0, batch_size=6, labeled_batch_size=2, seed=0
        )
        module = PseudoLabelModule(Bn(), selection=make(), optimizer=SGD)
        refresh = PseudoLabelRefresh(selection=make(), warmup_epochs=0)
        quiet_trainer(max_epochs=2, callbacks=[Shift(shift), refresh]).fit(module, datamodule=data)
        return [*module.state_dict().values(), refresh.table.weight, refresh.table.label], refresh.report["precision"]

    (first, right), (second, shifted) = fit(0), fit(1)
    assert right != shifted
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestFlexMatch:
    def test_by_hand(self, quiet_trainer):
        """Thresholds before a step's own predictions; of weak views; confidence is the fixed threshold's."""
        net = linear().float()
        data = two_streams(rest=24, batch_size=6, labeled_batch_size=2, strong_transform=nn.Dropout(0.3))
        rows, inputs = [], []

        class Watch(PseudoLabelModule):
            def _select(self, batch, predicted, labeled, logits, unknown=None):
                before = self.student.weight.detach().double().clone()
                target, weight = super()._select(batch, predicted, labeled, logits, unknown)
                rows.append((before, batch.index.tolist(), target.argmax(dim=1), weight))
                return target, weight

            def losses(self, batch):
                inputs.append(batch.x[batch.y == -100].double())
                return super().losses(batch)

        quiet_trainer(max_epochs=3).fit(Watch(net, selection=FlexMatch(0.5), optimizer=SGD), datamodule=data)
        selected = dict.fromkeys(data.unlabeled_indices(), -1)
        taken = []
        for x, (weights, index, label, accepted) in zip(inputs, rows, strict=True):
            counts = [sum(value == c for value in selected.values()) for c in (*range(CLASSES), -1)]
            beta = [count / max(counts) for count in counts[:-1]]
            for n, sample in enumerate(x):
                p = softmax(weights.numpy() @ sample.numpy())
                assert int(label[n]) == p.argmax()
                assert bool(accepted[n]) == (p.max() >= 0.5 * beta[p.argmax()] / (2 - beta[p.argmax()]))
                if p.max() >= 0.5:
                    selected[index[n]] = int(p.argmax())
            taken += accepted.tolist()
        assert len(rows) == 18
        assert set(taken) == {0.0, 1.0}

    def test_need_an_index(self, quiet_trainer, loader, student):
        module = PseudoLabelModule(student, selection=FlexMatch(0.9))
        with pytest.raises(InputError, match="FlexMatch needs batches with an index"):
            module.training_step((torch.randn(2, 1, 8, 8), torch.tensor([0, -100])), 0)
        with pytest.raises(InputError, match=r"needs a datamodule with unlabeled_indices\(\)"):
            quiet_trainer().fit(module, loader())

    def test_checkpoint_of_another_pool_is_refused(self, quiet_trainer, tmp_path):
        trainer = quiet_trainer()
        trainer.fit(PseudoLabelModule(linear().float(), selection=FlexMatch(0.9)), datamodule=two_streams())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        module = PseudoLabelModule(linear().float(), selection=FlexMatch(0.9))
        with pytest.raises(
            InputError,
            match=r"checkpoint does not fit PseudoLabelModule: .*selection.last_class \[\d+\] in the file, \[\d+\]",
        ):
            quiet_trainer(max_epochs=2).fit(module, datamodule=two_streams(rest=8), ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "regression"}, "PseudoLabelModule: online pseudo-labels are for classes"),
        ({"pseudo_labels": "offline"}, "pseudo_labels must be one of online, refreshed, got 'offline'"),
        ({"unsupervised_weight": -0.1}, "unsupervised_weight must be at least 0, got -0.1"),
        ({"unsupervised_weight": float("nan")}, "unsupervised_weight must be at least 0, got nan"),
        (
            {"pseudo_labels": "refreshed", "selection": FixedThreshold(0.9)},
            "selection is for online pseudo-labels; for refreshed ones set it in PseudoLabelRefresh",
        ),
        ({"teacher": linear(), "ema_decay": 0.9}, "online pseudo-labels come from one network, got a teacher and ema"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must lie in \[0, 1\), got -0.1"),
    ],
)
def test_constructor_checks(student, arguments, message):
    with pytest.raises(InputError, match=message):
        PseudoLabelModule(student, **arguments)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(9, 4), r"labels \(B, C\) that are floats must be probabilities"),
        (torch.zeros(9, 4).long(), r"labels must be one class a sample, \(B,\) = \[9\], got \[9, 4\]"),
        (torch.zeros(9, 1, dtype=torch.long), r"one class a sample, \(B,\) = \[9\], got \[9, 1\]"),
        (torch.zeros(8, dtype=torch.long), r"one class a sample, \(B,\) = \[9\], got \[8\]"),
        (torch.tensor(1), r"one class a sample, \(B,\) = \[9\], got \[\]"),
        (torch.full((9,), 4), r"labels must be 0 ... 3 .* got 4"),
    ],
)
def test_labels_that_do_not_fit(y, message):
    with pytest.raises(InputError, match=message):
        PseudoLabelModule(linear()).training_step((random_inputs(), y), 0)


@pytest.mark.parametrize("two", [False, True])
def test_student_that_does_not_give_classes(two):
    net = nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0)).double()
    with pytest.raises(InputError, match=r"the student must give logits \(B, C\) of at least two .*got \[\d+\]"):
        PseudoLabelModule(net).training_step(Batch(random_inputs(), Y, x_strong=random_inputs() if two else None), 0)


def test_weight_that_a_callback_sets():
    module = PseudoLabelModule(linear())
    module.unsupervised_weight = -1.0
    with pytest.raises(InputError, match="unsupervised_weight must be at least 0, got -1"):
        module.training_step((random_inputs(), Y), 0)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_pseudo_label import fit_share
fit_share()
"""


class OfTheSecond(FixedThreshold):
    """Accepts the pseudo-labels of the second process alone."""

    def forward(self, probabilities, labeled_probabilities, index):
        target, weight = super().forward(probabilities, labeled_probabilities, index)
        return target, weight * torch.distributed.get_rank()


def fit_share():
    """Fit on two processes; the first one writes its warnings."""
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = PseudoLabelModule(linear().float(), selection=OfTheSecond(0.0), optimizer=SGD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=two_streams(batch_size=6, labeled_batch_size=2))
    if trainer.is_global_zero:
        Path("warnings.txt").write_text("\n".join([*(str(one.message) for one in caught), "ends"]))


class TestRun:
    def test_no_unlabeled_samples(self, quiet_trainer, student):
        for arguments in ({"labeled": None}, {"labeled": 3, "unlabeled": "none"}):
            with pytest.raises(InputError, match="there are no unlabeled samples; set labeled to a part of the labels"):
                quiet_trainer().fit(
                    PseudoLabelModule(student), datamodule=SemiSupervisedDataModule(Digits(), **arguments)
                )

    def test_class_without_a_labeled_sample(self, quiet_trainer):
        for labeled, named in (((3, 0, 2, 1), "'1', so"), ((0, 2, 1, 0), "'0', '3', so")):
            with pytest.raises(InputError, match=f"PseudoLabelModule: no labeled sample of class {named}"):
                quiet_trainer().fit(PseudoLabelModule(linear().float()), datamodule=two_streams(labeled))

    def test_class_names_in_the_complaint(self, quiet_trainer):
        data = two_streams((3, 0, 2, 1))
        data.source.class_names = ["ant", "bee", "cat", "dog"]
        data.absent_classes = lambda: set()
        with pytest.raises(InputError, match="no labeled sample of class 'bee', so"):
            quiet_trainer().fit(PseudoLabelModule(linear().float()), datamodule=data)

    def test_a_class_without_training_images_is_named(self, quiet_trainer):
        data = two_streams((3, 0, 2, 1))
        data.source.class_names = ["ant", "bee", "cat", "dog"]
        with pytest.warns(UserWarning, match="no labeled sample of class 'bee', .* no training image of it is known"):
            quiet_trainer().fit(PseudoLabelModule(linear().float()), datamodule=data)

    def test_a_plain_loader_without_unlabeled_samples(self, quiet_trainer, loader, student):
        with pytest.warns(UserWarning, match="no batch of this epoch had an unlabeled sample"):
            quiet_trainer().fit(PseudoLabelModule(student), loader())

    def test_nothing_accepted_for_an_epoch(self, quiet_trainer, student):
        data = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=256)
        with pytest.warns(
            UserWarning,
            match=r"no pseudo-label of this epoch was accepted \(FixedThreshold\(threshold=1.0\)\), .* lower the",
        ):
            quiet_trainer().fit(PseudoLabelModule(student, selection=FixedThreshold(1.0)), datamodule=data)

    @pytest.mark.parametrize(
        "length", [{"max_epochs": 1}, {"max_epochs": 3}, {"max_epochs": -1, "max_steps": 5}], ids=str
    )
    @pytest.mark.parametrize("selection", [None, FreeMatch()], ids=["all", "FreeMatch"])
    def test_one_class_absorbs_the_others(self, quiet_trainer, student, selection, length):
        """Its bias is large against small inputs."""
        last = next(part for part in reversed([*student.modules()]) if isinstance(part, nn.Linear))
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 0.0)
        last.bias.data[3] = 5.0
        data = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=256)
        module = PseudoLabelModule(student, selection=selection, optimizer=partial(torch.optim.SGD, lr=0.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(**length).fit(module, datamodule=data)
        (text,) = [str(w.message) for w in caught if "absorbed" in str(w.message)]  # not of the first of 3 epochs
        assert text.startswith("in this epoch, 100% of the accepted pseudo-labels are of class 3, which has 10% of the")

    def test_one_class_may_have_most_labels(self, quiet_trainer):
        student = linear().float()
        data = two_streams((6, 1, 1, 1), rest=60)
        nn.init.zeros_(student.weight)  # all pseudo-labels are of class 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer().fit(PseudoLabelModule(student, optimizer=partial(SGD, lr=0.0)), datamodule=data)
        assert not [str(w.message) for w in caught if "absorbed" in str(w.message)]

    @pytest.mark.parametrize("arguments", [{}, {"selection": FixedThreshold(1.0), "unsupervised_weight": 0.0}])
    def test_no_warning_where_there_is_nothing_to_warn_of(self, quiet_trainer, student, arguments):
        data = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=256)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer().fit(PseudoLabelModule(student, **arguments), datamodule=data)
        texts = [str(w.message) for w in caught if "pseudo-label" in str(w.message)]
        assert all("absorbed" in text for text in texts)  # the new student has one class for all
        assert not texts or not arguments

    @pytest.mark.dist
    def test_no_warning_where_another_process_accepts(self, tmp_path, monkeypatch, processes):
        monkeypatch.chdir(tmp_path)
        Path("run.py").write_text(SCRIPT)
        processes.run_ranks(["run.py", str(Path(__file__).parent)])
        text = Path("warnings.txt").read_text()
        assert "ends" in text
        assert "pseudo-label" not in text

    def test_nobody_refreshes(self, quiet_trainer, loader, student):
        with pytest.raises(InputError, match="pseudo_labels: refreshed needs the callback PseudoLabelRefresh"):
            quiet_trainer().fit(PseudoLabelModule(student, pseudo_labels="refreshed"), loader())

    @pytest.mark.parametrize(
        ("options", "source", "message"),
        [
            (
                {"ema_decay": 0.9},
                "student",
                "ema_decay makes .* has source: student; set source: ema, or leave out",
            ),
            ({"teacher": linear(1).float()}, "student", "teacher makes no pseudo-labels: .*; set source: teacher, or"),
            (
                {"ema_decay": 0.9, "teacher": linear(1).float()},
                "teacher",
                "ema_decay makes no pseudo-labels: .*teacher",
            ),
            ({"ema_decay": 0.9}, GraphPseudoLabels(3), "ema_decay makes .* has source: GraphPseudoLabels; set"),
        ],
    )
    def test_a_network_that_would_label_nothing(self, quiet_trainer, options, source, message):
        module = PseudoLabelModule(linear().float(), pseudo_labels="refreshed", **options)
        with pytest.raises(InputError, match=message):
            quiet_trainer(callbacks=[PseudoLabelRefresh(source=source)]).fit(module, datamodule=two_streams())

    @pytest.mark.parametrize("source", ["ema", "teacher"])
    def test_a_network_that_labels(self, quiet_trainer, source):
        class Own(PseudoLabelRefresh):
            """A project's own."""

        options = {"ema": {"ema_decay": 0.9}, "teacher": {"teacher": linear(1).float()}}[source]
        module = PseudoLabelModule(linear().float(), pseudo_labels="refreshed", **options)
        refresh = Own(source=source, warmup_epochs=0)
        quiet_trainer(callbacks=[refresh]).fit(module, datamodule=two_streams())
        assert refresh.table is not None

    @pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("16-true", "float16")])
    def test_an_average_that_would_stand_still(self, quiet_trainer, precision, dtype):
        """A thousandth of a step is below the rounding of half precision: after 5,000 steps the average was at 1/4."""
        module = PseudoLabelModule(linear().float(), ema_decay=0.999)
        message = f"ema_decay: an average of {dtype} weights stands still; set precision: {precision[:-4]}mixed, or"
        with pytest.raises(InputError, match=message):
            quiet_trainer(precision=precision).fit(module, datamodule=two_streams())

    def test_plain_loader(self, quiet_trainer, student, loader):
        trainer = quiet_trainer(max_epochs=2)
        before = {name: value.clone() for name, value in student.state_dict().items()}
        trainer.fit(PseudoLabelModule(student, ema_decay=0.9), loader(labels=torch.tensor([0, -100, 2] * 4)))
        assert trainer.callback_metrics["train/coverage"] == 1
        assert not torch.equal(before["0.weight"], student.state_dict()["0.weight"])

    def test_handed_out_labels_reach_the_next_epoch(self, quiet_trainer, student):
        """The kinds that each epoch's batches had."""
        kinds = []

        class HandOut(Callback):
            def on_train_epoch_start(self, trainer, module):
                if trainer.current_epoch:
                    data = trainer.datamodule
                    index = torch.tensor(data.unlabeled_indices())
                    chosen = (index % 2 == trainer.current_epoch - 1).bool()
                    label = torch.full_like(index, trainer.current_epoch)
                    data.set_pseudo_labels(PseudoLabels(index, label, label.float(), chosen, chosen, 0, 0))

            def on_train_batch_start(self, trainer, module, batch, number):
                odd = batch.index[batch.kind == LabelKind.PSEUDO] % 2 if batch.kind is not None else torch.tensor([-1])
                kinds.append((trainer.current_epoch, *odd.unique().tolist()))
                if batch.kind is not None:
                    pseudo = batch.kind == LabelKind.PSEUDO
                    assert (batch.y[pseudo] == trainer.current_epoch).all()
                    assert batch.mean_pseudo == pseudo.sum()

        for workers in (0, 2):
            kinds.clear()
            data = SemiSupervisedDataModule(Digits(), labeled=2, batch_size=256, num_workers=workers)
            quiet_trainer(max_epochs=3, callbacks=[HandOut()]).fit(SupervisedModule(student), datamodule=data)
            assert set(kinds) == {(0, -1), (1, 0), (2, 1)}

    def test_loads_from_its_checkpoint(self, quiet_trainer, tmp_path):
        trainer = quiet_trainer()
        module = PseudoLabelModule(Bn(), 0.5, selection=FlexMatch(0.4), ema_decay=0.9)
        trainer.fit(module, datamodule=two_streams())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        parts = {"student": Bn(), "selection": FlexMatch(0.4)}
        again = PseudoLabelModule.load_from_checkpoint(tmp_path / "c.ckpt", **parts, weights_only=True)
        assert (again.unsupervised_weight, again.pseudo_labels) == (0.5, "online")
        state = module.state_dict()
        assert {name.split(".")[0] for name in state} == {"student", "ema", "selection"}
        for name, value in again.state_dict().items():
            assert torch.equal(value, state[name])
