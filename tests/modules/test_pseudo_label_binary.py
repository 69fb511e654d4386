"""PseudoLabelModule in the binary and multilabel task: the objective by hand, partial labels, resume, complaints."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import (
    Batch,
    DatasetSource,
    InputError,
    LabelThresholds,
    PseudoLabelModule,
    SemiSupervisedDataModule,
    SupervisedModule,
)
from kd_lightning.batch import LabelKind
from kd_lightning.data.transforms import MixUp

NAN = float("nan")
ROWS, FEATURES, LABELS = 8, 5, 3
SGD = partial(torch.optim.SGD, lr=0.5)
MULTI = torch.tensor(  # whole, none, in part
    [[1, 0, 1], [NAN] * 3, [NAN, 1, NAN], [0, 0, 1], [NAN] * 3, [1, NAN, 0], [NAN] * 3, [NAN, NAN, 0]]
).double()
BINARY = torch.tensor([1, -100, -100, 0, -100, 1, -100, 0])
TASKS = {
    "multilabel": ("multilabel", MULTI, LABELS),
    "all in part": ("multilabel", MULTI[[2, 5, 7] * 2 + [2, 5]], LABELS),
    "binary": ("binary", BINARY, 1),
    "binary, (B, 1) and floats": ("binary", torch.where(BINARY < 0, NAN, BINARY.double()).unsqueeze(1), 1),
}


def inputs(seed=0, rows=ROWS):
    return 2 * torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(labels, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, labels, bias=False).double()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def unknown(y):
    known = ~y.isnan() if y.is_floating_point() else y != -100
    return (~known).numpy().reshape(len(y), -1)


def own_labels(net, x, y, thresholds):
    """{(row, label): 0 or 1, None if not accepted} of the labels that are not known."""
    found = {}
    for row, label in zip(*np.nonzero(unknown(y)), strict=True):
        p = sigmoid(net.weight.detach().numpy()[label] @ x[row].numpy())
        found[row, label] = 1 if p >= thresholds[0] else 0 if p <= thresholds[1] else None
    return found


def by_hand(net, x, y, strong, targets, weight=1.0):
    """Loss and gradient (L, D), label by label."""
    weights, y = net.weight.detach().numpy(), y.double().numpy().reshape(len(y), -1)
    given = [(row, label) for row in range(len(y)) for label in range(y.shape[1]) if y[row, label] >= 0]
    terms = [(x, row, label, y[row, label], 1 / len(given)) for row, label in given]
    terms += [(strong, *place, t, weight / len(targets)) for place, t in targets.items() if t is not None]
    loss, gradient = 0.0, np.zeros_like(weights)
    for view, row, label, target, share in terms:
        p = sigmoid(weights[label] @ view[row].numpy())
        loss -= share * (target * np.log(p) + (1 - target) * np.log(1 - p))
        gradient[label] += share * (p - target) * view[row].numpy()
    return loss, gradient


def check(module, batch, loss, gradient, rel=1e-10):
    found = module.training_step(batch, 0)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=rel)
    assert module.student.weight.grad.numpy() == pytest.approx(gradient, rel=rel, abs=1e-10)


class TestObjective:
    @pytest.mark.parametrize("views", [1, 2])
    @pytest.mark.parametrize("source", ["student", "average", "teacher"])
    @pytest.mark.parametrize("thresholds", [None, (0.7, 0.4), (1.0, 0.0)], ids=["all", "some", "none"])
    @pytest.mark.parametrize("name", TASKS)
    def test_online(self, name, views, source, thresholds):
        task, y, labels = TASKS[name]
        net, x, strong = linear(labels), inputs(), inputs(3) if views == 2 else inputs()
        other = linear(labels, seed=1)
        options = {"student": {}, "average": {"ema_decay": 0.9}, "teacher": {"teacher": other}}[source]
        selection = None if thresholds is None else LabelThresholds(*thresholds)
        module = PseudoLabelModule(net, 0.7, task=task, selection=selection, **options)
        if source == "average":
            module.ema.module.weight.data.copy_(other.weight)
        targets = own_labels(net if source == "student" else other, x, y, thresholds or (0.5, 0.5))
        if thresholds == (0.7, 0.4) and source == "student":
            assert len({*targets.values()}) > 1
        loss, gradient = by_hand(net, x, y, strong, targets, 0.7)
        batch = Batch(x, y, x_strong=strong if views == 2 else None)
        check(module, batch, loss, gradient, rel=1e-6 if source == "teacher" else 1e-9)

    @pytest.mark.parametrize("views", [1, 2])
    @pytest.mark.parametrize("name", ["multilabel", "all in part", "binary"])
    def test_refreshed(self, name, views):
        """Stored pseudo-labels are in the unsupervised term, and never in the hard one."""
        task, y, labels = TASKS[name]
        net, x, strong = linear(labels), inputs(), inputs(3) if views == 2 else inputs()
        stored, kind = y.clone(), torch.where(torch.from_numpy(~unknown(y)).view(y.shape), LabelKind.CLEAN, 1)
        places = [*zip(*np.nonzero(unknown(y)), strict=True)]
        targets = dict.fromkeys(places)
        for number, (row, label) in enumerate(places[::2]):
            targets[row, label] = number % 2
            place = (row, label) if y.ndim > 1 else row
            stored[place], kind[place] = number % 2, LabelKind.PSEUDO
        loss, gradient = by_hand(net, x, y, strong, targets, 3.0)
        count = float((~unknown(stored)).sum())
        means = {"mean_labels": count, "mean_pseudo": float(len(places[::2])), "mean_rows": float(ROWS)}
        batch = Batch(x, stored, kind=kind.to(torch.int8), x_strong=strong if views == 2 else None, **means)
        check(PseudoLabelModule(net, 3.0, "refreshed", task=task), batch, loss, gradient)
        net.zero_grad()
        online = own_labels(net, x, y, (0.5, 0.5))  # takes no notice of them
        check(PseudoLabelModule(net, task=task), batch, *by_hand(net, x, y, strong, online))

    @pytest.mark.parametrize("name", ["multilabel", "all in part", "binary"])
    def test_refreshed_and_mixed(self, name):
        """Mixed labels are fractions; of the binary task with class indices, probabilities of both classes."""
        task, y, labels = TASKS[name]
        net, x = linear(labels), inputs()
        known = torch.from_numpy(~unknown(y))
        given = torch.where(known, 0.8 * y.double().view(known.shape) + 0.1, NAN)
        stored, kind = given.clone(), torch.where(known, LabelKind.CLEAN, 1)
        targets = dict.fromkeys(zip(*np.nonzero(unknown(y)), strict=True))
        for number, place in enumerate([*targets][::2]):
            targets[place] = stored[place] = (number % 3) / 3
            kind[place] = LabelKind.PSEUDO
        loss, gradient = by_hand(net, x, given, x, targets, 3.0)
        means = {"mean_labels": float((~stored.isnan()).sum()), "mean_pseudo": float(len([*targets][::2]))}
        if task == "binary":
            stored, kind = torch.cat([1 - stored, stored], dim=1), kind[:, 0]
        mixed = {"partner": torch.arange(ROWS).roll(1), "share": torch.full((ROWS,), 0.9)}
        batch = Batch(x, stored, kind=kind.to(torch.int8), mean_rows=float(ROWS), **mixed, **means)
        check(PseudoLabelModule(net, 3.0, "refreshed", task=task), batch, loss, gradient)

    @pytest.mark.parametrize("pseudo_labels", ["online", "refreshed"])
    @pytest.mark.parametrize("name", ["multilabel", "binary"])
    def test_batches_of_one_kind(self, name, pseudo_labels):
        """No label at all, all labels, and a batch that does not show how many labels there are."""
        task, y, labels = TASKS[name]
        net, x = linear(labels), inputs()
        none, known = y.clone(), torch.randint(2, y.shape, generator=torch.Generator().manual_seed(0))
        none[:] = NAN if none.is_floating_point() else -100
        losses = []
        for given in (none, None, torch.full((ROWS,), -100)):
            module = PseudoLabelModule(net, 1.0, pseudo_labels, task=task)
            losses.append(module.training_step(Batch(x, given, x_strong=inputs(3)), 0).item())
        targets = own_labels(net, x, none, (0.5, 0.5))
        expected = by_hand(net, x, none, inputs(3), targets)[0] if pseudo_labels == "online" else 0.0
        assert losses == [pytest.approx(expected, rel=1e-9)] * 3
        whole = PseudoLabelModule(net, 1.0, pseudo_labels, task=task).training_step(Batch(x, known.to(y)), 0)
        assert whole.item() == pytest.approx(by_hand(net, x, known.double(), x, {})[0], rel=1e-9)

    @pytest.mark.parametrize("name", ["multilabel", "binary"])
    def test_weight_zero_is_supervised_training(self, name):
        """To the bit."""
        task, y, labels = TASKS[name]
        found = []
        for make in (partial(PseudoLabelModule, unsupervised_weight=0.0), SupervisedModule):
            net = linear(labels).float()
            loss = make(net, task=task).training_step((inputs().float(), y), 0)
            loss.backward()
            found.append((loss.item(), net.weight.grad))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])

    @pytest.mark.parametrize("cut", [1, 3, 7])
    def test_shares_of_a_step_add_up(self, cut):
        net, x, y = linear(LABELS), inputs(), MULTI
        module = PseudoLabelModule(net, 2.0, task="multilabel")
        known = float((~unknown(y)).sum())
        for rows in (slice(cut), slice(cut, None)):
            batch = Batch(x[rows], y[rows], mean_labels=known / 2, mean_rows=ROWS / 2)
            (module.training_step(batch, 0) / 2).backward()
        _, gradient = by_hand(net, x, y, x, own_labels(net, x, y, (0.5, 0.5)), 2.0)
        assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float(self, dtype):
        class Half(nn.Linear):
            def forward(self, x):
                return super().forward(x).to(dtype)

        torch.manual_seed(0)
        net, x = Half(FEATURES, LABELS, bias=False).double(), inputs()
        logits = net(x).detach().double()
        identity = nn.Linear(LABELS, LABELS, bias=False).double()
        identity.weight.data = torch.eye(LABELS).double()
        expected, _ = by_hand(identity, logits, MULTI, logits, own_labels(identity, logits, MULTI, (0.5, 0.5)))
        loss = PseudoLabelModule(net, task="multilabel").training_step((x, MULTI), 0)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def data(task="multilabel", samples=40, in_part=True, **kwargs):
    """Labels that a linear network can learn; a third of them is missing in some samples."""
    x = inputs(5, samples).float()
    y = (x[:, :LABELS] + 0.2 * x[:, 1:4] > 0).long()
    y = y[:, 0] if task == "binary" else y
    if in_part and task == "multilabel":
        gone = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        gone[::3] = False
        y = torch.where(gone, NAN, y.float())
    options = {"labeled": 0.5, "val_size": 0, "batch_size": 8, "seed": 0}
    return SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y)), **(options | kwargs))


class Watch(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, number):
        self.batches.append(batch)


class TestSteps:
    @pytest.mark.parametrize("task", ["multilabel", "binary"])
    def test_many_steps(self, quiet_trainer, task):
        """In float64, beside numpy, over three epochs of batches with whole, missing and partial labels."""
        watch, net = Watch(), linear(1 if task == "binary" else LABELS)
        reference = linear(1 if task == "binary" else LABELS)
        made = data(task, strong_transform=nn.Dropout(0.3))
        selection = LabelThresholds(0.6, 0.45)
        module = PseudoLabelModule(net, 0.5, task=task, selection=selection, optimizer=SGD)
        quiet_trainer(max_epochs=3, callbacks=[watch], precision="64-true").fit(module, datamodule=made)
        assert len(watch.batches) == 15
        for batch in watch.batches:
            x, strong = batch.x.double(), batch.x_strong.double()
            targets = own_labels(reference, x, batch.y, (0.6, 0.45))
            _, gradient = by_hand(reference, x, batch.y, strong, targets, 0.5)
            reference.weight.data -= 0.5 * torch.from_numpy(gradient)
        assert net.weight.detach().numpy() == pytest.approx(reference.weight.detach().numpy(), rel=1e-6)

    @pytest.mark.parametrize("mix", [False, True])
    def test_accumulated_batches_make_one_big_one(self, quiet_trainer, mix):
        net, watch = linear(LABELS).float(), Watch()
        start = linear(LABELS).float().double()
        made = data(batch_size=9, mix=MixUp(0.5) if mix else None)
        trainer = quiet_trainer(accumulate_grad_batches=5, callbacks=[watch])
        trainer.fit(PseudoLabelModule(net, 2.0, task="multilabel", optimizer=SGD), datamodule=made)
        assert trainer.global_step == 1
        x, y = (torch.cat([getattr(batch, name) for batch in watch.batches]).double() for name in "xy")
        _, gradient = by_hand(start, x, y, x, own_labels(start, x, y, (0.5, 0.5)), 2.0)
        assert ((start.weight - net.weight) / 0.5).detach().numpy() == pytest.approx(gradient, abs=1e-5)

    def test_charts(self, quiet_trainer):
        net, made = linear(LABELS).float(), data(batch_size=40)
        still = partial(torch.optim.SGD, lr=0.0)
        module = PseudoLabelModule(net, task="multilabel", selection=LabelThresholds(0.8, 0.3), optimizer=still)
        trainer = quiet_trainer()
        trainer.fit(module, datamodule=made)
        y = made.visible_labels()
        x = made.samples.parts.train.images.tensors[0]
        targets = own_labels(net.double(), x.double(), y, (0.8, 0.3))
        p = [sigmoid((net.weight[label] @ x[row].double()).item()) for row, label in targets]
        coverage = np.mean([target is not None for target in targets.values()])
        assert trainer.callback_metrics["train/coverage"].item() == pytest.approx(coverage)
        confidence = np.mean([max(value, 1 - value) for value in p])
        assert trainer.callback_metrics["train/confidence"].item() == pytest.approx(confidence, rel=1e-5)

    @pytest.mark.parametrize("task", ["multilabel", "binary"])
    def test_bfloat16(self, quiet_trainer, task):
        trainer = quiet_trainer(precision="bf16-mixed")
        net = linear(1 if task == "binary" else LABELS).float()
        trainer.fit(PseudoLabelModule(net, task=task, ema_decay=0.9), datamodule=data(task))
        assert all(value.isfinite() for value in trainer.callback_metrics.values())
        assert trainer.callback_metrics["train/coverage"] == 1

    def test_resumes_to_the_bit(self, quiet_trainer, tmp_path):
        def run(**kwargs):
            module = PseudoLabelModule(
                linear(LABELS).float(), task="multilabel", selection=LabelThresholds(0.6, 0.4), ema_decay=0.5
            )
            saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
            quiet_trainer(max_epochs=3, callbacks=[saves], enable_checkpointing=True).fit(
                module, datamodule=data(), **kwargs
            )
            return module.state_dict()

        whole = run()
        resumed = run(ckpt_path=tmp_path / "step=7.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class TestComplaints:
    @pytest.mark.parametrize(
        ("task", "outputs", "y", "message"),
        [
            ("binary", 2, BINARY, r"the student must give logits \(B,\) or \(B, 1\), got \[4, 2\]"),
            ("binary", 1, MULTI, r"labels must be one a sample, \(B,\) = \[8\], got \[8, 3\]"),
            ("multilabel", 2, MULTI, r"multilabel labels of shape \[5, 3\] do not fit logits of shape \[5, 2\]"),
            ("multilabel", 3, torch.where(MULTI.isnan(), NAN, 2 * MULTI), "labels must be 0 ... 1 .* got 2"),
        ],
    )
    def test_outputs_and_labels_that_do_not_fit(self, task, outputs, y, message):
        with pytest.raises(InputError, match=message):
            PseudoLabelModule(linear(outputs), task=task).training_step((inputs(), y), 0)

    def test_dense_outputs(self):
        with pytest.raises(InputError, match="pseudo-labels of dense outputs need task: multiclass, got multilabel"):
            PseudoLabelModule(nn.Conv2d(1, 3, 1), task="multilabel", class_dim=1)

    def test_no_unlabeled_samples(self, quiet_trainer):
        made = data(in_part=False, labeled=None)
        with pytest.raises(InputError, match="there are no unlabeled samples"):
            quiet_trainer().fit(PseudoLabelModule(linear(LABELS).float(), task="multilabel"), datamodule=made)

    def test_labels_in_part_are_unlabeled_samples(self, quiet_trainer):
        trainer = quiet_trainer()
        module = PseudoLabelModule(linear(LABELS).float(), task="multilabel")
        trainer.fit(module, datamodule=data(labeled=None))
        assert trainer.callback_metrics["train/coverage"] == 1

    @pytest.mark.parametrize("value", [0, 1])
    def test_a_label_that_is_nowhere_known(self, quiet_trainer, value):
        made = data(in_part=False)
        made.source = DatasetSource(TensorDataset(inputs(5, 40).float(), made.source.load().train.targets.clone()))
        made.source.load().train.targets[:, 1] = value
        made.source.class_names = ["ant", "bee", "cat"]
        message = f"PseudoLabelModule: label 'bee' is {1 - value} in no labeled sample, so no pseudo-label can"
        with pytest.raises(InputError, match=message):
            quiet_trainer().fit(PseudoLabelModule(linear(LABELS).float(), task="multilabel"), datamodule=made)

    def test_a_binary_class_that_is_nowhere_known(self, quiet_trainer):
        x, y = inputs(5, 40).float(), torch.zeros(40, dtype=torch.long)
        made = SemiSupervisedDataModule(DatasetSource(TensorDataset(x, y)), labeled=0.5, val_size=0, batch_size=8)
        with pytest.raises(InputError, match="PseudoLabelModule: no labeled sample of class '1', so no pseudo-label"):
            quiet_trainer().fit(PseudoLabelModule(linear(1).float(), task="binary"), datamodule=made)

    def test_thresholds_of_other_labels(self, quiet_trainer):
        module = PseudoLabelModule(linear(LABELS).float(), task="multilabel", selection=LabelThresholds([0.9, 0.8]))
        with pytest.raises(InputError, match="positive must be one number, or one for each of 3 labels, got 2"):
            quiet_trainer().fit(module, datamodule=data())
