"""Why a teacher does not help: each cause is planted, and must be the verdict; a healthy teacher has none."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Digits, DistillModule, EnsembleDistillModule, SemiSupervisedDataModule, SupervisedModule, teach
from kd_lightning.losses import KDLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.report.examination import examine
from kd_lightning.report.why import History
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import save_weights
from kd_lightning.teachers.teacher import Teacher

NEW = ["memory", "wrong decisions", "view strength", "soft targets of views", "capacity", "gradients over training"]
NEW += ["unlabeled samples", "verdict"]


class Plain(nn.Module):
    """A transform that changes nothing."""

    def forward(self, x):
        return x


class Noise(nn.Module):
    """A view that destroys the content."""

    def forward(self, x):
        return torch.rand_like(x)


class Memory(nn.Module):
    """Returns the label of images that it has stored, and any class for others."""

    def __init__(self, images, labels):
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x):
        near = torch.cdist(x.flatten(1), self.images).min(dim=1)
        other = (x.flatten(1).sum(dim=1) * 7919).long() % 10
        return 4.0 * F.one_hot(torch.where(near.values < 1e-3, self.labels[near.indices], other), 10).float()


class Confused(nn.Module):
    """Takes 3 for 8, and 5 for 9."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        z = self.network(x).clone()
        z[:, 8], z[:, 9] = z[:, [3, 8]].amax(dim=1), z[:, [5, 9]].amax(dim=1)
        z[:, [3, 5]] -= 20
        return z


