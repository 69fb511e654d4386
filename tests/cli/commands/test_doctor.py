"""doctor, from its command line."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from kd_lightning import InputError, teach
from kd_lightning.__main__ import main
from kd_lightning.batch import Batch
from kd_lightning.data import Digits, SemiSupervisedDataModule
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import DistillModule, EnsembleDistillModule
from kd_lightning.report.examination import _normalised, examine
from kd_lightning.teachers.teacher import Teacher

IMAGES, LABELS = (Digits().load().train.images.tensors[0], Digits().load().train.targets)
NAMES = ["teacher", "normalisation", "class order", "eval mode", "soft targets", "labels", "gradients"]
WHY = ["memory", "wrong decisions", "view strength", "soft targets of views", "capacity", "gradients over training"]
WHY += ["unlabeled samples", "verdict"]


@pytest.fixture(scope="module")
def trained():
    """Weights of a teacher."""
    torch.manual_seed(0)
    network = DigitsCNN(8)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(6):
        for rows in torch.randperm(len(IMAGES)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(IMAGES[rows]), LABELS[rows]).backward()
            optimizer.step()
    return network.state_dict()


@pytest.fixture
def config(tmp_path, monkeypatch, trained):
    """A tiny distillation as a dict; its teacher's weights are there."""
    monkeypatch.chdir(tmp_path)
    torch.save(trained, "teacher.pt")
    return deepcopy(CONFIG)


CONFIG = {
    "name": "tiny",
    "seed_everything": 1,
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "model": {
        "class_path": "DistillModule",
        "init_args": {
            "student": {"class_path": "DigitsCNN", "init_args": {"width": 4, "dropout": 0.2}},
            "teacher": {
                "class_path": "kd_lightning.load_weights",
                "init_args": {"model": {"class_path": "DigitsCNN", "init_args": {"width": 8}}, "path": "teacher.pt"},
            },
            "soft_weight": 0.5,
        },
    },
    "data": {
        "class_path": "SemiSupervisedDataModule",
        "init_args": {"source": {"class_path": "Digits"}, "labeled": 5, "batch_size": 32},
    },
}


def doctor(config, capsys, *args):
    """Exit status, and what was printed: ``{check: (mark, text, hint)}``."""
    before = set(Path.cwd().rglob("*")) | {Path.cwd() / "config.yaml"}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    try:
        main(["doctor", "--config", "config.yaml", *args])
        status = 0
    except SystemExit as end:
        status = end.code
    assert set(Path.cwd().rglob("*")) == before  # nothing is left behind
    lines = capsys.readouterr().out.strip().splitlines()
    found = {}
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.match(r"(ok|warn|STOP) +([a-z ]+): (.*)", line):
            hint = after.removeprefix("      -> ") if after.startswith("      ->") else None
            found[match[2]] = (match[1], match[3], hint)
    return status, found


def test_healthy(config, capsys):
    status, found = doctor(config, capsys)
    assert status == 0
    assert list(found) == [*NAMES, *WHY[:-1], "selection", "verdict"]
    assert all(mark == "ok" and hint is None for mark, _, hint in found.values())
    right = r"(9\d|100)\.\d% of 119 validation labels right \(95% interval 9.* to .*, chance 10.9%, present student"
    assert re.match(right, found["teacher"][1])
    assert found["labels"][1] == "50 of 1078 training samples labeled, 10 of 10 classes"
    assert found["gradients"][1].count("weight 0.5") == 2


def test_what_fit_has_saved_can_be_examined(config, capsys):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "true"])
    main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"])
    saved = yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())
    assert doctor(saved, capsys)[0] == 0


def test_overrides(config, capsys):
    status, found = doctor(config, capsys, "--model.soft_weight", "1e-7", "--data.val_size", "20")
    assert status == 0
    assert "of 200 validation labels" in found["teacher"][1]
    assert found["gradients"][0] == "warn" and found["gradients"][2].startswith("soft is negligible")


