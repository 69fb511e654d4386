"""A teacher that changes its inputs in place never changes those of the student."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, DistillModule, EnsembleDistillModule, InputError, Teacher
from kd_lightning.teachers.ensemble import Ensemble


def network(seed=0, inplace=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(4, 3))


def inputs(rows=5):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)


KINDS = {
    "network": network,
    "TorchScript": lambda: torch.jit.script(network()),
    "frozen TorchScript": lambda: torch.jit.freeze(torch.jit.script(network().eval())),
    "trace": lambda: torch.jit.trace(network().eval(), inputs()),
    "torch.compile": lambda: torch.compile(network(), backend="eager"),
    "LightningModule": Module,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_run_with_each_kind_of_network(make, quiet_trainer):
    """The student learns as from a teacher that changes nothing."""
    loader = DataLoader([(one, number % 3) for number, one in enumerate(inputs(12))], 4)
    ends = []
    for teacher in (make(), network(inplace=False)):
        torch.manual_seed(2)
        module = DistillModule(nn.Linear(4, 3), teacher)
        quiet_trainer(max_epochs=2).fit(module, loader, loader)
        x = inputs()
        expected = network(inplace=False)(x)
        torch.testing.assert_close(module.teacher(x), expected)
        assert torch.equal(x, inputs())
        assert module.teacher.fingerprint() == module.teacher.fingerprint(anew=True)
        ends.append(module.student.weight.detach().clone())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_teacher_is_frozen_and_in_eval_mode(make):
    teacher = Teacher(make())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    teacher.network.train() if hasattr(teacher.network, "training") else None
    teacher(inputs())
    assert not any(getattr(layer, "training", False) for layer in teacher.network.modules())
    assert copy.deepcopy(teacher).network is teacher.network
    assert not [*teacher.parameters()] and not teacher.state_dict()


def test_in_inference_mode():
    """There, no change in place can be seen, so that it is no proof of anything."""
    teacher = Teacher(network())
    with torch.inference_mode():
        for _ in range(3):
            x = inputs()
            teacher(x)
            assert torch.equal(x, inputs())
    for _ in range(3):
        x = inputs()
        teacher(x)
        assert torch.equal(x, inputs())


def test_validate_before_fit(quiet_trainer):
    loader = DataLoader([(one, number % 3) for number, one in enumerate(inputs(12))], 4)
    module = DistillModule(nn.Linear(4, 3), network())
    quiet_trainer().validate(module, loader, verbose=False)
    quiet_trainer().fit(module, loader)
    assert module.global_step == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Batch({"input": x}),
        lambda x: Batch((x,)),
        lambda x: Batch(torch.zeros(5, 2), teacher_inputs={"input": x}),
    ],
    ids=["mapping", "tuple", "teacher_inputs"],
)
def test_inputs_of_each_form(make):
    teacher, x = Teacher(network()), inputs()
    for _ in range(3):
        torch.testing.assert_close(teacher(make(x)), network(inplace=False)(inputs()))
        assert torch.equal(x, inputs())


def test_a_preprocess_that_changes_its_inputs():
    teacher = Teacher(nn.Linear(4, 3), preprocess=lambda x: x.mul_(2))
    x = inputs()
    for _ in range(3):
        assert torch.equal(teacher(x), teacher.network(2 * inputs()))
    assert torch.equal(x, inputs())


def test_teachers_computed_as_one():
    ensemble = Ensemble([network(0), network(1)], use_vmap=True)
    for _ in range(3):
        x = inputs()
        found = ensemble(Batch(x))
        assert torch.equal(x, inputs())
        torch.testing.assert_close(found, torch.stack([network(seed, False)(inputs()) for seed in (0, 1)]))
    double = [Teacher(network(seed, False), preprocess=lambda x: x.mul_(2)) for seed in (0, 1)]
    ensemble = Ensemble(double, use_vmap=True)
    for _ in range(2):
        x = inputs()
        found = ensemble(Batch(x))
        assert torch.equal(x, inputs())
        torch.testing.assert_close(found, torch.stack([network(seed, False)(2 * inputs()) for seed in (0, 1)]))


def test_an_ensemble_computed_as_one_in_a_run(quiet_trainer):
    loader = DataLoader([(one, number % 3) for number, one in enumerate(inputs(12))], 4)
    ends = []
    for inplace in (True, False):
        torch.manual_seed(2)
        teachers = [network(0, inplace), network(1, inplace)]
        module = EnsembleDistillModule(nn.Linear(4, 3), teachers, use_vmap=True)
        quiet_trainer(max_epochs=2).fit(module, loader)
        ends.append(module.student.weight.detach().clone())
    assert torch.equal(*ends)


class Sometimes(nn.Module):
    def forward(self, x):
        return (x.neg_() if len(x) > 2 else x) + 0


def test_a_change_in_some_passes_alone_is_an_error():
    teacher = Teacher(Sometimes())
    teacher(inputs(2))
    with pytest.raises(InputError, match="changes its inputs in place, but in some passes alone"):
        teacher(inputs(3))