class Sharp(nn.Module):
    """Has one-hot soft targets."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 1000 * self.network(x)


def digits(**options):
    """Without augmentation, which the networks of these tests have not been trained on."""
    return SemiSupervisedDataModule(Digits(), batch_size=128, **{"train_transform": Plain(), **options})


def found(teacher, data, history=None, **options):
    torch.manual_seed(0)
    module = DistillModule(DigitsCNN(4), teacher, **{"soft_weight": 0.5, **options})
    findings = [*examine(module, data, History() if history is None else history)]
    assert not [one for one in findings if "Error" in one.text]  # nothing failed on the way
    return {one.name: one for one in findings}


def reasons(found):
    return {one.reason for name, one in found.items() if one.reason and name != "verdict"}


@pytest.mark.parametrize("labeled", [5, None])
def test_healthy(healthy, labeled):
    """With 50 labels and the rest unlabeled, and with all labels."""
    names = found(healthy, digits(labeled=labeled))
    assert [*names][7:] == NEW and not reasons(names)
    assert names["verdict"].text.startswith("no reason found") and names["verdict"].severity == "info"
    labels = 50 if labeled else 1024
    assert f"of {labels} labeled training samples" in names["memory"].text
    assert "of 119 validation samples" in names["memory"].text and "under the same views" in names["memory"].text
    assert "the student has 1.7 k parameters, the teacher 24.1 k (14.1 times)" in names["capacity"].text


def test_memorised_samples():
    data = digits(labeled=20)
    data.setup("fit")
    seen = torch.tensor(data.split.labeled)
    part = Digits().load().train
    names = found(Memory(part.images.tensors[0][seen], part.targets[seen]), data)
    assert names["verdict"].reason == "memory" and names["teacher"].reason == "poor"
    assert "100.0% of 200 labeled training samples" in names["memory"].text
    lines = yaml.safe_load(names["memory"].lines)
    assert lines["model"]["init_args"]["teacher"]["class_path"] == "kd_lightning.CrossFittedTeacher"


def test_wrong_classes(healthy):
    names = found(Confused(healthy), digits(), soft_loss=KDLoss(temperature=3.0))
    assert names["verdict"].reason == "wrong" and reasons(names) == {"wrong"}
    assert "3 taken for 8" in names["wrong decisions"].text and "5 taken for 9" in names["wrong decisions"].text
    kd = {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": 3.0}}
    loss = {"class_path": "kd_lightning.losses.ConditionalLoss", "init_args": {"loss": kd}}
    assert yaml.safe_load(names["wrong decisions"].lines) == {"model": {"init_args": {"soft_loss": loss}}}


def test_views_without_content(healthy):
    names = found(healthy, digits(train_transform=Noise()))
    assert names["verdict"].reason == "views" and {"views", "wrong"} <= reasons(names)
    assert "validation samples" in names["view strength"].text


def test_views_without_validation_part(healthy):
    names = found(healthy, digits(train_transform=Noise(), val_size=0))
    assert names["verdict"].reason == "views" and "labeled training samples" in names["view strength"].text
    assert names["memory"].text == "not checked: there are no labeled validation samples"


def test_one_hot_targets(healthy):
    names = found(Sharp(healthy), digits())
    assert names["verdict"].reason == "one-hot" and reasons(names) == {"one-hot"}
    assert yaml.safe_load(names["soft targets of views"].lines)["model"]["init_args"]["soft_loss"]["init_args"] == {
        "temperature": 8.0
    }


def test_no_unlabeled_samples(healthy):
    names = found(healthy, digits(labeled=5, unlabeled="none"))
    assert names["verdict"].reason == "few" and reasons(names) == {"few"}
    assert yaml.safe_load(names["unlabeled samples"].lines) == {"data": {"init_args": {"unlabeled": "rest"}}}


@pytest.fixture
def run(tmp_path):
    """Makes a finished run of a network."""

    def make(name, network, rows=()):
        folder = tmp_path / name / "version_0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "model": {"class_path": "X"}}))
        save_weights(network.state_dict(), folder / "student.safetensors", {})
        if rows:
            lines = ["step,gradient/hard,gradient/soft", *(f"{step},{hard},{soft}" for step, hard, soft in rows)]
            (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        return Run(folder)

    return make


@pytest.fixture(scope="module")
def good(train_digits):
    """A student of the usual size that is trained well."""
    torch.manual_seed(0)
    return train_digits(DigitsCNN(4))


def test_a_student_that_is_better_alone(good, healthy, run):
    """It explains all other findings about the teacher; the weights of the student come back."""
    names = found(Confused(healthy), digits(), History(alone=run("alone", good)))
    assert names["verdict"].reason == "no better" and "wrong" in reasons(names)
    assert "labeled training samples; the teacher: -" in names["student alone"].text


def test_a_student_that_does_not_follow(healthy, run):
    torch.manual_seed(1)
    config = {"trainer": {"max_epochs": 15}}
    names = found(healthy, digits(), History(config, taught=run("method", DigitsCNN(4))))
    assert names["verdict"].reason == "gap" and "gap" in reasons(names)
    assert yaml.safe_load(names["following"].lines) == {"trainer": {"max_epochs": 30}}


def without(network, *classes):
    """The same network, which never predicts some classes."""
    network = deepcopy(network)
    last = [one for one in network.modules() if isinstance(one, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[[*classes]] -= 1000
    return network


def test_errors_that_the_student_learns(good, healthy, run):
    """Where the teacher is wrong, the student with it is worse than the one alone; elsewhere it is not."""
    history = History(taught=run("method", without(good, 0, 1, 2, 3, 5)), alone=run("alone", without(good, 0, 1, 2)))
    names = found(Confused(healthy), digits(), history)
    assert (
        names["verdict"].reason == "wrong" and "the student with the teacher against" in names["wrong decisions"].text
    )


def test_errors_that_are_not_what_harms(good, healthy, run):
    """The student with the teacher is worse where the teacher is right: it has not learned what it was taught."""
    torch.manual_seed(1)
    history = History(taught=run("method", DigitsCNN(4)), alone=run("alone", without(good, 0, 1, 2)))
    names = found(Confused(healthy), digits(), history)
    assert names["verdict"].reason == "gap" and "wrong" not in reasons(names)
    assert names["wrong decisions"].text.endswith("so its errors are not what harms")
    assert "it is not too small" in names["following"].hint and "without the teacher" in names["following"].text
    alone = history._replace(taught=None)  # without a run, they may be
    names = found(Confused(healthy), digits(), alone)
    assert names["verdict"].reason == "wrong" and "kd-lightning experiment CONFIG" in names["verdict"].text


@pytest.mark.parametrize(("val", "severity"), [(None, "info"), (5, "warning")])
def test_few_samples_that_select(healthy, val, severity):
    history = History({"checkpoint": {"monitor": "val/accuracy"}})
    names = found(healthy, digits(val_size=val), history)
    assert names["selection"].severity == severity and names["verdict"].reason is None
    assert f"{119 if val is None else 50} validation samples" in names["selection"].text
    assert "selection" not in found(healthy, digits(val_size=val), History({"checkpoint": {"monitor": None}}))
    assert "selection" not in found(healthy, digits(val_size=0), history)


def test_gradients_of_a_run(good, healthy, run):
    """Those that the callback has logged, else those with its weights."""
    rows = [(0, 1.0, 12.0), (9, 1.0, 15.0), (18, 1.0, 30.0)]
    names = found(healthy, digits(), History(taught=run("method", good, rows)), soft_weight=0.9)
    assert names["verdict"].reason == "balance"
    assert "15 times in the middle of 3" in names["gradients over training"].text
    assert yaml.safe_load(names["gradients over training"].lines) == {"model": {"init_args": {"soft_weight": 0.5}}}
    names = found(healthy, digits(labeled=5), History(taught=run("other", good)))
    assert "with the first weights, and with those of" in names["gradients over training"].text


def test_runs_that_show_that_it_helps(good, healthy, run):
    torch.manual_seed(1)
    history = History(taught=run("method", good), alone=run("alone", DigitsCNN(4)))
    names = found(healthy, digits(), history)
    assert names["verdict"].text.startswith("the teacher helps") and names["verdict"].severity == "info"
    assert found(healthy, digits(), history._replace(helps=False))["verdict"].text.startswith("no reason found why")


def test_weights_come_back(good, healthy, run):
    torch.manual_seed(0)
    module = DistillModule(DigitsCNN(4), healthy)
    before = {name: value.clone() for name, value in module.student.named_parameters()}
    [*examine(module, digits(), History(taught=run("method", good), alone=run("alone", good)))]
    assert all(torch.equal(value, before[name]) for name, value in module.student.named_parameters())


def test_weights_that_do_not_fit(healthy, run):
    torch.manual_seed(0)
    module = DistillModule(DigitsCNN(4), healthy)
    names = {one.name: one.text for one in examine(module, digits(), History(alone=run("alone", DigitsCNN(6))))}
    assert names["student alone"].startswith("not checked: ") and "no reason" in names["verdict"]


def test_ensemble(healthy):
    """The pooled teachers are judged; a single bad one is no reason."""
    torch.manual_seed(0)
    module = EnsembleDistillModule(DigitsCNN(4), [healthy, healthy, Confused(healthy)], soft_weight=0.5)
    names = {one.name: one for one in examine(module, digits())}
    assert names["verdict"].reason is None and "the teacher 72.2 k (42.4 times)" in names["capacity"].text
    untrained = Teacher(DigitsCNN(4))
    module = EnsembleDistillModule(DigitsCNN(4), [healthy, untrained], teacher_weights=[1.0, 0.0], soft_weight=0.5)
    names = {one.name: one for one in examine(module, digits())}
    assert names["teachers[1]"].severity == "error" and names["verdict"].reason is None
    module = EnsembleDistillModule(DigitsCNN(4), [Confused(healthy), Confused(healthy)], soft_weight=0.5)
    names = {one.name: one for one in examine(module, digits())}
    assert names["verdict"].reason == "wrong"


class Lit(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.x), batch.y)


def test_a_taught_module(healthy):
    torch.manual_seed(0)
    names = {one.name: one for one in examine(teach(Lit(DigitsCNN(4)), Confused(healthy), soft_weight=0.5), digits())}
    assert names["verdict"].reason == "wrong" and "not checked" not in names["view strength"].text


class Scores(nn.Module):
    """Returns other values as its logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"logits": x.flatten(1)[:, :10], "scores": self.net(x)}


