"""Bad input and faults beyond a wrong config: what breaks, which part it was, and that nothing saved is lost."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.io import write_png

from kd_lightning import DatasetSource, DistillModule, InputError, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.checkpoints import SafeCheckpointIO, read_checkpoint
from kd_lightning.cli import DistillCLI
from kd_lightning.data import ImageFolder

CONFIG = """
name: tiny
seed_everything: 1
trainer: {max_epochs: 2, limit_train_batches: 4, limit_val_batches: 1, log_every_n_steps: 1, accelerator: cpu,
          enable_progress_bar: false, enable_model_summary: false}
checkpoint: {every_n_train_steps: 1, save_top_k: -1, monitor: null}
model:
  class_path: SupervisedModule
  init_args:
    student: {class_path: DigitsCNN, init_args: {width: 4}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  class_path: SemiSupervisedDataModule
  init_args: {source: {class_path: Digits}, labeled: 0.5, batch_size: 32}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny supervised run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    return yaml.safe_load(CONFIG)


class Returns(nn.Module):
    """A network that dresses its logits up."""

    def __init__(self, dress):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.dress = dress

    def forward(self, x):
        return self.dress(self.net(x))


Named = namedtuple("Named", ["features", "logits"])
FEATURES = torch.zeros(5, 7)


class TestOutputs:
    @pytest.mark.parametrize(
        "dress",
        [
            lambda z: {"logits": z, "features": FEATURES},
            lambda z: {"out": z},
            lambda z: Named(FEATURES, z),
            lambda z: (z,),
            lambda z: [None, z],
        ],
        ids=["mapping", "one entry", "named tuple", "tuple", "list"],
    )
    def test_plain_which_part(self, dress):
        torch.manual_seed(0)
        dressed, teacher = Returns(dress), Returns(dress)
        module = DistillModule(dressed, teacher, soft_weight=0.5)
        plain = DistillModule(dressed.net, teacher.net, soft_weight=0.5)
        batch = torch.randn(5, 4), torch.tensor([0, 1, 2, -100, 0])
        assert torch.equal(module.training_step(batch, 0), plain.training_step(batch, 0))
        assert torch.equal(module.predict_step(batch, 0), plain.predict_step(batch, 0))

    @pytest.mark.parametrize(
        ("dress", "got"),
        [
            (lambda z: (z, FEATURES), "tuple with 0: a tensor [5, 3], 1: a tensor [5, 7]"),
            (lambda z: {"a": z, "b": FEATURES}, "dict with a: a tensor [5, 3], b: a tensor [5, 7]"),
            (lambda z: {"loss": 0.5}, "dict with loss: float"),
            (lambda z: None, "got NoneType"),
            (lambda z: (), "got tuple"),
        ],
    )
    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_not_plain(self, dress, got, role):
        networks = {"student": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)} | {role: Returns(dress)}
        with pytest.raises(InputError, match=f"the {role} must return logits") as error:
            DistillModule(**networks).training_step((torch.randn(5, 4), torch.zeros(5).long()), 0)
        assert str(error.value).endswith(got)


class TestEmptyParts:
    FULL = TensorDataset(torch.randn(6, 4), torch.arange(6) % 2)
    EMPTY = TensorDataset(torch.randn(0, 4), torch.zeros(0).long())

    @pytest.mark.parametrize("part", ["train", "test", "unlabeled"])
    def test_named(self, part):
        parts = {"train": self.FULL, "test": self.FULL, "unlabeled": self.FULL} | {part: self.EMPTY}
        with pytest.raises(InputError, match=f"{part}: the {part} part of DatasetSource is empty"):
            SemiSupervisedDataModule(DatasetSource(**parts), val=0).setup("fit")

    def test_folders(self, tmp_path):
        for folder in ("train", "nothing"):
            (tmp_path / folder / "a").mkdir(parents=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "train/a/0.png"))
        for part, message in {"train": "train: .*nothing", "unlabeled": "unlabeled: no images in .*nothing"}.items():
            folders = {"train": str(tmp_path / "train"), part: str(tmp_path / "nothing")}
            with pytest.raises(InputError, match=message):
                SemiSupervisedDataModule(ImageFolder(**folders), val=0).setup("fit")


