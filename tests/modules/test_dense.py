"""Dense outputs: each term row by row in float64, steps of several batches and processes, metrics, what is refused."""

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryJaccardIndex,
    MulticlassAccuracy,
    MulticlassJaccardIndex,
)
from torchvision.transforms import v2

from kd_lightning import (
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    FlexMatch,
    HintModule,
    InputError,
    PseudoLabelModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.batch import LabelKind
from kd_lightning.data import transforms
from kd_lightning.data.views.dense_means import with_dense_means
from kd_lightning.features.pair import FeaturePair
from kd_lightning.losses import GeneralizedCrossEntropyLoss, KDLoss, LabelKindLoss
from kd_lightning.modules._shared.dense_checks import check_strong_transform

NAN = float("nan")
B, C, H, W, T = 4, 3, 2, 3, 6
FORMS = {
    "maps": ("multiclass", 1, False),
    "tokens": ("multiclass", -1, False),
    "causal": ("multiclass", -1, True),
    "soft labels": ("multiclass", 1, False),
    "binary maps": ("binary", 1, False),
    "binary tokens": ("binary", -1, False),
    "multilabel maps": ("multilabel", 1, False),
    "multilabel tokens": ("multilabel", -1, False),
    "regression maps": ("regression", 1, False),
    "regression tokens": ("regression", -1, False),
}
"""Task, dimension of classes, and whether labels are shifted."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(form, seed=0):
    """Outputs of a network for all samples, with a wide range."""
    task, class_dim, _ = FORMS[form]
    classes = 1 if task == "binary" else C
    return 2 * random(*((B, classes, H, W) if class_dim == 1 else (B, T, classes)), seed=seed)


class Table(nn.Module):
    """Outputs of all samples, which x names in its first column. With heads also their outputs."""

    def __init__(self, outputs, heads=()):
        super().__init__()
        self.outputs = nn.Parameter(outputs.clone())
        self.heads = nn.ParameterList([head.clone() for head in heads])

    def forward(self, x):
        rows = x[:, 0].long()
        if not len(self.heads):
            return self.outputs[rows]
        return {"out": self.outputs[rows], "aux": self.heads[0][rows]}


def options_of(form):
    task, class_dim, causal = FORMS[form]
    return {"task": task, "class_dim": class_dim, "causal": causal}


def labels_of(form):
    """Sample 0 is labeled; 1 in part; 2 not at all; 3 at its last position alone, which a mask leaves out."""
    task, class_dim, _ = FORMS[form]
    generator = torch.Generator().manual_seed(7)
    shape = (B, H, W) if class_dim == 1 else (B, T)
    some = torch.rand(shape, generator=generator) > 0.4
    some[0] = True
    some[2:] = False
    some[1].view(-1)[[1, 3]] = torch.tensor([True, False])
    some[3].view(-1)[-1] = True
    if task == "binary" or form in ("maps", "tokens", "causal"):
        classes = 2 if task == "binary" else C
        return torch.where(some, torch.randint(classes, shape, generator=generator), -100)
    full = (B, C, H, W) if class_dim == 1 else (B, T, C)
    if form == "soft labels":
        values = random(*full, seed=8).softmax(dim=class_dim)
    elif task == "multilabel":
        values = torch.randint(2, full, generator=generator).double()
    else:
        values = 3 * random(*full, seed=8)
    values = values.masked_fill(~some.unsqueeze(class_dim), NAN)
    if form != "soft labels":  # one entry of a row is missing
        values.view(-1)[0] = NAN
    return values


def mask_of(form):
    mask = torch.ones((B, H, W) if FORMS[form][1] == 1 else (B, T), dtype=torch.bool)
    for sample, padded in ((0, 2), (1, 1), (2, 2), (3, 1)):
        mask[sample].view(-1)[-padded:] = False
    return mask


def batch_of(form, masked=True, **fields):
    x = torch.stack([torch.arange(float(B)), torch.zeros(B)], dim=1).double()
    return Batch(x, labels_of(form), mask=mask_of(form) if masked else None, **fields)


def rows_by_hand(form, batch):
    """The rows of the samples of a batch, one after another: (number in the batch, position, label or None).

    A position is the index of its outputs. A label of several entries is a list with None where it is missing.
    """
    _, class_dim, causal = FORMS[form]
    y, mask = batch.y, batch.mask
    shape = (H, W) if class_dim == 1 else (y.shape[1],)
    rows = []
    for sample in range(len(y)):
        known, every = [], []
        for place in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
            there = place if not causal else [place[0] + 1]
            if there[0] >= shape[0] or (mask is not None and not mask[(sample, *there)]):
                continue
            value = y[(sample, slice(None), *there)] if y.ndim > len(shape) + 1 and class_dim == 1 else None
            value = y[(sample, *there)] if value is None else value
            entries = [None if e != e or e == -100 else e for e in value.reshape(-1).tolist()]
            label = entries if y.ndim > len(shape) + 1 else entries[0]
            has = any(e is not None for e in entries)
            every.append((sample, place, label if has else None))
            if has:
                known.append(every[-1])
        rows += known or every
    return rows


def output_at(form, outputs, sample, place):
    return outputs[(sample, slice(None), *place)] if FORMS[form][1] == 1 else outputs[(sample, *place)]


def log_softmax(z):
    return z - z.exp().sum().log()


def hard_by_hand(form, outputs, rows, class_weights=None, ignored=None, smoothing=0.0, weights=None):
    """Sum of the hard loss over its labels, and what it is divided by."""
    task = FORMS[form][0]
    total, divisor = outputs.sum() * 0, 0.0
    for sample, place, label in rows:
        if label is None:
            continue
        z, factor = output_at(form, outputs, sample, place), 1.0 if weights is None else float(weights[sample])
        if task == "multiclass":
            logs = log_softmax(z)
            if isinstance(label, list):
                total = total - factor * sum(p * log for p, log in zip(label, logs, strict=True))
                divisor += 1
                continue
            if label == ignored:
                continue
            of = [1.0] * C if class_weights is None else class_weights
            value = -(1 - smoothing) * of[int(label)] * logs[int(label)]
            value = value - smoothing / C * sum(w * log for w, log in zip(of, logs, strict=True))
            total, divisor = total + factor * value, divisor + of[int(label)]
            continue
        for entry, out in zip(label if isinstance(label, list) else [label], z, strict=True):
            if entry is None:
                continue
            if task == "regression":
                value = (out - entry) ** 2
            else:
                value = (1 + (-out).exp()).log() * entry + (1 + out.exp()).log() * (1 - entry)
            total, divisor = total + factor * value, divisor + 1
    return total, divisor


def soften(task, z, temperature=1.0):
    z = z / temperature
    return (z - z.max()).exp() / (z - z.max()).exp().sum() if task == "multiclass" else 1 / (1 + (-z).exp())


def divergence(task, p, q):
    """KL(q || p) of a row; of several labels the mean of each label's. ``q`` and ``p`` are probabilities."""
    if task == "multiclass":
        return (q * (q / p).log()).sum()
    return (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()


def soft_by_hand(form, outputs, taught, rows, temperature=4.0):
    """Sum of the soft loss over rows, and their number. ``taught`` gives the teacher's outputs of a row."""
    task = FORMS[form][0]
    total = outputs.sum() * 0
    for number, (sample, place, _) in enumerate(rows):
        z, t = output_at(form, outputs, sample, place), taught(number, sample, place)
        if task == "regression":
            total = total + ((z - t) ** 2).mean()
        else:
            p, q = (soften(task, one, temperature) for one in (z, t))
            total = total + temperature**2 * divergence(task, p, q)
    return total, len(rows)


def assert_equal(module, batch, parameters, terms):
    """The loss and the gradient of a step are those of weighted terms, {name: (weight, sum, divisor)}.

    The step's numbers of labels and rows may come from the loader, or not.
    """
    expected = sum(weight * total / max(divisor, 1e-12) for weight, total, divisor in terms.values())
    wanted = torch.autograd.grad(expected, [p for _, p in parameters], allow_unused=True)
    for means in (None, module.count_rows(batch)):
        batch.dense_means = means
        loss = module.training_step(batch, 0)
        assert loss.item() == pytest.approx(float(expected), rel=1e-9)
        found = torch.autograd.grad(loss, [p for p, _ in parameters], allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            one, other = (torch.zeros(()) if part is None else part for part in (one, other))
            torch.testing.assert_close(one, other.expand_as(one), rtol=1e-8, atol=1e-12)


def at(form, outputs):
    """What gives a teacher's outputs of a row."""
    return lambda number, sample, place: output_at(form, outputs, sample, place)


class TestHardTerm:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_by_hand(self, form, masked):
        outputs, batch = outputs_of(form), batch_of(form, masked)
        leaf = outputs.clone().requires_grad_()
        module = SupervisedModule(Table(outputs), **options_of(form))
        hard = hard_by_hand(form, leaf, rows_by_hand(form, batch))
        assert 0 < hard[1] < B * T * C
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (1.0, *hard)})

    @pytest.mark.parametrize(
        ("loss", "options"),
        [
            (lambda w: nn.CrossEntropyLoss(w), {"class_weights": [0.5, 2.0, 1.5]}),
            (lambda w: nn.CrossEntropyLoss(ignore_index=1), {"ignored": 1}),
            (lambda w: nn.CrossEntropyLoss(w, ignore_index=2), {"class_weights": [0.5, 2.0, 1.5], "ignored": 2}),
            (lambda w: nn.CrossEntropyLoss(label_smoothing=0.2), {"smoothing": 0.2}),
            (
                lambda w: nn.CrossEntropyLoss(w, label_smoothing=0.2),
                {"class_weights": [0.5, 2.0, 1.5], "smoothing": 0.2},
            ),
        ],
        ids=["class weights", "ignored class", "both", "smoothing", "smoothing and class weights"],
    )
    @pytest.mark.parametrize("form", ["maps", "tokens", "causal"])
    def test_losses_of_torch(self, form, loss, options):
        outputs, batch = outputs_of(form), batch_of(form)
        leaf = outputs.clone().requires_grad_()
        module = SupervisedModule(
            Table(outputs), hard_loss=loss(torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)), **options_of(form)
        )
        hard = hard_by_hand(form, leaf, rows_by_hand(form, batch), **options)
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (1.0, *hard)})

    @pytest.mark.parametrize("form", ["maps", "causal", "binary maps", "regression tokens", "soft labels"])
    def test_weights_of_samples(self, form):
        weights = torch.tensor([0.5, 3.0, 7.0, 2.0], dtype=torch.float64)
        outputs, batch = outputs_of(form), batch_of(form, weight=weights)
        leaf = outputs.clone().requires_grad_()
        module = SupervisedModule(Table(outputs), **options_of(form))
        hard = hard_by_hand(form, leaf, rows_by_hand(form, batch), weights=weights)
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (1.0, *hard)})

    def test_kinds_of_samples(self):
        outputs, kind = outputs_of("maps"), torch.tensor([LabelKind.NOISY, LabelKind.CLEAN, LabelKind.MISSING, 1])
        batch = batch_of("maps", kind=kind)
        leaf = outputs.clone().requires_grad_()
        loss = LabelKindLoss(GeneralizedCrossEntropyLoss(q=0.7))
        module = SupervisedModule(Table(outputs), hard_loss=loss, **options_of("maps"))
        rows = [row for row in rows_by_hand("maps", batch) if row[2] is not None]
        total, _ = hard_by_hand("maps", leaf, [row for row in rows if row[0] != 0])
        for sample, place, label in rows:
            if sample == 0:
                p = log_softmax(output_at("maps", leaf, sample, place))[label].exp()
                total = total + (1 - p**0.7) / 0.7
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (1.0, total, len(rows))})

    def test_auxiliary_heads(self):
        outputs, head = outputs_of("maps"), outputs_of("maps", 1)
        batch = batch_of("maps")
        leaves = [one.clone().requires_grad_() for one in (outputs, head)]
        module = SupervisedModule(Table(outputs, [head]), auxiliary_weight=0.4, **options_of("maps"))
        hard, auxiliary = (hard_by_hand("maps", leaf, rows_by_hand("maps", batch)) for leaf in leaves)
        pairs = [*zip((module.student.outputs, module.student.heads[0]), leaves, strict=True)]
        assert_equal(module, batch, pairs, {"hard": (1.0, *hard), "auxiliary_hard": (0.4, *auxiliary)})

    def test_labels_of_torchvision_have_a_dimension_of_size_one(self):
        batch = batch_of("maps")
        module = SupervisedModule(Table(outputs_of("maps")), **options_of("maps"))
        expected, counts = module.training_step(batch, 0), module.count_rows(batch)
        batch.y = batch.y.unsqueeze(1)
        assert torch.equal(module.training_step(batch, 0), expected)
        assert module.count_rows(batch) == counts

    def test_attention_mask_of_the_inputs(self):
        batch, masks = batch_of("tokens"), mask_of("tokens")

        class Network(Table):
            def forward(self, number, attention_mask):
                return super().forward(number)

        expected = SupervisedModule(Table(outputs_of("tokens")), **options_of("tokens")).training_step(batch, 0)
        mapping = Batch({"number": batch.x, "attention_mask": masks.long()}, batch.y)
        found = SupervisedModule(Network(outputs_of("tokens")), **options_of("tokens")).training_step(mapping, 0)
        assert torch.equal(found, expected)