class OfScores(Lit):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.x)["scores"], batch.y)


def test_a_taught_module_whose_networks_name_their_logits(healthy):
    """All is as if the networks returned these logits, also in another class order."""

    def findings(kind, wrap, **options):
        torch.manual_seed(0)
        student, order = wrap(DigitsCNN(4)), [*range(1, 10), 0]
        teacher = Teacher(wrap(healthy), classes=order)
        found = [*examine(teach(kind(student), teacher, soft_weight=0.5, **options), digits())]
        assert teacher.compute.__func__ is Teacher.compute
        return [(one.name, one.severity, one.text) for one in found]

    found = findings(OfScores, Scores, output="scores")
    assert found == findings(Lit, lambda net: net)
    assert any(severity == "error" for _, severity, _ in found)  # the order is a wrong one


class Loaders(LightningDataModule):
    """Pairs of another project, in which samples have no index."""

    def __init__(self, labeled=True, val=True):
        super().__init__()
        self.labeled, self.val = labeled, val
        self.part = Digits().load().train

    def loader(self, rows):
        y = self.part.targets[rows]
        return DataLoader(
            TensorDataset(self.part.images.tensors[0][rows], y if self.labeled else torch.full_like(y, -100)), 100
        )

    def train_dataloader(self):
        return self.loader(slice(0, 900))

    def val_dataloader(self):
        return self.loader(slice(900, None)) if self.val else []