def test_untrained_teacher(config, capsys):
    torch.manual_seed(0)
    torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
    status, found = doctor(config, capsys)
    assert status == 1
    assert found["teacher"][0] == "STOP" and "is it trained" in found["teacher"][2]


@pytest.mark.parametrize("val_size", ["1", "0"])
def test_few_labels_stop_nothing(config, capsys, val_size):
    """Ten validation labels, or none and the 50 of the training part; and a teacher of random weights."""
    torch.manual_seed(0)
    torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
    status, found = doctor(config, capsys, "--data.val_size", val_size)
    assert status == 0
    assert found["teacher"][0] == "warn" and "too few to judge" in found["teacher"][1]
    assert all("too few" in found[name][1] for name in ("normalisation", "class order"))


def test_a_student_with_other_outputs(config, capsys):
    config["model"]["class_path"] = "SupervisedModule"
    del config["model"]["init_args"]["teacher"], config["model"]["init_args"]["soft_weight"]
    status, found = doctor(config, capsys, "--model.student.num_classes", "1000")
    assert status == 1 and found["labels"][0] == "STOP" and "must have 10" in found["labels"][2]
    student = ["--model.student.num_classes", "1000", "--model.num_classes", "1000"]
    assert doctor(config, capsys, *student)[0] == 0


def test_permuted_classes(config, capsys, trained):
    order = [4, 7, 0, 2, 9, 1, 3, 5, 8, 6]
    weights = deepcopy(trained)
    weights["13.weight"], weights["13.bias"] = weights["13.weight"][order], weights["13.bias"][order]
    torch.save(weights, "teacher.pt")
    status, found = doctor(config, capsys)
    assert status == 1  # as it stands, it teaches nonsense
    assert found["class order"][2] == f"Teacher(network, classes={order})"
    network = config["model"]["init_args"]["teacher"]
    config["model"]["init_args"]["teacher"] = {
        "class_path": "kd_lightning.Teacher",
        "init_args": {"network": network, "classes": order},
    }
    status, found = doctor(config, capsys)
    assert status == 0 and found["class order"][0] == "ok"


def scaled(path: str) -> nn.Module:
    """The teacher, as if it had been trained on pixels in [0, 255]."""
    network = DigitsCNN(8)
    network.load_state_dict(torch.load(path, weights_only=True))
    network[0].weight.data /= 255
    return network


def test_normalisation_can_be_pasted(config, capsys):
    network = {"class_path": f"{__name__}.scaled", "init_args": {"path": "teacher.pt"}}
    config["model"]["init_args"]["teacher"] = network
    status, found = doctor(config, capsys)
    assert status == 1 and "[0, 255]" in found["normalisation"][1]
    pasted = yaml.safe_load(found["normalisation"][2].split("in YAML ")[1])
    config["model"]["init_args"]["teacher"] = {
        "class_path": "kd_lightning.Teacher",
        "init_args": {"network": network, **pasted},
    }
    status, found = doctor(config, capsys)
    assert status == 0 and found["normalisation"][0] == "ok"


class Always(nn.Module):
    """Dropout that ignores eval mode."""

    def forward(self, x):
        return F.dropout(x, 0.1)


def with_always(path: str) -> nn.Module:
    network = DigitsCNN(8)
    network.load_state_dict(torch.load(path, weights_only=True))
    return nn.Sequential(network, Always())


def test_functional_dropout(config, capsys):
    network = {"class_path": f"{__name__}.with_always", "init_args": {"path": "teacher.pt"}}
    config["model"]["init_args"]["teacher"] = network
    status, found = doctor(config, capsys)
    assert status == 0
    assert found["eval mode"][0] == "warn" and "F.dropout" in found["eval mode"][2]


@pytest.mark.parametrize(("temperature", "advice"), [("0.01", "raise"), ("1000", "lower")])
def test_temperature(config, capsys, temperature, advice):
    config["model"]["init_args"]["soft_loss"] = {"class_path": "kd_lightning.losses.KDLoss"}
    status, found = doctor(config, capsys, "--model.init_args.soft_loss.init_args.temperature", temperature)
    assert status == 0
    assert f"{advice} the temperature" in found["soft targets"][2]


