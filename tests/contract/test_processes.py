"""Two processes learn what one learns at the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning.pytorch import Trainer, Callback
from kd_lightning import Digits, DistillModule, SemiSupervisedDataModule
from functools import partial

class Losses(Callback):
    def __init__(self):
        self.seen = []
    def on_train_epoch_end(self, trainer, module):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})

def run(devices, batch, accumulate, plain):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    module = DistillModule(student, teacher, soft_weight=0.5, optimizer=partial(torch.optim.SGD, lr=0.1))
    losses = Losses()
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
                      logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      accumulate_grad_batches=accumulate,
                      limit_train_batches=640 // (batch * devices), callbacks=[losses], use_distributed_sampler=True)
    if plain:  # labels of the even rows alone: rank 0 has them all
        data = SemiSupervisedDataModule(Digits(), val=0)
        data.setup("")
        x = torch.cat([b.x for b in data.test_dataloader()])[:512]
        y = torch.cat([b.y for b in data.test_dataloader()])[:512]
        y[1::2] = -100
        y[0] = -100
        data = TensorDataset(x, y)
        sampler = DistributedSampler(data, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        trainer.fit(module, DataLoader(data, batch, sampler=sampler))
    else:
        data = SemiSupervisedDataModule(Digits(), labeled=6, batch_size=batch, seed=3, val=20)
        trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        figures = {"losses": losses.seen, "val": float(trainer.callback_metrics.get("val/accuracy", 0)),
                   "weights": torch.cat([p.flatten() for p in student.parameters()]).tolist()}
        open(sys.argv[5], "w").write(json.dumps(figures))

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "plain")
"""


@pytest.fixture
def train(tmp_path):
    """Runs one setting in a process of its own, and reads what it found."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(devices, batch, accumulate, data):
        out = tmp_path / f"{devices}_{batch}_{accumulate}_{data}.json"
        command = [sys.executable, str(script), str(devices), str(batch), str(accumulate), data, str(out)]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
        return json.loads(Path(out).read_text())

    return run


def assert_same(one, other):
    for mine, theirs in zip(one["losses"], other["losses"], strict=True):
        assert mine["train/hard"] == pytest.approx(theirs["train/hard"], abs=1e-4)
        assert mine["train/soft"] == pytest.approx(theirs["train/soft"], abs=1e-4)
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)
    assert one["weights"] == pytest.approx(other["weights"], abs=1e-5)
    assert one["val"] == pytest.approx(other["val"], abs=1e-6)


def test_two_processes_equal_one(train):
    assert_same(train(1, 16, 1, "module"), train(2, 8, 1, "module"))


def test_two_processes_and_accumulated_batches_equal_one_batch(train):
    one = train(1, 32, 1, "module")
    two = train(2, 8, 2, "module")
    assert one["weights"] == pytest.approx(two["weights"], abs=1e-5)


def test_plain_loader_with_labels_on_one_process_alone(train):
    assert_same(train(1, 16, 1, "plain"), train(2, 8, 1, "plain"))
