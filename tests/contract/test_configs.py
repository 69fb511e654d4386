"""What every YAML in configs/ must obey; a later method is held to it by adding its file."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_lightning.__main__ import main
from kd_lightning.cli import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
QUICK = """
trainer: {max_epochs: 3, limit_train_batches: 5, enable_progress_bar: false, enable_model_summary: false,
          accelerator: cpu, log_every_n_steps: 1, limit_test_batches: 2, limit_predict_batches: 2}
checkpoint: {monitor: null, every_n_train_steps: 2, save_top_k: -1}
"""
STEPS = 15


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def args(request, tmp_path, monkeypatch):
    """Arguments of a quick run in an empty folder, where the teacher's weights lie as its config leaves them."""
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").write_text(QUICK)
    torch.manual_seed(0)
    teacher = Path("runs/teacher_digits/version_0/student.safetensors")
    if request.param.stem != "teacher_digits":
        teacher.parent.mkdir(parents=True)
        torch.save(DigitsCNN(32).state_dict(), "teacher.pt")
    extra = ["--config", "quick.yaml", "--name", "quick"]
    if "teacher" in yaml.safe_load(request.param.read_text())["model"]["init_args"]:
        extra += ["--model.init_args.teacher.init_args.path", "teacher.pt"]
    return ["--config", str(request.param), *extra]


class Stop(Callback):
    """Raises before a step, as a machine that dies."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


class StoppingCLI(DistillCLI):
    """With a :class:`Stop` among the callbacks."""

    step = 0

    def before_fit(self):
        self.trainer.callbacks.append(Stop(self.step))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_fits_validates_tests_and_predicts(args):
    main(["fit", *args])
    run = Path("runs/quick/version_0")
    for command in ("validate", "test", "predict"):
        main([command, *args, "--ckpt_path", "last"])
    tags = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    expected = {"train/loss", "train/hard", "val/loss", "val/accuracy", "val/f1", "val/calibration_error"}
    expected |= {"test/accuracy", "test/f1"}
    if "--model.init_args.teacher.init_args.path" in args:
        expected |= {"train/soft", "soft_weight", "val/agreement", "val/teacher_accuracy", "val/teacher_kl"}
    assert expected <= set(tags)
    assert (run / "predictions.csv").is_file()
    assert (run / "student.safetensors").is_file()


@pytest.mark.parametrize("step", [3, 5, 12], ids=["mid-epoch", "at the boundary", "last epoch"])
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_run_ends_with_the_same_weights(args, step, workers):
    args = [*args, "--data.init_args.num_workers", str(workers)]
    if workers:
        args += ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5"]
        step = {3: 2, 5: 3, 12: 7}[step]  # three optimiser steps an epoch
    whole = DistillCLI(["fit", *args])
    assert whole.trainer.global_step == (9 if workers else STEPS)
    StoppingCLI.step = step
    with pytest.raises(KeyError):
        StoppingCLI(["fit", *args])
    saved = max(Path("runs/quick/version_1/checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    assert 0 < torch.load(saved, weights_only=True)["global_step"] <= step
    resumed = DistillCLI(["fit", *args, "--ckpt_path", str(saved)])
    assert resumed.trainer.log_dir == str(Path("runs/quick/version_1"))
    assert is_equal(whole.model.state_dict(), resumed.model.state_dict())


def test_another_interruption_is_noticed(args):
    """The comparison above can fail: a run of another seed ends elsewhere."""
    one = DistillCLI(["fit", *args])
    other = DistillCLI(["fit", *args, "--data.init_args.seed", "9"])
    assert not is_equal(one.model.state_dict(), other.model.state_dict())


def test_checkpoint_holds_the_student_alone(args):
    cli = DistillCLI(["fit", *args])
    saved = weights("runs/quick/version_0/checkpoints/last.ckpt")
    count = sum(tensor.numel() for tensor in saved.values())
    assert count <= 1.1 * sum(tensor.numel() for tensor in cli.model.student.state_dict().values())
    teacher = getattr(cli.model, "teacher", None)
    if teacher is None:
        return
    assert teacher.network.state_dict().keys() == torch.load("teacher.pt", weights_only=True).keys()
    assert is_equal(teacher.network.state_dict(), torch.load("teacher.pt", weights_only=True))
    torch.save(DigitsCNN(32).state_dict(), "teacher.pt")  # another one
    with pytest.raises(InputError, match="teacher: the checkpoint was trained under another one"):
        DistillCLI(["fit", *args, "--ckpt_path", "last"])


def test_mixed_precision_stays_close(args):
    args += ["--model.init_args.optimizer.init_args.lr", "0.001"]
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        cli = DistillCLI(["fit", *args, "--trainer.precision", precision])
        losses.append(float(cli.trainer.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
