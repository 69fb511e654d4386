"""EnsembleDistillModule: its objective by hand, identities between its modes, sampling of teachers, what it refuses."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    Batch,
    DatasetSource,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.losses import DISTLoss, DKDLoss, KDLoss
from kd_lightning.models import DigitsCNN

NAN = float("nan")
ROWS, CLASSES, COUNT = 6, 4, 3
LABELS = {
    "multiclass": torch.tensor([0, -100, 3, 1, -100, 2]),
    "multilabel": torch.tensor([[0, 1, 1, 0], [NAN] * 4, [1, NAN, 0, 1], [0, 0, 1, 1], [1] * 4, [NAN] * 4]),
    "binary": torch.tensor([0, 1, -100, 1, 0, -100]),
}
SHAPES = {"multiclass": (ROWS, CLASSES), "multilabel": (ROWS, CLASSES), "binary": (ROWS,)}
LOSSES = {
    "soft, T 1": KDLoss(1.0),
    "soft, T 4": KDLoss(4.0),
    "soft, T 20": KDLoss(20.0),
    "standardised": KDLoss(2.0, standardize=True),
    "decoupled": DKDLoss(alpha=1.5, beta=3.0, temperature=2.0),
    "correlation": DISTLoss(beta=1.5, gamma=0.5, temperature=2.0),
    "multilabel": KDLoss(3.0, "multilabel"),
    "binary": KDLoss(3.0, "binary"),
}
WEIGHTS = {"uniform": None, "given": [1, 2, 5], "one of weight 0": [1.0, 0.0, 3.0], "confidence": "confidence"}


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[: len(x)] + 0 * x.sum()


class Recorder(nn.Module):
    """A linear network that logs its number and the samples' numbers, which are x's first column."""

    def __init__(self, number=0, log=None):
        super().__init__()
        torch.manual_seed(number)
        self.linear, self.number, self.log = nn.Linear(4, CLASSES), number, [] if log is None else log
        self.linear.weight.data[:, 0] = 0

    def forward(self, x):
        self.log.append((self.number, x[:, 0].long().tolist()))
        return self.linear(x)


def numbered(count):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))
    x[:, 0] = torch.arange(float(count))
    return x


def samples(count=12, **kwargs):
    """A datamodule of numbered samples, all labeled."""
    data = TensorDataset(numbered(count), torch.arange(count) % CLASSES)
    return SemiSupervisedDataModule(DatasetSource(data), **({"val_size": 0, "batch_size": 4} | kwargs))


def logits(task, seed, column=False):
    z = 2 * torch.randn(SHAPES[task], generator=torch.Generator().manual_seed(seed))
    return z[:, None] if column else z


def soften(task, z, temperature=1.0):
    z = z / temperature
    return np.exp(z) / np.exp(z).sum(1, keepdims=True) if task == "multiclass" else 1 / (1 + np.exp(-z))


def standardise(z):
    return (z - z.mean(1, keepdims=True)) / (1e-7 + z.std(1, ddof=1, keepdims=True))


def weights_by_hand(task, kind, teachers, y):
    """(B, K)."""
    if kind != "confidence":
        given = np.array(WEIGHTS[kind] or [1] * COUNT, dtype=float)
        return np.tile(given / given.sum(), (ROWS, 1))
    found = np.full((ROWS, COUNT), 1 / COUNT)
    for b, labels in enumerate(y.reshape(ROWS, -1).tolist()):
        known = [(c, label) for c, label in enumerate(labels) if label >= 0]
        if not known:
            continue
        losses = []
        for t in teachers:
            p = soften(task, t)[b].reshape(-1)
            right = (
                [p[int(v)] for _, v in known] if task == "multiclass" else [p[c] if v else 1 - p[c] for c, v in known]
            )
            losses.append(-np.mean(np.log(right)))
        found[b] = (1 - np.exp(losses) / np.exp(losses).sum()) / (COUNT - 1)
    return found


def kl(q, p):
    return (q * np.log(q / p)).sum(-1)


def soft_by_hand(loss, s, q, y):
    """The package's losses between the student's logits and probabilities q at the loss's temperature."""
    t = loss.temperature
    p = soften(loss.task, s, t)
    if loss.task != "multiclass":
        return t**2 * np.mean(q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)))
    if isinstance(loss, DKDLoss):
        rows = []
        for a, b, label in zip(q, p, y.tolist(), strict=True):
            c = int(a.argmax()) if label == -100 else label
            one, two = np.array([a[c], 1 - a[c]]), np.array([b[c], 1 - b[c]])
            rest, others = np.delete(a, c) / (1 - a[c]), np.delete(b, c) / (1 - b[c])
            rows.append(loss.alpha * kl(one, two) + loss.beta * kl(rest, others))
        return t**2 * np.mean(rows)
    if isinstance(loss, DISTLoss):
        rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
        columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
        return t**2 * (loss.beta * rows + loss.gamma * columns)
    return t**2 * np.mean(kl(q, p))


