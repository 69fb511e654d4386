"""SupervisedModule and DistillModule: the objective by hand, frozen teachers, figures, bad input."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import Digits, DistillModule, InputError, SemiSupervisedDataModule, SupervisedModule, Teacher
from kd_lightning.losses import SoftTargetLoss
from kd_lightning.modules.evaluation import Evaluation

NAN = float("nan")


class Fixed(nn.Module):
    """A network that gives the logits it was made with, whatever comes in."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[: len(x)] + 0 * x.sum()


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bernoulli(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def by_hand(task, student, teacher, y, temperature):
    """Hard and soft term in float64, from the formulas."""
    s, t = student.double().numpy(), teacher.double().numpy()
    y = y.double().numpy()
    if task == "multiclass":
        hard = np.mean([-log_softmax(s)[i, int(c)] for i, c in enumerate(y) if c != -100])
        p, q = np.exp(log_softmax(t / temperature)), np.exp(log_softmax(s / temperature))
        return hard, temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    known = ~np.isnan(y) & (y != -100)
    p = sigmoid(s)
    entries = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    soft = bernoulli(sigmoid(t / temperature), sigmoid(s / temperature)).mean()
    return entries[known].mean(), temperature**2 * soft


CASES = {
    "multiclass": ((5, 4), torch.tensor([0, -100, 3, 1, -100])),
    "multilabel": ((3, 4), torch.tensor([[0, 1, 1, 0], [NAN, NAN, NAN, NAN], [1, NAN, 0, 1]])),
    "binary": ((4,), torch.tensor([0, 1, -100, 1])),
}


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_objective_by_hand(task, temperature):
    shape, y = CASES[task]
    torch.manual_seed(0)
    student, teacher = torch.randn(shape) * 2, torch.randn(shape) * 2
    hard, soft = by_hand(task, student, teacher, y, temperature)
    module = DistillModule(
        Fixed(student), Fixed(teacher), task=task, soft_weight=0.3, soft_loss=SoftTargetLoss(temperature, task)
    )
    loss = module.training_step((torch.zeros(len(y), 2), y), 0)  # without a Trainer
    assert loss.item() == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)
    alone = SupervisedModule(Fixed(student), task=task).training_step((torch.zeros(len(y), 2), y), 0)
    assert alone.item() == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize("y", [torch.full((4,), -100), None])
def test_no_label_gives_zero_in_the_graph(y):
    net = nn.Linear(2, 3)
    x = torch.randn(4, 2)
    loss = SupervisedModule(net).training_step(x if y is None else (x, y), 0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(net.weight.grad, torch.zeros(3, 2))


def test_hard_loss_of_ones_own():
    module = SupervisedModule(Fixed(torch.zeros(3, 2)), hard_loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    assert module.training_step((torch.zeros(3, 1), torch.tensor([0, 1, -100])), 0).item() == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: DistillModule(s, t, soft_weight=1.5), r"soft_weight must lie in \[0, 1\], got 1.5"),
        (lambda s, t: DistillModule(s, t, soft_weight=-0.1), r"soft_weight must lie in \[0, 1\]"),
        (
            lambda s, t: DistillModule(s, t, task="binary", soft_loss=SoftTargetLoss()),
            "soft_loss is for the multiclass",
        ),
        (lambda s, t: SupervisedModule(s, task="regression"), "task must be one of multiclass, multilabel, binary"),
        (lambda s, t: SupervisedModule(s, lr_interval="day"), "lr_interval must be one of epoch, step"),
        (lambda s, t: Teacher(t, classes=[0, 0, 1]), "classes must hold each of 0 ... 2 once"),
    ],
)
def test_constructors_check(make, message, student, teacher):
    with pytest.raises(InputError, match=message):
        make(student, teacher)


@pytest.mark.parametrize("label", [10, -1])
def test_labels_outside_the_classes(student, label):
    with pytest.raises(InputError, match=r"labels must be 0 ... 9 .* got " + str(label)):
        SupervisedModule(student).training_step((torch.randn(2, 1, 8, 8), torch.tensor([3, label])), 0)


def test_teacher_with_other_outputs(student):
    module = DistillModule(student, nn.Sequential(nn.Flatten(), nn.Linear(64, 9)))
    with pytest.raises(InputError, match=r"\[9\] from the teacher and \[10\] from the student"):
        module.training_step((torch.randn(2, 1, 8, 8), torch.tensor([3, 1])), 0)


def loader(count=12, batch=4):
    torch.manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 10), batch)


def test_teacher_stays_as_it_was(quiet_trainer, student, teacher):
    before = copy.deepcopy(teacher.state_dict())
    module = DistillModule(student, teacher)
    module.train()
    module.teacher.train()
    teacher.train()  # somebody holds it
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, loader(), loader())
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    assert not any("teacher" in key for key in module.state_dict())
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in student.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher_moves_and_is_shared_by_copies(student, teacher):
    module = DistillModule(student, teacher).to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64
    assert copy.deepcopy(module).teacher.network is teacher


def test_class_map(teacher):
    x = torch.randn(3, 1, 8, 8)
    classes = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]
    from kd_lightning import Batch

    plain, mapped = Teacher(teacher)(Batch(x)), Teacher(teacher, classes=classes)(Batch(x))
    for output, student_class in enumerate(classes):
        assert torch.equal(mapped[:, student_class], plain[:, output])