class TestSoftTerms:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_distill(self, form, masked):
        outputs, taught, batch = outputs_of(form), outputs_of(form, 1), batch_of(form, masked)
        leaf = outputs.clone().requires_grad_()
        module = DistillModule(Table(outputs), Table(taught), soft_weight=0.3, **options_of(form))
        rows = rows_by_hand(form, batch)
        hard, soft = hard_by_hand(form, leaf, rows), soft_by_hand(form, leaf, at(form, taught), rows)
        unlabeled = H * W if FORMS[form][1] == 1 else T
        assert sum(label is None for *_, label in rows) >= unlabeled - 2 - FORMS[form][2]
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (0.7, *hard), "soft": (0.3, *soft)})

    @pytest.mark.parametrize("form", ["maps", "causal", "multilabel tokens", "regression maps"])
    def test_without_any_label(self, form):
        outputs, taught, batch = outputs_of(form), outputs_of(form, 1), batch_of(form)
        batch.y = None
        leaf = outputs.clone().requires_grad_()
        module = DistillModule(Table(outputs), Table(taught), soft_weight=0.3, **options_of(form))
        unlabeled = Batch(batch.x, labels_of(form).fill_(NAN if labels_of(form).is_floating_point() else -100))
        unlabeled.mask = batch.mask
        for one in (batch, unlabeled):
            soft = soft_by_hand(form, leaf, at(form, taught), rows_by_hand(form, unlabeled))
            assert_equal(module, one, [(module.student.outputs, leaf)], {"soft": (0.3, *soft)})

    @pytest.mark.parametrize("form", ["maps", "regression maps", "causal"])
    @pytest.mark.parametrize("task_loss", [None, "torch"])
    def test_no_position_counts(self, form, task_loss):
        """The mean of nothing is 0, not NaN, and has a gradient of 0."""
        batch = batch_of(form)
        batch.mask = torch.zeros_like(batch.mask)
        loss = None if task_loss is None else nn.MSELoss()
        module = DistillModule(Table(outputs_of(form)), Table(outputs_of(form, 1)), soft_loss=loss, **options_of(form))
        value = module.training_step(batch, 0)
        value.backward()
        assert value.item() == 0
        assert module.student.outputs.grad.abs().max() == 0

    @pytest.mark.parametrize("mutual", [False, True])
    @pytest.mark.parametrize("form", ["maps", "causal", "binary maps", "regression maps"])
    def test_apprentice(self, form, mutual):
        outputs, taught, head, batch = (*(outputs_of(form, n) for n in range(3)), batch_of(form))
        leaves = [one.clone().requires_grad_() for one in (outputs, taught, head)]
        module = ApprenticeModule(
            Table(outputs),
            Table(taught, [head]),
            teacher_weight=0.6,
            soft_weight=0.3,
            auxiliary_weight=0.4,
            mutual=mutual,
            **options_of(form),
        )
        rows = rows_by_hand(form, batch)
        terms = {
            "hard": (0.7, *hard_by_hand(form, leaves[0], rows)),
            "soft": (0.3, *soft_by_hand(form, leaves[0], at(form, taught), rows, 1.0)),
            "teacher_hard": (0.6, *hard_by_hand(form, leaves[1], rows)),
            "teacher_auxiliary_hard": (0.24, *hard_by_hand(form, leaves[2], rows)),
        }
        if mutual:
            terms["teacher_soft"] = (0.18, *soft_by_hand(form, leaves[1], at(form, outputs), rows, 1.0))
        networks = module.student.outputs, module.teacher.outputs, module.teacher.heads[0]
        assert_equal(module, batch, [*zip(networks, leaves, strict=True)], terms)

    def test_tokens_as_trl_averages_them(self):
        """Its GKD at beta 0: the KL of each token whose label is not -100, summed, over their number."""
        student, taught, batch = outputs_of("causal"), outputs_of("causal", 1), batch_of("causal")
        batch.y[2:] = torch.tensor([[0, 1, 2, 0, -100, -100], [-100, -100, 1, 1, 0, -100]])
        batch.mask[2:] = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
        batch.mask[:2] = True
        module = DistillModule(
            Table(student), Table(taught), soft_weight=1.0, soft_loss=KDLoss(1.0), **options_of("causal")
        )
        logs, of_teacher = (one[:, :-1].log_softmax(-1) for one in (student, taught))
        each = torch.nn.functional.kl_div(logs, of_teacher, reduction="none", log_target=True)
        counted = batch.y[:, 1:] != -100
        expected = each[counted].sum() / counted.sum()
        assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-12)

    def test_torchs_losses_of_two_arguments(self):
        outputs, taught, batch = outputs_of("maps"), outputs_of("maps", 1), batch_of("maps")
        leaf, rows = outputs.clone().requires_grad_(), rows_by_hand("maps", batch)
        module = DistillModule(
            Table(outputs), Table(taught), soft_weight=1.0, soft_loss=nn.SmoothL1Loss(), **options_of("maps")
        )
        total = leaf.sum() * 0
        for sample, place, _ in rows:
            gap = (output_at("maps", leaf, sample, place) - output_at("maps", taught, sample, place)).abs()
            total = total + torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"soft": (1.0, total, len(rows))})

    def test_losses_of_a_projects_own(self):
        """They get rows, with the labels; a loss of outputs without class_dim may have shapes of its own."""
        seen = []

        class Dice(nn.Module):
            reduction = "mean"

            def forward(self, logits, y):
                seen.append([*logits.shape, *y.shape])
                return logits.sigmoid().mean() - y.mean()

        class Gap(nn.Module):
            def forward(self, student, teacher, y):
                seen.append([*student.shape, *teacher.shape])
                return student.mean() - teacher.mean()

        x, y = torch.zeros(2, 1), torch.tensor([[[[0.0, 1.0]]], [[[1.0, 1.0]]]])  # (B, 1, 1, 2)
        student, teacher = Table(random(2, 1, 1, 2)), Table(random(2, 5, 4))
        module = DistillModule(
            student, teacher, task="binary", hard_loss=Dice(), soft_loss=Gap(), soft_weight=0.5, optimizer=None
        )
        x[1] = 1
        loss = module.training_step((x, y), 0)
        expected = (student.outputs.sigmoid().mean() - 0.75 + student.outputs.mean() - teacher.outputs.mean()) / 2
        assert loss.item() == pytest.approx(expected.item())
        assert seen == [[2, 1, 1, 2, 2, 1, 1, 2], [2, 1, 1, 2, 2, 5, 4]]


