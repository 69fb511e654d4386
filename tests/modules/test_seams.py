"""What a project may override (unpack, call), auxiliary heads, and soft labels."""

import warnings
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import (
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    PseudoLabelModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.losses import EarlyLearningLoss, GeneralizedCrossEntropyLoss, LabelKindLoss

NAN = float("nan")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
SGD = partial(torch.optim.SGD, lr=0.1)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


# unpack and call


class Project(DistillModule):
    """Batches are strings of a registry, and networks are called with a second argument."""

    def unpack(self, batch):
        return Batch(X, Y)

    def call(self, net, x):
        return net(x, 2)


class Scaled(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.layer = network(seed)

    def forward(self, x, factor=1):
        return factor * self.layer(x)


def test_a_project_overrides_unpack_and_call():
    module = Project(Scaled(), Scaled(1), soft_weight=0.0)
    expected = F.cross_entropy(2 * module.student.layer(X), Y)
    assert torch.equal(module.training_step("anything", 0), expected)
    assert torch.equal(module.predict_step("anything", 0), (2 * module.student.layer(X)).softmax(-1))
    module.validation_step("anything", 0)
    assert module._evaluations[0].of_all_processes()["labels"] == 6


@pytest.mark.parametrize("form", ["mapping", "tuple", "named tensor"])
def test_nested_inputs(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network()

        def forward(self, a, b=None):
            return self.layer(a if b is None else a + b)

    batch = {
        "mapping": {"a": X, "b": 2 * X, "label": Y},
        "tuple": ((X, 2 * X), Y),
        "named tensor": {"a": 3 * X, "label": Y},
    }[form]
    module = SupervisedModule(Net())
    torch.testing.assert_close(module.training_step(batch, 0), F.cross_entropy(network()(3 * X), Y))


# Auxiliary heads

Heads = namedtuple("Heads", "logits aux_logits1 aux_logits2")


class WithHeads(nn.Module):
    """Gives logits of three heads in training, as GoogLeNet does, and of one else."""

    def __init__(self, seed=0):
        super().__init__()
        self.heads = nn.ModuleList(network(seed + n) for n in range(3))

    def forward(self, x):
        return Heads(*(head(x) for head in self.heads)) if self.training else self.heads[0](x)


def test_auxiliary_heads_learn_the_hard_loss():
    module = DistillModule(WithHeads(), network(9), soft_weight=0.5, auxiliary_weight=0.25)
    hard = [F.cross_entropy(head(X).double(), Y) for head in module.student.heads]
    teacher = (module.teacher.network(X).double() / 4).log_softmax(-1)
    student = (module.student.heads[0](X).double() / 4).log_softmax(-1)
    soft = 16 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    loss = module.training_step((X, Y), 0)
    torch.testing.assert_close(loss.double(), 0.5 * hard[0] + 0.5 * soft + 0.25 * (hard[1] + hard[2]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    module.eval()
    module.validation_step((X, Y), 0)


def test_auxiliary_heads_are_logged(quiet_trainer):
    trainer = quiet_trainer()
    trainer.fit(SupervisedModule(WithHeads(), optimizer=SGD), DataLoader(list(zip(X, Y, strict=True)), 3))
    assert "train/auxiliary_hard" in trainer.callback_metrics


@pytest.mark.parametrize(
    "make",
    [
        lambda: PseudoLabelModule(WithHeads()),
        lambda: CoTeachingModule(WithHeads(), WithHeads(5), 0.1),
        lambda: SupervisedModule(WithHeads(), hard_loss=EarlyLearningLoss()),
    ],
    ids=["pseudo-labels", "co-teaching", "stateful loss"],
)
def test_a_warning_where_auxiliary_heads_do_not_learn(make):
    module = make()
    batch = Batch(X, Y, index=torch.arange(6))
    with pytest.warns(UserWarning, match="the student's 2 auxiliary heads do not learn in"):
        module.training_step(batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.training_step(batch, 0)  # once


def test_auxiliary_weight_of_0_and_below():
    module = SupervisedModule(WithHeads(), auxiliary_weight=0.0)
    assert torch.equal(module.training_step((X, Y), 0), F.cross_entropy(module.student.heads[0](X), Y))
    with pytest.raises(InputError, match="auxiliary_weight must be finite and at least 0"):
        SupervisedModule(WithHeads(), auxiliary_weight=-1.0)


# Soft labels

SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).double()
SOFT = (SOFT / SOFT.sum(1, keepdim=True)).float()


def test_soft_labels_by_hand():
    module = SupervisedModule(network())
    y = SOFT.clone()
    y[2] = NAN  # no label
    known = [0, 1, 3, 4, 5]
    log = module.student(X).double().log_softmax(-1)
    expected = -(y[known].double() * log[known]).sum(-1).mean()
    torch.testing.assert_close(module.training_step((X, y), 0).double(), expected)
    module.validation_step((X, y), 0)
    sums = module._evaluations[0].of_all_processes()
    assert sums["labels"] == 5
    assert sums["correct"] == (log.argmax(-1) == y.argmax(-1))[known].sum()


def test_one_hot_labels_are_classes():
    module = SupervisedModule(network())
    hard, soft = (module.training_step((X, y), 0) for y in (Y, F.one_hot(Y, 3).float()))
    torch.testing.assert_close(hard, soft)


def test_soft_labels_with_row_weights_and_class_weights():
    weight, row_weight = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    module = SupervisedModule(network(), hard_loss=nn.CrossEntropyLoss(weight=weight))
    log = module.student(X).double().log_softmax(-1)
    rows = -(weight.double() * SOFT.double() * log).sum(-1)
    torch.testing.assert_close(module.training_step((X, SOFT), 0).double(), rows.mean())
    weighted = module.training_step(Batch(X, SOFT, weight=row_weight), 0)
    torch.testing.assert_close(weighted.double(), (rows * row_weight).mean())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (2 * SOFT, r"must be probabilities, with a sum of 1 in each row"),
        (torch.tensor([[1.5, -0.5, 0.0]]).repeat(6, 1), "must be probabilities"),
        (
            SOFT[:, :2] / SOFT[:, :2].sum(1, keepdim=True),
            r"labels of shape \[6, 2\] do not fit logits of shape \[6, 3\]",
        ),
        (torch.where(torch.eye(6, 3) > 0, NAN, SOFT), "or NaN in a whole row"),
        (F.one_hot(Y, 3), r"labels of shape \[6, 3\] do not fit"),  # integers are no probabilities
    ],
)
def test_what_are_no_soft_labels(y, message):
    with pytest.raises(InputError, match=message):
        SupervisedModule(network()).training_step((X, y), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoTeachingModule(network(), network(1), 0.1), "labels must be one class a sample"),
        (
            lambda: EnsembleDistillModule(network(), [network(1), network(2)], teacher_weights="confidence"),
            "confidence needs class indices",
        ),
        (lambda: SupervisedModule(network(), hard_loss=GeneralizedCrossEntropyLoss()), "use CrossEntropyLoss"),
        (
            lambda: SupervisedModule(network(), hard_loss=LabelKindLoss(nn.CrossEntropyLoss())),
            "which LabelKindLoss does not take; use CrossEntropyLoss",
        ),
        (
            lambda: SupervisedModule(network(), hard_loss=nn.CrossEntropyLoss(ignore_index=1)),
            "ignore_index: 1 of CrossEntropyLoss is for class indices",
        ),
    ],
    ids=["co-teaching", "confidence", "a loss of classes", "kinds", "ignored"],
)
def test_methods_that_need_classes_refuse_soft_labels(make, message):
    with pytest.raises(InputError, match=message):
        make().training_step((X, SOFT), 0)


# Teachers on bare inputs


def test_a_teacher_takes_bare_inputs():
    assert torch.equal(Teacher(network())(X), network()(X))

    class Net(nn.Module):
        def forward(self, a, b):
            return a + b

    assert torch.equal(Teacher(Net())({"a": X, "b": X}), 2 * X)
    assert torch.equal(Teacher(Net())((X, X)), 2 * X)


def test_teacher_inputs_of_a_batch():
    module = DistillModule(network(), network(1), soft_weight=1.0)
    batch = Batch(X, Y, teacher_inputs=X + 1)
    expected = module.soft_loss(module.student(X), module.teacher.network(X + 1))
    assert torch.equal(module.training_step(batch, 0), expected)
    assert torch.equal(module.training_step({"x": X, "label": Y, "teacher_inputs": X + 1}, 0), expected)


class InPlace(nn.Module):
    """Changes its inputs in place."""

    def __init__(self):
        super().__init__()
        self.layer = network(1)

    def forward(self, x):
        return self.layer(x.relu_())


def test_a_teacher_that_changes_its_inputs_leaves_those_of_the_student():
    module = DistillModule(network(), InPlace(), soft_weight=0.0)
    x = X.clone()
    for _ in range(2):
        assert torch.equal(module.training_step((x, Y), 0), F.cross_entropy(module.student(X), Y))
        assert torch.equal(x, X)


def test_a_student_that_changes_its_inputs_leaves_those_of_the_teacher():
    module, plain = (
        DistillModule(student, network(2)) for student in (InPlace(), nn.Sequential(nn.ReLU(), network(1)))
    )
    for one in (module, plain):
        one.validation_step((X.clone(), Y), 0)
    sums, expected = (one._evaluations[0].of_all_processes() for one in (module, plain))
    for name in ("teacher_correct", "agreed", "teacher_kl", "correct"):
        assert torch.equal(sums[name], expected[name])
    assert torch.equal(module.training_step((X.clone(), Y), 0), plain.training_step((X.clone(), Y), 0))