def gradient(module, batch):
    """Loss, and the student's gradients as one vector."""
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in module.student.parameters()])


class TestAverage:
    @pytest.mark.parametrize("kind", WEIGHTS)
    @pytest.mark.parametrize(("name", "column"), [*((name, False) for name in LOSSES), ("binary", True)])
    def test_by_hand(self, name, kind, column):
        loss = LOSSES[name]
        task, y = loss.task, LABELS[loss.task]
        student, given = logits(task, 0, column), [logits(task, k + 1, column) for k in range(COUNT)]
        module = EnsembleDistillModule(
            Fixed(student), [Fixed(t) for t in given], teacher_weights=WEIGHTS[kind], soft_loss=loss, task=task
        )
        found = module.losses(Batch(torch.zeros(ROWS, 2), y))["soft"].value
        s, *teachers = (z.double().numpy() for z in (student, *given))
        weights = weights_by_hand(task, kind, teachers, y)
        if getattr(loss, "standardize", False):
            s, teachers = standardise(s), [standardise(t) for t in teachers]
        q = sum(
            weights[:, k].reshape(-1, *[1] * (s.ndim - 1)) * soften(task, t, loss.temperature)
            for k, t in enumerate(teachers)
        )
        if kind == "confidence" and name == "standardised":  # the weights are of the teachers as they are
            assert not np.allclose(weights, weights_by_hand(task, kind, teachers, y))
        assert found.item() == pytest.approx(soft_by_hand(loss, s, q, y), rel=1e-4)
        assert loss.reduction == "mean"  # the user's loss is as it was
        assert getattr(loss, "standardize", False) == (name == "standardised")

    def test_whole_objective(self):
        """As DistillModule's, at temperature 4 by default; the temperature is read at every call."""
        s, t = logits("multiclass", 0), [logits("multiclass", k + 1) for k in range(2)]
        y = LABELS["multiclass"]
        module = EnsembleDistillModule(Fixed(s), [Fixed(z) for z in t], soft_weight=0.3)
        hard = -np.mean([np.log(soften("multiclass", s.double().numpy())[i, c]) for i, c in enumerate(y) if c >= 0])
        for temperature in (4.0, 1.5):
            module.soft_loss.temperature = temperature
            q = sum(soften("multiclass", z.double().numpy(), temperature) for z in t) / 2
            soft = soft_by_hand(KDLoss(temperature), s.double().numpy(), q, y)
            loss = module.training_step((torch.zeros(ROWS, 2), y), 0)
            assert loss.item() == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)

    def test_losses_of_ones_own_get_the_students_shape(self):
        """A binary student of shape (B,), which with (B, 1) would broadcast to (B, B)."""

        class Squared(nn.Module):
            def forward(self, student, teacher, target=None):
                return (student - teacher).square().mean()

        s, t = logits("binary", 0), logits("binary", 1)
        for strategy in ("random", "average"):
            module = EnsembleDistillModule(Fixed(s), [Fixed(t)] * 2, strategy, task="binary", soft_loss=Squared())
            found = module.losses(Batch(torch.zeros(ROWS, 2)))["soft"].value
            assert found.item() == pytest.approx((s - t).square().mean().item(), rel=1e-5), strategy