def pooled(task, tables, weights, temperature):
    """The outputs of several teachers at a row, combined by hand: their logits at a temperature, or values."""

    def combine(outputs, w):
        if task == "regression":
            return sum(k * z for k, z in zip(w, outputs, strict=True))
        q = sum(k * soften(task, z, temperature) for k, z in zip(w, outputs, strict=True))
        return temperature * (q.log() if task == "multiclass" else (q / (1 - q)).log())

    return lambda number, sample, place: combine([one(number, sample, place) for one in tables], weights(number))


class TestEnsemble:
    @pytest.mark.parametrize("given", [None, [1.0, 3.0]])
    @pytest.mark.parametrize("use_vmap", [False, True])
    @pytest.mark.parametrize(
        "form", ["maps", "causal", "binary tokens", "multilabel maps", "regression maps", "regression tokens"]
    )
    def test_average(self, form, use_vmap, given):
        outputs, taught, batch = outputs_of(form), [outputs_of(form, n) for n in (1, 2)], batch_of(form)
        leaf, task = outputs.clone().requires_grad_(), FORMS[form][0]
        module = EnsembleDistillModule(
            Table(outputs),
            [Table(one) for one in taught],
            teacher_weights=given,
            use_vmap=use_vmap,
            soft_weight=0.3,
            **options_of(form),
        )
        rows, shares = rows_by_hand(form, batch), [w / 4 for w in given or [2.0, 2.0]]
        combined = pooled(task, [at(form, one) for one in taught], lambda number: shares, 4.0)
        hard, soft = hard_by_hand(form, leaf, rows), soft_by_hand(form, leaf, combined, rows)
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"hard": (0.7, *hard), "soft": (0.3, *soft)})

    @pytest.mark.parametrize("form", ["maps", "causal", "binary maps"])
    def test_confidence_of_each_position(self, form):
        outputs, taught, batch = outputs_of(form), [outputs_of(form, n) for n in (1, 2, 3)], batch_of(form)
        leaf, task, rows = outputs.clone().requires_grad_(), FORMS[form][0], rows_by_hand(form, batch)
        shares = []
        for sample, place, label in rows:
            if label is None:
                shares.append([1 / 3] * 3)
                continue
            right = [soften(task, output_at(form, one, sample, place)) for one in taught]
            right = [p[int(label)] if task == "multiclass" else (p[0] if label else 1 - p[0]) for p in right]
            doubt = torch.stack([1 / p for p in right])  # exp of the cross-entropy
            shares.append(((1 - doubt / doubt.sum()) / 2).tolist())
        combined = pooled(task, [at(form, one) for one in taught], lambda number: shares[number], 4.0)
        module = EnsembleDistillModule(
            Table(outputs),
            [Table(one) for one in taught],
            teacher_weights="confidence",
            soft_weight=1.0,
            **options_of(form),
        )
        soft = soft_by_hand(form, leaf, combined, rows)
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"soft": (1.0, *soft)})

    @pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
    @pytest.mark.parametrize(
        ("form", "other_order"),
        [("maps", False), ("maps", True), ("causal", False), ("regression maps", False), ("binary maps", False)],
    )
    def test_relabel_gives_a_sample_one_teacher(self, form, other_order, weights):
        outputs, taught, batch = outputs_of(form), [outputs_of(form, n) for n in (1, 2)], batch_of(form)
        batch.view = torch.tensor([1, 0, 3, 1])
        leaf, rows = outputs.clone().requires_grad_(), rows_by_hand(form, batch)
        teachers = [Table(one) for one in taught]
        if other_order:  # the second one has the classes in another order, and one that the student has not
            order = [2, None, 0, 1]
            columns = torch.stack([random(B, H, W) if c is None else taught[1][:, c] for c in order], dim=1)
            teachers[1] = Teacher(Table(columns), classes=order)
        module = EnsembleDistillModule(
            Table(outputs), teachers, "relabel", teacher_weights=weights, soft_weight=1.0, **options_of(form)
        )
        shares = [1.0, 1.0] if weights is None else [0.5, 1.5]
        total = leaf.sum() * 0
        for row in rows:
            teacher = int(batch.view[row[0]]) % 2
            total = total + shares[teacher] * soft_by_hand(form, leaf, at(form, taught[teacher]), [row])[0]
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"soft": (1.0, total, len(rows))})

    @pytest.mark.parametrize("classes", [[0, 1], [1, 2]])
    def test_a_class_that_one_teacher_does_not_know(self, classes):
        """It is averaged over those that do, at each position; also where that teacher is sampled."""
        outputs, taught, batch = outputs_of("maps"), [outputs_of("maps", 1), outputs_of("maps", 2)], batch_of("maps")
        batch.view = torch.tensor([0, 1, 1, 1])
        few = Teacher(Table(taught[1][:, classes]), classes=classes)
        rows = rows_by_hand("maps", batch)

        def combine(number, sample, place, w):
            p = soften("multiclass", output_at("maps", taught[0], sample, place), 4.0)
            q = torch.zeros(C, dtype=torch.float64)
            q[classes] = soften("multiclass", output_at("maps", taught[1], sample, place)[classes], 4.0)
            known = torch.zeros(C, dtype=torch.float64)
            known[classes] = 1.0
            shares = torch.tensor([[w[0]] * C, (w[1] * known).tolist()], dtype=torch.float64)
            shares = torch.where(shares.sum(0) > 0, shares, torch.stack([torch.ones(C), known]).double() / 2)
            mixed = (shares[0] * p + shares[1] * q) / shares.sum(0)
            return 4.0 * (mixed / mixed.sum()).log()

        for strategy in ("average", "relabel"):
            leaf = outputs.clone().requires_grad_()
            module = EnsembleDistillModule(
                Table(outputs), [Table(taught[0]), few], strategy, soft_weight=1.0, **options_of("maps")
            )

            def shares(number, sample, place, strategy=strategy):
                w = [0.5, 0.5] if strategy == "average" else [[1.0, 0.0], [0.0, 1.0]][int(batch.view[sample])]
                return combine(number, sample, place, w)

            soft = soft_by_hand("maps", leaf, shares, rows)
            assert_equal(module, batch, [(module.student.outputs, leaf)], {"soft": (1.0, *soft)})

    @pytest.mark.parametrize("form", ["maps", "regression maps", "binary tokens"])
    def test_metrics_of_each_teacher(self, form, quiet_trainer):
        taught, batch = [outputs_of(form, n) for n in (1, 2)], batch_of(form)
        module = EnsembleDistillModule(Table(outputs_of(form)), [Table(one) for one in taught], **options_of(form))
        trainer = quiet_trainer()
        trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)
        found, rows = trainer.callback_metrics, rows_by_hand(form, batch)
        labeled = [(s, p, label) for s, p, label in rows if label is not None]
        for number, one in enumerate(taught):
            if form == "regression maps":
                gaps = [
                    float(out - entry)
                    for s, p, label in labeled
                    for out, entry in zip(output_at(form, one, s, p), label, strict=True)
                    if entry is not None
                ]
                assert found[f"val/teacher_{number}_mae"] == pytest.approx(sum(map(abs, gaps)) / len(gaps))
                rmse = (sum(gap**2 for gap in gaps) / len(gaps)) ** 0.5
                assert found[f"val/teacher_{number}_rmse"] == pytest.approx(rmse)
                pairs = [output_at(form, one, s, p) - output_at(form, outputs_of(form), s, p) for s, p, _ in rows]
                difference = torch.stack(pairs).square().mean().sqrt()
                assert found[f"val/teacher_{number}_difference"] == pytest.approx(difference.item())
                continue
            kind = "argmax" if form == "maps" else "sign"
            decide = (lambda z: int(z.argmax())) if kind == "argmax" else (lambda z: int(z[0] > 0))
            right = [decide(output_at(form, one, s, p)) == label for s, p, label in labeled]
            assert found[f"val/teacher_{number}_accuracy"] == pytest.approx(sum(right) / len(right))