class Breaks(TensorDataset):
    """Cannot read one of its items."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("bad sector")
        return super().__getitem__(index)


class TestUnreadableImages:
    @pytest.mark.parametrize("workers", ["0", "2"])
    @pytest.mark.parametrize("damage", ["cut", "text"])
    def test_path_is_named(self, config, fails, workers, damage):
        for number in range(8):
            image = Path("photos", f"class{number % 2}", f"{number}.png")
            image.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(256, (3, 40, 40), dtype=torch.uint8), str(image))
        bad = Path("photos/class1/5.png")
        bad.write_bytes(bad.read_bytes()[:900] if damage == "cut" else b"no picture")
        config["data"]["init_args"] |= {
            "source": {"class_path": "ImageFolder", "init_args": {"train": "photos", "image_size": 16}},
            "labeled": None,
            "batch_size": 4,
            "val": 0,
        }
        config["model"]["init_args"]["student"] = {"class_path": f"{__name__}.PhotoNet"}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        last = fails("fit", "--config", "config.yaml", "--data.init_args.num_workers", workers)
        assert last.startswith(f"error: image {bad} cannot be read: ")

    def test_datasets_without_paths_name_the_item(self):
        data = SemiSupervisedDataModule(DatasetSource(Breaks(torch.randn(6, 4), torch.arange(6) % 2)), val=0)
        with pytest.raises(InputError, match="item 3 of Breaks cannot be read: OSError: bad sector"):
            list(data.train_dataloader())


class PhotoNet(nn.Sequential):
    """For small colour images."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))


class Poison(nn.Module):
    """A hard loss that is no number at its n-th call in training; the step's other terms are fine."""

    def __init__(self, call: int):
        super().__init__()
        self.calls = 0
        self.call = call

    def forward(self, logits, target):
        self.calls += torch.is_grad_enabled()
        return nn.functional.cross_entropy(logits, target) * (float("nan") if self.calls == self.call else 1)


class TestNonFinite:
    def test_term_and_step_are_named_and_the_last_checkpoint_stays(self, config, fails):
        config["model"]["init_args"]["hard_loss"] = {"class_path": f"{__name__}.Poison", "init_args": {"call": 7}}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        last = fails("fit", "--config", "config.yaml")
        assert last.startswith("error: train/hard is not a finite number at step 6; lower the learning rate")
        saved = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
        assert saved["global_step"] == 6
        assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())

    def test_weights_that_blew_up_are_not_saved(self, quiet_trainer, tmp_path, student):
        module = SupervisedModule(student)
        trainer = quiet_trainer()
        trainer.strategy.connect(module)
        with torch.no_grad():
            student[-1].weight[0, 0] = float("inf")
        with pytest.raises(InputError, match=r"weights student.*weight hold numbers that are not finite"):
            trainer.save_checkpoint(tmp_path / "blown.ckpt")
        assert not (tmp_path / "blown.ckpt").exists()

    def test_the_first_bad_step_is_kept_until_somebody_looks(self):
        from kd_lightning.modules.finite import FiniteCheck

        check, fine = FiniteCheck(), torch.tensor(1.0)
        check.note({"hard": fine, "soft": fine}, 0)
        check.check()
        check.note({"hard": fine, "soft": fine / 0}, 4)
        check.note({"hard": fine * float("nan"), "soft": fine}, 5)
        with pytest.raises(InputError, match="train/soft is not a finite number at step 4"):
            check.check()


