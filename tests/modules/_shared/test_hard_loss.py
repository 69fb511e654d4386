"""The hard loss of a batch: parameters of each class meet their class, against references in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning import Batch, CoTeachingModule, InputError, SupervisedModule
from kd_lightning.losses import LabelKindLoss
from kd_lightning.modules._shared.hard_loss import hard_loss_of

NAN = float("nan")
POS, PER_LABEL = [1.0, 5.0, 10.0], [0.5, 2.0, 3.0]


def bce_by_hand(z, y, pos=(1.0, 1.0, 1.0), weight=(1.0, 1.0, 1.0)):
    """Mean over the known labels, and its gradient, entry by entry in float64."""
    values, gradient = [], np.zeros(z.shape)
    for row, label in np.ndindex(z.shape):
        if np.isnan(y[row, label]) or y[row, label] == -100:
            continue
        p = 1 / (1 + np.exp(-z[row, label]))
        yes, no = (pos[label], 0) if y[row, label] == 1 else (0, 1)
        values.append(weight[label] * (-yes * np.log(p) - no * np.log(1 - p)))
        gradient[row, label] = weight[label] * (no * p - yes * (1 - p))
    return np.mean(values), gradient / len(values)


def random_case(integers=False):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (7, 3), generator=generator).double()
    y[torch.rand(7, 3, generator=generator) < 0.4] = NAN
    y[4], y[5] = NAN, 1.0
    assert (~y.isnan()).all(dim=1).any() and (y.isnan().any(dim=1) & ~y.isnan().all(dim=1)).any()
    return logits, y.nan_to_num(-100).long() if integers else y


class Asymmetric(nn.Module):
    """A loss of one's own with parameters of each label (Ridnik et al. 2021, with other focusing for each label)."""

    row_fields = ("kind",)

    def __init__(self, reduction="mean"):
        super().__init__()
        self.register_buffer("focus", torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64))
        self.reduction, self.seen = reduction, []

    def forward(self, logits, target, kind=None):
        self.seen.append((tuple(logits.shape), None if kind is None else kind.tolist()))
        p = logits.sigmoid()
        rows = -target * p.log() - (1 - target) * p**self.focus * (1 - p).log()
        return rows if self.reduction == "none" else rows.mean()