class TestPseudoLabels:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("ema", [None, 0.9])
    @pytest.mark.parametrize("views", [1, 2])
    @pytest.mark.parametrize("threshold", [None, 0.7])
    @pytest.mark.parametrize("form", ["maps", "tokens", "causal"])
    def test_by_hand(self, form, threshold, views, ema, masked):
        """Weak and strong view are two rows of the table; positions of unlabeled samples alone have pseudo-labels."""
        both = torch.cat([outputs_of(form), outputs_of(form, 5)])
        batch = batch_of(form, masked)
        if views == 2:
            batch.x_strong = batch.x.clone()
            batch.x_strong[:, 0] += B
        module = PseudoLabelModule(
            Table(both), 0.7, selection=threshold and FixedThreshold(threshold), ema_decay=ema, **options_of(form)
        )
        leaf, rows = both.clone().requires_grad_(), rows_by_hand(form, batch)
        total, accepted, unlabeled = leaf.sum() * 0, 0, [row for row in rows if row[2] is None]
        for sample, place, _ in unlabeled:
            p = soften("multiclass", output_at(form, both, sample, place))
            if threshold is None or p.max() >= threshold:
                strong = output_at(form, leaf, sample + B * (views - 1), place)
                total, accepted = total - log_softmax(strong)[int(p.argmax())], accepted + 1
        assert unlabeled
        assert accepted == len(unlabeled) if threshold is None else 0 < accepted < len(unlabeled)
        hard = hard_by_hand(form, leaf, rows)
        terms = {"hard": (1.0, *hard), "unsupervised": (0.7, total, len(unlabeled))}
        assert_equal(module, batch, [(module.student.outputs, leaf)], terms)

    @pytest.mark.parametrize("y", [None, -100, 1], ids=["no labels", "none known", "all known"])
    def test_one_kind_of_samples_alone(self, y):
        both, batch = outputs_of("maps"), batch_of("maps")
        batch.y = None if y is None else torch.full_like(batch.y, y)
        by_hand = Batch(batch.x, torch.full((B, H, W), -100 if y is None else y), mask=batch.mask)
        module = PseudoLabelModule(Table(both), ema_decay=0.9, **options_of("maps"))
        leaf, rows = both.clone().requires_grad_(), rows_by_hand("maps", by_hand)
        total = leaf.sum() * 0
        for sample, place, label in rows:
            z = output_at("maps", leaf, sample, place)
            total = total - log_softmax(z)[int(z.argmax()) if label is None else label]
        assert_equal(module, batch, [(module.student.outputs, leaf)], {"the only": (1.0, total, len(rows))})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"pseudo_labels": "refreshed"},
                "pseudo_labels: refreshed is for one pseudo-label a sample, got class_dim: 1",
            ),
            ({"selection": FlexMatch(0.9)}, "FlexMatch is for one pseudo-label a sample, got class_dim: 1"),
            ({"task": "regression"}, "online pseudo-labels are for classes"),
        ],
    )
    def test_what_is_refused(self, arguments, message):
        with pytest.raises(InputError, match=message):
            PseudoLabelModule(Table(outputs_of("maps")), class_dim=1, **arguments)

    def test_strong_views_of_other_positions(self):
        """Another size, another number of tokens, and geometry that each view draws for itself."""
        batch = batch_of("maps")
        batch.x_strong = batch.x[:, :1]
        with pytest.raises(InputError, match=r"x_strong must have the positions of x, got \[4, 1\] and \[4, 2\]"):
            PseudoLabelModule(Table(outputs_of("maps")), class_dim=1).training_step(batch, 0)
        ids, ones = torch.zeros(2, 3), torch.ones(2, 3)
        shorter = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
        text = Batch({"input_ids": ids, "attention_mask": ones}, x_strong={"input_ids": ids, "attention_mask": shorter})
        with pytest.raises(InputError, match="x_strong must have the positions of x, got another attention_mask"):
            PseudoLabelModule(Table(outputs_of("tokens")), class_dim=-1).training_step(text, 0)

    @pytest.mark.parametrize("strong", [None, transforms.RandomHorizontalFlip()])
    def test_datamodule_whose_visible_labels_name_no_classes(self, strong, quiet_trainer):
        """Samples with dense labels have the label 0 there."""

        class Data(LightningDataModule):
            strong_transform = strong

            def train_dataloader(self):
                return DataLoader([batch_of("maps")], batch_size=None)

            def visible_labels(self):
                return torch.tensor([0, 0, -100, -100])

            def unlabeled_indices(self):
                return [2, 3]

        module = PseudoLabelModule(Heads(outputs_of("maps")), class_dim=1)
        refused = pytest.raises(InputError, match="strong_transform: RandomHorizontalFlip") if strong else nullcontext()
        with refused:
            quiet_trainer().fit(module, datamodule=Data())

    @pytest.mark.parametrize(
        ("weak", "strong", "name"),
        [
            (transforms.RandomHorizontalFlip(), nn.Identity(), "train_transform: RandomHorizontalFlip"),
            (None, transforms.Compose([transforms.RandomCrop(4)]), "strong_transform: RandomCrop"),
            (None, v2.Compose([v2.ColorJitter(), v2.RandomResizedCrop(4)]), "strong_transform: RandomResizedCrop"),
            (v2.Resize(4), v2.Compose([v2.Resize(4), v2.ColorJitter()]), None),
            (v2.Resize(4), transforms.Compose([v2.Resize(4), transforms.ColorJitter(0.4)]), None),
            (transforms.RandomHorizontalFlip(), None, None),  # there is one view
        ],
    )
    def test_geometry_of_each_view(self, weak, strong, name):
        data = SimpleNamespace(train_transform=weak, strong_transform=strong)
        refused = pytest.raises(InputError, match=f"{name} moves pixels at random") if name else nullcontext()
        with refused:
            check_strong_transform(data)

    def test_strong_views_of_dense_labels_follow_any_weak_view(self):
        """The datamodule makes them from the weak views."""
        samples = SimpleNamespace(dense=True)
        data = SimpleNamespace(train_transform=transforms.RandomHorizontalFlip(), strong_transform=nn.Identity())
        with pytest.raises(InputError, match="train_transform: RandomHorizontalFlip moves"):
            check_strong_transform(data)
        data.samples = samples
        check_strong_transform(data)
        data.strong_transform = transforms.RandomHorizontalFlip()
        with pytest.raises(InputError, match="strong_transform: RandomHorizontalFlip moves"):
            check_strong_transform(data)


