"""Label smoothing of the hard loss, by hand in float64: value and gradient of every method."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn

from kd_lightning import (
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    PseudoLabelModule,
    SupervisedModule,
    Teacher,
)

B, C, SMOOTHING = 9, 4, 0.3
Y = torch.tensor([0, 3, -100, 1, 2, 2, 0, 1, -100])
WEIGHTS = [0.5, 2.0, 1.0, 8.0]


class Logits(nn.Module):
    """A network whose logits are its parameters."""

    def __init__(self, seed):
        super().__init__()
        self.logits = nn.Parameter(2 * torch.randn(B, C, generator=torch.Generator().manual_seed(seed)))
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(self.logits[x[:, 0].long()])


def by_hand(logits, weights):
    """Szegedy et al. 2016: cross-entropy with (1 - s) of the label and s / C of each class; means as torch's."""
    log_p = log_softmax(logits.detach().double().numpy(), axis=1)
    target = np.where(np.arange(C) == Y.numpy()[:, None], 1 - SMOOTHING, 0) + SMOOTHING / C
    weighted, known = np.array(weights) * target, Y.numpy() >= 0
    total = np.array(weights)[Y[known]].sum()
    gradient = (np.exp(log_p) * weighted.sum(1, keepdims=True) - weighted) * known[:, None] / total
    return -(weighted * log_p)[known].sum() / total, gradient


METHODS = {
    "supervised": SupervisedModule,
    "distill": lambda net, **o: DistillModule(net, Teacher(Logits(7)), **o),
    "ensemble": lambda net, **o: EnsembleDistillModule(net, [Logits(7), Logits(8)], **o),
    "hint": lambda net, **o: HintModule(net, Logits(7), hints={"layer": "layer"}, hint_epochs=0, **o),
    "pseudo": PseudoLabelModule,
    "peer": lambda net, **o: CoTeachingModule(net, Logits(7), forget_rate=0.0, **o),
    "joint": lambda net, **o: ApprenticeModule(net, Logits(7), scheme="joint", **o),
    "fixed": lambda net, **o: ApprenticeModule(net, Logits(7), scheme="fixed_teacher", **o),
}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("method", METHODS)
def test_of_every_method(method, weights):
    net = Logits(0)
    loss = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    module = METHODS[method](net, hard_loss=loss, class_weights=weights)
    terms = module.losses(Batch(torch.arange(float(B))[:, None], Y.clone(), index=torch.arange(B)))
    terms["hard"].value.backward()
    value, gradient = by_hand(net.logits, weights or [1.0] * C)
    assert terms["hard"].value.item() == pytest.approx(value, rel=1e-5)
    assert net.logits.grad.numpy() == pytest.approx(gradient, abs=1e-6)
    for name in terms.keys() & {"peer_hard", "teacher_hard"}:
        other = module.peer if name == "peer_hard" else module.teacher
        assert terms[name].value.item() == pytest.approx(by_hand(other.logits, weights or [1.0] * C)[0], rel=1e-5)
