"""PairedOptimizer: two optimisers in one do what they do apart."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from kd_lightning import InputError
from kd_lightning.modules._shared.paired_optimizer import PairedOptimizer

MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
PAIRS = [(MOMENTUM, partial(Adam, lr=0.05)), (partial(Adam, lr=0.05), MOMENTUM), (Adagrad, AdamW), (MOMENTUM, MOMENTUM)]


def networks():
    """Two of other shapes; the second's bias is frozen."""
    torch.manual_seed(0)
    nets = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 4)])
    nets[1].bias.requires_grad_(False)
    return nets


def paired(nets, first, second):
    return PairedOptimizer(first(nets[0].parameters()), second([p for p in nets[1].parameters() if p.requires_grad]))


def train(nets, optimizers, steps, begin=0):
    """Steps on losses that differ from step to step."""
    for step in range(begin, begin + steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        sum(net(x).square().sum() for net in nets).backward()
        for optimizer in optimizers:
            optimizer.step()


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.fixture(params=PAIRS, ids=["SGD, Adam", "Adam, SGD", "Adagrad, AdamW", "SGD twice"])
def kinds(request):
    return request.param


def test_equals_both_apart(kinds):
    together, apart = networks(), networks()
    pair = paired(together, *kinds)
    train(together, [pair], 4)
    train(apart, [kinds[0](apart[0].parameters()), kinds[1](apart[1].parameters())], 4)
    start = networks()
    assert equal(together, apart)
    assert not torch.equal(together[0].bias, start[0].bias)
    assert not torch.equal(together[1].weight, start[1].weight)
    assert torch.equal(together[1].bias, start[1].bias)


def test_keeps_the_state_of_the_start():
    nets = networks()
    pair = PairedOptimizer(SGD(nets[0].parameters()), Adagrad([nets[1].weight], initial_accumulator_value=0.5))
    assert (pair.state[nets[1].weight]["sum"] == 0.5).all()


def test_groups_of_ones_own():
    """Parameter groups with settings of their own stay apart."""
    together, apart = networks(), networks()

    def groups(net):
        return SGD([{"params": [net.weight], "lr": 0.3}, {"params": [net.bias]}], lr=0.01, momentum=0.5)

    pair = PairedOptimizer(groups(together[0]), Adam([together[1].weight]))
    assert [group["lr"] for group in pair.param_groups] == [0.3, 0.01, 0.001]
    train(together, [pair], 3)
    train(apart, [groups(apart[0]), Adam([apart[1].weight])], 3)
    assert equal(together, apart)


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_goes_on_where_it_was(kinds, how):
    whole, parts = networks(), networks()
    optimizer = paired(whole, *kinds)
    train(whole, [optimizer], 5)
    pair = paired(parts, *kinds)
    train(parts, [pair], 2)
    if how in ("deepcopy", "pickle"):
        both = (parts, pair)
        other, again = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    else:
        state = pair.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = networks()
        other.load_state_dict(parts.state_dict())
        again = paired(other, *kinds)
        again.load_state_dict(state)
    for group in again.param_groups:
        assert all(any(p is mine for mine in other.parameters()) for p in group["params"])
    train(other, [again], 3, begin=2)
    assert equal(other, whole)
    assert not equal(parts, whole)  # the copied one stayed behind


def test_loading_reaches_rates_and_schedulers(kinds):
    """A scheduler made before the state was loaded still drives both."""
    whole, other = networks(), networks()
    pair, again = paired(whole, *kinds), paired(other, *kinds)
    rates = [group["lr"] for group in pair.param_groups]
    scheduler, later = StepLR(pair, 1, 0.5), StepLR(again, 1, 0.5)
    train(whole, [pair], 1)
    scheduler.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in pair.pair] == [0.5 * rate for rate in rates]
    again.load_state_dict(pair.state_dict())
    later.load_state_dict(scheduler.state_dict())
    train(other, [again], 1)
    later.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in again.pair] == [0.25 * rate for rate in rates]


def test_plateau_lowers_both():
    pair = paired(networks(), *PAIRS[0])
    scheduler = ReduceLROnPlateau(pair, factor=0.1, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    assert [group["lr"] for group in pair.param_groups] == pytest.approx([0.01, 0.005])


def test_one_cycle():
    """It may cycle what both know, and nothing that one of them lacks."""
    pair = paired(networks(), Adam, AdamW)
    scheduler = OneCycleLR(pair, [0.1, 0.2], total_steps=5)
    expected = [OneCycleLR(Adam([nn.Parameter(torch.zeros(1))]), rate, total_steps=5) for rate in (0.1, 0.2)]
    for _ in range(3):
        for each in (scheduler, *expected):
            each.optimizer.step()
            each.step()
    for group, alone in zip(pair.param_groups, expected, strict=True):
        assert group["lr"] == alone.optimizer.param_groups[0]["lr"]
        assert group["betas"] == alone.optimizer.param_groups[0]["betas"] != (0.9, 0.999)
    for kinds in (PAIRS[0], PAIRS[1]):
        with pytest.raises(ValueError, match="must support momentum"):
            OneCycleLR(paired(networks(), *kinds), 0.1, total_steps=5)
        OneCycleLR(paired(networks(), *kinds), 0.1, total_steps=5, cycle_momentum=False)


def test_closure_is_called_once():
    nets, calls = networks(), []
    pair = paired(nets, *PAIRS[0])

    def closure():
        calls.append([p.detach().clone() for p in nets.parameters()])
        pair.zero_grad()
        loss = sum(net(torch.ones(1, 3)).square().sum() for net in nets)
        loss.backward()
        return loss

    before = networks()
    loss = pair.step(closure)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(calls[0], before.parameters(), strict=True))  # before either steps
    assert loss.item() == pytest.approx(sum(net(torch.ones(1, 3)).square().sum().item() for net in before))
    assert not torch.equal(nets[0].weight, before[0].weight)
    assert not torch.equal(nets[1].weight, before[1].weight)
    assert pair.step() is None


def test_zero_grad():
    nets = networks()
    pair = paired(nets, *PAIRS[0])
    sum(net(torch.ones(1, 3)).sum() for net in nets).backward()
    pair.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in nets.parameters() if p.requires_grad)
    pair.zero_grad()
    assert all(p.grad is None for p in nets.parameters())


def test_refused():
    nets = networks()
    with pytest.raises(InputError, match="LBFGS evaluates the loss several times"):
        PairedOptimizer(SGD(nets[0].parameters()), LBFGS(nets[1].parameters()))
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        PairedOptimizer(SGD(nets[0].parameters()), SGD(nets[0].parameters()))
