"""StudentWriter: which weights it writes, their metadata, and loading them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from torch import nn

from kd_lightning import (
    Digits,
    DistillModule,
    InputError,
    SemiSupervisedDataModule,
    StudentWriter,
    SupervisedModule,
    load_weights,
)
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.layers import quantize

SGD = partial(torch.optim.SGD, lr=0.5)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("monitor", ["val/loss", None])
def test_best_where_monitored_else_last(quiet_trainer, loader, tmp_path, student, teacher, monitor):
    module = DistillModule(student, teacher, optimizer=SGD, soft_weight=0.0)
    # the loss falls, so with mode max the best checkpoint is not the last
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor, mode="max")
    trainer = quiet_trainer(max_epochs=6, enable_checkpointing=True, callbacks=[checkpoint, StudentWriter()])
    trainer.fit(module, loader(), loader())
    path = tmp_path / "student.safetensors"
    best = Path(checkpoint.best_model_path)
    assert metadata(path)["weights"] == (best.name if monitor else "step 18")
    expected = DistillModule(DigitsCNN(4), teacher)
    expected.load_state_dict(torch.load(best, weights_only=True)["state_dict"] if monitor else module.state_dict())
    x = torch.randn(5, 1, 8, 8)
    logits = load_weights(DigitsCNN(4), path).eval()(x)
    assert torch.equal(logits, expected.eval()(x))
    assert torch.equal(logits, module.eval()(x)) == (monitor is None)


def test_metadata_and_the_runs_folder(quiet_trainer, tmp_path, student):
    data = SemiSupervisedDataModule(Digits(), labeled=2, unlabeled="none", eval_transform=nn.Identity())
    logger = CSVLogger(tmp_path, name="n", version=3)
    quiet_trainer(logger=logger, callbacks=[StudentWriter()]).fit(SupervisedModule(student), data)
    found = metadata(tmp_path / "n/version_3/student.safetensors")
    assert found.pop("kd_lightning")
    assert json.loads(found.pop("classes")) == [*"0123456789"]
    assert json.loads(found.pop("input_shape")) == [1, 8, 8]
    size = sum(t.numel() * 4 for t in student.state_dict().values() if t.is_floating_point())
    assert json.loads(found.pop("size_bytes")) == size
    assert found == {"task": "multiclass", "precision": "fp32", "preprocessing": "Identity()", "weights": "step 1"}
    assert not (tmp_path / "student.safetensors").exists()


def test_a_quantised_student(quiet_trainer, loader, tmp_path, student, caplog):
    """Its size is that of its weights at their bits, and the file restores it."""
    net = quantize(student, 4)
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[StudentWriter()]).fit(SupervisedModule(net), loader())
    found = metadata(tmp_path / "student.safetensors")
    rest = 9 * 4 + 4 * (4 + 8 + 16) + 16 * 10 + 10
    size = (9 * 4 * 8 + 9 * 8 * 16) // 2 + 4 * (8 + 16 + 2 + rest)
    assert (found["precision"], json.loads(found["size_bytes"])) == ("8A-4W", size)
    assert caplog.messages[-1].endswith(f"student.safetensors: 1,704 parameters, 8A-4W, {size / 1000:.1f} KB")
    x = torch.randn(5, 1, 8, 8)
    fresh = load_weights(quantize(DigitsCNN(4), 4), tmp_path / "student.safetensors")
    assert torch.equal(fresh.eval()(x), net.eval()(x))


def test_best_checkpoint_that_is_gone(quiet_trainer, loader, tmp_path, student):
    """A run that was moved, and gets no better once resumed, still ends with its student."""

    def fit(folder, path=None):
        callbacks = [ModelCheckpoint(tmp_path / folder, monitor="val/loss", save_last=True), StudentWriter()]
        trainer = quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(SupervisedModule(student, optimizer=SGD), loader(), loader(), ckpt_path=path)

    fit("old")
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "student.safetensors").unlink()
    fit("new", tmp_path / "new/last.ckpt")  # nothing left to do
    assert metadata(tmp_path / "student.safetensors")["weights"] == "step 6"


def test_tied_weights(quiet_trainer, loader, tmp_path):
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    net = nn.Sequential(nn.Flatten(), first, second)
    quiet_trainer(callbacks=[StudentWriter()]).fit(SupervisedModule(net), loader())
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64))
    load_weights(fresh, tmp_path / "student.safetensors")
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), net(x))


def test_dry_run_writes_nothing(quiet_trainer, loader, tmp_path, student):
    quiet_trainer(fast_dev_run=True, callbacks=[StudentWriter()]).fit(SupervisedModule(student), loader())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("student", [None, "resnet", 3])
def test_needs_a_student(quiet_trainer, loader, student):
    class Theirs(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    module = Theirs()
    if student:
        module.student = student
    with pytest.raises(InputError, match="StudentWriter needs a module with a student, Theirs has none"):
        quiet_trainer(callbacks=[StudentWriter()]).fit(module, loader())