class TestIdentities:
    @pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
    @pytest.mark.parametrize("loss", [KDLoss(1.0), KDLoss(4.0)])
    def test_random_is_the_average_on_average(self, monkeypatch, weights, loss):
        log = []
        student, x, y = nn.Linear(4, CLASSES).double(), numbered(ROWS).double(), LABELS["multiclass"]
        teachers = [Recorder(k, log).double() for k in range(COUNT)]
        module = EnsembleDistillModule(student, teachers, "random", teacher_weights=weights, soft_loss=loss)
        of = {}
        for seed in range(40):
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            log.clear()
            found = gradient(module, Batch(x, y))[1]
            ((drawn, rows),) = log
            assert rows == [*range(ROWS)]
            of[drawn] = found
        p = np.array(weights or [1] * COUNT) / sum(weights or [1] * COUNT)
        average = EnsembleDistillModule(student, teachers, teacher_weights=weights, soft_loss=loss)
        expected = gradient(average, Batch(x, y))[1]
        assert torch.allclose(sum(p[k] * of[k] for k in range(COUNT)), expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [1.0, 0.0, 3.0]])
    def test_relabel_is_the_average_over_an_epoch(self, weights):
        student = nn.Linear(4, CLASSES).double()
        teachers = [Recorder(k).double() for k in range(COUNT)]

        def epoch(strategy, views_per_epoch):
            module = EnsembleDistillModule(student, teachers, strategy, teacher_weights=weights, soft_weight=0.6)
            total, rows = 0, 0
            for batch in samples(views_per_epoch=views_per_epoch).train_dataloader():
                batch.x = batch.x.double()
                total, rows = total + gradient(module, batch)[1], rows + len(batch)
            assert rows == 12 * views_per_epoch
            return total

        assert torch.allclose(epoch("relabel", COUNT), COUNT * epoch("average", 1), rtol=1e-6, atol=1e-9)

    MODES = [
        {"strategy": "average"},
        {"strategy": "average", "teacher_weights": "confidence"},
        {"strategy": "average", "use_vmap": True},
        {"strategy": "random"},
        {"strategy": "random", "draw_per": "sample"},
        {"strategy": "relabel"},
        {"strategy": "relabel", "teacher_weights": [3.0]},
    ]

    @pytest.mark.parametrize("mode", MODES, ids=str)
    @pytest.mark.parametrize("name", LOSSES)
    def test_one_teacher_is_distill_module(self, name, mode):
        loss = LOSSES[name]
        for column in (False, True) if loss.task == "binary" else (False,):
            s, t = logits(loss.task, 0), Fixed(logits(loss.task, 1, column))
            batch = Batch(torch.zeros(ROWS, 2), LABELS[loss.task], torch.arange(ROWS), torch.arange(ROWS))
            one = EnsembleDistillModule(Fixed(s), [t], **mode, task=loss.task, soft_loss=loss)
            other = DistillModule(Fixed(s), t, task=loss.task, soft_loss=loss)
            for found, expected in zip(gradient(one, batch), gradient(other, copy.copy(batch)), strict=True):
                assert torch.equal(found, expected)

    @pytest.mark.parametrize("mode", MODES, ids=str)
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_one_teacher_is_distill_module_after_steps(self, quiet_trainer, teacher, mode, precision):
        def fit(make):
            torch.manual_seed(0)
            module = make(DigitsCNN(4, dropout=0.3))
            data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=16, val_size=20)
            trainer = quiet_trainer(limit_train_batches=3, limit_val_batches=1, precision=precision)
            trainer.fit(module, data)
            return module.state_dict(), {k: v for k, v in trainer.callback_metrics.items() if "teacher_0" not in k}

        found, shown = fit(lambda student: EnsembleDistillModule(student, [teacher], **mode))
        expected, charted = fit(lambda student: DistillModule(student, teacher))
        names = {key: f"student.{key.removeprefix('student.')}" for key in found}
        assert {*names.values()} == {*expected}
        assert all(torch.equal(found[key], expected[name]) for key, name in names.items())
        assert shown.keys() == charted.keys()
        assert all(torch.equal(value, charted[key]) for key, value in shown.items())


@pytest.mark.parametrize("strategy", ["average", "random", "relabel"])
def test_teachers_compute_before_the_student(strategy):
    """Its activations would take memory meanwhile. One alone computes where one is selected."""
    log = []
    module = EnsembleDistillModule(Recorder(9, log), [Recorder(0, log), Recorder(1, log)], strategy)
    module.training_step(Batch(numbered(2), torch.tensor([0, 1]), view=torch.tensor([1, 1])), 0)
    order = [number for number, _ in log]
    assert order[-1] == 9
    assert len(order) == (3 if strategy == "average" else 2)