def test_fingerprint_tells_teachers_apart(teacher):
    def of(network, **kwargs):
        return Teacher(copy.deepcopy(network), **kwargs).fingerprint()

    other_weight, other_buffer = copy.deepcopy(teacher), copy.deepcopy(teacher)
    next(other_weight.parameters()).data.view(-1)[0] += 1e-3
    next(b for b in other_buffer.buffers() if b.is_floating_point())[0] += 1e-3
    prints = [of(teacher), of(other_weight), of(other_buffer), of(teacher, classes=[*range(1, 10), 0])]
    prints.append(of(teacher, preprocess=nn.Upsample(scale_factor=2)))
    assert len(set(prints)) == 5
    assert of(teacher) == prints[0]


class Counting(nn.Module):
    """Counts its forwards."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def test_teacher_sees_validation_once(quiet_trainer, student, teacher):
    counting = Counting(teacher)
    data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=256, val=0.5)
    quiet_trainer(max_epochs=3, limit_train_batches=1).fit(DistillModule(student, counting), datamodule=data)
    assert counting.calls == 3 * 1 + 3  # a step an epoch, and three batches of validation images


def test_without_its_teacher(quiet_trainer, student):
    module = DistillModule(student, None)
    assert "test/accuracy" in quiet_trainer().test(module, loader(), verbose=False)[0]
    assert torch.cat(quiet_trainer().predict(module, loader())).sum(dim=1) == pytest.approx(torch.ones(12))
    with pytest.raises(InputError, match="training needs the teacher"):
        quiet_trainer().fit(module, loader())


def test_logged_names_and_reload(tmp_path, student, teacher):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = DistillModule(student, teacher, soft_weight=0.4)
    trainer.fit(module, loader(), [loader(), loader(8)])
    names = {"train/loss", "train/hard", "train/soft", "soft_weight"}
    names |= {f"val/{name}" for name in ("accuracy", "f1", "calibration_error", "loss")}
    names |= {f"val/{name}" for name in ("agreement", "teacher_kl", "teacher_accuracy")}
    assert names | {"val/accuracy/1"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["soft_weight"].item() == pytest.approx(0.4)
    again = DistillModule.load_from_checkpoint(
        trainer.checkpoint_callback.best_model_path, student=copy.deepcopy(student), teacher=teacher, weights_only=True
    )
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert again.soft_weight == 0.4
    assert trainer.test(module, loader(), verbose=False)  # with its figure


def test_charted_hard_loss_is_a_mean_over_labels(quiet_trainer):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([0, -100, 1, 0])
    rows = DataLoader(TensorDataset(logits, y), batch_size=2)  # one label, then two
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.eye(2)
    trainer = quiet_trainer()
    trainer.fit(SupervisedModule(net, optimizer=lambda p: torch.optim.SGD(p, 0.0)), rows)
    expected = [-log_softmax(logits.double().numpy())[i, y[i]] for i in (0, 2, 3)]
    assert trainer.callback_metrics["train/hard"].item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_figures_agree_with_sklearn():
    torch.manual_seed(0)
    logits, teacher = torch.randn(200, 5) * 2, torch.randn(200, 5) * 2
    y = torch.randint(5, (200,))
    y[::7] = -100
    evaluation = Evaluation("multiclass", 5)
    for part in (slice(0, 90), slice(90, 200)):
        known = int((y[part] != -100).sum())
        loss = nn.functional.cross_entropy(logits[part], y[part])
        evaluation.update(logits[part], y[part], loss, known, teacher[part])
    found = {name: value.item() for name, value in evaluation.compute().items()}

    known = (y != -100).numpy()
    truth, guess = y.numpy()[known], logits.argmax(1).numpy()[known]
    log_p = log_softmax(logits.double().numpy())
    log_t = log_softmax(teacher.double().numpy())
    confidence, right = np.exp(log_p[known]).max(axis=1), truth == guess
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert found["calibration_error"] == pytest.approx(sum(gaps), abs=1e-5)
    assert found["loss"] == pytest.approx(-log_p[known, truth].mean(), rel=1e-5)
    assert found["agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).float().mean().item())
    assert found["teacher_accuracy"] == pytest.approx(accuracy_score(truth, teacher.argmax(1).numpy()[known]))
    assert found["teacher_kl"] == pytest.approx((np.exp(log_t) * (log_t - log_p)).sum(axis=1).mean(), rel=1e-5)


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_figures_of_the_other_tasks(task):
    torch.manual_seed(0)
    shape = (60, 3) if task == "multilabel" else (60,)
    logits, y = torch.randn(shape), torch.randint(2, shape).float()
    y.view(-1)[::5] = NAN
    evaluation = Evaluation(task, 3 if task == "multilabel" else 1)
    known = ~torch.isnan(y)
    evaluation.update(logits, y, torch.tensor(0.5), int(known.sum()), logits)
    found = evaluation.compute()
    right = ((logits > 0).float() == y)[known].float().mean()
    assert found["accuracy"].item() == pytest.approx(right.item())
    assert found["agreement"].item() == 1
    assert found["teacher_kl"].item() == pytest.approx(0, abs=1e-7)
