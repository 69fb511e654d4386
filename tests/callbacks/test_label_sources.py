"""The networks that label the pool are called as their modules call them, whatever the form of their inputs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, GraphPseudoLabels, InputError, PseudoLabelModule, PseudoLabelRefresh, Teacher, teach

COUNT, CLASSES = 30, 3
INDEX = torch.arange(COUNT)
TRUTH = INDEX % CLASSES
A = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0)) + 2 * F.one_hot(TRUTH, 4)
Y = torch.where(INDEX < 9, TRUTH, -100)
SGD = partial(torch.optim.SGD, lr=0.0)


class Two(nn.Module):
    """Takes two tensors by name, of which one lies deeper."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, a, rest):
        return self.head(torch.tanh(self.layer(a - rest["b"])))


FORMS = {
    "mapping": (lambda a: {"a": a, "rest": {"b": 0.5 * a}}, Two),
    "tuple": (lambda a: (a, {"b": 0.5 * a}), Two),
    "tensor": (lambda a: a, lambda seed=0: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))),
}


class Pool(LightningDataModule):
    """Batches of inputs of one form."""

    def __init__(self, form, batch=Batch):
        super().__init__()
        self.form, self.batch = FORMS[form][0], batch
        self.labels = None

    def pool_dataloader(self):
        def collate(rows):
            rows = torch.tensor(rows)
            return self.batch(self.form(A[rows]), Y[rows], rows)

        return DataLoader(range(COUNT), batch_size=7, collate_fn=collate)

    train_dataloader = pool_dataloader

    def set_pseudo_labels(self, labels):
        self.labels = labels


def fit(quiet_trainer, module, data, *callbacks, **kwargs):
    refresh = PseudoLabelRefresh(warmup_epochs=0, **kwargs)
    quiet_trainer(callbacks=[refresh, *callbacks], max_epochs=1).fit(module, datamodule=data)
    return refresh


def expected(logits):
    return logits[9:].softmax(1).max(1)


def check(table, logits):
    confidence, label = expected(logits)
    assert torch.equal(table.index, INDEX[9:])
    assert torch.equal(table.label, label)
    torch.testing.assert_close(table.confidence, confidence, rtol=1e-5, atol=1e-6)


def run(network, x):
    with torch.no_grad():
        return network(**x) if isinstance(x, dict) else network(*x) if isinstance(x, tuple) else network(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["student", "ema", "teacher"])
def test_our_modules(quiet_trainer, form, source):
    change, make = FORMS[form]
    options = {"student": {}, "ema": {"ema_decay": 0.5}, "teacher": {"teacher": Teacher(make(1))}}[source]
    module = PseudoLabelModule(make(), pseudo_labels="refreshed", optimizer=SGD, **options)
    data = Pool(form)
    fit(quiet_trainer, module, data, source=source)
    network = module.teacher.network if source == "teacher" else module.student
    check(data.labels, run(network, change(A)))


def test_weights_that_are_loaded_into_a_module(quiet_trainer):
    """The average begins with the student's weights at the start of the fit, not with those of the constructor."""
    net, other = Two(0), Two(1)
    module, data = PseudoLabelModule(net, pseudo_labels="refreshed", optimizer=SGD, ema_decay=0.5), Pool("mapping")
    net.load_state_dict(other.state_dict())
    fit(quiet_trainer, module, data, source="ema")
    check(data.labels, run(other, FORMS["mapping"][0](A)))
    assert int(module.ema.n_averaged) == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_of_features(quiet_trainer, form):
    change, make = FORMS[form]
    data = Pool(form)
    graph = GraphPseudoLabels(neighbors=3)
    module = PseudoLabelModule(make(), pseudo_labels="refreshed", optimizer=SGD)
    fit(quiet_trainer, module, data, source=graph)
    net = module.student
    with torch.no_grad():
        features = torch.tanh(net.layer(0.5 * A)) if isinstance(net, Two) else net[:2](change(A))
    assert torch.equal(data.labels.label, graph(features, Y, CLASSES)[9:].argmax(1))


class Doubled(PseudoLabelModule):
    """Reads batches and calls networks in a way of its own."""

    def unpack(self, batch):
        batch = super().unpack(batch)
        return Batch(batch.x["a"], batch.y) if self.drops else replace(batch, x=batch.x["a"])

    def call(self, network, x):
        return network(2 * x)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("source", ["student", "ema", GraphPseudoLabels(neighbors=3)])
def test_a_module_with_seams_of_its_own(quiet_trainer, source, drops):
    """Its ``unpack`` counts, also one that returns no index, and so does its ``call``."""
    Doubled.drops = drops
    net = FORMS["tensor"][1]()
    module = Doubled(net, pseudo_labels="online", optimizer=SGD, ema_decay=0.5)
    data = Pool("mapping")
    data.train_dataloader = lambda: DataLoader([Batch({"a": A, "rest": A}, Y, INDEX)], batch_size=None)
    module.training_step = lambda batch, batch_idx: net(batch.x["a"]).sum()
    fit(quiet_trainer, module, data, source=source)
    if isinstance(source, str):
        check(data.labels, run(net, 2 * A))
    else:
        with torch.no_grad():
            assert torch.equal(data.labels.label, source(net[:2](2 * A), Y, CLASSES)[9:].argmax(1))