def dead() -> nn.Module:
    """A student that cannot learn."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)


def broken() -> nn.Module:
    """A student whose weights are not finite."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(network[1].weight, torch.nan)
    return network


@pytest.mark.parametrize(("student", "text"), [("dead", "no parameter"), ("broken", "nan")])
@pytest.mark.parametrize("module", ["DistillModule", "SupervisedModule"])
def test_student_that_cannot_learn(config, capsys, student, text, module):
    config["model"]["init_args"]["student"] = {"class_path": f"{__name__}.{student}"}
    if module == "SupervisedModule":
        config["model"]["class_path"] = module
        del config["model"]["init_args"]["teacher"], config["model"]["init_args"]["soft_weight"]
    status, found = doctor(config, capsys)
    assert status == 1
    assert found["gradients"][0] == "STOP" and text in found["gradients"][1]


def test_without_a_teacher(config, capsys):
    config["model"] = {
        "class_path": "SupervisedModule",
        "init_args": {"student": {"class_path": "DigitsCNN", "init_args": {"width": 4}}},
    }
    status, found = doctor(config, capsys)
    assert status == 0
    assert list(found) == ["labels", "gradients"]
    assert [mark for mark, _, _ in found.values()] == ["ok", "ok"]


def test_teachers_of_part_of_the_classes():
    """Their accuracy is not checked; their eval mode is."""
    torch.manual_seed(0)
    restless = nn.Sequential(DigitsCNN(4, num_classes=5), Always())
    teachers = [
        DigitsCNN(4),
        Teacher(DigitsCNN(4, num_classes=3), classes=[7, 2, 9]),
        Teacher(restless, classes=[4, 3, 2, 1, 0]),
    ]
    module = EnsembleDistillModule(DigitsCNN(4), teachers)
    found = {finding.name: finding for finding in examine(module, SemiSupervisedDataModule(Digits(), labeled=10))}
    assert [name for name in found if name.startswith(("teachers[1]", "teachers[2]"))] == [
        "teachers[1], eval mode",
        "teachers[2], eval mode",
    ]
    assert "the same in two passes" in found["teachers[1], eval mode"].text
    assert "two passes give different logits" in found["teachers[2], eval mode"].text
    assert "right (95% interval" in found["ensemble"].text