class TestMissingLabelsOfARow:
    def test_positive_weights_meet_their_label(self):
        """Three rows that know label 0 alone: three flat entries would meet the three weights in turn."""
        y = torch.tensor([[1, NAN, NAN]] * 3)
        loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS))
        found = hard_loss_of(loss, "multilabel", torch.zeros(3, 3), Batch(y, y))
        assert found.value.item() == pytest.approx(np.log(2))
        assert (found.labels, found.class_weights) == (3, None)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("integers", [False, True])
    @pytest.mark.parametrize(
        "parameters", [{}, {"pos_weight": POS}, {"weight": PER_LABEL}, {"pos_weight": POS, "weight": PER_LABEL}]
    )
    def test_by_hand(self, parameters, integers, reduction):
        logits, y = random_case(integers)
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in parameters.items()}
        expected, gradient = bce_by_hand(
            logits.numpy(), y.double().numpy(), parameters.get("pos_weight", [1] * 3), parameters.get("weight", [1] * 3)
        )
        z = logits.clone().requires_grad_()
        loss = nn.BCEWithLogitsLoss(reduction=reduction, **tensors)
        found = hard_loss_of(loss, "multilabel", z, Batch(logits, y))
        found.value.backward()
        assert found.value.item() == pytest.approx(expected, rel=1e-12)
        assert z.grad.numpy() == pytest.approx(gradient, abs=1e-15)
        assert found.labels == int(((y == 0) | (y == 1)).sum())

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_whole_rows_have_the_same_mean(self, reduction):
        logits, _ = random_case()
        y = (logits > 0.3).double()
        loss = nn.BCEWithLogitsLoss(reduction=reduction, pos_weight=torch.tensor(POS).double())
        found = hard_loss_of(loss, "multilabel", logits, Batch(logits, y))
        assert found.value.item() == pytest.approx(bce_by_hand(logits.numpy(), y.numpy(), POS)[0], rel=1e-12)
        if reduction == "mean":
            assert torch.equal(found.value, loss(logits, y))  # to the bit

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_own_loss_gets_whole_rows_and_their_fields(self, reduction):
        logits, y = random_case()
        loss, kind = Asymmetric(reduction), torch.arange(7)
        found = hard_loss_of(loss, "multilabel", logits, Batch(logits, y, kind=kind))
        p, known = logits.sigmoid(), ~y.isnan()
        whole = -y * p.log() - (1 - y) * p ** torch.tensor([0.0, 1.0, 4.0]).double() * (1 - p).log()
        assert found.value.item() == pytest.approx(whole[known].mean().item(), rel=1e-12)
        assert loss.seen == [((6, 3), [0, 1, 2, 3, 5, 6])]  # row 4 has no label
        assert loss.reduction == reduction

    @pytest.mark.parametrize("where", [torch.inf, NAN])
    def test_logits_of_missing_labels_have_no_part(self, where):
        z = torch.tensor([[0.5, where, -1.0]], requires_grad=True)
        y = torch.tensor([[1, NAN, 0]])
        found = hard_loss_of(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POS)), "multilabel", z, Batch(y, y))
        found.value.backward()
        expected, gradient = bce_by_hand(np.array([[0.5, 0.0, -1.0]]), y.numpy(), POS)
        assert found.value.item() == pytest.approx(expected, rel=1e-6)
        assert z.grad.numpy() == pytest.approx(gradient, rel=1e-6)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (nn.Flatten(), "hard_loss: Flatten has no reduction, .* missing labels"),
            (nn.MultiLabelSoftMarginLoss(), r"one value for each label, \[6, 3\], .* got \[6\]"),
        ],
    )
    def test_losses_that_mix_labels(self, loss, message):
        logits, y = random_case()
        with pytest.raises(InputError, match=message):
            hard_loss_of(loss, "multilabel", logits, Batch(logits, y))

    def test_known_labels_are_checked(self):
        y = torch.tensor([[1, NAN, 2.0]])
        with pytest.raises(InputError, match="labels must be 0 ... 1 .*; got 2"):
            hard_loss_of(nn.BCEWithLogitsLoss(), "multilabel", torch.zeros(1, 3), Batch(y, y))


class TestClassNumbersAsFloats:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(
        ("y", "bad"), [([0.5, 1.7, 2.0], "0.5"), ([0, NAN, 1.25], "1.25"), ([0, 1, 1.9999], "1.9999")]
    )
    def test_fractions_are_refused(self, y, bad):
        y = torch.tensor(y)
        with pytest.raises(
            InputError, match=rf"whole class numbers, .*; got {bad}; probabilities .* \(B, C\)"
        ) as caught:
            hard_loss_of(nn.CrossEntropyLoss(), "multiclass", self.logits, Batch(y, y))
        assert "\n" not in str(caught.value)

    def test_whole_numbers_count_as_classes(self):
        y = torch.tensor([2.0, NAN, 0.0])
        found = hard_loss_of(nn.CrossEntropyLoss(), "multiclass", self.logits, Batch(y, y))
        assert torch.equal(found.value, nn.functional.cross_entropy(self.logits[[0, 2]], torch.tensor([2, 0])))

    @pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 256), (torch.float16, 2048)])
    def test_a_type_that_rounds_them(self, dtype, most):
        """A precision plugin casts floats: as bfloat16, class 257 is 256."""
        y = torch.tensor([most, 1.0]).to(dtype)
        assert torch.tensor(most + 1.0).to(dtype) == most
        found = hard_loss_of(nn.CrossEntropyLoss(), "multiclass", torch.zeros(2, most + 1), Batch(y, y))
        assert found.value.item() == pytest.approx(np.log(most + 1), rel=1e-6)
        with pytest.raises(InputError, match=f"has {most + 2} classes, and .*float16 cannot hold .* above {most}"):
            hard_loss_of(nn.CrossEntropyLoss(), "multiclass", torch.zeros(2, most + 2), Batch(y, y))

    @pytest.mark.parametrize(("task", "shape"), [("binary", (4,)), ("multilabel", (4, 1))])
    def test_probabilities_of_other_tasks_stay(self, task, shape):
        y, z = torch.tensor([0.0, 0.3, 0.9, 1.0]).view(shape), torch.randn(shape)
        found = hard_loss_of(nn.BCEWithLogitsLoss(), task, z, Batch(z, y))
        assert found.value.item() == pytest.approx(
            nn.functional.binary_cross_entropy(z.sigmoid().double(), y.double()).item(), rel=1e-6
        )
        for bad in (-0.1, 1.5):
            y = torch.full(shape, bad)
            with pytest.raises(InputError, match=f"labels must be 0 ... 1 .*got {bad}"):
                hard_loss_of(nn.BCEWithLogitsLoss(), task, z, Batch(z, y))


