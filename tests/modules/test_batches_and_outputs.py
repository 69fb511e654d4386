"""Each kind of batch with each kind of output in each module: the loss is that of the plain form, to the bit."""

from collections import namedtuple
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning import (
    AdaMatch,
    ApprenticeModule,
    Batch,
    CoTeachingModule,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    HintModule,
    InputError,
    PseudoLabelModule,
    SupervisedModule,
)

ROWS, CLASSES = 6, 3
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, -100, 1, -100, 1])
SOFT = torch.softmax(torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)), dim=1)
HALF = torch.full((ROWS, 1), 0.5)  # the networks multiply their inputs, which is exact


@dataclass
class ModelOutput:
    """As of Hugging Face's models."""

    loss: Tensor
    logits: Tensor


InceptionOutputs = namedtuple("InceptionOutputs", "logits aux_logits")
OUTPUTS = {
    "tensor": lambda logits, features: logits,
    "(logits, features)": lambda logits, features: (logits, features),
    "out and aux": lambda logits, features: {"out": logits, "aux": -logits},
    "(loss, logits)": lambda logits, features: (features.mean(), logits),
    "ModelOutput": lambda logits, features: ModelOutput(features.mean(), logits),
    "InceptionOutputs": lambda logits, features: InceptionOutputs(logits, -logits),
}
BATCHES = {
    "x": X,
    "(x, y)": (X, Y),
    "[x, y, meta]": [X, Y, ["a text"] * ROWS, torch.arange(ROWS)],
    "one tensor by name": {"image": X, "label": Y, "path": ["a.png"] * ROWS},
    "two tensors by name": {"a": 2 * X, "b": HALF, "labels": Y},
    "teacher_inputs": {"image": X, "label": Y, "teacher_inputs": 4 * X},
    "teacher_inputs by name": {"image": X, "label": Y, "teacher_inputs": {"a": 8 * X, "b": HALF}},
    "tuple of inputs": ((2 * X, HALF), Y),
    "Batch": Batch(X, Y),
    "Batch of inputs by name": Batch({"a": 2 * X, "b": HALF}, Y),
    "soft labels": (X, SOFT),
    "soft labels by name": {"a": 2 * X, "b": HALF, "labels": SOFT},
}


def labels_of(batch):
    """The labels of a batch, as a module reads them."""
    return Batch.from_any(batch).y


class Net(nn.Module):
    """Needs all of its inputs, and returns an output of some kind."""

    def __init__(self, seed, output="tensor", scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)
        self.output = output
        self.scale = scale

    def forward(self, a, b=None):
        features = self.body(self.scale * (a if b is None else a * b)).tanh()
        return OUTPUTS[self.output](self.head(features), features)


def student_and_teachers(batch, output):
    scale = 0.25 if "teacher_inputs" in batch else 1.0
    return Net(0, output), [Net(seed, output, scale) for seed in (1, 2)]


# auxiliary heads would add a term of their own
OPTIONS = {"auxiliary_weight": 0.0}
MODULES = {
    "Supervised": lambda student, teachers: SupervisedModule(student, **OPTIONS),
    "Distill": lambda student, teachers: DistillModule(student, teachers[0], **OPTIONS),
    "Hint": lambda student, teachers: HintModule(student, teachers[0], {"body": "body"}, 1, **OPTIONS),
    "joint Hint": lambda student, teachers: HintModule(
        student, teachers[0], {"body": "body"}, 0, hint_weight=0.5, **OPTIONS
    ),
    "EnsembleDistill": lambda student, teachers: EnsembleDistillModule(student, teachers, **OPTIONS),
    "Apprentice A": lambda student, teachers: ApprenticeModule(student, teachers[0], **OPTIONS),
    "Apprentice B": lambda student, teachers: ApprenticeModule(student, teachers[0], "fixed_teacher", **OPTIONS),
    "PseudoLabel": lambda student, teachers: PseudoLabelModule(student, **OPTIONS),
    "PseudoLabel, averaged": lambda student, teachers: PseudoLabelModule(student, ema_decay=0.5, **OPTIONS),
    "CoTeaching": lambda student, teachers: CoTeachingModule(student, teachers[0], 0.5, ramp_epochs=1, **OPTIONS),
}
REFUSED = {  # module and kind of labels: what the module says
    ("CoTeaching", "soft"): r"labels must be one class a sample, \(B,\) = \[6\], got \[6, 3\]",
}
TRAINS_BOTH = {"CoTeaching"}  # on the student's inputs


def steps(module, batch):
    """One training step with its gradients, and one validation step with its sums."""
    module.train()
    torch.manual_seed(0)  # a projector is random
    loss = module.training_step(batch, 0)
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in module.student.parameters()]
    module.eval()
    with torch.no_grad():
        predicted = module.validation_step(batch, 0)
        probabilities = module.predict_step(batch, 0)
    sums = module._evaluations[0].of_all_processes()
    return loss.detach(), gradients, predicted, probabilities, sums