class Forms(LightningDataModule):
    """The digits as a tensor, a mapping or a tuple; with ``teacher_inputs`` for the teacher."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def loader(self, part):
        forms = {
            "tensor": lambda x, y: (x, y),
            "mapping": lambda x, y: {"image": x, "scale": torch.tensor(1.0), "label": y},
            "tuple": lambda x, y: ((x, torch.tensor(1.0)), y),
            "teacher_inputs": lambda x, y: {"image": x, "scale": torch.tensor(1.0), "label": y, "teacher_inputs": x},
        }
        rows = zip(IMAGES[part], LABELS[part], strict=True)
        return DataLoader([forms[self.form](*row) for row in rows], 50)

    def train_dataloader(self):
        return self.loader(slice(0, 500))

    def val_dataloader(self):
        return self.loader(slice(500, 700))


class Scaled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image, scale=None):
        return self.network(image if scale is None else image * scale.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", ["distill", "ensemble"])
def test_batches_of_each_form(kind, trained):
    """The findings are those of the same batches as tensors."""
    found = {}
    for form in ("tensor", "mapping", "tuple", "teacher_inputs"):
        networks = [Scaled(DigitsCNN(8)) for _ in range(2)]
        networks[0].network.load_state_dict(trained)
        networks[1].network.load_state_dict({name: value * 0.5 for name, value in trained.items()})
        torch.manual_seed(0)
        student = Scaled(DigitsCNN(4))
        module = DistillModule(student, networks[0]) if kind == "distill" else EnsembleDistillModule(student, networks)
        found[form] = [(finding.name, finding.text, finding.hint) for finding in examine(module, Forms(form))]
    assert "9" in found["tensor"][0][1] and len(found["tensor"]) == (7 if kind == "distill" else 14) + len(WHY)
    for form in ("mapping", "tuple", "teacher_inputs"):
        for one, other in zip(found[form], found["tensor"], strict=True):
            assert one == other or one[0].endswith(("normalisation", "capacity", "verdict"))  # tensors alone are scaled


class Lit(LightningModule):
    """Of another project. Its steps change the images, which its network is called with in some form."""

    def __init__(self, network, form):
        super().__init__()
        self.net = network
        self.form = form

    def loss(self, batch):
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        x = x[0] if isinstance(x, list | tuple) else x
        scale = torch.full((len(x),), 0.5)
        call = {
            "tensor": lambda: self.net(x * 0.5),
            "tuple": lambda: self.net(x, scale),
            "mapping": lambda: self.net(image=x, scale=scale),
            "teacher_inputs": lambda: self.net(x, scale=scale),
        }
        return F.cross_entropy(call[self.form](), y)

    def training_step(self, batch, batch_idx):
        self.log("train/loss", loss := self.loss(batch))
        return {"loss": loss}


class Hooked(Lit):
    """Changes the images in its own hook."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0.5, batch[1]

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple", "teacher_inputs", "hook"])
def test_a_taught_module(form, trained):
    """The findings are those of a DistillModule, whose networks get what the module gives its network."""

    def networks(halved):
        teacher = Scaled(DigitsCNN(8))
        teacher.network.load_state_dict(trained)
        torch.manual_seed(0)
        student = Scaled(DigitsCNN(4))
        if halved:
            student.network[0].weight.data *= 0.5
            if form != "teacher_inputs":  # there, the teacher gets the images as they are
                teacher.network[0].weight.data *= 0.5
        return student, teacher

    expected = [*examine(DistillModule(*networks(True), soft_weight=0.5), Forms("tensor"))]
    student, teacher = networks(False)
    module = Hooked(student, form) if form == "hook" else Lit(student, form)
    found = [*examine(teach(module, teacher, soft_weight=0.5), Forms("tensor" if form == "hook" else form))]
    assert [finding.name for finding in found] == NAMES + WHY
    for one, other in zip(found, expected, strict=True):
        if one.name == "gradients":  # those of halved weights differ
            assert one.text.count("weight 0.5") == 2 and one.severity == "info"
        else:
            assert one == other or one.name in ("normalisation", "capacity")
    assert module.soft_weight == 0.5


def test_the_gradients_of_a_taught_module(trained):
    """They are those of a DistillModule, at a weight that is no half."""
    texts = []
    for make in (DistillModule, lambda student, *args, **kwargs: teach(Plain(student), *args, **kwargs)):
        torch.manual_seed(0)
        student, teacher = DigitsCNN(4), DigitsCNN(8)
        teacher.load_state_dict(trained)
        found = examine(make(student, teacher, soft_weight=0.3), Forms("tensor"))
        texts += [finding.text for finding in found if finding.name == "gradients"]
    assert texts[0] == texts[1] and "hard" in texts[0] and "(weight 0.3)" in texts[0]


class Plain(LightningModule):
    """Without any change of the images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Manual(Plain):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False


class NeedsTrainer(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.trainer.current_epoch


class Noisy(Plain):
    """Its training step sees noise alone."""

    def training_step(self, batch, batch_idx):
        return super().training_step((torch.rand_like(batch[0]), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class Twice(Plain):
    def training_step(self, batch, batch_idx):
        logits = self.net(torch.cat([batch[0], batch[0]]))
        return F.cross_entropy(logits, torch.cat([batch[1], batch[1]]))


class Odd(Plain):
    """Its loaders have batches of a kind that is not known."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["pictures"]["a"]), batch["truth"]["of them"])


