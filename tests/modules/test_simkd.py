"""SimKDModule: the objective against a plain loop, the classifier's copy, and what a run leaves."""

import copy
import warnings
from functools import partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from kd_lightning import (
    Digits,
    ExactResume,
    InputError,
    Run,
    SeedEveryStep,
    SemiSupervisedDataModule,
    SimKDModule,
    SimKDStudent,
    SoftWeightAnnealing,
    Teacher,
)
from kd_lightning.__main__ import main
from kd_lightning.models import DigitsCNN
from kd_lightning.report.examination import examine

LAYER = "9"  # the last ReLU of DigitsCNN


def networks(seed=0, **kwargs):
    torch.manual_seed(seed)
    teacher = DigitsCNN(8)
    teacher.train()(torch.randn(32, 1, 8, 8))
    teacher.eval()
    return SimKDStudent(DigitsCNN(4), teacher, LAYER, LAYER, **kwargs), teacher


def data(**kwargs):
    settings = {"labeled": 10, "batch_size": 64, "val_size": 0.5, "num_views": 2, "seed": 3}
    return SemiSupervisedDataModule(Digits(), **settings | kwargs)


def fit(trainer, student, teacher, path=None, **kwargs):
    module = SimKDModule(student, teacher, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer.fit(module, datamodule=data(**kwargs), ckpt_path=path)
    return module


def test_equals_a_plain_loop(quiet_trainer):
    """Labels do not count; the backbone's and the projector's statistics are those of training, the teacher's stay."""
    student, teacher = networks()
    plain = copy.deepcopy(student).train()
    trainer = quiet_trainer(limit_train_batches=3)
    module = fit(trainer, student, teacher)
    loader = data()
    loader.setup("fit")
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for batch in islice(loader.train_dataloader(), 3):
        with torch.no_grad():
            maps = torch.nn.Sequential(*[*teacher][:10])(batch.x)
        loss = F.mse_loss(plain.projector(plain.backbone(batch.x)), maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = module.student.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-6), name
    found = trainer.callback_metrics
    assert found["train/feature"].item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["train/loss"] == found["train/feature"]
    assert {"val/feature", "val/accuracy", "val/agreement", "val/teacher_accuracy"} <= {*found}
    assert "train/hard" not in found
    assert "train/soft" not in found


def test_no_report_of_soft_targets(quiet_trainer, caplog):
    """Neither a fit nor doctor checks soft targets, which the objective does not have."""
    student, teacher = networks()
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
        module = fit(quiet_trainer(limit_train_batches=1, limit_val_batches=3), student, teacher)
    findings = {finding.name: finding for finding in examine(module, data())}
    assert {"teacher", "class order", "eval mode", "gradients"} <= {*findings}
    assert "soft targets" not in findings
    texts = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]
    assert any(text.startswith("teacher: ") for text in texts)
    assert not any("soft targets" in text for text in texts)


def test_a_soft_weight_cannot_be_annealed(quiet_trainer):
    student, teacher = networks()
    with pytest.raises(InputError, match="'soft_weight' to anneal: SimKDModule has no attribute"):
        fit(quiet_trainer(callbacks=[SoftWeightAnnealing(0.9, 0.0)]), student, teacher)


def test_agrees_with_the_teacher_where_maps_agree(quiet_trainer):
    _, teacher = networks()
    student = SimKDStudent(copy.deepcopy(teacher), teacher, LAYER, LAYER)
    student.projector = torch.nn.Sequential()  # the map itself
    module = SimKDModule(student, teacher)
    (found,) = quiet_trainer().validate(module, datamodule=data(), verbose=False)
    assert found["val/agreement"] == 1
    assert found["val/accuracy"] == found["val/teacher_accuracy"]
    assert found["val/teacher_kl"] == pytest.approx(0, abs=1e-6)


