"""StudentWriter: which weights it writes, their metadata, and loading them."""

import json
from enum import Enum
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import (
    CompileNetworks,
    Digits,
    InputError,
    SemiSupervisedDataModule,
    StudentWriter,
    SupervisedModule,
    load_weights,
)
from kd_lightning.callbacks import student_writer
from kd_lightning.data.preprocessing import describe_preprocessing
from kd_lightning.models import DigitsCNN
from kd_lightning.quantization.layers import quantize

SGD = partial(torch.optim.SGD, lr=0.5)


class Color(Enum):
    RED = 1


def equal(net, other):
    states = net.state_dict(), other.state_dict()
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


class LogsProgress(SupervisedModule):
    """Logs a metric under a name that does not show its direction: it falls, so that the first value is the best."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("falls", -float(self.global_step))


@pytest.mark.parametrize("monitor", ["falls", None])
def test_best_where_monitored_else_last(quiet_trainer, loader, tmp_path, student, monitor):
    module = LogsProgress(student, optimizer=SGD)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor, mode="max")
    trainer = quiet_trainer(max_epochs=6, enable_checkpointing=True, callbacks=[checkpoint, StudentWriter()])
    trainer.fit(module, loader(), loader())
    path = tmp_path / "student.safetensors"
    best = Path(checkpoint.best_model_path)
    assert metadata(path)["weights"] == (best.name if monitor else "step 18")
    expected = SupervisedModule(DigitsCNN(4))
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
    assert json.loads(found.pop("preprocessing")) is None
    assert found == {"task": "multiclass", "precision": "fp32", "transform": "Identity()", "weights": "step 1"}
    assert not (tmp_path / "student.safetensors").exists()


def test_preprocessing_is_described(quiet_trainer, tmp_path, student):
    data = SemiSupervisedDataModule(Digits(), labeled=2, unlabeled="none")
    quiet_trainer(callbacks=[StudentWriter()]).fit(SupervisedModule(student), data)
    found = json.loads(metadata(tmp_path / "student.safetensors")["preprocessing"])
    assert found == describe_preprocessing(data.eval_transform, (1, 8, 8))
    assert found["scale"] == 1 / 255


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


class TestBestCheckpoint:
    """The best checkpoint is found, or a warning names it and the last weights are written."""

    @pytest.fixture
    def fit(self, quiet_trainer, loader, tmp_path):
        def run(folder="old", path=None, change=lambda file: None, epochs=2, filename="{epoch}", **kwargs):
            class Change(Callback):
                def on_train_end(self, trainer, pl_module):
                    change(Path(trainer.checkpoint_callback.best_model_path))

            checkpoint = ModelCheckpoint(
                tmp_path / folder, filename, monitor="falls", mode="max", save_last=True, auto_insert_metric_name=False
            )
            callbacks = [checkpoint, StudentWriter(), Change(), *kwargs.pop("callbacks", ())]
            trainer = quiet_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
            torch.manual_seed(0)
            module = LogsProgress(DigitsCNN(4), optimizer=SGD)
            trainer.fit(module, loader(), loader(), ckpt_path=path, weights_only=kwargs.get("weights_only"))
            return metadata(tmp_path / "student.safetensors")["weights"], module.student

        return run

    @pytest.mark.parametrize(
        ("filename", "origin"),
        [("best", "best.ckpt"), ("e/{epoch}-{val/loss:.0f}", r"e/0-2.ckpt"), ("a/b/c", "a/b/c.ckpt")],
    )
    def test_origin_is_the_path_in_the_folder_of_checkpoints(self, fit, tmp_path, filename, origin):
        assert fit(filename=filename)[0] == origin
        assert (tmp_path / "old" / origin).is_file()

    @pytest.mark.parametrize("filename", ["{epoch}", "e/{epoch}-{val/loss:.0f}"])
    def test_in_a_run_that_was_moved(self, fit, tmp_path, filename):
        before, _ = fit(filename=filename)
        (tmp_path / "old").rename(tmp_path / "new")
        (tmp_path / "student.safetensors").unlink()
        after, student = fit("new", tmp_path / "new/last.ckpt", filename=filename)  # nothing left to do
        assert after == before
        assert not equal(load_weights(DigitsCNN(4), tmp_path / "student.safetensors"), student)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (Path.unlink, "old/0.ckpt is gone"),
            (lambda file: file.write_bytes(b""), "old/0.ckpt cannot be read"),
            (lambda file: file.write_bytes(file.read_bytes()[:-200]), "old/0.ckpt cannot be read"),
            (lambda file: torch.save({"state_dict": {}}, file), "old/0.ckpt does not fit the student: 20 missing"),
            (lambda file: torch.save({"state_dict": Path("a")}, file), "old/0.ckpt was refused"),
        ],
        ids=["gone", "empty", "cut", "other", "odd"],
    )
    def test_that_cannot_be_used(self, fit, tmp_path, change, message):
        with pytest.warns(
            UserWarning, match=f"student.safetensors holds the last weights, not the best ones: .*{message}"
        ):
            origin, student = fit(change=change)
        assert origin == "step 6"
        assert equal(load_weights(DigitsCNN(4), tmp_path / "student.safetensors"), student)

    def test_with_objects_that_torch_does_not_load(self, quiet_trainer, loader, tmp_path, student):
        class Odd(SemiSupervisedDataModule):
            def __init__(self, path=Path("a"), color=Color.RED):
                super().__init__(Digits(), labeled=2, unlabeled="none")
                self.save_hyperparameters({"path": path, "color": color})

        class State(Callback):
            def state_dict(self):
                return {"path": Path("a")}

        checkpoint = ModelCheckpoint(tmp_path / "c", "best", monitor="val/accuracy", mode="max")
        callbacks = [checkpoint, StudentWriter(), State()]
        trainer = quiet_trainer(enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(SupervisedModule(student), Odd())
        with pytest.raises(Exception, match="PosixPath"):
            torch.load(tmp_path / "c/best.ckpt", weights_only=True)
        assert metadata(tmp_path / "student.safetensors")["weights"] == "best.ckpt"
        assert equal(load_weights(DigitsCNN(4), tmp_path / "student.safetensors"), student)


class Faulty(SemiSupervisedDataModule):
    """Has class names and transforms that metadata cannot represent."""

    class Transform(nn.Module):
        def forward(self, x):
            return x

        def __repr__(self):
            raise RuntimeError("no text")

    def __init__(self):
        super().__init__(Digits(), labeled=2, unlabeled="none", eval_transform=nn.Identity())

    @property
    def class_names(self):
        return [object()] * 10

    @class_names.setter
    def class_names(self, names):
        pass


def test_metadata_that_cannot_be_determined_are_left_out(quiet_trainer, tmp_path, student, monkeypatch):
    def fault(network):
        raise ValueError("odd network")

    monkeypatch.setattr(student_writer, "size_of", fault)
    monkeypatch.setattr(student_writer, "precision_of", fault)
    data = Faulty()

    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            data.eval_transform = Faulty.Transform()

    with pytest.warns(UserWarning, match="metadata of student.safetensors lack") as warned:
        quiet_trainer(callbacks=[StudentWriter(), Break()]).fit(SupervisedModule(student), data)
    texts = [str(warning.message) for warning in warned]
    for name in ("precision", "size_bytes", "classes", "transform"):
        assert any(f"student.safetensors lack {name}: " in text for text in texts), name
    found = metadata(tmp_path / "student.safetensors")
    assert found.keys() == {"kd_lightning", "task", "input_shape", "preprocessing", "weights"}
    assert found["preprocessing"] == "null"
    assert equal(load_weights(DigitsCNN(4), tmp_path / "student.safetensors"), student)


@pytest.mark.parametrize("kind", ["whole", "part", "in place"])
def test_a_compiled_student_has_plain_keys(quiet_trainer, loader, tmp_path, student, kind):
    checkpoint = ModelCheckpoint(tmp_path, "best", monitor="falls", mode="max")
    callbacks = [checkpoint, StudentWriter()]
    net = student
    if kind == "whole":
        net = torch.compile(student, backend="eager")
    elif kind == "part":
        student[0] = torch.compile(student[0], backend="eager")
    else:
        callbacks.append(CompileNetworks(backend="eager"))
    module = LogsProgress(net, optimizer=SGD)
    quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks).fit(module, loader(), loader())
    file = tmp_path / "student.safetensors"
    assert metadata(file)["weights"] == "best.ckpt"
    assert load_file(file).keys() == DigitsCNN(4).state_dict().keys()
    best = load_weights(DigitsCNN(4), tmp_path / "best.ckpt")
    assert equal(load_weights(DigitsCNN(4), file), best)


class Theirs(LightningModule):
    """A module of another package, with batches of its own kind."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def training_step(self, batch, batch_idx):
        return self.student(batch["x"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


NAMED = DataLoader([{"x": torch.ones(3, 2), "name": "a"}], batch_size=None)


def test_batches_of_another_kind(quiet_trainer, tmp_path):
    """Any LightningModule gets its file, with the shape of what its network is called with."""
    quiet_trainer(callbacks=[StudentWriter()]).fit(Theirs(nn.Linear(2, 2)), NAMED)
    assert metadata(tmp_path / "student.safetensors")["input_shape"] == "[2]"


def test_a_network_that_is_never_called(quiet_trainer, tmp_path):
    class Beside(Theirs):
        def training_step(self, batch, batch_idx):
            return self.student.weight.sum()

    module = Beside(nn.Linear(2, 2))
    quiet_trainer(callbacks=[StudentWriter()]).fit(module, NAMED)
    assert metadata(tmp_path / "student.safetensors")["input_shape"] == "null"
    assert not module.student._forward_pre_hooks


def test_extra_state_that_is_left_out_is_named(quiet_trainer, loader, tmp_path):
    class Text(nn.Flatten):
        def get_extra_state(self):
            return "a"

        def set_extra_state(self, state):
            pass

    net = nn.Sequential(Text(), nn.Linear(64, 10))
    with pytest.warns(UserWarning, match=r"student.safetensors lacks 0._extra_state"):
        quiet_trainer(callbacks=[StudentWriter()]).fit(SupervisedModule(net), loader())
    load_weights(nn.Sequential(Text(), nn.Linear(64, 10)), tmp_path / "student.safetensors")


def test_weights_that_cannot_be_written(quiet_trainer, tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("odd", torch.ones(2).to_sparse())
    with pytest.raises(InputError, match=r"student.safetensors cannot be written") as error:
        quiet_trainer(callbacks=[StudentWriter()]).fit(Theirs(net), NAMED)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(InputError, match="StudentWriter: network: Theirs has no network 'student'"):
        quiet_trainer(callbacks=[StudentWriter()]).fit(module, loader())