def test_data_of_the_user(healthy):
    names = found(Confused(healthy), Loaders())
    assert names["verdict"].reason == "wrong"
    assert "under evaluation transforms" in names["memory"].text
    assert "Loaders has no samples by index" in names["view strength"].text
    assert "Loaders does not count its labeled samples" in names["unlabeled samples"].text


@pytest.mark.parametrize("val", [True, False])
def test_data_without_labels(healthy, val):
    names = found(healthy, Loaders(labeled=False, val=val))
    assert "there are no labeled training samples" in names["training views"].text
    assert names["verdict"].reason is None


def test_noisy_labels(healthy):
    names = found(Confused(healthy), digits(noisy=True))
    assert names["wrong decisions"].hint is None and "labels may be wrong, too" in names["wrong decisions"].text


def test_mixed_views_are_judged_unmixed(healthy):
    from kd_lightning.data.transforms import MixUp

    names = found(healthy, digits(mix=MixUp(1.0)))
    assert names["verdict"].reason is None and "of 1024 labeled training samples" in names["memory"].text


def test_regression():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(dim=1, keepdim=True))

    class Values(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(data, 50)

        val_dataloader = train_dataloader

    teacher = nn.Linear(4, 1)
    teacher.load_state_dict({"weight": torch.ones(1, 4), "bias": torch.zeros(1)})
    module = DistillModule(nn.Linear(4, 1), teacher, task="regression")
    names = {one.name: one for one in examine(module, Values())}
    assert "neither right nor wrong" in names["training views"].text and names["verdict"].reason is None


def test_dense_labels():
    """Positions of a sample count as one."""
    x = torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    class Maps(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(x, y), 20)

        val_dataloader = train_dataloader

    teacher = nn.Conv2d(1, 2, 1)
    teacher.load_state_dict({"weight": torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1), "bias": torch.zeros(2)})
    for make in (DistillModule, lambda s, t, **o: EnsembleDistillModule(s, [t, t], **o)):
        names = {one.name: one for one in examine(make(nn.Conv2d(1, 2, 1), teacher, class_dim=1), Maps())}
        assert "100.0% of 60 labeled training samples" in names["memory"].text
        assert "of the decisions on 60 labeled training samples" in names["wrong decisions"].text
        assert names["verdict"].reason is None


def test_without_a_teacher():
    names = [one.name for one in examine(SupervisedModule(DigitsCNN(4)), digits())]
    assert names == ["labels", "gradients"]