class TestSampling:
    def by_batch(self, quiet_trainer, **kwargs):
        """The drawn teacher of each batch of an epoch of ten, two of the steps."""
        log = []
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(k, log) for k in range(3)], "random")
        trainer = quiet_trainer(**kwargs)
        trainer.fit(module, samples(40))
        sizes = [len(rows) for _, rows in log]
        assert sizes == [4] * 10  # one teacher for all rows
        return [k for k, _ in log], trainer.callback_metrics

    def test_by_batch(self, quiet_trainer, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
        drawn, metrics = self.by_batch(quiet_trainer)
        assert set(drawn) == {0, 1, 2}
        for k in range(3):
            assert metrics[f"train/teacher_{k}_share"].item() == pytest.approx(drawn.count(k) / 10)
        accumulated, _ = self.by_batch(quiet_trainer, accumulate_grad_batches=2)
        assert accumulated == [k for k in drawn[:5] for _ in range(2)]  # as of the first five steps
        assert self.by_batch(quiet_trainer)[0] == drawn
        monkeypatch.setenv("PL_GLOBAL_SEED", "2")
        assert self.by_batch(quiet_trainer)[0] != drawn

    def test_by_sample(self, quiet_trainer, monkeypatch):
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")

        def fit(**kwargs):
            """{(epoch, index): teacher}"""
            log = []
            module = EnsembleDistillModule(
                nn.Linear(4, 4), [Recorder(k, log) for k in range(3)], "random", draw_per="sample"
            )
            quiet_trainer(max_epochs=2).fit(module, samples(40, **kwargs))
            found, seen = {}, 0
            for k, rows in log:
                for index in rows:
                    found[seen // 40, index] = k
                    seen += 1
            assert len(found) == seen == 80
            return found

        drawn = fit()
        assert fit(batch_size=7, seed=3) == drawn  # whatever batch and row
        assert {drawn[0, i] for i in range(40)} == {0, 1, 2}
        assert [drawn[0, i] for i in range(40)] != [drawn[1, i] for i in range(40)]
        monkeypatch.setenv("PL_GLOBAL_SEED", "2")
        assert fit() != drawn

    @pytest.mark.parametrize("views", [None, 6])
    def test_relabel(self, quiet_trainer, views):
        log = []
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(k, log) for k in range(3)], "relabel")
        quiet_trainer(max_epochs=3).fit(module, samples(12, views_per_epoch=3, num_views=views, batch_size=5))
        for k in range(3):  # each sample once an epoch
            indices = [index for number, rows in log if number == k for index in rows]
            assert len(indices) == 36
            assert all(sorted(indices[start : start + 12]) == [*range(12)] for start in (0, 12, 24))
        log.clear()
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(k, log) for k in range(3)], "relabel")
        module.training_step(Batch(numbered(6), view=torch.tensor([7, 0, 5, 3, 4, 11])), 0)
        assert sorted(log) == [(0, [1, 3]), (1, [0, 4]), (2, [2, 5])]

    def test_relabel_of_a_plain_loader(self, quiet_trainer):
        log = []
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(k, log) for k in range(3)], "relabel")
        data = DataLoader(TensorDataset(numbered(300), torch.arange(300) % 4), 30)
        with pytest.warns(UserWarning, match="relabel: batches have no view") as warned:
            quiet_trainer().fit(module, data)
        assert len([w for w in warned if "batches have no view" in str(w.message)]) == 1
        counts = [sum(len(rows) for number, rows in log if number == k) for k in range(3)]
        assert sum(counts) == 300
        assert min(counts) > 60  # per row
        with pytest.raises(InputError, match="draw_per: sample needs batches with an index"):
            EnsembleDistillModule(
                nn.Linear(4, 4), [Recorder(0), Recorder(1)], "random", draw_per="sample"
            ).training_step((numbered(4), torch.arange(4)), 0)

    @pytest.mark.parametrize("strategy", ["random", "relabel"])
    def test_partial_teachers_by_hand(self, monkeypatch, strategy):
        """Classes that the sampled teacher does not know come from the other teachers; then q is normalised."""
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
        maps = [[2, 0, 1], [0, 3], [0, 1, 2, 3]]
        s, t = logits("multiclass", 0), [logits("multiclass", k + 1)[:, : len(m)] for k, m in enumerate(maps)]
        teachers = [Teacher(Fixed(z), classes=m) for z, m in zip(t, maps, strict=True)]
        module = EnsembleDistillModule(Fixed(s), teachers, strategy, soft_loss=KDLoss(2.0))
        found = module.losses(Batch(torch.zeros(ROWS, 2), view=torch.arange(ROWS)))["soft"].value.item()
        outputs = [soften("multiclass", z.double().numpy(), 2.0) for z in t]
        q = np.zeros((3, ROWS, 4))
        for k, c in np.ndindex(3, 4):
            knowing = [k] if c in maps[k] else [j for j in range(3) if c in maps[j]]
            q[k, :, c] = np.mean([outputs[j][:, maps[j].index(c)] for j in knowing], axis=0)
        q /= q.sum(2, keepdims=True)
        choices = [[0, 1, 2, 0, 1, 2]] if strategy == "relabel" else [[k] * ROWS for k in range(3)]
        expected = [soft_by_hand(KDLoss(2.0), s.double().numpy(), q[choice, range(ROWS)], None) for choice in choices]
        assert min(abs(found - one) for one in expected) < 1e-5 * found