class OddForms(Forms):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"truth": {"of them": batch[1]}, "pictures": {"a": batch[0]}, "label": "none"}


class FloatForms(Forms):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], F.one_hot(batch[1], 10).float()


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda s, t: teach(Manual(s), t), Forms, "doctor needs a module with automatic optimisation"),
        (lambda s, t: teach(Plain(s), None), Forms, "doctor needs a module with a teacher"),
        (lambda s, t: teach(Plain(s), t, class_dim=1), Forms, r"doctor needs .* \(B, C\), but teach has class_dim"),
        (lambda s, t: teach(Plain(s), t, mask="mask"), Forms, r"doctor needs .* \(B, C\), but teach has mask"),
        (lambda s, t: teach(NeedsTrainer(s), t), Forms, "cannot run training_step without a trainer: RuntimeError"),
        (lambda s, t: teach(Twice(s), t), Forms, "training_step calls the student with 100 rows for 50 labels"),
        (lambda s, t: teach(Odd(s), t), OddForms, r"the module's unpack\(batch\) can convert it"),
        (lambda s, t: teach(Plain(s), t, "net.0"), OddForms, "training_step does not lead to .*: KeyError: 0"),
        (
            lambda s, t: teach(Plain(s), t, soft_loss=nn.MSELoss()),
            FloatForms,
            "doctor compares classes, got labels of torch.float32 and soft_loss MSELoss",
        ),
    ],
)
def test_taught_modules_that_cannot_be_checked(make, data, message):
    with pytest.raises(InputError, match=message):
        [*examine(make(DigitsCNN(4), DigitsCNN(4)), data("tensor"))]


def test_a_taught_module_is_judged_by_its_validation_step(trained):
    teacher = DigitsCNN(8)
    teacher.load_state_dict(trained)
    first, *_ = examine(teach(Noisy(DigitsCNN(4)), teacher), Forms("tensor"))
    assert re.match(r"(9\d|100)\.\d% of 200 validation labels", first.text)


class Reading(DistillModule):
    """Reads the images in its own way."""

    def unpack(self, batch):
        batch = Batch.from_any(batch)
        return Batch(batch.x * 0.5, batch.y)


def test_a_module_reads_batches_itself(trained):
    """Also those of a datamodule."""
    networks = DigitsCNN(4), DigitsCNN(8)
    networks[1].load_state_dict(trained)
    networks[1][0].weight.data *= 2
    first, *_ = examine(Reading(*networks), Forms("tensor"))
    assert re.match(r"(9\d|100)\.\d% of 200 validation labels", first.text)
    first, *_ = examine(DistillModule(*networks), Forms("tensor"))
    networks[1][0].weight.data /= 2
    same, *_ = examine(DistillModule(*networks), Forms("tensor"))
    assert first.text != same.text


def test_without_validation_part(config, capsys):
    status, found = doctor(config, capsys, "--data.val_size", "0")
    assert status == 0
    assert "of 50 labels of training images (there are no validation labels) right" in found["teacher"][1]


class PlainData(LightningDataModule):
    """Pairs from TensorDatasets, normalised on the way, optionally without labels."""

    def __init__(self, val: bool = True, labeled: bool = True, test: bool = False):
        super().__init__()
        self.val, self.labeled, self.test = val, labeled, test
        self.eval_transform = v2.Compose([v2.Normalize([0.5], [0.25])])

    def loader(self, part):
        y = LABELS[part] if self.labeled else torch.full_like(LABELS[part], -100)
        return DataLoader(TensorDataset(IMAGES[part], y), 50)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 0.5) / 0.25, batch[1]

    def train_dataloader(self):
        return self.loader(slice(0, 500))

    def val_dataloader(self):
        return self.loader(slice(500, 700)) if self.val else []

    def test_dataloader(self):
        raise AssertionError("the test part judges nothing")


