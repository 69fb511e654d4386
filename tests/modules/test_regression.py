"""The regression task with one row a sample: terms by hand in float64, metrics of torchmetrics, several teachers."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

from kd_lightning import (
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    SupervisedModule,
    Teacher,
)

NAN = float("nan")
ROWS, D = 6, 3
SHAPES = {"values": (ROWS,), "column": (ROWS, 1), "several": (ROWS, D)}


def random(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Fixed(nn.Module):
    """A network that gives the outputs it was made with, of the rows that x names."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs.clone())

    def forward(self, x):
        return self.outputs[x[:, 0].long()]


X = torch.arange(float(ROWS)).unsqueeze(1)


def targets(kind):
    y = random(*SHAPES[kind], seed=9)
    y.view(ROWS, -1)[1] = NAN
    if kind == "several":
        y[3, 1] = NAN
    return y


def hard_by_hand(z, y, loss=lambda gap: gap**2, weights=None):
    values = [
        (1.0 if weights is None else weights[row]) * loss(z.view(ROWS, -1)[row, n] - y.view(ROWS, -1)[row, n])
        for row in range(ROWS)
        for n in range(z.view(ROWS, -1).shape[1])
        if not y.view(ROWS, -1)[row, n].isnan()
    ]
    return sum(values) / len(values)


def soft_by_hand(z, t):
    return sum((a - b) ** 2 for a, b in zip(z.flatten(), t.flatten(), strict=True)) / z.numel()


def assert_equal(module, batch, pairs, expected):
    """Loss and gradients are those of the sum by hand."""
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)
    found = torch.autograd.grad(loss, [p for p, _ in pairs])
    wanted = torch.autograd.grad(expected, [p for _, p in pairs])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", SHAPES)
class TestTerms:
    def test_hard(self, kind):
        z, y = random(*SHAPES[kind]), targets(kind)
        for loss, by_hand in (
            (None, lambda g: g**2),
            (nn.L1Loss(), abs),
            (nn.HuberLoss(delta=9e9), lambda g: g**2 / 2),
        ):
            leaf = z.clone().requires_grad_()
            module = SupervisedModule(Fixed(z), task="regression", hard_loss=loss)
            assert_equal(module, Batch(X, y), [(module.student.outputs, leaf)], hard_by_hand(leaf, y, by_hand))

    def test_weights_of_rows(self, kind):
        """Also where targets of a row are missing in part."""
        z, y, weights = random(*SHAPES[kind]), targets(kind), torch.tensor([1.0, 9.0, 0.5, 2.0, 0.0, 3.0])
        leaf = z.clone().requires_grad_()
        module = SupervisedModule(Fixed(z), task="regression")
        batch = Batch(X, y, weight=weights)
        assert_equal(module, batch, [(module.student.outputs, leaf)], hard_by_hand(leaf, y, weights=weights.double()))

    def test_distill(self, kind):
        z, t, y = random(*SHAPES[kind]), random(*SHAPES[kind], seed=1), targets(kind)
        leaf = z.clone().requires_grad_()
        module = DistillModule(Fixed(z), Fixed(t), soft_weight=0.3, task="regression")
        expected = 0.7 * hard_by_hand(leaf, y) + 0.3 * soft_by_hand(leaf, t)
        assert_equal(module, Batch(X, y), [(module.student.outputs, leaf)], expected)

    def test_apprentice(self, kind):
        z, t, y = random(*SHAPES[kind]), random(*SHAPES[kind], seed=1), targets(kind)
        leaf, taught = z.clone().requires_grad_(), t.clone().requires_grad_()
        module = ApprenticeModule(Fixed(z), Fixed(t), soft_weight=0.3, mutual=True, task="regression")
        expected = 0.7 * hard_by_hand(leaf, y) + 0.3 * soft_by_hand(leaf, t) + hard_by_hand(taught, y)
        expected = expected + 0.3 * soft_by_hand(z, taught)
        assert_equal(module, Batch(X, y), [(module.student.outputs, leaf), (module.teacher.outputs, taught)], expected)

    @pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
    @pytest.mark.parametrize("use_vmap", [False, True])
    def test_average(self, kind, use_vmap, weights):
        z, y = random(*SHAPES[kind]), targets(kind)
        teachers = [random(*SHAPES[kind], seed=n) for n in (1, 2)]
        leaf = z.clone().requires_grad_()
        module = EnsembleDistillModule(
            Fixed(z),
            [Fixed(t) for t in teachers],
            teacher_weights=weights,
            use_vmap=use_vmap,
            soft_weight=0.3,
            task="regression",
        )
        one, other = [0.5, 0.5] if weights is None else [0.25, 0.75]
        mean = one * teachers[0] + other * teachers[1]
        expected = 0.7 * hard_by_hand(leaf, y) + 0.3 * soft_by_hand(leaf, mean)
        assert_equal(module, Batch(X, y), [(module.student.outputs, leaf)], expected)

    @pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
    def test_relabel(self, kind, weights):
        z, teachers = random(*SHAPES[kind]), [random(*SHAPES[kind], seed=n) for n in (1, 2)]
        view = torch.tensor([0, 1, 1, 0, 1, 0])
        leaf = z.clone().requires_grad_()
        module = EnsembleDistillModule(
            Fixed(z),
            [Fixed(t) for t in teachers],
            "relabel",
            teacher_weights=weights,
            soft_weight=1.0,
            task="regression",
        )
        shares = torch.tensor([1.0, 1.0] if weights is None else [0.5, 1.5])[view].double()
        chosen = torch.stack([teachers[int(k)][row] for row, k in enumerate(view)])
        rows = (leaf - chosen).square().view(ROWS, -1).mean(dim=1)
        assert_equal(module, Batch(X, None, view=view), [(module.student.outputs, leaf)], (shares * rows).mean())