class TestCheckpoints:
    @pytest.fixture
    def run(self, config):
        DistillCLI(["fit", "--config", "config.yaml"])
        return Path("runs/tiny/version_0/checkpoints")

    @pytest.mark.parametrize("command", ["fit", "test"])
    def test_truncated(self, run, fails, command):
        newest = run / "last.ckpt"
        newest.write_bytes(newest.read_bytes()[:-1000])
        last = fails(command, "--config", "config.yaml", "--ckpt_path", "last")
        assert f"ckpt_path: {newest} is damaged or no checkpoint" in last
        assert "step=8.ckpt beside it can be read" in last
        (run / "last.ckpt").write_bytes(b"")
        assert "is damaged" in fails("fit", "--config", "config.yaml", "--ckpt_path", str(newest))

    def test_of_another_network(self, run, fails):
        wide = ["--model.init_args.student.init_args.width", "6"]
        last = fails("fit", "--config", "config.yaml", "--ckpt_path", "last", *wide)
        assert "ckpt_path: the checkpoint does not fit SupervisedModule: " in last
        assert "student.0.weight [4, 1, 3, 3] in the file, [6, 1, 3, 3] in the model" in last

    def test_of_another_split(self, run, fails):
        last = fails("fit", "--config", "config.yaml", "--ckpt_path", "last", "--data.init_args.labeled", "9")
        assert "the checkpoint was trained on another split" in last

    def test_split_file_of_other_data(self, run, fails):
        other = ["--data.init_args.source", "FakeData", "--data.init_args.labeled", str(run.parent / "split.json")]
        assert "split.json belongs to other data" in fails("fit", "--config", "config.yaml", *other)

    def test_full_disk_leaves_the_last_good_one(self, config, fails):
        size = 60_000  # a checkpoint has about 25 kB; the fifth is made larger than the disk
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Swell", "init_args": {"step": 5}}]
        Path("config.yaml").write_text(yaml.safe_dump(config))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            last = fails("fit", "--config", "config.yaml")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run = Path("runs/tiny/version_0/checkpoints")
        assert f"error: checkpoint {run}" in last
        assert "cannot be written: " in last
        assert "File too large" in last
        assert read_checkpoint(run / "last.ckpt")["global_step"] == 4
        assert not list(run.glob(".*"))  # nor half a file

    def test_is_used_by_the_command_line_but_not_in_place_of_ones_own(self, config):
        cli = DistillCLI(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "1"])
        assert type(cli.trainer.strategy.checkpoint_io) is SafeCheckpointIO
        own = ["--trainer.plugins", "lightning.pytorch.plugins.io.AsyncCheckpointIO"]
        cli = DistillCLI(["fit", "--config", "config.yaml", "--trainer.fast_dev_run", "1", *own])
        assert type(cli.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"


class Swell(Callback):
    """Makes checkpoints large from a step on."""

    def __init__(self, step: int):
        self.step = step

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step >= self.step:
            checkpoint["ballast"] = torch.zeros(100_000)


class TestFolders:
    @pytest.mark.parametrize("logger", ["true", "false"])
    def test_that_cannot_be_written(self, config, fails, logger):
        Path("runs").write_text("a file in the way")
        last = fails("fit", "--config", "config.yaml", "--trainer.logger", logger)
        assert last.startswith("error: ")
        assert "runs" in last
        assert logger == "false" or last.startswith("error: trainer.default_root_dir: cannot write to runs/tiny")


class Die(Callback):
    """Kills its process in the middle of an epoch, on one rank."""

    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others(config, rank):
    command = [sys.executable, "-m", "kd_lightning", "fit", "--config", "config.yaml"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command += ["--trainer.callbacks+", "test_faults.Die", "--trainer.callbacks.rank", str(rank)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    # a group of its own, so that both ranks can be found and waited for
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=300)  # until both have closed it
            waited = time.time() - Path("died").stat().st_mtime
        finally:
            if _alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert waited < 60
    assert "error: another process of this run has ended" in output
    assert read_checkpoint(Path("runs/tiny/version_0/checkpoints/last.ckpt"))["global_step"] == 2


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_teacher_refusals_have_no_traceback(config, fails):
    """A teacher's own complaint while training reaches the shell as one line."""
    config["model"] = {
        "class_path": "DistillModule",
        "init_args": {
            "student": {"class_path": "DigitsCNN", "init_args": {"width": 4}},
            "teacher": {
                "class_path": "Teacher",
                "init_args": {"network": {"class_path": "DigitsCNN"}, "classes": [1, 0]},
            },
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert "classes has 2 entries, but the teacher's output is [32, 10]" in fails("fit", "--config", "config.yaml")