def test_teachers_map_of_another_size(quiet_trainer):
    torch.manual_seed(0)
    teacher = DigitsCNN(8)
    smaller = SimKDStudent(torch.nn.Sequential(torch.nn.MaxPool2d(2), DigitsCNN(4)), teacher, "1.9", LAYER)
    trainer = quiet_trainer(limit_train_batches=1)
    fit(trainer, smaller, teacher)
    larger = SimKDStudent(DigitsCNN(4), teacher, "5", LAYER)
    with pytest.raises(InputError, match=r"map \[8, 8\] must not be larger than the teacher's \[4, 4\]; set"):
        fit(quiet_trainer(limit_train_batches=1), larger, teacher)
    fit(quiet_trainer(limit_train_batches=1), SimKDStudent(DigitsCNN(4), teacher, "5", LAYER, size=[4, 4]), teacher)


class TestRefused:
    def test_another_student(self):
        with pytest.raises(InputError, match="^student must be a SimKDStudent, got DigitsCNN$"):
            SimKDModule(DigitsCNN(4), DigitsCNN(8))

    def test_another_teacher(self, quiet_trainer):
        student, teacher = networks()
        other = copy.deepcopy(teacher)
        other[13].bias.data += 1
        with pytest.raises(InputError, match="^student: its classifier must be the teacher's, got another 13.bias"):
            fit(quiet_trainer(), student, other)

    def test_class_map(self):
        student, teacher = networks()
        with pytest.raises(InputError, match="^teacher: classes must be left out"):
            SimKDModule(student, Teacher(teacher, classes=[*range(1, 10), 0]))

    def test_no_teacher(self, quiet_trainer):
        student, _ = networks()
        module = SimKDModule(student, None)
        quiet_trainer().test(module, datamodule=data(), verbose=False)
        with pytest.raises(InputError, match="training needs the teacher"):
            quiet_trainer().fit(module, datamodule=data())


def test_compiled_student_and_cached_teacher(quiet_trainer, tmp_path):
    student, teacher = networks()
    trainers = [quiet_trainer(max_epochs=2, limit_train_batches=2) for _ in range(2)]
    live = fit(trainers[0], copy.deepcopy(student), teacher).student.state_dict()
    compiled = torch.compile(student, backend="eager")
    cached = fit(trainers[1], compiled, Teacher(teacher, cache=tmp_path, cache_dtype="float32"))
    for name, value in cached.student._orig_mod.state_dict().items():
        assert torch.equal(live[name], value), name


def test_resumes_exactly(quiet_trainer, tmp_path):
    def trainer(epochs):
        return quiet_trainer(max_epochs=epochs, callbacks=[SeedEveryStep(seed=3), ExactResume()], limit_train_batches=3)

    whole = fit(trainer(3), *networks())
    first = trainer(2)
    fit(first, *networks())
    first.save_checkpoint(tmp_path / "c.ckpt")
    resumed = fit(trainer(3), *networks(), path=tmp_path / "c.ckpt").state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items())


def test_bf16(quiet_trainer):
    trainer = quiet_trainer(precision="bf16-mixed", limit_train_batches=2)
    fit(trainer, *networks())
    assert trainer.callback_metrics["train/feature"].isfinite()


def test_a_run_is_rebuilt_without_the_teachers_weights(tmp_path, monkeypatch, root):
    """From its config and its deployed weights alone, which hold the teacher's classifier."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((root / "configs/simkd_digits.yaml").read_text())
    torch.manual_seed(5)
    teacher = DigitsCNN(32)
    torch.save(teacher.state_dict(), "teacher.pt")
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = "teacher.pt"
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2, "limit_test_batches": 2, "accelerator": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    folder = tmp_path / "runs/simkd_digits/version_0"
    (tmp_path / "teacher.pt").unlink()
    state = load_file(folder / "student.safetensors")
    assert torch.equal(state["head.13.weight"], teacher.state_dict()["13.weight"])
    student = Run(folder).student().eval()
    x = torch.randn(3, 1, 8, 8)
    expected = student.head(student.projector(student.backbone(x)))
    assert torch.equal(student(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    main(["export", str(folder), "--format", "torch_export"])
    assert torch.allclose(torch.export.load(next(folder.rglob("*.pt2"))).module()(x), expected, atol=1e-5)