CLASS_WEIGHTS = torch.tensor([0.25, 1.0, 4.0, 0.0])


def weighted_case():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 2, -100, 1, 2, 3, -100, 0, 1, -100])
    candidates = torch.zeros(10, 4, dtype=torch.bool)
    candidates[6, [1, 2]] = candidates[9, [0, 3]] = True
    return logits, y, candidates


def weighted_by_hand(logits, y, candidates):
    """The sum of weighted losses by the sum of weights, a coarse label weighing 1; and its gradient."""
    total, weights, gradient = 0.0, 0.0, np.zeros(logits.shape)
    for i, z in enumerate(logits.numpy()):
        chosen = np.arange(4) == int(y[i]) if y[i] >= 0 else candidates[i].numpy()
        if not chosen.any():
            continue
        weight = CLASS_WEIGHTS[y[i]].item() if y[i] >= 0 else 1.0
        p = np.exp(z) / np.exp(z).sum()
        total, weights = total - weight * np.log(p[chosen].sum()), weights + weight
        gradient[i] = weight * (p - chosen * p / p[chosen].sum())
    return total / weights, gradient / weights


class TestClassWeights:
    def test_by_hand(self):
        logits, y, candidates = weighted_case()
        loss = nn.CrossEntropyLoss(CLASS_WEIGHTS.double())
        found = hard_loss_of(loss, "multiclass", logits, Batch(logits, y, candidates=candidates))
        assert found.value.item() == pytest.approx(weighted_by_hand(logits, y, candidates)[0], rel=1e-12)
        assert (found.labels, found.class_weights.item()) == (9, 0.5 + 2 + 8 + 2)
        fine = hard_loss_of(loss, "multiclass", logits, Batch(logits, y))
        assert fine.value.item() == pytest.approx(loss(logits, y).item(), rel=1e-12)  # torch's own

    @pytest.mark.parametrize("y", [torch.tensor([3, 3]), torch.tensor([-100, -100]), None])
    def test_no_weight_is_zero(self, y):
        """Torch's mean is 0 / 0 there."""
        z = torch.randn(2, 4, requires_grad=True)
        found = hard_loss_of(nn.CrossEntropyLoss(CLASS_WEIGHTS), "multiclass", z, Batch(z.detach(), y))
        found.value.backward()
        assert found.value.item() == 0 and found.class_weights.item() == 0
        assert torch.equal(z.grad, torch.zeros(2, 4))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(self, dtype):
        """As a trainer with precision "bf16-true" converts the module."""
        y, weight = torch.tensor([0, 2, -100, 1]), torch.tensor([1.0, 2.5, 0.5])
        z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        for wrap in (lambda loss: loss, lambda loss: LabelKindLoss(nn.CrossEntropyLoss(), loss)):
            wanted = hard_loss_of(wrap(nn.CrossEntropyLoss(weight)), "multiclass", z.float(), Batch(z, y))
            found = hard_loss_of(wrap(nn.CrossEntropyLoss(weight)).to(dtype), "multiclass", z, Batch(z, y))
            torch.testing.assert_close(found.value, wanted.value)
            torch.testing.assert_close(found.class_weights, wanted.class_weights)

    @pytest.mark.parametrize("cut", [0, 1, 3, 6, 9])
    def test_processes_add_up(self, cut, monkeypatch):
        """The gradients of two processes, whose mean DDP takes, are those of one."""
        logits, y, candidates = weighted_case()
        z = logits.clone().requires_grad_()
        module = SupervisedModule(nn.Identity(), hard_loss=nn.CrossEntropyLoss(CLASS_WEIGHTS.double()))
        batch, parts = Batch(logits, y, candidates=candidates), [torch.arange(cut), torch.arange(cut, 10)]
        sent = []
        monkeypatch.setattr(module, "_trains_on_several_processes", lambda: True)
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: sent.append(value) or value)
        monkeypatch.setattr(type(module), "trainer", SimpleNamespace(strategy=strategy))
        first = [module.hard_term(z[rows], batch.select(rows)) for rows in parts]  # what each process sends
        assert len(first) == 2 and len(sent) == 4
        means = [(sent[0] + sent[2]) / 2, (sent[1] + sent[3]) / 2]
        for rows in parts:
            answers = iter(means)
            strategy.reduce = lambda value, reduce_op, answers=answers: next(answers)
            (module.hard_term(z[rows], batch.select(rows)) / 2).backward()
        _, gradient = weighted_by_hand(logits, y, candidates)
        assert z.grad.numpy() == pytest.approx(gradient, rel=1e-6, abs=1e-12)

    def test_co_teaching_divides_by_them_too(self):
        """Where nothing is forgotten, it is the supervised term."""
        logits, y, candidates = weighted_case()

        class Fixed(nn.Module):
            def forward(self, x):
                return x + torch.zeros(1)

        loss = nn.CrossEntropyLoss(CLASS_WEIGHTS.double())
        module = CoTeachingModule(Fixed(), Fixed(), 0.0, hard_loss=loss)
        found = module.losses(Batch(logits, y, candidates=candidates))["hard"].value
        assert found.item() == pytest.approx(weighted_by_hand(logits, y, candidates)[0], rel=1e-12)


