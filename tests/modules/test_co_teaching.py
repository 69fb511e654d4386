"""CoTeachingModule: the rows each student learns by hand, the ramp, several processes, resume, what is deployed."""

import threading
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from safetensors import safe_open
from scipy.special import log_softmax
from torch import nn

from kd_lightning import Batch, CoTeachingModule, Digits, InputError, SemiSupervisedDataModule, SymmetricNoise
from kd_lightning.batch import LabelKind
from kd_lightning.callbacks import StudentWriter
from kd_lightning.losses import EarlyLearningLoss, GeneralizedCrossEntropyLoss, LabelKindLoss, LogitAdjustmentLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import co_teaching

CLASSES = 4
N, C, M, P, G = LabelKind.NOISY, LabelKind.CLEAN, LabelKind.MISSING, LabelKind.PSEUDO, LabelKind.COARSE
SGD = partial(torch.optim.SGD, lr=0.1)


class Fixed(nn.Module):
    """A network that gives the logits it was made with, of the rows that x names."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[x[:, 0].long()]


def random_logits(seed, rows=10):
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def plain():
    y = torch.tensor([0, 3, -100, 1, 2, 2, 0, 1, -100, 3])
    return Batch(torch.arange(10.0).unsqueeze(1), y)


def mixed():
    """Every kind of label, weighted; the coarse rows are 2 and 8."""
    batch = plain()
    batch.kind = torch.tensor([N, C, G, N, N, P, N, C, G, M], dtype=torch.int8)
    batch.y[9] = -100
    batch.weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.1, 1.0, 3.0, 1.0, 0.5, 7.0])
    batch.candidates = torch.zeros(10, CLASSES, dtype=torch.bool)
    batch.candidates[2, [0, 1]] = batch.candidates[8, [1, 2, 3]] = True
    return batch


def rows_by_hand(logits, batch):
    """Loss (B,) and gradient (B, C) of each row; 0 without a label."""
    rows, gradient = np.zeros(len(logits)), np.zeros(logits.shape)
    for i, z in enumerate(logits.double().numpy()):
        log_p = log_softmax(z)
        chosen = [] if batch.y[i] == -100 else [int(batch.y[i])]
        if batch.candidates is not None and batch.candidates[i].any():
            chosen = batch.candidates[i].nonzero().flatten().tolist()
        if chosen:
            inside = np.exp(log_p[chosen])
            rows[i] = -np.log(inside.sum())
            gradient[i] = np.exp(log_p)
            gradient[i][chosen] -= inside / inside.sum()
    return rows, gradient


def learned_by_hand(selector, batch, forget):
    """Which rows the other student learns."""
    rows, _ = rows_by_hand(selector, batch)
    labeled = [i for i in range(len(rows)) if batch.y[i] != -100]
    noisy = [i for i in labeled if batch.kind is None or batch.kind[i] != C]
    easy = sorted(noisy, key=lambda i: rows[i])[: round((1 - forget) * len(noisy))]
    coarse = [] if batch.candidates is None else batch.candidates.any(dim=1).nonzero().flatten().tolist()
    return sorted(easy + [i for i in labeled if i not in noisy] + coarse)


def term_by_hand(learner, selector, batch, forget):
    rows, gradient = rows_by_hand(learner, batch)
    learned = learned_by_hand(selector, batch, forget)
    share = np.zeros(len(rows))
    share[learned] = 1 / len(learned)
    share *= 1 if batch.weight is None else batch.weight.double().numpy()
    return (share * rows).sum(), share[:, None] * gradient


def module_of(forget, student=None, peer=None, **kwargs):
    student, peer = (random_logits(0) if student is None else student), (random_logits(1) if peer is None else peer)
    module = CoTeachingModule(Fixed(student), Fixed(peer), forget, **kwargs)
    module.forget_rate_at = lambda epoch: forget  # as at the ramp's end
    return module


class TestObjective:
    @pytest.mark.parametrize("make", [plain, mixed])
    @pytest.mark.parametrize("forget", [0.0, 0.25, 0.5, 0.9])
    def test_by_hand(self, make, forget):
        module = module_of(forget)
        terms = module.losses(make())
        sum(term.weight * term.value for term in terms.values()).backward()
        first, second = random_logits(0), random_logits(1)
        sides = (first, second, module.student, "hard"), (second, first, module.peer, "peer_hard")
        for learner, selector, net, name in sides:
            value, gradient = term_by_hand(learner, selector, make(), forget)
            assert terms[name].weight == 1
            assert terms[name].value.item() == pytest.approx(value, rel=1e-12)
            assert net.logits.grad.numpy() == pytest.approx(gradient, abs=1e-14)

    def test_the_cases_tell_the_students_apart(self):
        """Else the test above could not fail."""
        for make in (plain, mixed):
            one, other = (learned_by_hand(random_logits(seed), make(), 0.5) for seed in (0, 1))
            assert one != other

    def test_the_peer_chooses(self):
        learned = []
        for seed in (1, 2):
            module = module_of(0.5, peer=random_logits(seed))
            module.losses(plain())["hard"].value.backward()
            learned.append(module.student.logits.grad.abs().sum(dim=1).nonzero().flatten().tolist())
            assert module.peer.logits.grad is None  # choosing is not learning
        assert learned == [learned_by_hand(random_logits(seed), plain(), 0.5) for seed in (1, 2)]
        assert learned[0] != learned[1]

    def test_weights_have_no_say_in_the_choice(self):
        """Row 3 of no weight is neither easy for it, nor learned."""
        light, heavy = plain(), plain()
        light.weight = torch.ones(10)
        light.weight[3] = 0.0
        module = module_of(0.5)
        found = module.losses(light)["hard"].value
        assert found.item() == pytest.approx(term_by_hand(random_logits(0), random_logits(1), light, 0.5)[0])
        heavy.weight = torch.full((10,), 2.0)
        double = module.losses(heavy)["hard"].value
        torch.testing.assert_close(double, 2 * module.losses(plain())["hard"].value)

    @pytest.mark.parametrize(
        "options",
        [
            {"class_weights": [1.0, 1.0, 50.0, 1.0]},
            {"hard_loss": LogitAdjustmentLoss(priors=[100, 100, 1, 100])},
            {"hard_loss": nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 50.0, 1.0]))},
            {
                "hard_loss": LabelKindLoss(
                    nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 50.0, 1.0]))
                )
            },
        ],
    )
    def test_nor_have_those_of_classes(self, options):
        """Else the rows of a rare class, whose weight is large, were left out as noisy."""
        batch, logits = plain(), [random_logits(seed).float() for seed in (1, 2)]
        module = module_of(0.5, *logits, **options)
        sum(term.value for term in module.losses(batch).values()).backward()
        for learner, selector in ((module.student, 1), (module.peer, 0)):
            learned = learner.logits.grad.abs().sum(dim=1).nonzero().flatten().tolist()
            assert learned == sorted(learned_by_hand(logits[selector], batch, 0.5))

    @pytest.mark.parametrize("y", [None, torch.full((10,), -100), torch.full((10,), float("nan"))])
    def test_no_label_is_zero_in_the_graph(self, y):
        nets = [nn.Linear(3, 2) for _ in range(2)]
        loss = CoTeachingModule(*nets, 0.5).training_step(Batch(torch.full((10, 3), 3e38), y), 0)
        loss.backward()
        assert loss.item() == 0
        for net in nets:
            assert torch.equal(net.weight.grad, torch.zeros_like(net.weight))

    def test_rows_without_a_label_leak_nothing(self):
        """Not even logits that overflow."""
        wild = random_logits(0)
        wild[2] = float("inf")
        found = module_of(0.5, student=wild).losses(plain())["hard"].value
        assert found.item() == pytest.approx(term_by_hand(random_logits(0), random_logits(1), plain(), 0.5)[0])

    def test_all_clean_is_plain_training(self):
        batch = plain()
        batch.kind = torch.where(batch.y == -100, LabelKind.MISSING, LabelKind.CLEAN)
        found = module_of(0.9).losses(batch)["hard"].value
        expected = nn.functional.cross_entropy(random_logits(0), batch.y)
        torch.testing.assert_close(found, expected)

    def test_coarse_labels_alone(self):
        batch = mixed()
        batch.y = None
        batch.kind = None
        batch.weight = None
        rows, _ = rows_by_hand(random_logits(0), mixed())
        assert module_of(0.9).losses(batch)["hard"].value.item() == pytest.approx(rows[[2, 8]].mean())

    def test_forgetting_all_there_is(self):
        batch = plain()
        batch.y[:-1] = -100  # one label, of which 0.6 are forgotten
        module = module_of(0.6)
        loss = module.training_step(batch, 0)
        loss.backward()
        assert loss == 0 and torch.equal(module.student.logits.grad, torch.zeros(10, CLASSES, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        module = module_of(0.25, random_logits(0).to(dtype), random_logits(1).to(dtype))
        found = module.losses(mixed())["hard"].value
        expected, _ = term_by_hand(random_logits(0).to(dtype), random_logits(1).to(dtype), mixed(), 0.25)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected, rel=1e-5)

    def test_accumulated_batches_are_weighted_by_their_labels(self):
        """Nothing is forgotten here: two uneven batches of a step make the mean of all their labels."""
        module, whole = module_of(0.0), plain()
        values = []
        for rows in (slice(0, 3), slice(3, 10)):
            values.append(module.losses(Batch(whole.x[rows], whole.y[rows], mean_labels=4.0))["hard"].value)
        torch.testing.assert_close(sum(values) / 2, module.losses(plain())["hard"].value)

    def test_another_hard_loss(self):
        loss = GeneralizedCrossEntropyLoss()
        module = module_of(0.5, hard_loss=LabelKindLoss(loss))
        found = module.losses(mixed())["hard"].value
        rows = nn.functional.cross_entropy(random_logits(0), mixed().y, reduction="none")
        noisy = mixed().kind == LabelKind.NOISY
        rows[noisy] = GeneralizedCrossEntropyLoss(reduction="none")(random_logits(0)[noisy], mixed().y[noisy])
        rows[[2, 8]] = torch.from_numpy(rows_by_hand(random_logits(0), mixed())[0])[[2, 8]]
        # chosen by the peer's loss of the same kind, which puts the noisy rows in cross-entropy's order
        others = nn.functional.cross_entropy(random_logits(1), mixed().y, reduction="none")
        others[noisy] = GeneralizedCrossEntropyLoss(reduction="none")(random_logits(1)[noisy], mixed().y[noisy])
        sorted_rows = [0, 3, 4, 5, 6]
        easy = sorted(sorted_rows, key=lambda i: others[i].item())[: round(0.5 * 5)]
        learned = [*easy, 1, 7, 2, 8]
        expected = (rows * mixed().weight)[learned].sum() / len(learned)
        torch.testing.assert_close(found, expected)
        assert loss.reduction == "mean"


def test_two_processes_choose_as_one(monkeypatch):
    """Two threads that hear of one another as processes do, on 3 and 7 rows."""
    barrier, slots = threading.Barrier(2, timeout=60), [None, None]

    def gather(part):
        slots[int(threading.current_thread().name)] = part
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    monkeypatch.setattr(co_teaching, "gather_all_tensors", gather)
    for make in (plain, mixed):
        one = module_of(0.4)
        one.training_step(make(), 0).backward()
        modules, shares = [module_of(0.4) for _ in range(2)], [torch.arange(3), torch.arange(3, 10)]
        labels = int((make().y != -100).sum()) + 2 * (make is mixed)

        def run(rank, make=make, modules=modules, shares=shares, labels=labels):
            modules[rank]._trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=0)
            modules[rank]._record_mean = lambda *args: None
            batch = make().select(shares[rank])
            batch.mean_labels = labels / 2
            terms = modules[rank].losses(batch)
            sum(term.value for term in terms.values()).backward()

        threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for side in ("student", "peer"):
            first, second = (getattr(module, side).logits.grad for module in modules)
            torch.testing.assert_close((first + second) / 2, getattr(one, side).logits.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_rate": 1.0}, r"forget_rate must lie in \[0, 1\), got 1.0"),
        ({"forget_rate": -0.1}, r"forget_rate must lie in \[0, 1\), got -0.1"),
        ({"forget_rate": float("nan")}, r"forget_rate must lie in \[0, 1\), got nan"),
        ({"ramp_epochs": 0}, "ramp_epochs must be at least 1, got 0"),
        ({"task": "binary"}, "task must be multiclass, got 'binary'"),
        ({"hard_loss": nn.Identity()}, "hard_loss: Identity has no reduction"),
        ({"hard_loss": EarlyLearningLoss()}, "hard_loss: EarlyLearningLoss stores values of samples"),
        ({"hard_loss": LabelKindLoss(EarlyLearningLoss())}, "hard_loss: LabelKindLoss stores values of samples"),
    ],
)
def test_constructor_checks(arguments, message):
    with pytest.raises(InputError, match=message):
        CoTeachingModule(nn.Linear(2, 2), nn.Linear(2, 2), **({"forget_rate": 0.4} | arguments))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(torch.zeros(2, 1), torch.tensor([0, 4])), "labels must be 0 ... 3 .* got 4"),
        (Batch(torch.zeros(2, 1), torch.zeros(2, 4).long()), r"multiclass labels of shape \[2, 4\] do not fit"),
        (Batch(torch.zeros(2, 1), weight=torch.ones(2, 1)), r"weights must be one a row, \(B,\) = \[2\].* \[2, 1\]"),
        (
            Batch(torch.zeros(2, 1), candidates=torch.ones(2, 3, dtype=torch.bool)),
            r"candidates of shape \[2, 3\] do not fit logits of shape \[2, 4\]",
        ),
    ],
)
def test_labels_that_do_not_fit(batch, message):
    with pytest.raises(InputError, match=message):
        module_of(0.4).training_step(batch, 0)


def test_peer_of_other_classes():
    module = CoTeachingModule(nn.Linear(2, 4), nn.Linear(2, 3), 0.4)
    with pytest.raises(InputError, match=r"student and peer must have one shape, got \[5, 4\] and \[5, 3\]"):
        module.training_step((torch.zeros(5, 2), torch.zeros(5, dtype=torch.long)), 0)


def networks(*seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        yield DigitsCNN(width=4)


class TestRun:
    def test_ramp(self, quiet_trainer, loader):
        seen = []

        class Watch(Callback):
            def on_train_epoch_end(self, trainer, module):
                seen.append(trainer.callback_metrics["forget_rate"].item())

        trainer = quiet_trainer(max_epochs=5, callbacks=[Watch()])
        trainer.fit(CoTeachingModule(*networks(0, 1), 0.5, ramp_epochs=3, optimizer=SGD), loader(), loader())
        assert seen == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5, 0.5])
        assert {"train/hard", "train/peer_hard", "val/accuracy"} < set(trainer.callback_metrics)

    @pytest.mark.parametrize(
        ("options", "warns"),
        [({}, False), ({"noisy": True}, False), ({"label_file": "l.csv"}, True), ({"noise": 1}, False)],
    )
    def test_says_so_where_every_label_is_clean(self, quiet_trainer, tmp_path, options, warns):
        (tmp_path / "l.csv").write_text("index,label\n0,3\n")
        options = {"label_file": tmp_path / "l.csv"} if "label_file" in options else options
        options = {"label_noise": SymmetricNoise(0.0)} if "noise" in options else options
        data = SemiSupervisedDataModule(Digits(), labeled=5, val_size=0, batch_size=512, **options)
        module = CoTeachingModule(*networks(0, 1), 0.4, ramp_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(max_epochs=2).fit(module, datamodule=data)
        warnings_found = [str(w.message) for w in caught if "forget_rate: no row was left out" in str(w.message)]
        assert len(warnings_found) == warns

    def test_both_learn(self, quiet_trainer, loader):
        module = CoTeachingModule(*networks(0, 1), 0.5)
        before = [p.clone() for p in module.parameters()]
        quiet_trainer().fit(module, loader())
        assert all(not torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))

    def test_same_weights(self, quiet_trainer, loader):
        shared = next(networks(0))
        same = "peer must have other weights than the student, got the same"
        for student, peer, message in (
            (*networks(0, 0), same),
            (shared, shared, "peer and student must be two networks, got the same network twice"),
            (shared, nn.Sequential(*list(shared)[:-1], nn.Linear(16, 10)), "got 9 that are in both, such as 0.weight"),
            (shared, next(networks(1)).requires_grad_(False), "peer: at least one parameter must require a gradient"),
        ):
            module = CoTeachingModule(student, peer, 0.4)
            with pytest.raises(InputError, match=message):
                quiet_trainer().fit(module, loader())
            quiet_trainer().test(module, loader(), verbose=False)  # where nobody chooses

    def test_resume_is_exact(self, quiet_trainer, loader, tmp_path):
        def make(*seeds):
            return CoTeachingModule(*networks(*seeds), 0.6, ramp_epochs=3)

        whole, part, resumed = make(0, 1), make(0, 1), make(2, 3)
        quiet_trainer(max_epochs=4).fit(whole, loader())
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(part, loader())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        quiet_trainer(max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        assert not torch.equal(part.student[0].weight, whole.student[0].weight)

    def test_checkpoint_is_evaluated_without_a_fit(self, quiet_trainer, loader, tmp_path):
        module = CoTeachingModule(*networks(0, 1), 0.4, ramp_epochs=3)
        trainer = quiet_trainer()
        trainer.fit(module, loader())
        expected = quiet_trainer().test(module, loader(), verbose=False)
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        student, peer = networks(5, 6)
        again = CoTeachingModule.load_from_checkpoint(
            tmp_path / "c.ckpt", student=student, peer=peer, weights_only=True
        )
        assert (again.forget_rate, again.ramp_epochs) == (0.4, 3)
        assert quiet_trainer().test(again, loader(), verbose=False) == expected

    def test_the_student_alone_is_deployed(self, quiet_trainer, loader, tmp_path):
        module = CoTeachingModule(*networks(0, 1), 0.4)
        quiet_trainer(callbacks=[StudentWriter()]).fit(module, loader())
        with safe_open(tmp_path / "student.safetensors", "pt") as file:
            assert {*file.keys()} == {*module.student.state_dict()}
            assert torch.equal(file.get_tensor("0.weight"), module.student[0].weight)


class WithHead(nn.Module):
    """A network with an auxiliary head."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.head = nn.Linear(1, CLASSES), nn.Linear(1, CLASSES)

    def forward(self, x):
        return {"out": self.net(x), "aux": self.head(x)}


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_auxiliary_heads_of_both_are_reported_once(weight):
    module = CoTeachingModule(WithHead(0), WithHead(1), 0.2, auxiliary_weight=weight)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            module.training_step(plain(), 0)
    texts = sorted(str(one.message) for one in said if "auxiliary heads" in str(one.message))
    assert [text.split(" do not")[0] for text in texts] == (
        ["the peer's 1 auxiliary heads", "the student's 1 auxiliary heads"] if weight else []
    )
