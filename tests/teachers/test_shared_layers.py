"""Teachers and students that share layers: trained ones are refused by name, a frozen base with adapters works."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import (
    ApprenticeModule,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    HintModule,
    InputError,
    Teacher,
    teach,
)


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


class Adapted(nn.Module):
    """A layer of the base with a low-rank adapter beside it (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def with_adapters(network):
    torch.manual_seed(7)
    return nn.Sequential(*(Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in network))


def frozen(network):
    return network.requires_grad_(False)


def loader():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(5))
    return DataLoader([(one, n % 3) for n, one in enumerate(x)], 4)


class Own(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


MODULES = {
    "distill": lambda student, teacher: DistillModule(student, teacher),
    "hint": lambda student, teacher: HintModule(student, teacher, {"1": "1"}, 1),
    "ensemble": lambda student, teacher: EnsembleDistillModule(student, [teacher, base(3)]),
    "ensemble as one": lambda student, teacher: EnsembleDistillModule(student, [teacher, base(3)], use_vmap=True),
    "teach": lambda student, teacher: teach(Own(student), teacher),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["network", "Teacher"])
def test_trained_layers_in_both_are_named(kind, wrapped):
    network = base()
    student = nn.Sequential(*network[:3], nn.Linear(8, 3))  # a shared backbone
    teacher = Teacher(network) if wrapped else network
    with pytest.raises(InputError, match=r"got 2 that are in both, such as 0.weight, 0.bias; give one of them a copy"):
        MODULES[kind](student, teacher)


def test_what_an_earlier_teacher_has_frozen_was_trained():
    network = base()
    DistillModule(base(1), network)
    with pytest.raises(InputError, match="in both, such as 0.weight"):
        DistillModule(nn.Sequential(*network[:3], nn.Linear(8, 3)), network)


def test_adapters_inside_the_base_are_named():
    network = frozen(base())
    student = with_adapters(network)
    for number, layer in enumerate(student):  # as libraries do that change the base in place
        network[number] = layer
    student = nn.Sequential(*student, nn.Linear(3, 3))
    with pytest.raises(InputError, match="such as 0.down.weight, 0.up.weight, 3.down.weight"):
        DistillModule(student, network)


@pytest.mark.parametrize("kind", MODULES)
def test_adapters_on_a_frozen_base(kind, quiet_trainer):
    network = frozen(base())
    before = copy.deepcopy(network.state_dict())
    student = with_adapters(network)
    adapters = {name: p.clone() for name, p in student.named_parameters() if p.requires_grad}
    module = MODULES[kind](student, network)
    modes = []
    student[2].register_forward_hook(lambda layer, *_: modes.append((layer.training, torch.is_grad_enabled())))
    quiet_trainer(max_epochs=2).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert any(not torch.equal(p, adapters[name]) for name, p in student.named_parameters() if name in adapters)
    # the shared dropout trains in the student's passes, and not in the teacher's
    trained = {training for training, grad in modes if grad}
    assert trained == ({True, False} if kind == "hint" else {True})  # projectors are built from a pass in eval mode
    if kind != "ensemble as one":  # whose weights are copies
        assert False in {training for training, grad in modes if not grad}
    assert student[2].training


def test_the_student_learns_as_with_a_copy_of_the_base(quiet_trainer):
    weights = []
    for copied in (False, True):
        network = frozen(base())
        student = with_adapters(copy.deepcopy(network) if copied else network)
        module = DistillModule(student, network, optimizer=lambda p: torch.optim.SGD(p, 0.1))
        torch.manual_seed(0)
        quiet_trainer(max_epochs=3).fit(module, loader())
        weights.append(student.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_resumed_run_with_adapters(quiet_trainer, tmp_path):
    def make():
        network = frozen(base())
        return DistillModule(with_adapters(network), network, optimizer=lambda p: torch.optim.SGD(p, 0.1))

    saver = ModelCheckpoint(tmp_path)
    quiet_trainer(enable_checkpointing=True, callbacks=[saver]).fit(make(), loader())
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert {"student.0.layer.weight", "student.0.down.weight"} <= saved["state_dict"].keys()
    resumed = make()
    quiet_trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=saver.best_model_path)  # the same teacher
    assert resumed.global_step == 6


def test_a_shared_layer_without_parameters_has_the_students_mode(quiet_trainer):
    dropout = nn.Dropout(0.5)
    student = nn.Sequential(nn.Linear(4, 8), dropout, nn.Linear(8, 3))
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 8), dropout, nn.Linear(8, 3))
    module = DistillModule(student, teacher)
    quiet_trainer().fit(module, loader())
    assert dropout.training
    x = torch.randn(4, 4)
    assert torch.equal(module.teacher(x), module.teacher(x))