class Stateful(nn.Module):
    """Records its calls, as a loss that exchanges values between processes at each."""

    row_fields, is_stateful, reduction = ("index", "kind"), True, "mean"

    def __init__(self):
        super().__init__()
        self.seen = []

    def reset(self):
        self.seen.clear()

    def forward(self, logits, target, index=None, kind=None):
        self.seen.append((tuple(logits.shape), tuple(target.shape), index.tolist(), kind.tolist()))
        return logits.sum() * 0


@pytest.mark.parametrize(
    ("task", "rows", "target"),
    [("multiclass", (0, 4), (0,)), ("multilabel", (0, 4), (0, 4)), ("binary", (0,), (0,))],
)
def test_stateful_loss_runs_without_y(task, rows, target):
    """Another process may have labels, and would wait for this one."""
    loss, z = Stateful(), torch.randn(3, *(rows[1:] or (1,)), requires_grad=True)
    found = hard_loss_of(loss, task, z, Batch(z.detach()))
    assert loss.seen == [(rows, target, [], [])]
    assert found.value.item() == 0 and found.value.requires_grad and found.labels == 0


class TestRowsOfTheLoader:
    """The loader names the rows whose label is known, and no step searches the labels."""

    @pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
    @pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], []])
    def test_the_value_is_that_of_a_search(self, task, rows, monkeypatch):
        torch.manual_seed(0)
        z = torch.randn((4, 3) if task != "binary" else (4,), requires_grad=True)
        y = torch.tensor([0, 2, 1, 0]) if task == "multiclass" else torch.randint(2, z.shape).float()
        missing = [row for row in range(4) if row not in rows]
        y[missing] = -100 if task == "multiclass" else float("nan")
        loss = nn.CrossEntropyLoss() if task == "multiclass" else nn.BCEWithLogitsLoss()
        found = hard_loss_of(loss, task, z, Batch(z, y))
        (wanted,) = torch.autograd.grad(found.value, z)
        monkeypatch.setattr("kd_lightning.modules._shared.hard_loss.is_labeled", None)
        told = hard_loss_of(loss, task, z, Batch(z, y, labeled=torch.tensor(rows, dtype=torch.long)))
        assert torch.equal(told.value, found.value)
        assert told.labels == found.labels
        assert torch.equal(torch.autograd.grad(told.value, z)[0], wanted)

    @pytest.mark.parametrize(
        ("task", "y", "got"), [("multiclass", [0, -100], -100), ("binary", [1.0, float("nan")], "nan")]
    )
    def test_a_row_without_a_label_is_an_error(self, task, y, got):
        """Such as where a hook has replaced the labels."""
        z = torch.zeros((2, 3) if task == "multiclass" else (2,))
        loss = nn.CrossEntropyLoss() if task == "multiclass" else nn.BCEWithLogitsLoss()
        with pytest.raises(InputError, match=f"labels must be 0 .* got {got}"):
            hard_loss_of(loss, task, z, Batch(z, torch.tensor(y), labeled=torch.tensor([0, 1])))
