"""Soft losses: sums of several by hand in each method, the losses that caches of top logits allow, wrong forms."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_networks import pictures, small
from torch import nn

from kd_lightning import (
    ApprenticeModule,
    Batch,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    Teacher,
)
from kd_lightning.losses import CosineLoss, DISTLoss, DKDLoss, KDLoss, ReverseKLLoss
from kd_lightning.modules._shared.soft_loss import SoftLosses


class Fixed(nn.Module):
    """A network that gives the logits of samples, whose numbers come in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[x[:, 0].long()]


def random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHERS = random(5, 4), [random(5, 4, seed=1), random(5, 4, seed=2), random(5, 4, seed=3)]
Y = torch.tensor([0, -100, 3, 1, -100])
X = torch.arange(5).float().unsqueeze(1)


def kl(log_p, log_q):
    """KL(p || q) of logarithms, averaged over rows."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def logs(z, temperature=1.0):
    return (z.double() / temperature).log_softmax(1)


def standardized(z):
    z = z.double()
    return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)


def losses():
    """A sum of three, one of them of torch."""
    return {"kd": (0.5, KDLoss(3.0)), "reverse": (2.0, ReverseKLLoss(temperature=2.0)), "squares": (0.1, nn.MSELoss())}


def by_hand(student, teacher):
    """The values of these losses in float64."""
    return {
        "kd": 9 * kl(logs(teacher, 3), logs(student, 3)),
        "reverse": 4 * kl(logs(student, 2), logs(teacher, 2)),
        "squares": F.mse_loss(student.double(), teacher.double()),
    }


def check(terms, values, soft_weight):
    """Compare terms with values, and their weights."""
    weights = {"kd": 0.5, "reverse": 2.0, "squares": 0.1}
    found = {name: terms[name].value.item() for name in values}
    assert found == pytest.approx({name: value.item() for name, value in values.items()}, rel=1e-4)
    assert {name: terms[name].weight for name in values} == {
        name: pytest.approx(soft_weight * weight) for name, weight in weights.items()
    }
    return soft_weight * sum(weights[name] * value for name, value in values.items())


class TestSums:
    def test_distill(self):
        module = DistillModule(Fixed(STUDENT), Fixed(TEACHERS[0]), soft_loss=losses(), soft_weight=0.3)
        soft = check(module.losses(Batch(X, Y)), by_hand(STUDENT, TEACHERS[0]), 0.3)
        hard = F.cross_entropy(STUDENT.double(), Y)
        loss = module.training_step((X, Y), 0)
        assert loss.item() == pytest.approx((0.7 * hard + soft).item(), rel=1e-5)
        loss.backward()
        mine = STUDENT.double().requires_grad_()
        (
            0.7 * F.cross_entropy(mine, Y)
            + sum(0.3 * w * v for w, v in zip((0.5, 2, 0.1), by_hand(mine, TEACHERS[0]).values(), strict=True))
        ).backward()
        torch.testing.assert_close(module.student.logits.grad.double(), mine.grad, rtol=1e-4, atol=1e-7)

    def test_one_of_weight_one_is_the_loss_alone(self):
        alone = DistillModule(Fixed(STUDENT), Fixed(TEACHERS[0]), soft_loss=KDLoss(3.0))
        named = DistillModule(Fixed(STUDENT), Fixed(TEACHERS[0]), soft_loss={"kd": (1.0, KDLoss(3.0))})
        assert torch.equal(alone.training_step((X, Y), 0), named.training_step((X, Y), 0))

    def test_a_weight_of_a_callback(self):
        module = DistillModule(Fixed(STUDENT), Fixed(TEACHERS[0]), soft_loss=losses(), soft_weight=0.9)
        module.soft_loss.kd.weight = 0.25
        assert module.losses(Batch(X, Y))["kd"].weight == pytest.approx(0.9 * 0.25)
        module.soft_loss.kd.loss.temperature = 5.0
        assert module.losses(Batch(X, Y))["kd"].value.item() == pytest.approx(
            (25 * kl(logs(TEACHERS[0], 5), logs(STUDENT, 5))).item(), rel=1e-4
        )
        module.soft_loss.kd.weight = -0.1
        with pytest.raises(InputError, match=r"soft_loss.kd.weight must be .* at least 0, got -0.1"):
            module.training_step((X, Y), 0)

    @pytest.mark.parametrize("use_vmap", [False, True])
    def test_ensemble_pools_at_the_temperature_of_each(self, use_vmap):
        sums = losses() | {"standard": (1.0, KDLoss(2.0, standardize=True))}
        teachers = [Fixed(z) for z in TEACHERS]
        module = EnsembleDistillModule(
            Fixed(STUDENT), teachers, teacher_weights=[2, 1, 1], soft_loss=sums, soft_weight=0.3, use_vmap=use_vmap
        )
        weights = torch.tensor([0.5, 0.25, 0.25]).double().view(3, 1, 1)

        def pool(temperature, change=lambda z: z):
            every = torch.stack([logs(change(z), temperature).exp() for z in TEACHERS])
            return (weights * every).sum(0).log()

        terms = module.losses(Batch(X, Y))
        standard = kl(pool(2.0, standardized), logs(standardized(STUDENT), 2))
        assert terms["kd"].value.item() == pytest.approx((9 * kl(pool(3.0), logs(STUDENT, 3))).item(), rel=1e-4)
        assert terms["reverse"].value.item() == pytest.approx((4 * kl(logs(STUDENT, 2), pool(2.0))).item(), rel=1e-4)
        assert terms["standard"].value.item() == pytest.approx(4 * standard.item(), rel=1e-4)
        squares = F.mse_loss(STUDENT.double(), pool(1.0))  # logarithms of probabilities at temperature 1
        assert terms["squares"].value.item() == pytest.approx(squares.item(), rel=1e-4)
        loss = sum(weight * value for weight, value in terms.values())
        assert module.training_step((X, Y), 0).item() == pytest.approx(loss.item(), rel=1e-5)
        assert sums["standard"][1].standardize  # the loss is as it was

    def test_ensemble_samples_one_teacher_for_all_losses(self, monkeypatch):
        selected = torch.tensor([2, 0, 1, 1, 0])
        monkeypatch.setattr("torch.multinomial", lambda *args: selected)
        module = EnsembleDistillModule(
            Fixed(STUDENT),
            [Fixed(z) for z in TEACHERS],
            "random",
            draw_per="sample",
            soft_loss=losses(),
            soft_weight=0.3,
        )
        target = torch.stack(TEACHERS)[selected, torch.arange(5)]
        check(module.losses(Batch(X, Y, index=torch.arange(5))), by_hand(STUDENT, target), 0.3)

    def test_ensemble_relabel_weights_rows_of_each(self):
        sums = {"kd": (0.5, KDLoss(3.0)), "reverse": (2.0, ReverseKLLoss(temperature=2.0))}
        module = EnsembleDistillModule(
            Fixed(STUDENT), [Fixed(z) for z in TEACHERS], "relabel", teacher_weights=[2, 1, 1], soft_loss=sums
        )
        view = torch.tensor([0, 1, 2, 0, 1])
        target = torch.stack(TEACHERS)[view, torch.arange(5)]
        weights = 3 * torch.tensor([0.5, 0.25, 0.25]).double()[view]
        terms = module.losses(Batch(X, Y, view=view))
        p, q = logs(target, 3), logs(STUDENT, 3)
        assert terms["kd"].value.item() == pytest.approx(
            (9 * weights * (p.exp() * (p - q)).sum(1)).mean().item(), rel=1e-4
        )
        p, q = logs(STUDENT, 2), logs(target, 2)
        expected = (4 * weights * (p.exp() * (p - q)).sum(1)).mean().item()
        assert terms["reverse"].value.item() == pytest.approx(expected, rel=1e-4)
        assert all(loss.reduction == "mean" for _, loss in sums.values())

    @pytest.mark.parametrize("mutual", [False, True])
    def test_apprentice(self, mutual):
        module = ApprenticeModule(
            Fixed(STUDENT), Fixed(TEACHERS[0]), mutual=mutual, teacher_weight=0.7, soft_loss=losses(), soft_weight=0.3
        )
        terms = module.losses(Batch(X, Y))
        check(terms, by_hand(STUDENT, TEACHERS[0]), 0.3)
        assert ("teacher_soft" in terms) == mutual
        if mutual:
            values = by_hand(TEACHERS[0], STUDENT)
            expected = 0.5 * values["kd"] + 2 * values["reverse"] + 0.1 * values["squares"]
            assert terms["teacher_soft"].weight == pytest.approx(0.21)
            assert terms["teacher_soft"].value.item() == pytest.approx(expected.item(), rel=1e-4)
        module.training_step((X, Y), 0).backward()
        student, teacher = STUDENT.double().requires_grad_(), TEACHERS[0].double().requires_grad_()
        loss = 0.7 * F.cross_entropy(student, Y) + 0.7 * F.cross_entropy(teacher, Y)
        values = [*by_hand(student, teacher.detach()).values()]
        loss = loss + 0.3 * (0.5 * values[0] + 2 * values[1] + 0.1 * values[2])
        if mutual:
            values = [*by_hand(teacher, student.detach()).values()]
            loss = loss + 0.21 * (0.5 * values[0] + 2 * values[1] + 0.1 * values[2])
        loss.backward()
        torch.testing.assert_close(module.student.logits.grad.double(), student.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(module.teacher.logits.grad.double(), teacher.grad, rtol=1e-4, atol=1e-7)

    def test_dense_outputs(self):
        """Void positions count in no loss."""
        student, teacher = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
        y = torch.arange(18).view(2, 3, 3) % 4
        y[0, 0] = -100
        module = DistillModule(Fixed(student), Fixed(teacher), class_dim=1, soft_loss=losses(), soft_weight=0.3)
        rows = [z.movedim(1, -1)[y >= 0] for z in (student, teacher)]
        check(module.losses(Batch(X[:2], y)), by_hand(*rows), 0.3)

    def test_charts(self, quiet_trainer):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pictures(10)), 4)
        optimizer = partial(torch.optim.SGD, lr=0.0)
        module = DistillModule(small(), small(5, 1), soft_loss=losses(), soft_weight=0.3, optimizer=optimizer)
        trainer = quiet_trainer()
        trainer.fit(module, loader)
        x = loader.dataset.tensors[0]
        values = by_hand(module.student(x), module.teacher(x))
        expected = {f"train/{name}": value.item() for name, value in values.items()}
        expected |= {"kd_weight": 0.15, "reverse_weight": 0.6, "squares_weight": 0.03}
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert "train/soft" not in found and "soft_weight" not in found


class TestTopLogits:
    def test_all_losses_must_allow_them(self, tmp_path):
        teacher = Teacher(Fixed(TEACHERS[0]), cache=tmp_path, cache_top_k=2)
        allowed = {"kd": (1.0, KDLoss()), "dkd": (1.0, DKDLoss())}
        make = [
            partial(DistillModule, Fixed(STUDENT), teacher),
            partial(EnsembleDistillModule, Fixed(STUDENT), [teacher]),
            partial(ApprenticeModule, Fixed(STUDENT), teacher, "fixed_teacher"),
        ]
        for module in make:
            module(soft_loss=allowed)
            with pytest.raises(InputError, match="needs all logits, but a teacher's cache_top_k") as error:
                module(soft_loss=allowed | {"dist": (0.0, DISTLoss())})
            assert "\n" not in str(error.value)


KD = KDLoss()


class TestBadInput:
    @pytest.mark.parametrize(
        "make",
        [
            lambda **options: DistillModule(Fixed(STUDENT), Fixed(TEACHERS[0]), **options),
            lambda **options: EnsembleDistillModule(Fixed(STUDENT), [Fixed(TEACHERS[0])], **options),
        ],
        ids=["distill", "ensemble"],
    )
    @pytest.mark.parametrize(
        ("soft_loss", "message"),
        [
            ({}, "soft_loss must name at least one loss"),
            ({"kd": KD}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"kd": (KD, 1.0)}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"kd": (1.0,)}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"kd": (1.0, KD, 2)}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"kd": (-1.0, KD)}, "soft_loss.kd: weight must be .* at least 0, got -1.0"),
            ({"kd": (float("nan"), KD)}, "soft_loss.kd: weight must be .* at least 0, got nan"),
            ({"kd": ("1", KD)}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"kd": (None, KD)}, r"soft_loss.kd must be \(weight, loss\), got"),
            ({"hard": (1.0, KD)}, "soft_loss: a term's name must be .* got 'hard'"),
            ({"loss": (1.0, KD)}, "got 'loss'"),
            ({"soft": (1.0, KD)}, "got 'soft'"),
            ({"a.b": (1.0, KD)}, "got 'a.b'"),
            ({"keys": (1.0, KD)}, "got 'keys'"),
            ({1: (1.0, KD)}, "got 1"),
            ({"kd": (1.0, KDLoss(task="binary"))}, "soft_loss.* is for the binary task"),
            ({"ce": (1.0, nn.CrossEntropyLoss())}, "CrossEntropyLoss needs probabilities or classes"),
            ({"at": (1.0, CosineLoss())}, "soft_loss: CosineLoss compares features; give it to a FeatureTerm"),
            (CosineLoss(), "soft_loss: CosineLoss compares features; give it to a FeatureTerm"),
            ([(1.0, KD)], r"soft_loss must be a loss, or a dict \{name: \(weight, loss\)\}, got"),
            ((1.0, KD), r"soft_loss must be a loss, or a dict \{name: \(weight, loss\)\}, got"),
            ("kd", r"soft_loss must be a loss, or a dict \{name: \(weight, loss\)\}, got"),
        ],
    )
    def test_forms(self, make, soft_loss, message):
        with pytest.raises(InputError, match=message) as error:
            make(soft_loss=soft_loss)
        assert "\n" not in str(error.value)

    def test_copies_are_independent(self):
        one = SoftLosses(losses())
        other = copy.deepcopy(one)
        other.kd.weight = 3.0
        assert one.kd.weight == 0.5