def test_outputs_that_one_teacher_does_not_know():
    """They are the mean of the teachers that do."""
    z, full, few = random(ROWS, D), random(ROWS, D, seed=1), random(ROWS, 2, seed=2)
    leaf = z.clone().requires_grad_()
    module = EnsembleDistillModule(
        Fixed(z), [Fixed(full), Teacher(Fixed(few), classes=[2, 0])], soft_weight=1.0, task="regression"
    )
    mean = torch.stack([(full[:, 0] + few[:, 1]) / 2, full[:, 1], (full[:, 2] + few[:, 0]) / 2], dim=1)
    assert_equal(module, Batch(X), [(module.student.outputs, leaf)], soft_by_hand(leaf, mean))


def test_smooth_l1_as_soft_loss():
    z, t = random(ROWS), random(ROWS, 1, seed=1)  # (B,) and (B, 1) must not broadcast
    leaf = z.clone().requires_grad_()
    module = DistillModule(Fixed(z), Fixed(t), soft_weight=1.0, soft_loss=nn.SmoothL1Loss(), task="regression")
    gaps = [(a - b).abs() for a, b in zip(leaf, t.flatten(), strict=True)]
    expected = sum(torch.where(gap < 1, gap**2 / 2, gap - 0.5) for gap in gaps) / ROWS
    assert_equal(module, Batch(X), [(module.student.outputs, leaf)], expected)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("teachers", [0, 1, 2])
def test_metrics(kind, teachers, quiet_trainer):
    """Those of torchmetrics, over targets that are missing in part, in batches of two sizes."""
    z, y = random(*SHAPES[kind]), targets(kind)
    taught = [random(*SHAPES[kind], seed=n + 1) for n in range(teachers)]
    nets = [Fixed(t) for t in taught]
    if teachers == 2:
        module = EnsembleDistillModule(Fixed(z), nets, task="regression")
    else:
        module = (
            DistillModule(Fixed(z), *nets, task="regression") if nets else SupervisedModule(Fixed(z), task="regression")
        )
    trainer = quiet_trainer()
    batches = [Batch(X[:4], y[:4]), Batch(X[4:], y[4:])]
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    found = trainer.callback_metrics
    known = ~y.isnan()
    columns = [(z.view(ROWS, -1)[:, n], y.view(ROWS, -1)[:, n]) for n in range(z.view(ROWS, -1).shape[1])]
    scores = [R2Score()(a[~b.isnan()], b[~b.isnan()]).item() for a, b in columns]
    assert found["val/r2"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
    assert found["val/mae"] == pytest.approx(MeanAbsoluteError()(z[known], y[known]).item(), rel=1e-5)
    assert found["val/rmse"] == pytest.approx(MeanSquaredError(squared=False)(z[known], y[known]).item(), rel=1e-5)
    assert found["val/loss"] == pytest.approx(float(hard_by_hand(z, y)), rel=1e-5)
    if teachers:
        mean = sum(taught) / teachers
        assert found["val/teacher_mae"] == pytest.approx((mean - y)[known].abs().mean().item(), rel=1e-5)
        assert found["val/teacher_difference"] == pytest.approx((mean - z).square().mean().sqrt().item(), rel=1e-5)
    for number, t in enumerate(taught if teachers == 2 else ()):
        assert found[f"val/teacher_{number}_mae"] == pytest.approx((t - y)[known].abs().mean().item(), rel=1e-5)
        rmse = (t - y)[known].square().mean().sqrt().item()
        assert found[f"val/teacher_{number}_rmse"] == pytest.approx(rmse, rel=1e-5)
        difference = (t - z).square().mean().sqrt().item()
        assert found[f"val/teacher_{number}_difference"] == pytest.approx(difference, rel=1e-5)


def test_methods_of_classes_refuse_it():
    nets = Fixed(random(ROWS)), Fixed(random(ROWS, seed=1))
    with pytest.raises(InputError, match="task must be multiclass.*, got 'regression'"):
        CoTeachingModule(*nets, 0.2, task="regression")
