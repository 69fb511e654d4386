"""Every soft loss with averaged teachers: its value by hand from the mean of their probabilities at its temperature."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning import Batch, DistillModule, EnsembleDistillModule
from kd_lightning.losses import (
    ConditionalLoss,
    DKDLoss,
    HardDistillationLoss,
    JSDLoss,
    KDLoss,
    MLKDLoss,
    NKDLoss,
    ReverseKLLoss,
    RLDLoss,
    TTMLoss,
    WTTMLoss,
)

ROWS, CLASSES = 6, 4
X = torch.arange(float(ROWS)).unsqueeze(1)
Y = torch.tensor([0, -100, 3, 1, -100, 2])
WEIGHTS = {"uniform": None, "given": [1.0, 2.0, 5.0]}


class Fixed(nn.Module):
    """A network that gives the logits it was made with; x's first column is the number of the row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits[x[:, 0].long()]


def logits(seed):
    return 2 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))


def normalised(powers):
    return powers / powers.sum(axis=1, keepdims=True)


def softmax(z, temperature=1.0):
    return normalised(np.exp(z / temperature))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def kl(q, p):
    return (q * np.log(q / p)).sum(-1)


def targets(q):
    return [int(row.argmax()) if label < 0 else label for row, label in zip(q, Y.tolist(), strict=True)]


def others(p, classes):
    return normalised(np.array([np.delete(row, c) for row, c in zip(p, classes, strict=True)]))


def binary(p, classes):
    picked = p[np.arange(ROWS), classes]
    return np.stack([picked, 1 - picked], axis=1)


def dkd(loss, s, q):
    s = (s - s.mean(1, keepdims=True)) / (1e-7 + s.std(1, ddof=1, keepdims=True)) if loss.standardize else s
    p, y = softmax(s, loss.temperature), targets(q)
    rows = loss.alpha * kl(binary(q, y), binary(p, y)) + loss.beta * kl(others(q, y), others(p, y))
    return loss.temperature**2 * rows.mean()


def ttm(loss, s, q):
    return kl(q, softmax(s)).mean()


def wttm(loss, s, q):
    p_t = normalised(q ** (1 / loss.exponent))  # its power is q
    return ((p_t**loss.exponent).sum(axis=1) * kl(q, softmax(s))).mean()


def nkd(loss, s, q):
    y, temperature = targets(q), loss.temperature
    p_t = normalised(q**temperature)
    first = -binary(p_t, y)[:, 0] * np.log(binary(softmax(s), y)[:, 0])
    rest = (others(q, y) * np.log(others(softmax(s, temperature), y))).sum(axis=1)
    return (first - loss.gamma * temperature**2 * rest).mean()


def rld(loss, s, q):
    p, y = softmax(s, loss.temperature), targets(q)
    rows = loss.alpha * kl(binary(q, q.argmax(axis=1)), binary(p, y))
    for row, true in enumerate(y):
        below = q[row] < q[row, true]
        if below.any():
            rows[row] += loss.beta * kl(q[row, below] / q[row, below].sum(), p[row, below] / p[row, below].sum())
    return loss.temperature**2 * rows.mean()


def mlkd(loss, s, q):
    total, whole = 0.0, normalised(q**loss.temperature)  # at temperature 1
    rows = whole.max(axis=1) <= np.percentile(whole.max(axis=1), 50)
    columns = whole.sum(axis=0) <= np.percentile(whole.sum(axis=0), 50)
    for temperature in loss.temperatures:
        t, p = normalised(whole ** (1 / temperature)), softmax(s, temperature)
        total += (temperature**2 * kl(t, p) + ((t @ t.T - p @ p.T) ** 2).sum(axis=1))[rows].sum() / ROWS
        total += ((t.T @ t - p.T @ p) ** 2)[columns].sum() / CLASSES
    return total


def js(loss, s, q):
    p = softmax(s, loss.temperature)
    return loss.temperature**2 * ((kl(q, (p + q) / 2) + kl(p, (p + q) / 2)) / 2).mean()


def reverse_kl(loss, s, q):
    return loss.temperature**2 * kl(softmax(s, loss.temperature), q).mean()