class Tokens(nn.Module):
    """Features (B, T, D) and logits (B, T, C) of padded tokens."""

    def __init__(self, width, seed, pooled=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden, self.head = nn.Embedding(9, width), nn.Linear(width, width), nn.Linear(width, C)
        self.pooled = pooled
        self.double()

    def forward(self, input_ids, attention_mask):
        z = self.hidden(self.embed(input_ids)).tanh()
        z = self.head(z)
        return (z * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True) if self.pooled else z


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 1, 2, 0, 0], [3, 3, 3, 1, 0]])
REAL = (IDS != 0).long()
TARGETS = torch.where(IDS != 0, (IDS * 7) % C, -100)
TARGETS[2] = -100


def text_batch(rows=slice(None), length=None):
    ids, real, targets = IDS[rows], REAL[rows], TARGETS[rows]
    length = int(real.sum(1).max()) if length is None else length
    pad = [torch.zeros(len(ids), max(length - 5, 0), dtype=torch.long) + fill for fill in (2, 0, -100)]
    ids, real, targets = (
        torch.cat([one, more], 1)[:, :length] for one, more in zip((ids, real, targets), pad, strict=True)
    )
    return Batch({"input_ids": ids, "attention_mask": real}, targets)


class TestHints:
    @pytest.mark.parametrize("joint", [False, True])
    @pytest.mark.parametrize("pooled", [False, True])
    def test_padded_tokens_do_not_count(self, pooled, joint):
        """By hand, and to rounding for each length of padding: loss, gradient, and the mean of validation."""
        student, teacher = Tokens(4, 0, pooled), Tokens(6, 1, pooled)
        dense = {} if pooled else {"class_dim": -1}
        projector = nn.Conv1d(4, 6, 1).double()  # tokens have their channels first
        module = HintModule(
            student,
            teacher,
            {"hidden": "hidden"},
            0 if joint else 1,
            hint_weight=0.5 if joint else 0.0,
            projectors={"hidden": projector},
            **dense,
        )
        found = []
        for length in (5, 6, 9):
            batch = text_batch(length=length)
            if pooled:
                batch.y = torch.tensor([0, 1, -100, 2])
            loss = module.training_step(batch, 0)
            found.append((loss, torch.autograd.grad(loss, [*student.embed.parameters(), *projector.parameters()])))
        for loss, gradient in found[1:]:
            assert loss.item() == pytest.approx(found[0][0].item(), rel=1e-12)
            for one, other in zip(gradient, found[0][1], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        expected = 0.0
        for sample in range(4):
            for token in range(int(REAL[sample].sum())):
                mine, hint = (net.hidden(net.embed(IDS[sample, token])) for net in (student, teacher))
                expected += float((projector(mine[:, None])[:, 0] - hint).square().sum()) / 2 / 4
        batch = text_batch()
        batch.y = torch.tensor([0, 1, -100, 2]) if pooled else batch.y
        terms = module.losses(batch)
        assert terms["hint"].value.item() == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("length", [5, 8])
    def test_built_projectors_and_the_hint_of_validation(self, quiet_trainer, length):
        student, teacher = Tokens(4, 0), Tokens(6, 1)
        module = HintModule(student, teacher, {"hidden": "hidden"}, 0, hint_weight=0.1, class_dim=-1)
        module.optimizer = partial(torch.optim.SGD, lr=0.0)
        trainer = quiet_trainer()
        trainer.fit(module, *(DataLoader([text_batch(length=length)], batch_size=None) for _ in range(2)))
        projector = module.features["hint"].pairs[0].projector.double()
        expected = 0.0
        for ids in IDS:
            mine, hint = (net.hidden(net.embed(ids[ids != 0])) for net in (student, teacher))
            expected += float((projector(mine.T[None], (len(hint),))[0] - hint.T).square().sum()) / 2 / 4
        for name in ("val/hint", "train/hint"):
            assert trainer.callback_metrics[name].item() == pytest.approx(expected, rel=1e-5)

    def test_means_of_joint_hints_are_over_samples(self, quiet_trainer):
        """Batches of other lengths have other numbers of positions."""
        hints = {"hidden": "hidden", "embed": "embed"}
        module = HintModule(Tokens(4, 0), Tokens(6, 1), hints, 0, hint_weight=0.1, class_dim=-1)
        module.optimizer = partial(torch.optim.SGD, lr=0.0)
        trainer = quiet_trainer()
        trainer.fit(module, DataLoader([text_batch([0, 1]), text_batch([1, 2])], batch_size=None))
        means = trainer.callback_metrics
        pairs = [means[f"train/hint/{layer}"].item() for layer in hints]
        assert min(pairs) > 0 and means["train/hint"].item() == pytest.approx(sum(pairs), rel=1e-6)

    @pytest.mark.parametrize("layout", ["map", "own"])
    def test_maps_with_the_positions_of_the_mask(self, layout):
        """Masked pixels of maps (B, C, H, W) do not count either."""
        pair = FeaturePair("a", "b", nn.Identity() if layout == "own" else None, True, None)
        pair.build(([2, H, W], [2, H, W]), ("first", "first"), torch.device("cpu"), torch.float64)
        guided, hint = random(B, 2, H, W), random(B, 2, H, W, seed=1)
        mask = mask_of("maps")
        projected, target = pair(guided, hint, mask)
        assert (projected[~mask.unsqueeze(1).expand_as(projected)] == 0).all()
        assert torch.equal(target, hint * mask.unsqueeze(1))

    def test_features_of_another_resolution_are_reported_once(self):
        pair = FeaturePair("a", "b", nn.Identity(), True, None)
        pair.build(([2, 1, 1], [2, 1, 1]), ("first", "first"), torch.device("cpu"), torch.float64)
        feature = random(B, 2, 1, 1)
        with pytest.warns(
            UserWarning, match=r"padded positions count in that of a, .* positions \[1, 1\], .* \[2, 3\]"
        ):
            pair(feature, feature, mask_of("maps"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pair(feature, feature, mask_of("maps"))


class Counted(DataLoader):
    """A plain loader that gives dense_means, as the datamodule's does."""

    trainer = None

    def __iter__(self):
        return with_dense_means(super().__iter__(), self.trainer, 0, len(self))


def part(batch, rows):
    return batch.select(torch.tensor(rows))


WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64))
STEPS = {
    "supervised": lambda net, form: SupervisedModule(net(0), **options_of(form)),
    "class weights": lambda net, form: SupervisedModule(net(0), hard_loss=WEIGHTED, **options_of(form)),
    "distill": lambda net, form: DistillModule(net(0), net(1), soft_weight=0.3, **options_of(form)),
    "distill, class weights": lambda net, form: DistillModule(net(0), net(1), hard_loss=WEIGHTED, **options_of(form)),
    "apprentice": lambda net, form: ApprenticeModule(net(0), net(1), mutual=True, **options_of(form)),
    "ensemble": lambda net, form: EnsembleDistillModule(net(0), [net(1), net(2)], **options_of(form)),
    "relabel": lambda net, form: EnsembleDistillModule(
        net(0), [net(1), net(2)], "relabel", teacher_weights=[1, 3], **options_of(form)
    ),
    "pseudo-labels": lambda net, form: PseudoLabelModule(
        net(0), 0.7, selection=FixedThreshold(0.6), **options_of(form)
    ),
}


class TestSteps:
    """Accumulated batches of different lengths are one big batch."""

    @pytest.mark.parametrize("form", ["maps", "causal"])
    @pytest.mark.parametrize("name", STEPS)
    def test_accumulated_batches(self, name, form, quiet_trainer):
        """After one optimiser step, weights are the same; so are the means that are logged."""
        whole = batch_of(form, view=torch.arange(B))
        found = []
        for parts in ([[0, 1, 2, 3]], [[0], [1, 2, 3]], [[1, 3], [2], [0]]):
            batches = [part(whole, rows) for rows in parts]
            if form == "causal" and len(parts) > 1:  # a batch alone may be shorter
                batches = [shortened(batch) for batch in batches]
            found.append(fit(name, form, batches, quiet_trainer(accumulate_grad_batches=len(parts))))
        (big, means), *others = found
        assert (big - outputs_of(form)).abs().max() > 1e-3
        for weights, logged in others:
            torch.testing.assert_close(weights, big, rtol=1e-6, atol=1e-9)
            assert logged == pytest.approx(means, rel=1e-5, abs=1e-7)

    def test_without_the_numbers_it_is_said_once(self, quiet_trainer):
        module = DistillModule(Heads(outputs_of("maps")), Table(outputs_of("maps", 1)), class_dim=1)
        loader = DataLoader([batch_of("maps")] * 4, batch_size=None)
        with pytest.warns(UserWarning, match="accumulate_grad_batches: .* each batch's mean counts the same") as said:
            quiet_trainer(accumulate_grad_batches=2).fit(module, loader)
        assert sum("accumulate_grad_batches" in str(one.message) for one in said) == 1

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_batch_alone_needs_no_numbers(self, quiet_trainer, accumulate):
        module = DistillModule(Heads(outputs_of("maps")), Table(outputs_of("maps", 1)), class_dim=1)
        loader = DataLoader([batch_of("maps")] * 4, batch_size=None)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            quiet_trainer(accumulate_grad_batches=accumulate).fit(module, loader)
        assert any("dense_means" in str(one.message) for one in said) == (accumulate == 2)

    @pytest.mark.parametrize("form", FORMS)
    def test_counts_are_those_of_the_rows(self, form):
        for masked in (False, True):
            batch = batch_of(form, masked)
            module = SupervisedModule(Table(outputs_of(form)), **options_of(form))
            rows = rows_by_hand(form, batch)
            labels = hard_by_hand(form, outputs_of(form), rows)[1]
            assert module.count_rows(batch) == (labels, len(rows))

    def test_sums_of_class_weights(self):
        module = SupervisedModule(Table(outputs_of("maps")), hard_loss=WEIGHTED, class_dim=1)
        batch = batch_of("maps")
        labels = [label for *_, label in rows_by_hand("maps", batch) if label is not None]
        assert module.count_rows(batch)[2] == pytest.approx(sum([0.2, 3.0, 1.0][label] for label in labels))


class Heads(Table):
    """A table whose rows are as long as the inputs."""

    def forward(self, x):
        z = super().forward(x)
        return z if x.shape[1] == 2 else z[:, : x.shape[1]]


def shortened(batch):
    """A causal batch without the columns that are padding in all of its samples."""
    length = int(batch.mask.sum(1).max())
    x = batch.x[:, :1].expand(-1, length).clone() if length > 2 else batch.x
    return Batch(x, batch.y[:, :length], mask=batch.mask[:, :length], view=batch.view)


SCRIPT = """
import sys
from functools import partial
import torch
from lightning.pytorch import Trainer
sys.path.insert(0, sys.argv[1])
import test_dense as dense
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
found = {}
for form in ("maps", "causal"):
    for name in dense.STEPS:
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_epochs=1,
            accumulate_grad_batches=2, use_distributed_sampler=False, num_sanity_val_steps=0, **quiet
        )
        whole = dense.batch_of(form, view=torch.arange(dense.B))
        batches = [dense.part(whole, rows) for rows in [[[0], [1]], [[3], [2]]][trainer.global_rank]]
        batches = [dense.shortened(batch) for batch in batches] if form == "causal" else batches
        found[name, form, "accumulated"] = dense.fit(name, form, batches, trainer)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_epochs=1,
            use_distributed_sampler=False, num_sanity_val_steps=0, **quiet
        )
        batches = [dense.part(whole, [[0], [3, 1, 2]][trainer.global_rank])]
        found[name, form, "plain loader"] = dense.fit(name, form, batches, trainer, dense.DataLoader)
if trainer.is_global_zero:
    torch.save(found, "found.pt")
"""


def fit(name, form, batches, trainer, kind=Counted):
    """Train for one optimiser step, and return the student's outputs and the means of the terms."""
    module = STEPS[name](lambda seed: Heads(outputs_of(form, seed)), form)
    module.optimizer = partial(torch.optim.SGD, lr=0.5)
    loader = kind(batches, batch_size=None)
    loader.trainer = trainer
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dense_means.*")
        trainer.fit(module, loader)
    means = trainer.callback_metrics.items()
    return module.student.outputs.detach(), {k: float(v) for k, v in means if k != "train/loss_step"}


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_that_accumulate_equal_one_batch(tmp_path, quiet_trainer, monkeypatch, processes):
    """Each method, with two batches of each process, all of different lengths."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(SCRIPT)
    processes.run_ranks(["run.py", str(Path(__file__).parent)])
    for (name, form, kind), (outputs, means) in torch.load(tmp_path / "found.pt").items():
        one, expected = fit(name, form, [batch_of(form, view=torch.arange(B))], quiet_trainer())
        torch.testing.assert_close(outputs, one, rtol=1e-6, atol=1e-8, msg=f"{name}, {form}, {kind}")
        assert means == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, form, kind)


class TestMetrics:
    def validate(self, module, batches, trainer):
        trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
        return trainer.callback_metrics

    @pytest.mark.parametrize("form", ["maps", "tokens", "causal", "binary maps"])
    def test_of_torchmetrics(self, form, quiet_trainer):
        """Void and masked positions do not count; several batches are one."""
        z, batch = outputs_of(form), batch_of(form)
        found = self.validate(
            DistillModule(Table(z), Table(outputs_of(form, 1)), **options_of(form)),
            [part(batch, [0, 2]), part(batch, [1, 3])],
            quiet_trainer(),
        )
        rows = [row for row in rows_by_hand(form, batch) if row[2] is not None]
        outputs = torch.stack([output_at(form, z, s, p) for s, p, _ in rows])
        y = torch.tensor([label for *_, label in rows])
        if form == "binary maps":
            iou, accuracy = BinaryJaccardIndex(), BinaryAccuracy()
            outputs = outputs.flatten()
        else:
            iou, accuracy = MulticlassJaccardIndex(C), MulticlassAccuracy(C, average="micro")
        assert found["val/mean_iou"] == pytest.approx(iou(outputs, y).item())
        assert found["val/accuracy"] == pytest.approx(accuracy(outputs, y).item())
        guess = (outputs > 0).long() if form == "binary maps" else outputs.argmax(dim=1)
        assert found["val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess), rel=1e-6)
        for number, recall in enumerate(recall_score(y, guess, average=None, labels=y.unique())):
            assert found[f"val/recall_{y.unique()[number]}"] == pytest.approx(recall, rel=1e-6)
        total, count = hard_by_hand(form, z, rows)
        assert found["val/loss"] == pytest.approx(float(total) / count)
        every = rows_by_hand(form, batch)
        total, count = soft_by_hand(form, z, at(form, outputs_of(form, 1)), every, 1.0)
        assert found["val/teacher_kl"] == pytest.approx(float(total) / count)

    @pytest.mark.parametrize("form", ["regression maps", "regression tokens"])
    def test_of_regression(self, form, quiet_trainer):
        """Of targets that are missing in part: R2 of each output over the targets that it has."""
        z, batch = outputs_of(form), batch_of(form)
        found = self.validate(
            SupervisedModule(Table(z), **options_of(form)),
            [part(batch, [0, 2]), part(batch, [1, 3])],
            quiet_trainer(),
        )
        rows = [row for row in rows_by_hand(form, batch) if row[2] is not None]
        pairs = [
            [
                (out.item(), label[c])
                for out, label in ((output_at(form, z, s, p)[c], e) for s, p, e in rows)
                if label[c] is not None
            ]
            for c in range(C)
        ]
        scores = []
        for c in range(C):
            values, targets = torch.tensor(pairs[c], dtype=torch.float64).T
            scores.append(R2Score()(values, targets).item())
        values, targets = torch.tensor([pair for column in pairs for pair in column], dtype=torch.float64).T
        assert len({len(column) for column in pairs}) > 1
        assert found["val/r2"] == pytest.approx(sum(scores) / C, rel=1e-5)
        assert found["val/mae"] == pytest.approx(MeanAbsoluteError()(values, targets).item(), rel=1e-5)
        assert found["val/rmse"] == pytest.approx(MeanSquaredError(squared=False)(values, targets).item(), rel=1e-5)

    def test_metrics_of_a_projects_own(self, quiet_trainer):
        class Own(SupervisedModule):
            def configure_metrics(self):
                return {"top": MulticlassAccuracy(C, average="micro"), "iou": MulticlassJaccardIndex(C)}

        z, batch = outputs_of("maps"), batch_of("maps")
        found = self.validate(Own(Table(z), **options_of("maps")), [batch], quiet_trainer())
        rows = [row for row in rows_by_hand("maps", batch) if row[2] is not None]
        outputs = torch.stack([output_at("maps", z, s, p) for s, p, _ in rows])
        y = torch.tensor([label for *_, label in rows])
        assert found["val/top"] == pytest.approx(MulticlassAccuracy(C, average="micro")(outputs, y).item())
        assert found["val/iou"] == pytest.approx(MulticlassJaccardIndex(C)(outputs, y).item())
        assert "val/accuracy" not in found


def test_low_precision_is_close(quiet_trainer):
    """bf16-mixed: losses are computed in float32, whatever the outputs are."""

    class Net(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, C, 1)

        def forward(self, x):
            return self.last(self.first(x).relu())

    x, y = random(B, 1, H, W).float(), labels_of("maps")
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = DistillModule(Net(0), Net(1), class_dim=1, optimizer=partial(torch.optim.SGD, lr=0.0))
        trainer = quiet_trainer(precision=precision)
        trainer.fit(module, DataLoader([Batch(x, y, mask=mask_of("maps"))], batch_size=None))
        found.append([trainer.callback_metrics[f"train/{name}"].item() for name in ("hard", "soft")])
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] != found[1]


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


class TestWrongLabels:
    """Labels of language models that a network would learn to copy, or that would be shifted twice."""

    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 2, 1, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])

    def step(self, y, causal, x=None):
        x = {"input_ids": self.ids, "attention_mask": self.mask} if x is None else x
        return SupervisedModule(Language(), class_dim=-1, causal=causal).training_step(Batch(x, y), 0)

    def test_labels_that_are_the_inputs(self):
        y = self.ids.masked_fill(self.mask == 0, -100)
        for x in (None, self.ids):
            with pytest.raises(
                InputError, match="causal: with false, labels that are the input_ids teach .* copy them"
            ):
                self.step(y, False, x)
        assert self.step(y, True).isfinite()
        prompt = y.clone()
        prompt[0, :2] = -100
        with pytest.raises(InputError, match="copy them"):
            self.step(prompt, False)

    def test_labels_that_are_shifted_already(self):
        y = torch.full_like(self.ids, -100)
        y[:, :-1] = self.ids[:, 1:].masked_fill(self.mask[:, 1:] == 0, -100)
        with pytest.raises(InputError, match="causal: with true, the loss shifts labels, but they are shifted already"):
            self.step(y, True)
        assert self.step(y, False).isfinite()

    def test_other_labels(self):
        masked = self.ids.clone()
        masked[0, 1] = 7  # of a masked language model, which sees another token there
        for y in (torch.where(masked == 7, self.ids, -100), (self.ids * 3) % 7, torch.full_like(self.ids, -100)):
            x = {"input_ids": masked, "attention_mask": self.mask}
            assert self.step(y, False, x).isfinite()

    def test_the_first_batch_with_labels_is_looked_at(self):
        module = SupervisedModule(Language(), class_dim=-1)
        x = {"input_ids": self.ids, "attention_mask": self.mask}
        module.training_step(Batch(x, torch.full_like(self.ids, -100)), 0)
        with pytest.raises(InputError, match="copy them"):
            module.training_step(Batch(x, self.ids), 0)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        ("options", "outputs", "y", "message"),
        [
            ({"task": "binary", "class_dim": 1}, (2, 3, 3), torch.zeros(2, 3, 3), r"binary outputs have one class"),
            ({"task": "regression", "class_dim": 1}, (2, 1, 3, 3), torch.zeros(2, 3, 3), "they must have one shape"),
            (
                {"class_dim": 1},
                (2, 3, 4, 4),
                torch.zeros(2, 4, 4),
                "they must have one shape",
            ),  # probabilities, or floats
            ({"class_dim": 1}, (2, 3, 4, 4), torch.zeros(2, 4, 3).long(), r"one for each position \[2, 4, 4\]"),
            ({"class_dim": -1}, (2, 3), torch.zeros(2).long(), "needs outputs of at least 3 dimensions"),
            ({}, (2, 3, 4, 4), torch.zeros(2, 4, 4).long(), "need class_dim"),
            ({"task": "binary"}, (2, 1, 4, 4), torch.zeros(2, 4, 4), "need class_dim"),
            ({"task": "multilabel"}, (2, 3, 4), torch.zeros(2, 3, 4), "need class_dim"),
            ({"task": "regression"}, (2, 3, 4), torch.zeros(2, 3, 4), "need class_dim"),
        ],
    )
    def test_shapes(self, options, outputs, y, message):
        with pytest.raises(InputError, match=message):
            SupervisedModule(Table(random(*outputs)), **options).training_step((torch.zeros(2, 1), y), 0)

    def test_a_crop_of_void_alone_teaches_nothing_if_its_sample_has_labels(self):
        y = torch.full((3, 2, 2), -100)
        y[0, 0, 0] = 1
        rows = []
        for labeled in (None, torch.tensor([0, 1])):
            batch = Batch(torch.zeros(3, 1), y, labeled=labeled)
            module = DistillModule(Table(random(3, 4, 2, 2)), Table(random(3, 4, 2, 2, seed=1)), class_dim=1)
            rows.append(module.count_rows(batch))
            assert len(module.to_rows(batch, module(batch.x))[0]) == rows[-1][1]
        assert rows == [(1, 9), (1, 5)]

    def test_missing_labels_of_whole_samples_are_no_labels(self):
        """As of a source of tokens without labels."""
        outputs, mask = random(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
        batch = Batch(torch.zeros(3, 1), torch.full((3,), -100), mask=mask)
        module = DistillModule(Table(outputs), Table(random(3, 5, 4, seed=1)), class_dim=-1)
        assert module.count_rows(batch) == (0, 8)
        rows, logits = module.to_rows(batch, outputs)
        assert rows.y is None
        assert torch.equal(logits, outputs[mask != 0])
        assert float(module.losses(batch)["hard"].value) == 0
        batch.mask = None
        assert module.count_rows(batch) is None
        assert len(module.to_rows(batch, outputs)[0]) == 15

    def test_labels_of_the_loader_do_not_select_pixels(self):
        """``labeled`` numbers samples; flat maps would be indexed by it."""
        batch = Batch(torch.zeros(2, 1), torch.zeros(2, 4, 4), labeled=torch.tensor([1]))
        with pytest.raises(InputError, match="need class_dim"):
            SupervisedModule(Table(random(2, 1, 4, 4)), task="binary").training_step(batch, 0)

    @pytest.mark.parametrize("labels", ["count", "step"])
    def test_masks(self, labels):
        batch = batch_of("maps")
        batch.mask = batch.mask[:, :1]
        module = SupervisedModule(Table(outputs_of("maps")), class_dim=1)
        with pytest.raises(
            InputError, match=r"mask must have one entry for each position, \[4, 2, 3\], got \[4, 1, 3\]"
        ):
            module.count_rows(batch) if labels == "count" else module.training_step(batch, 0)

    def test_teachers_of_other_positions(self):
        teachers = [Table(random(B, C, H, W + 1)), Table(random(B, C, H, W + 1, seed=1))]
        module = EnsembleDistillModule(Table(outputs_of("maps")), teachers, class_dim=1)
        with pytest.raises(InputError, match="must have outputs of one shape, got .* from the teachers and .* student"):
            module.training_step(batch_of("maps"), 0)
        teachers = [Table(outputs_of("maps", 1)), Table(random(B, C, H, W + 1))]
        module = EnsembleDistillModule(Table(outputs_of("maps")), teachers, class_dim=1)
        with pytest.raises(InputError, match="teachers must give outputs of one shape"):
            module.training_step(batch_of("maps"), 0)

    def test_co_teaching_selects_samples(self):
        nets = Table(outputs_of("maps")), Table(outputs_of("maps", 1))
        with pytest.raises(InputError, match="class_dim must be left out: samples are selected, not positions; got 1"):
            CoTeachingModule(*nets, 0.2, class_dim=1)
        with pytest.raises(InputError, match="task must be multiclass, got 'regression'"):
            CoTeachingModule(*nets, 0.2, task="regression")

    def test_confidence_has_no_meaning_for_values(self):
        nets = [Table(outputs_of("maps", n)) for n in range(3)]
        with pytest.raises(
            InputError, match="teacher_weights: confidence is for tasks with classes, got task regression"
        ):
            EnsembleDistillModule(nets[0], nets[1:], teacher_weights="confidence", task="regression")