class TestTheirData:
    def teacher(self, config):
        config["data"] = {"class_path": f"{__name__}.PlainData"}
        network = config["model"]["init_args"]["teacher"]
        preprocess = {"class_path": "torchvision.transforms.v2.Normalize", "init_args": {"mean": [-2.0], "std": [4.0]}}
        right = {
            "class_path": "kd_lightning.Teacher",
            "init_args": {"network": network, "preprocess": preprocess},
        }
        return network, right

    def test_healthy(self, config, capsys):
        _, config["model"]["init_args"]["teacher"] = self.teacher(config)
        status, found = doctor(config, capsys)
        assert status == 0 and all(mark == "ok" for mark, _, _ in found.values())
        assert "of 200 validation labels" in found["teacher"][1]
        assert found["labels"][1] == "50 of 50 samples of a training batch labeled, 10 of 10 classes"
        assert "with a SemiSupervisedDataModule alone" in found["gradients over training"][1]
        assert "experiment" not in found["verdict"][1]  # which does not take these data

    def test_normalised_by_the_datamodule(self, config, capsys):
        self.teacher(config)
        _, found = doctor(config, capsys)
        assert "trained on inputs in [0, 1]" in found["normalisation"][1]
        assert "mean: [-2.0], std: [4.0]" in found["normalisation"][2]

    def test_without_validation_part(self, config, capsys):
        _, config["model"]["init_args"]["teacher"] = self.teacher(config)
        status, found = doctor(config, capsys, "--data.val", "false")
        assert status == 0 and "of 500 labels of training images" in found["teacher"][1]

    def test_without_any_label(self, config, capsys):
        _, config["model"]["init_args"]["teacher"] = self.teacher(config)
        status, found = doctor(config, capsys, "--data.labeled", "false")
        assert status == 0 and "no labels" in found["teacher"][1]
        assert found["labels"][1] == "0 of 50 samples of a training batch labeled"
        config["model"] = {"class_path": "SupervisedModule", "init_args": {"student": {"class_path": "DigitsCNN"}}}
        status, found = doctor(config, capsys, "--data.labeled", "false")
        assert status == 1 and found["labels"][0] == "STOP"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model.soft_wieght", "0.5"], ["soft_wieght"]),
        (["--model.teacher.path", "gone.pt"], ["gone.pt"]),
        (["--ckpt_path", "config.yaml"], ["config.yaml"]),
        (["--model.student.num_classes", "7"], ["same number of outputs", "[10]", "[7]"]),
        (["--model.teacher", "null"], ["teacher"]),
        (["--data.batch_size", "0"], ["batch_size must be at least 1, got 0"]),
        (["--model", "lightning.pytorch.demos.boring_classes.BoringModel"], ["SupervisedModule", "BoringModel"]),
    ],
)
def test_wrong_input(config, capsys, args, parts):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    if "BoringModel" in args[-1]:
        config["model"] = {"class_path": args[-1]}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        args = []
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--config", "config.yaml", *args])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert not Path("runs").exists()


def test_hidden_truth_is_not_used(config, capsys, monkeypatch):
    """With the truth of the unlabeled images falsified, doctor prints the same."""
    expected = doctor(config, capsys, "--data.val_size", "0")
    load = Digits.load

    def falsified(self):
        parts = load(self)
        monkeypatch.setattr("kd_lightning.data.split_setup.make_split", lambda *args, **kwargs: split)
        hidden = parts.train.targets.clone()
        hidden[split.unlabeled] = (hidden[split.unlabeled] + 1) % 10
        return parts._replace(train=parts.train._replace(targets=hidden))

    from kd_lightning.data.splits import make_split

    split = make_split(load(Digits()).train.targets, 5, 0, 0, None)
    monkeypatch.setattr(Digits, "load", falsified)
    assert doctor(config, capsys, "--data.val_size", "0") == expected


def test_finds_the_last_normalisation():
    class Data:
        eval_transform = v2.Compose([v2.Resize(8), v2.Compose([v2.Normalize([0.1], [0.2])]), nn.Identity()])

    assert _normalised(Data()) == ([0.1], [0.2])
    assert _normalised(object()) is None