def conditional(loss, s, q):
    """The labels meet the student's logits as they are, also where the soft loss standardizes them."""
    standardized = (s - s.mean(1, keepdims=True)) / (1e-7 + s.std(1, ddof=1, keepdims=True))
    rows = loss.temperature**2 * kl(q, softmax(standardized if loss.standardize else s, loss.temperature))
    for row, label in enumerate(Y.tolist()):
        if label >= 0 and q[row].argmax() != label:
            rows[row] = loss.wrong_weight * rows[row] - (1 - loss.wrong_weight) * np.log(softmax(s)[row, label])
    return rows.mean()


def hard(loss, s, q):
    return -np.log(softmax(s)[np.arange(ROWS), q.argmax(axis=1)]).mean()


def hard_multilabel(loss, s, q):
    return -np.log(np.where(q > 0.5, sigmoid(s), sigmoid(-s))).mean()


LOSSES = {
    "DKD, standardized": (lambda: DKDLoss(1.5, 3.0, 2.0, standardize=True), dkd),
    "TTM": (lambda: TTMLoss(0.25), ttm),
    "WTTM": (lambda: WTTMLoss(0.25), wttm),
    "NKD": (NKDLoss, nkd),
    "NKD, T 3": (lambda: NKDLoss(0.5, 3.0), nkd),
    "RLD": (lambda: RLDLoss(1.5, 3.0, 2.0), rld),
    "MLKD": (lambda: MLKDLoss([1.0, 2.0, 4.0]), mlkd),
    "JS": (lambda: JSDLoss(2.0), js),
    "reverse KL": (lambda: ReverseKLLoss(2.0), reverse_kl),
    "hard": (HardDistillationLoss, hard),
    "conditional": (lambda: ConditionalLoss(KDLoss(2.0), 0.3), conditional),
    "conditional, standardized": (lambda: ConditionalLoss(KDLoss(2.0, standardize=True), 0.3), conditional),
    "hard, multilabel": (lambda: HardDistillationLoss("multilabel"), hard_multilabel),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_average_by_hand(name, kind):
    make, by_hand = LOSSES[name]
    loss, student, teachers = make(), logits(0), [logits(k + 1) for k in range(3)]
    y = Y if loss.task == "multiclass" else None
    module = EnsembleDistillModule(
        Fixed(student), [Fixed(t) for t in teachers], teacher_weights=WEIGHTS[kind], soft_loss=loss, task=loss.task
    )
    found = module.losses(Batch(X, y))["soft"].value
    s, *parts = (z.double().numpy() for z in (student, *teachers))
    if loss.standardize:
        parts = [(t - t.mean(1, keepdims=True)) / (1e-7 + t.std(1, ddof=1, keepdims=True)) for t in parts]
    weights = np.array(WEIGHTS[kind] or [1.0] * 3)
    soft = [sigmoid(t) if loss.task == "multilabel" else softmax(t, loss.temperature) for t in parts]
    q = np.average(soft, axis=0, weights=weights)
    assert found.item() == pytest.approx(by_hand(loss, s, q), rel=1e-4)
    assert repr(loss) == repr(make())  # the user's loss is as it was


@pytest.mark.parametrize("name", LOSSES)
def test_three_equal_teachers_are_one(name):
    loss = LOSSES[name][0]()
    y = Y if loss.task == "multiclass" else None
    s, t, batch = logits(0), logits(1), Batch(X, y)
    average = EnsembleDistillModule(Fixed(s), [Fixed(t)] * 3, soft_loss=loss, task=loss.task)
    one = DistillModule(Fixed(s), Fixed(t), soft_loss=loss, task=loss.task)
    expected = one.losses(batch)["soft"].value.item()
    assert average.losses(batch)["soft"].value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_relabel_weights_the_rows(name):
    """Also the losses that compare the rows of a batch have a value for each row."""
    loss = LOSSES[name][0]()
    y = Y if loss.task == "multiclass" else None
    teachers = [Fixed(logits(k + 1)) for k in range(2)]
    module = EnsembleDistillModule(
        Fixed(logits(0)), teachers, "relabel", teacher_weights=[1.0, 3.0], soft_loss=loss, task=loss.task
    )
    batch = Batch(X, y, view=torch.arange(ROWS))
    selected = torch.arange(ROWS) % 2
    target = torch.where(selected.unsqueeze(1) == 0, teachers[0].logits, teachers[1].logits).detach()
    rows = LOSSES[name][0]()
    rows.reduction = "none"
    expected = (2 * torch.tensor([0.25, 0.75])[selected] * rows(logits(0), target, Y)).mean()
    assert module.losses(batch)["soft"].value.item() == pytest.approx(expected.item(), rel=1e-5)
