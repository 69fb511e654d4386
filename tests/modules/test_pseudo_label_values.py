"""PseudoLabelModule in the regression task: the objective by hand in float64, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_lightning import ABCModule, Batch, InputError, PseudoLabelModule, SupervisedModule, UncertaintyThreshold
from kd_lightning.batch import LabelKind

NAN = float("nan")
ROWS, FEATURES = 8, 5
SEVERAL = torch.tensor([[1, 0.5], [NAN] * 2, [NAN, 7], [0, -3], [NAN] * 2, [2, NAN], [NAN] * 2, [NAN, 4]]).double()
LABELS = {"several": SEVERAL, "column": SEVERAL[:, :1], "values": SEVERAL[:, 0]}
LOSSES = {
    "squared": (None, lambda gap: gap**2, lambda gap: 2 * gap),
    "absolute": (nn.L1Loss(), abs, np.sign),
    "huber": (
        nn.HuberLoss(delta=1.5),
        lambda gap: gap**2 / 2 if abs(gap) <= 1.5 else 1.5 * (abs(gap) - 0.75),
        lambda gap: np.clip(gap, -1.5, 1.5),
    ),
}


class Linear(nn.Linear):
    """Returns (B,) where there is one value a sample, if it is made so."""

    flat = False

    def forward(self, x):
        return super().forward(x).flatten() if self.flat else super().forward(x)


def linear(y):
    torch.manual_seed(0)
    net = Linear(FEATURES, y[0].numel(), bias=False).double()
    net.flat = y.ndim == 1
    return net


def inputs(seed=0):
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("name", LABELS)
def test_objective(name, views, loss):
    """Stored pseudo-labels are in the unsupervised term with the hard loss, and never in the hard term."""
    y, (hard_loss, value_of, slope_of) = LABELS[name], LOSSES[loss]
    net, x, strong = linear(y), inputs(), inputs(3) if views == 2 else inputs()
    given = ~y.isnan().numpy().reshape(ROWS, -1)
    places = [*zip(*np.nonzero(~given), strict=True)]
    stored, kind = y.clone(), torch.where(y.isnan(), int(LabelKind.MISSING), int(LabelKind.CLEAN))
    targets = {}
    for number, (row, output) in enumerate(places[::2]):
        place = (row, output) if y.ndim > 1 else row
        targets[row, output] = 0.5 * number - 1
        stored[place], kind[place] = targets[row, output], LabelKind.PSEUDO

    weights, truth = net.weight.detach().numpy(), y.numpy().reshape(ROWS, -1)
    count = given.sum()
    terms = [(x, row, output, truth[row, output], 1 / count) for row, output in zip(*np.nonzero(given), strict=True)]
    terms += [(strong, *place, value, 3.0 / len(places)) for place, value in targets.items()]
    wanted, gradient = 0.0, np.zeros_like(weights)
    for view, row, output, target, share in terms:
        gap = weights[output] @ view[row].numpy() - target
        wanted += share * value_of(gap)
        gradient[output] += share * slope_of(gap) * view[row].numpy()

    known = float(count + len(targets))
    means = {"mean_labels": known, "mean_pseudo": float(len(targets)), "mean_rows": float(ROWS)}
    batch = Batch(x, stored, kind=kind.to(torch.int8), x_strong=strong if views == 2 else None, **means)
    module = PseudoLabelModule(net, 3.0, "refreshed", task="regression", hard_loss=hard_loss)
    found = module.training_step(batch, 0)
    found.backward()
    assert found.item() == pytest.approx(wanted, rel=1e-10)
    assert net.weight.grad.numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", LABELS)
def test_before_the_first_refresh_it_is_supervised_training(name):
    """To the bit."""
    y, found = LABELS[name], []
    for make in (lambda net, **kw: PseudoLabelModule(net, 2.0, "refreshed", **kw), SupervisedModule):
        net = linear(y)
        loss = make(net, task="regression").training_step((inputs(), y), 0)
        loss.backward()
        found.append((loss.item(), net.weight.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_what_is_refused():
    net = nn.Linear(FEATURES, 2)
    online = (
        "PseudoLabelModule: online pseudo-labels are for classes, .* for task: regression set pseudo_labels: refreshed"
    )
    for options in ({}, {"teacher": nn.Linear(FEATURES, 2)}, {"ema_decay": 0.9}, {"selection": UncertaintyThreshold()}):
        with pytest.raises(InputError, match=online):
            PseudoLabelModule(net, task="regression", **options)
    with pytest.raises(InputError, match="selection is for online pseudo-labels; for refreshed ones set it in Pseudo"):
        PseudoLabelModule(net, pseudo_labels="refreshed", task="regression", selection=UncertaintyThreshold())
    with pytest.raises(InputError, match="UncertaintyThreshold is for values of several views"):
        PseudoLabelModule(net, selection=UncertaintyThreshold())
    with pytest.raises(InputError, match="ABCModule: task must be multiclass, got 'regression'"):
        ABCModule(net, task="regression")
    module = PseudoLabelModule(net, pseudo_labels="refreshed", task="regression")
    with pytest.raises(InputError, match=r"the student must give values \(B,\) or \(B, D\), got \[1, 2, 2\]"):
        module.label_task.rows(torch.zeros(1, 2, 2), "the student")