@pytest.mark.parametrize("drops", [False, True])
def test_coarse_labels_count_where_a_module_reads_batches_itself(quiet_trainer, drops):
    """The pseudo-label of each unlabeled sample is one of two classes, also if ``unpack`` returns no ``candidates``."""
    Doubled.drops = drops
    net = FORMS["tensor"][1]()
    allowed = F.one_hot((TRUTH + 1) % CLASSES, CLASSES) == 0
    candidates = allowed & (INDEX >= 9).unsqueeze(1)
    module = Doubled(net, optimizer=SGD)
    data = Pool("mapping", lambda x, y, index: Batch(x, y, index, candidates=candidates[index]))
    data.train_dataloader = lambda: DataLoader([Batch({"a": A, "rest": A}, Y, INDEX)], batch_size=None)
    module.training_step = lambda batch, batch_idx: net(batch.x["a"]).sum()
    fit(quiet_trainer, module, data)
    check(data.labels, run(net, 2 * A).masked_fill(~allowed, -torch.inf))


class Theirs(LightningModule):
    """Another project's: ``forward`` takes the tensors by name, and the network has another name."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        known = batch.y >= 0
        x = batch.x
        logits = self.net(**x) if isinstance(x, dict) else self.net(*x) if isinstance(x, tuple) else self.net(x)
        return F.cross_entropy(logits[known], batch.y[known]) if known.any() else 0 * logits.sum()

    def configure_optimizers(self):
        return SGD(self.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("averaged", [False, True])
def test_another_projects_module(quiet_trainer, form, averaged):
    change, make = FORMS[form]
    module, data = Theirs(make()), Pool(form)
    average = [EMAWeightAveraging()] if averaged else []
    fit(quiet_trainer, module, data, *average, source="ema" if averaged else "student")
    check(data.labels, run(module.net, change(A)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["teacher", GraphPseudoLabels(neighbors=3)])
def test_a_taught_module(quiet_trainer, form, source):
    """Its teacher labels; the features are those of its network; a restart resets its network."""
    change, make = FORMS[form]
    teacher, data = make(1), Pool(form)
    module = teach(Theirs(make()), teacher)
    fit(quiet_trainer, module, data, source=source, restart_student=True)
    if source == "teacher":
        check(data.labels, run(teacher, change(A)))
    else:
        net = module.net
        with torch.no_grad():
            features = torch.tanh(net.layer(0.5 * A)) if isinstance(net, Two) else net[:2](change(A))
        assert torch.equal(data.labels.label, source(features, Y, CLASSES)[9:].argmax(1))


class Steps(Theirs):
    """Its step doubles what the network gets, and the network returns its logits under another name."""

    def __init__(self, net, named):
        super().__init__(Named(net) if named else net)
        self.named = named

    def forward(self, x):
        raise AssertionError("a taught module needs no forward")

    def training_step(self, batch, batch_idx):
        logits = self.net(2 * batch.x)
        known, logits = batch.y >= 0, logits["scores"] if self.named else logits
        return F.cross_entropy(logits[known], batch.y[known])


class Named(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"logits": x, "scores": self.net(x)}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("source", ["student", "ema", "teacher", GraphPseudoLabels(neighbors=3)])
def test_a_taught_module_changes_inputs_in_its_step(quiet_trainer, source, named):
    """Each network gets what the step gives the student, and what ``output`` names are the logits."""
    make, data = FORMS["tensor"][1], Pool("tensor")
    net, teacher = make(), make(1)
    known = Teacher(Named(teacher) if named else teacher, classes=[2, 0, 1])  # the order of its outputs
    module = teach(Steps(net, named), known, output="scores" if named else None)
    average = [EMAWeightAveraging()] if source == "ema" else []
    fit(quiet_trainer, module, data, *average, source=source)
    if isinstance(source, str):
        check(data.labels, run(teacher, 2 * A)[:, [1, 2, 0]] if source == "teacher" else run(net, 2 * A))
    else:
        with torch.no_grad():
            assert torch.equal(data.labels.label, source(net[:2](2 * A), Y, CLASSES)[9:].argmax(1))


def test_a_module_without_a_student(quiet_trainer):
    for options, name in (
        ({"source": GraphPseudoLabels()}, "GraphPseudoLabels"),
        ({"restart_student": True}, "restart"),
    ):
        with pytest.raises(InputError, match=f"{name}.* needs a module with a student, Theirs has none"):
            fit(quiet_trainer, Theirs(Two()), Pool("mapping"), **options)
