"""The callbacks, alone and on somebody else's module."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    DistillModule,
    InputError,
    PredictionWriter,
    SoftWeightAnnealing,
    StepSeed,
    StudentWriter,
    SupervisedModule,
    load_weights,
)
from kd_lightning.models import DigitsCNN


def loader(count=12, batch=4):
    torch.manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 10), batch)


class TestAnnealing:
    @pytest.mark.parametrize(
        ("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("exponential", 0.8 * (0.2 / 0.8) ** 0.5)]
    )
    def test_values(self, shape, middle):
        annealing = SoftWeightAnnealing(0.8, 0.2, begin_epoch=2, end_epoch=6, shape=shape)
        values = [annealing.value(epoch, last_epoch=99) for epoch in range(9)]
        assert values[:3] == pytest.approx([0.8] * 3)
        assert values[4] == pytest.approx(middle)
        assert values[6:] == [0.2] * 3
        assert values == sorted(values, reverse=True)
        quarter = {"linear": 0.65, "cosine": 0.2 + 0.6 * (1 + 0.5**0.5) / 2, "exponential": 0.8 * 0.25**0.25}
        assert values[3] == pytest.approx(quarter[shape])

    def test_to_the_last_epoch(self):
        assert SoftWeightAnnealing(0.0, 3.0).value(9, last_epoch=9) == 3.0
        assert SoftWeightAnnealing(0.0, 3.0).value(0, last_epoch=9) == 0.0
        assert SoftWeightAnnealing(1.0, 0.0, begin_epoch=5).value(0, last_epoch=0) == 1.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"shape": "square"}, "shape must be one of"),
            ({"shape": "exponential", "end": 0.0}, "above 0"),
            ({"begin_epoch": 3, "end_epoch": 2}, "begin_epoch"),
        ],
    )
    def test_bad_values(self, arguments, message):
        with pytest.raises(InputError, match=message):
            SoftWeightAnnealing(**({"start": 1.0, "end": 0.5} | arguments))

    @pytest.mark.parametrize(
        ("attribute", "message"),
        [("soft_wait", "DistillModule has none of that name"), ("student", "must be a number, got DigitsCNN")],
    )
    def test_module_without_it(self, quiet_trainer, student, teacher, attribute, message):
        trainer = quiet_trainer(callbacks=[SoftWeightAnnealing(1.0, 0.0, attribute=attribute)])
        with pytest.raises(InputError, match=message):
            trainer.fit(DistillModule(student, teacher), loader())

    def test_needs_a_last_epoch(self, quiet_trainer, student, teacher):
        trainer = quiet_trainer(max_epochs=-1, max_steps=2, callbacks=[SoftWeightAnnealing(1.0, 0.0)])
        with pytest.raises(InputError, match="end_epoch must be given"):
            trainer.fit(DistillModule(student, teacher), loader())

    def test_temperature_by_dotted_path(self, quiet_trainer, student, teacher):
        module = DistillModule(student, teacher)
        annealing = SoftWeightAnnealing(8.0, 2.0, attribute="soft_loss.temperature")
        trainer = quiet_trainer(max_epochs=3, callbacks=[annealing])
        trainer.fit(module, loader())
        assert module.soft_loss.temperature == 2.0
        assert trainer.callback_metrics["soft_loss.temperature"] == 2.0

    def test_somebody_elses_module(self, quiet_trainer):
        class Theirs(LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.alpha, self.seen = nn.Linear(64, 10), 0.0, []

            def training_step(self, batch, batch_idx):
                self.seen.append(self.alpha)
                return self.alpha * self.net(batch[0].flatten(1)).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        module = Theirs()
        callbacks = [SoftWeightAnnealing(0.0, 1.0, attribute="alpha")]
        quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module, loader(4))
        assert module.seen == [0.0, 0.5, 1.0]


def test_step_seed_repeats_dropout_and_tells_steps_apart(quiet_trainer):
    class Draws(SupervisedModule):
        def losses(self, batch):
            self.seen.append(torch.rand(1).item())
            return super().losses(batch)

    seen = []
    for burn in (1, 2):
        data = loader()
        torch.manual_seed(burn)  # after the loader, which seeds for itself
        module = Draws(DigitsCNN(4))
        module.seen = []
        quiet_trainer(max_epochs=2, callbacks=[StepSeed(seed=3)]).fit(module, data)
        seen.append(module.seen)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 6


@pytest.mark.parametrize("monitor", ["val/loss", None])
def test_student_writer(quiet_trainer, tmp_path, student, monitor):
    """Trained so badly that the first validation stays the best."""
    module = SupervisedModule(student, optimizer=lambda p: torch.optim.SGD(p, 5.0))
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor)
    trainer = quiet_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[checkpoint, StudentWriter()])
    trainer.fit(module, loader(), loader())
    path = tmp_path / "student.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["input_shape"]) == [1, 8, 8]
    assert metadata["task"] == "multiclass"
    fresh = load_weights(DigitsCNN(4), path)
    source = checkpoint.best_model_path
    assert metadata["weights"] == (Path(source).name if monitor else "step 12")
    expected = torch.load(source, weights_only=True)["state_dict"] if monitor else module.state_dict()
    assert all(torch.equal(tensor, expected[f"student.{key}"]) for key, tensor in fresh.state_dict().items())
    is_last = all(torch.equal(t, module.state_dict()[f"student.{k}"]) for k, t in fresh.state_dict().items())
    assert is_last == (monitor is None)


def test_student_writer_needs_a_student(quiet_trainer):
    class Theirs(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    with pytest.raises(InputError, match="StudentWriter needs a module with a student, Theirs has none"):
        quiet_trainer(callbacks=[StudentWriter()]).fit(Theirs(), loader())


@pytest.mark.parametrize(
    ("task", "outputs", "header"),
    [
        ("multiclass", 10, ["index", "prediction", *"0123456789"]),
        ("multilabel", 3, ["index", "prediction", "0", "1", "2"]),
        ("binary", 1, ["index", "prediction", "1"]),
    ],
)
def test_prediction_writer(quiet_trainer, tmp_path, task, outputs, header):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
    module = SupervisedModule(net, task=task)
    quiet_trainer(callbacks=[PredictionWriter()]).predict(module, loader())
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == header
    assert [int(row["index"]) for row in rows] == list(range(12))
    logits = net(loader().dataset.tensors[0]).detach()
    for row, z in zip(rows, logits, strict=True):
        p = z.softmax(0) if task == "multiclass" else z.sigmoid()
        assert [float(row[name]) for name in header[2:]] == pytest.approx(p.tolist(), abs=1e-5)
        if task == "multilabel":
            assert row["prediction"] == ";".join(str(k) for k in range(3) if z[k] > 0)
        else:
            assert int(row["prediction"]) == (z.argmax().item() if task == "multiclass" else int(z[0] > 0))