@cache
def plain_steps(name, y):
    """Of the same module on a tensor, whose networks return tensors."""
    return steps(MODULES[name](Net(0), [Net(1), Net(2)]), Batch(X, y))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_each_batch_with_each_output(output, name):
    for kind, batch in BATCHES.items():
        y = labels_of(batch)
        module = MODULES[name](*student_and_teachers("" if name in TRAINS_BOTH else kind, output))
        message = REFUSED.get((name, "soft" if y is SOFT else "classes"))
        if message is not None:
            with pytest.raises(InputError, match=f"^{message}$"):
                module.training_step(batch, 0)
            continue
        found, expected = steps(module, batch), plain_steps(name, y)
        assert torch.equal(found[0], expected[0]), kind
        for one, other in zip(found[1], expected[1], strict=True):
            assert (one is None and other is None) or torch.equal(one, other), kind
        assert torch.equal(found[2], expected[2]), kind
        assert torch.equal(found[3], expected[3]), kind
        assert found[4].keys() == expected[4].keys()
        assert all(torch.equal(found[4][key], expected[4][key]) for key in expected[4]), kind


@pytest.mark.parametrize("name", MODULES)
def test_the_plain_form_learns(name):
    """What the others are compared with is no empty loss."""
    loss, gradients, *_ = plain_steps(name, Y)
    assert 0 < float(loss) < 100
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_networks_need_all_inputs():
    with torch.no_grad():
        assert not torch.equal(Net(0)(2 * X), Net(0)(X))
        assert torch.equal(Net(0)(2 * X, HALF), Net(0)(X))
        assert torch.equal(Net(1, scale=0.25)(8 * X, HALF), Net(1)(X))


STRONG = X.flip(0)
VIEWS = {
    "tensors": Batch(X, Y, x_strong=STRONG),
    "by name": Batch({"a": 2 * X, "b": HALF}, Y, x_strong={"b": HALF, "a": 2 * STRONG}),
    "tuples": Batch((2 * X, HALF), Y, x_strong=(2 * STRONG, HALF)),
}
FIXMATCH = {
    "student": {},
    "average": {"ema_decay": 0.5},
    "threshold": {"selection": FixedThreshold(0.4)},
    "labeled rows": {"selection": AdaMatch(0.9), "ema_decay": 0.5},
    "refreshed": {"pseudo_labels": "refreshed"},
}


@pytest.mark.parametrize("options", FIXMATCH.values(), ids=FIXMATCH)
def test_strong_views(options):
    """Their rows join the weak ones by name, whatever the order of names is."""
    ends = []
    for batch in VIEWS.values():
        module = PseudoLabelModule(Net(0), **options)
        module.selection.setup(None, 3)
        loss = module.training_step(batch, 0)
        loss.backward()
        ends.append([loss.detach(), *(p.grad for p in module.student.parameters())])
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


def test_strong_views_by_hand():
    module = PseudoLabelModule(Net(0), selection=FixedThreshold(0.4), ema_decay=0.5)
    with torch.no_grad():
        module.ema.module.head.bias.add_(torch.tensor([0.0, 1.0, 0.0]))  # an average that differs
    loss = module.training_step(VIEWS["by name"], 0)
    labeled = Y != -100
    with torch.no_grad():
        confidence, label = module.ema.module(X[~labeled]).softmax(1).max(1)
    assert (confidence > 0.4).any()
    logits = module.student(STRONG[~labeled])
    unsupervised = (F.cross_entropy(logits, label, reduction="none") * (confidence >= 0.4)).sum() / 2
    torch.testing.assert_close(loss, F.cross_entropy(module.student(X), Y) + unsupervised)


class Called(nn.Module):
    """Cannot be called: a project calls its method."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = Net(seed)

    def encode(self, x):
        return self.net(**x)


@pytest.mark.parametrize("options", FIXMATCH.values(), ids=FIXMATCH)
def test_a_project_calls_its_networks_itself(options):
    """So are averages and peers."""

    class Project(PseudoLabelModule):
        def call(self, network, x):
            return network.encode(x)

    module, expected = Project(Called(), **options), PseudoLabelModule(Net(0), **options)
    assert torch.equal(module.training_step(VIEWS["by name"], 0), expected.training_step(VIEWS["tensors"], 0))


def test_a_project_calls_its_peer_itself():
    class Project(CoTeachingModule):
        def call(self, network, x):
            return network.encode(x)

    module = Project(Called(), Called(1), 0.5)
    expected = CoTeachingModule(Net(0), Net(1), 0.5).training_step((X, Y), 0)
    assert torch.equal(module.training_step(VIEWS["by name"], 0), expected)


@pytest.mark.parametrize("y", [None, Y, F.one_hot(Y.clamp(min=0), CLASSES)])
def test_two_forms_of_strong_views_are_refused(y):
    if y is None or y is Y:
        batch = Batch({"a": 2 * X, "b": HALF}, y, x_strong={"a": STRONG})
        message = r"inputs must have one form, got \{a: \[\d, 4\], b: \[\d, 1\]\} and \{a: \[\d, 4\]\}"
    else:
        batch, message = Batch(X, y, x_strong=STRONG), r"labels must be one class a sample, .* got \[6, 3\]"
    with pytest.raises(InputError, match=f"^{message}$"):
        PseudoLabelModule(Net(0)).training_step(batch, 0)


@pytest.mark.parametrize("who", ["network", "teacher's network"])
def test_inputs_that_a_network_does_not_take(who):
    class Takes(nn.Sequential):
        def forward(self, image, index=None):
            return super().forward(image)

    student, teacher = (nn.Sequential if who == name else Takes for name in ("network", "teacher's network"))
    module = DistillModule(student(nn.Linear(4, 3)), teacher(nn.Linear(4, 3)))
    batch = {"image": torch.randn(3, 4), "label": torch.tensor([0, 1, 2]), "index": torch.arange(3)}
    with pytest.raises(
        InputError, match=rf"the {who} Sequential takes \(input\), but a batch has the inputs image, index"
    ):
        module.training_step(batch, 0)