class TestTraining:
    def test_frozen_and_hidden(self, quiet_trainer, tmp_path, student):
        torch.manual_seed(1)
        networks = [nn.Sequential(*DigitsCNN(8), nn.Dropout(0.5)) for _ in range(2)]
        before = copy.deepcopy([network.state_dict() for network in networks])
        module = EnsembleDistillModule(student, networks, optimizer=partial(torch.optim.SGD, lr=0.1))
        module.train()
        for network in networks:
            network.train()
        trainer = quiet_trainer(limit_train_batches=2)
        trainer.fit(module, SemiSupervisedDataModule(Digits(), batch_size=16))
        for network, state in zip(networks, before, strict=True):
            assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
            assert not any(part.training for part in network.modules())
        own = {id(p) for p in student.parameters()}
        assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == own
        assert set(module.state_dict()) == {f"student.{key}" for key in student.state_dict()}
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        content = torch.load(tmp_path / "c.ckpt", weights_only=True)
        assert set(content["state_dict"]) == set(module.state_dict())
        assert content["teacher_fingerprints"] == [Teacher(network).fingerprint() for network in networks]
        twin = copy.deepcopy(module)
        assert [teacher.network for teacher in twin.ensemble] == networks
        assert twin.student is not student

    @pytest.mark.parametrize("use_vmap", [True, False])
    def test_half_precision(self, quiet_trainer, student, use_vmap):
        torch.manual_seed(1)
        networks = [DigitsCNN(8) for _ in range(2)]
        terms = {}
        for precision in ("32-true", "bf16-mixed"):
            still = partial(torch.optim.SGD, lr=0.0)
            module = EnsembleDistillModule(copy.deepcopy(student), networks, use_vmap=use_vmap, optimizer=still)
            trainer = quiet_trainer(limit_train_batches=2, precision=precision)
            trainer.fit(module, SemiSupervisedDataModule(Digits(), batch_size=64))
            terms[precision] = trainer.callback_metrics["train/soft"].item()
        assert terms["bf16-mixed"] == pytest.approx(terms["32-true"], rel=0.1)
        assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}

    def test_batched_equals_the_loop(self, quiet_trainer, student):
        """Through Lightning's sanity check, which runs under inference_mode, training and validation."""
        found = []
        for use_vmap in (True, False):
            torch.manual_seed(1)
            module = EnsembleDistillModule(copy.deepcopy(student), [DigitsCNN(8) for _ in range(2)], use_vmap=use_vmap)
            trainer = quiet_trainer(limit_train_batches=3, limit_val_batches=2)
            trainer.fit(module, SemiSupervisedDataModule(Digits(), batch_size=32))
            found.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        assert found[0] == pytest.approx(found[1], rel=1e-4)

    def test_checkpoint(self, quiet_trainer, tmp_path, loader, student):
        torch.manual_seed(1)
        networks = [DigitsCNN(8) for _ in range(3)]
        trainer = quiet_trainer()
        trainer.fit(EnsembleDistillModule(student, networks[:2], "random", soft_weight=0.4), loader())
        path = tmp_path / "c.ckpt"
        trainer.save_checkpoint(path)

        def make(teachers):
            return EnsembleDistillModule(copy.deepcopy(student), teachers)

        with pytest.raises(InputError, match=r"teachers\[1\]: the checkpoint was trained with another teacher"):
            quiet_trainer(max_epochs=2).fit(make([networks[0], networks[2]]), loader(), ckpt_path=path)
        with pytest.raises(InputError, match=r"teachers\[0\]: the checkpoint was trained with another teacher"):
            quiet_trainer(max_epochs=2).fit(make(networks[1::-1]), loader(), ckpt_path=path)
        for teachers, count in ((networks, 3), (networks[:1], 1)):
            with pytest.raises(InputError, match=f"teachers: the checkpoint was trained with 2 teachers, got {count}"):
                quiet_trainer(max_epochs=2).fit(make(teachers), loader(), ckpt_path=path)
        quiet_trainer(max_epochs=2).fit(make([copy.deepcopy(n) for n in networks[:2]]), loader(), ckpt_path=path)
        for teachers in (None, networks):
            quiet_trainer().test(make(teachers), loader(), ckpt_path=path, verbose=False)
        quiet_trainer().predict(make(None), loader(), ckpt_path=path)
        again = EnsembleDistillModule.load_from_checkpoint(path, student=student, teachers=None, weights_only=True)
        assert (again.strategy, again.soft_weight) == ("random", 0.4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"teachers": []}, "teachers must hold at least one teacher, got none"),
            ({"teacher_weights": [1.0]}, "teacher_weights must be 2 numbers, one for each teacher, got \\[1.0\\]"),
            ({"teacher_weights": [1, -1]}, r"teacher_weights must be finite, at least 0 .*, got \[1, -1\]"),
            ({"teacher_weights": [0, 0]}, r"teacher_weights must be .* not all 0, got \[0, 0\]"),
            ({"teacher_weights": [1, NAN]}, r"teacher_weights must be finite, .*, got \[1, nan\]"),
            ({"teacher_weights": "certainty"}, "teacher_weights must be one of confidence, got 'certainty'"),
            ({"strategy": "mean"}, "strategy must be one of average, random, relabel, got 'mean'"),
            ({"draw_per": "row"}, "draw_per must be one of batch, sample, got 'row'"),
            (
                {"strategy": "random", "teacher_weights": "confidence"},
                "confidence is for strategy average, got strategy 'random'",
            ),
            (
                {"strategy": "relabel", "teacher_weights": "confidence"},
                "confidence is for strategy average, got strategy 'relabel'",
            ),
            ({"soft_loss": KDLoss(task="binary")}, "soft_loss is for the binary task, .* is multiclass"),
            ({"soft_weight": 1.5}, r"soft_weight must lie in \[0, 1\], got 1.5"),
        ],
        ids=str,
    )
    def test_arguments(self, student, kwargs, message):
        teachers = [DigitsCNN(4), DigitsCNN(4)]
        with pytest.raises(InputError, match=message):
            EnsembleDistillModule(student, **({"teachers": teachers} | kwargs))

    @pytest.mark.parametrize(
        ("data", "got"),
        [
            ({}, "views_per_epoch 1, num_views None"),
            ({"views_per_epoch": 3}, "views_per_epoch 3, num_views None"),
            ({"views_per_epoch": 2, "num_views": 3}, "num_views 3"),
        ],
    )
    def test_relabel_of_other_copies(self, quiet_trainer, data, got):
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(0), Recorder(1)], "relabel")
        with pytest.raises(InputError, match=rf"strategy: relabel .*views_per_epoch: 2 .* got .*{got}"):
            quiet_trainer().fit(module, samples(**data))
        quiet_trainer(limit_train_batches=1).fit(module, samples(views_per_epoch=2, num_views=4))

    def test_without_teachers(self, quiet_trainer, loader, student):
        module = EnsembleDistillModule(student, None)
        (found,) = quiet_trainer().test(module, loader(), verbose=False)
        assert not [name for name in found if "teacher" in name or "agreement" in name]
        with pytest.raises(
            InputError, match="training needs the teachers; teachers=None is for test and predict alone"
        ):
            quiet_trainer().fit(module, loader())

    @pytest.mark.parametrize("strategy", ["average", "random", "relabel"])
    def test_teachers_that_do_not_fit_the_student(self, quiet_trainer, loader, student, strategy):
        for teachers, message in [
            ([DigitsCNN(4, 9), DigitsCNN(4, 9)], "must have the same number of outputs, got .*9.* and .*10"),
            (
                [Teacher(DigitsCNN(4, 3), classes=[0, 1, 9]), Teacher(DigitsCNN(4, 3), classes=[0, 1, 9])],
                r"no teacher .* knows .* classes \[2, 3, 4, 5, 6, 7, 8\]",
            ),
            (
                [Teacher(DigitsCNN(4), classes=[*range(9, -1, -1)]), Teacher(DigitsCNN(4, 2), classes=[0, 10])],
                r"teachers\[1\]: its classes \[0, 10\] exceed the student's, 0 ... 9",
            ),
        ]:
            for validation in (loader(), None):
                with pytest.raises(InputError, match=message):
                    quiet_trainer().fit(EnsembleDistillModule(student, teachers, strategy), loader(), validation)

    def test_weighted_relabel_needs_losses_of_rows(self):
        class Own(nn.Module):
            def forward(self, student, teacher, target=None):
                return (student - teacher).square().mean()

        batch = Batch(numbered(4), view=torch.arange(4))
        make = partial(EnsembleDistillModule, nn.Linear(4, 4), [Recorder(0), Recorder(1)], "relabel", soft_loss=Own())
        make(teacher_weights=[2, 2]).training_step(batch, 0)
        with pytest.raises(InputError, match="soft_loss must have a reduction, .* relabel with teacher_weights"):
            make(teacher_weights=[1, 2]).training_step(batch, 0)

    def test_weighted_relabel_of_losses_of_entries(self):
        """A reduction of torch's kind leaves (B, C): either refused, or each row gets its own weight."""

        class Squared(nn.Module):
            reduction = "mean"

            def forward(self, student, teacher, target=None):
                return nn.functional.mse_loss(student, teacher, reduction=self.reduction)

        s, t = logits("multiclass", 0)[:4], [logits("multiclass", k + 1)[:4] for k in range(2)]
        networks = [nn.Embedding.from_pretrained(z) for z in t]  # a row's logits by its number
        module = EnsembleDistillModule(Fixed(s), networks, "relabel", teacher_weights=[1, 3], soft_loss=Squared())
        expected = np.mean([[0.5, 1.5][b % 2] * (s[b] - t[b % 2][b]).square().mean().item() for b in range(4)])
        try:
            found = module.losses(Batch(torch.arange(4), view=torch.arange(4)))["soft"].value.item()
        except InputError:
            return
        assert found == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("label", [4, -1])
    @pytest.mark.parametrize("weights", [None, "confidence"])
    def test_labels_outside_the_classes(self, weights, label):
        y = torch.tensor([0, 1, label, -100])
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(0), Recorder(1)], teacher_weights=weights)
        with pytest.raises(InputError, match=rf"labels must be 0 ... 3 .*; got {label}"):
            module.training_step((numbered(4), y), 0)

    @pytest.mark.parametrize("weights", [None, "confidence"])
    def test_labels_of_another_shape(self, weights):
        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(0), Recorder(1)], teacher_weights=weights)
        with pytest.raises(
            InputError, match=r"multiclass labels of shape \[4, 2\] do not fit logits of shape \[4, 4\]"
        ):
            module.training_step((numbered(4), torch.zeros(4, 2).long()), 0)

    @pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64, torch.float32])
    def test_labels_of_any_kind(self, kind):
        y, teachers = torch.tensor([0, 1, 3, 2]), [Recorder(0), Recorder(1)]
        module = EnsembleDistillModule(nn.Linear(4, 4), teachers, teacher_weights="confidence")
        expected = module.training_step((numbered(4), y), 0)
        assert torch.equal(module.training_step((numbered(4), y.to(kind)), 0), expected)

    def test_only_a_teacher_of_weight_0_knows_a_class(self):
        teachers = [Recorder(0), Teacher(nn.Linear(4, 2), classes=[1, 0])]
        module = EnsembleDistillModule(nn.Linear(4, 4), teachers, teacher_weights=[0, 1])
        with pytest.raises(InputError, match=r"no teacher \(of weight above 0\) knows the student's classes \[2, 3\]"):
            module.training_step((numbered(4), torch.arange(4)), 0)

    @pytest.mark.parametrize("strategy", ["average", "random", "relabel"])
    def test_a_loss_that_counts_its_steps(self, strategy):
        """Such as one with a warm-up of its own: the very object is called, no copy."""

        class Counted(nn.Module):
            calls = 0

            def forward(self, student, teacher, target=None):
                self.calls += 1
                return nn.functional.mse_loss(student, teacher)

        module = EnsembleDistillModule(nn.Linear(4, 4), [Recorder(0), Recorder(1)], strategy, soft_loss=Counted())
        for _ in range(3):
            module.training_step((numbered(4), torch.arange(4)), 0)
        assert module.soft_loss.calls == 3