def test_shared_batch_norm_is_refused():
    network = frozen(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    with pytest.raises(InputError, match=r"must not share a \w+Norm1d in training mode, got 1 in both"):
        DistillModule(with_adapters(network), network)


REFUSING = {
    "network": lambda student, network: DistillModule(student, network),
    "Teacher": lambda student, network: DistillModule(student, Teacher(network)),
    "ensemble": lambda student, network: EnsembleDistillModule(student, [base(3), network]),
    "ensemble of Teachers": lambda student, network: EnsembleDistillModule(student, [base(3), Teacher(network)]),
    "teach": lambda student, network: teach(Own(student), network),
}


@pytest.mark.parametrize("make", REFUSING.values(), ids=REFUSING)
@pytest.mark.parametrize("norm", [False, True], ids=["parameters", "BatchNorm"])
def test_what_is_refused_stays_as_it_was(make, norm):
    """So that the copy that the message advises can learn."""
    if norm:
        network = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
        student = nn.Sequential(*network[:2], nn.Linear(8, 3))
    else:
        network = base()
        student = nn.Sequential(*network[:3], nn.Linear(8, 3))
    before = [p.requires_grad for p in student.parameters()]
    with pytest.raises(InputError, match="share a BatchNorm1d" if norm else "parameters of their own"):
        make(student, network)
    assert [p.requires_grad for p in student.parameters()] == before
    assert all(layer.training for layer in student.modules())
    copied = copy.deepcopy(student)
    DistillModule(copied, network)
    assert [p.requires_grad for p in copied.parameters()] == before
    assert all(layer.training for layer in copied.modules())


def test_frozen_after_a_refusal_is_frozen_before_the_next():
    network = base()
    teacher = Teacher(network)
    with pytest.raises(InputError, match="in both, such as 0.layer.weight"):
        DistillModule(with_adapters(network), teacher)
    DistillModule(with_adapters(frozen(network)), teacher)


def test_a_teacher_that_holds_the_student():
    student = base()
    with pytest.raises(InputError, match="got 4 that are in both, such as 0.weight"):
        DistillModule(student, nn.Sequential(student, nn.Linear(3, 3)))
    with pytest.raises(InputError, match="got the same network twice"):
        DistillModule(student, nn.Sequential(student))


class Holder(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.base = network
        self.adapter = nn.Linear(3, 3)

    def forward(self, x):
        return self.adapter(self.base(x))


def test_a_student_that_holds_the_teacher(quiet_trainer):
    with pytest.raises(InputError, match="got 4 that are in both, such as base.0.weight"):
        DistillModule(Holder(network := base()), network)
    network = frozen(base())
    module = DistillModule(Holder(network), network)
    quiet_trainer().fit(module, loader())
    assert network.training and network[2].training


def test_weights_of_two_layers_that_are_one_tensor():
    student, network = base(), base(1)
    student[3].weight = network[3].weight
    with pytest.raises(InputError, match="got 1 that are in both, such as 3.weight"):
        DistillModule(student, network)


def test_adapters_in_the_base_itself():
    """As peft does: the student is the base. The message names what trains in the teacher."""
    network = frozen(base())
    network[0], network[3] = Adapted(network[0]), Adapted(network[3])
    with pytest.raises(
        InputError, match="got 4 that are in both, such as 0.0.down.weight, .* without them, frozen before"
    ):
        DistillModule(nn.Sequential(network), network)


@pytest.mark.parametrize("make", [lambda s, t: ApprenticeModule(s, t), lambda s, t: CoTeachingModule(s, t, 0.2)])
def test_two_networks_that_train(make, quiet_trainer):
    network = base()
    student = nn.Sequential(*network[:3], nn.Linear(8, 3))
    with pytest.raises(InputError, match="such as 0.weight, 0.bias"):
        quiet_trainer().fit(make(student, network), loader())
    network = frozen(base())
    one, other = with_adapters(network), with_adapters(network)
    nn.init.ones_(other[0].up.weight)
    module = make(one, other)
    before = copy.deepcopy(network.state_dict())
    quiet_trainer(max_epochs=2).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(one[0].up.weight, other[0].up.weight) and network[2].training


@pytest.mark.parametrize("order", ["teacher first", "student first"])
@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_the_students(training, order):
    """Pretrained networks are often in eval mode, and so are then the layers of a student that holds them."""
    network = frozen(base())
    network.train(training)
    if order == "teacher first":
        teacher = Teacher(network)
        student = with_adapters(network)
    else:
        student = with_adapters(network)
        teacher = Teacher(network)
    DistillModule(student, teacher)
    assert student[2].training is training
    other = with_adapters(network)
    other.train()
    DistillModule(other, teacher)
    assert other[2].training
    teacher(torch.randn(2, 4))
    assert other[2].training


def test_layers_that_are_trained_later_are_named(quiet_trainer):
    network = frozen(base())
    student = with_adapters(network)
    module = DistillModule(student, network)
    quiet_trainer().fit(module, loader())
    student[0].layer.requires_grad_(True)  # as callbacks do that train more and more layers
    with pytest.raises(InputError, match=r"share 0.layer.weight, 0.layer.bias, which the student trains"):
        quiet_trainer().fit(module, loader())


class Counter(nn.Module):
    """Has a buffer that each pass in training mode changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("positions", torch.arange(8))

    def forward(self, x):
        if self.training:
            self.mean.add_(x.detach().mean(0))
        return x - self.mean


def test_a_shared_buffer_that_the_student_changes_is_named(quiet_trainer):
    network = frozen(nn.Sequential(nn.Linear(4, 8), Counter(), nn.Linear(8, 3)))
    with pytest.raises(InputError, match="share 1.mean, which the student changes"):
        quiet_trainer().fit(DistillModule(with_adapters(network), network), loader())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), Counter()])
def test_shared_buffers_that_stay(norm, quiet_trainer, tmp_path):
    """In eval mode, statistics stay. To load their values again is no change."""
    network = frozen(nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3)))
    network.eval()
    module = DistillModule(with_adapters(network), network)
    saver = ModelCheckpoint(tmp_path)
    quiet_trainer(enable_checkpointing=True, callbacks=[saver]).fit(module, loader(), loader())
    quiet_trainer(max_epochs=2).fit(module, loader(), ckpt_path=saver.best_model_path)
    quiet_trainer().test(module, loader(), ckpt_path=saver.best_model_path, verbose=False)
    norm.train()
    with pytest.raises(InputError, match="which the student changes"):
        quiet_trainer().fit(module, loader())


def test_shared_instance_norm_is_refused():
    network = frozen(nn.Sequential(nn.Conv1d(4, 8, 1), nn.InstanceNorm1d(8, track_running_stats=True)))
    student = nn.Sequential(*network, nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"must not share a \w+Norm1d in training mode, got 1 in both"):
        DistillModule(student, network)


def test_a_shared_trace_is_named():
    part = torch.jit.script(nn.Linear(4, 8))
    student, network = nn.Sequential(part, nn.Linear(8, 3)), nn.Sequential(part, nn.Linear(8, 3))
    with pytest.raises(InputError, match="such as 0.weight, 0.bias"):
        DistillModule(student, network)
    compiled = torch.compile(base(), backend="eager")
    with pytest.raises(InputError, match="got the same network twice"):
        DistillModule(compiled._orig_mod, compiled)
