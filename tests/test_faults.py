"""Bad input and faults other than a wrong config: the error names the part, and no saved file is lost."""

import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.io import write_png

from kd_lightning import (
    DatasetSource,
    DistillModule,
    InputError,
    SemiSupervisedDataModule,
    StudentWriter,
    SupervisedModule,
)
from kd_lightning.__main__ import main
from kd_lightning.cli.main import DistillCLI
from kd_lightning.data import ImageFolder
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.checkpoints import SafeCheckpointIO, read_checkpoint

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


@pytest.fixture
def small_disk():
    """While inside, no file can grow beyond 60 kB."""

    @contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


class WithExtraState(nn.Sequential):
    """A network whose state holds something other than tensors."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def get_extra_state(self):
        return {"note": "plain"}

    def set_extra_state(self, state):
        assert state == {"note": "plain"}


class Still(nn.Module):
    """A network with constant outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.new_zeros(len(x), 10) + 0 * self.weight


class Blow(Callback):
    """Spoils the weights after the last step."""

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            next(pl_module.student.parameters()).mul_(float("inf"))


class Returns(nn.Module):
    """A network that wraps its logits."""

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
            lambda z: (z, FEATURES),
            lambda z: (torch.tensor(0.5), z),
        ],
        ids=["mapping", "one entry", "named tuple", "tuple", "list", "features", "loss"],
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
            SemiSupervisedDataModule(DatasetSource(**parts), val_size=0).setup("fit")

    def test_folders(self, tmp_path):
        for folder in ("train", "nothing"):
            (tmp_path / folder / "a").mkdir(parents=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "train/a/0.png"))
        for part, message in {"train": "train: .*nothing", "unlabeled": "unlabeled: no images in .*nothing"}.items():
            folders = {"train": str(tmp_path / "train"), part: str(tmp_path / "nothing")}
            with pytest.raises(InputError, match=message):
                SemiSupervisedDataModule(ImageFolder(**folders), val_size=0).setup("fit")


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
            "val_size": 0,
        }
        config["model"]["init_args"]["student"] = {"class_path": f"{__name__}.PhotoNet"}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        last = fails("fit", "--config", "config.yaml", "--data.init_args.num_workers", workers)
        assert last.startswith(f"error: image {bad} cannot be read: ")

    def test_datasets_without_paths_name_the_item(self):
        data = SemiSupervisedDataModule(DatasetSource(Breaks(torch.randn(6, 4), torch.arange(6) % 2)), val_size=0)
        with pytest.raises(InputError, match="item 3 of Breaks cannot be read: OSError: bad sector"):
            list(data.train_dataloader())


class PhotoNet(nn.Sequential):
    """A network for small colour images."""

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

    def test_raised_before_any_save(self, quiet_trainer, loader, student):
        with pytest.raises(InputError, match="train/hard is not a finite number at step 1"):
            quiet_trainer().fit(SupervisedModule(student, hard_loss=Poison(2)), loader())

    @pytest.mark.parametrize("make", [SupervisedModule, lambda s: DistillModule(s, DigitsCNN(4))])
    def test_weights_that_blow_up_at_the_end_are_not_deployed(self, quiet_trainer, loader, tmp_path, student, make):
        with pytest.raises(InputError, match="weights student.* hold numbers that are not finite"):
            quiet_trainer(callbacks=[StudentWriter(), Blow()]).fit(make(student), loader())
        assert not (tmp_path / "student.safetensors").exists()

    def test_a_second_fit_starts_clean(self, quiet_trainer, loader, student):
        module = SupervisedModule(student)
        module._finite_check.record({"hard": torch.tensor(float("nan"))}, 3)
        quiet_trainer().fit(module, loader())

    @pytest.mark.parametrize("make", [SupervisedModule, lambda s: DistillModule(s, DigitsCNN(4))])
    def test_weights_that_blew_up_are_not_saved(self, quiet_trainer, tmp_path, student, make):
        module = make(student)
        trainer = quiet_trainer()
        trainer.strategy.connect(module)
        with torch.no_grad():
            student[-1].weight[0, 0] = float("inf")
        with pytest.raises(InputError, match=r"weights student.*weight hold numbers that are not finite"):
            trainer.save_checkpoint(tmp_path / "blown.ckpt")
        assert not (tmp_path / "blown.ckpt").exists()

    def test_the_first_bad_step_is_stored_until_the_check(self):
        from kd_lightning.modules._shared.finite_check import FiniteCheck

        check, fine = FiniteCheck(), torch.tensor(1.0)
        check.record({"hard": fine, "soft": fine}, 0)
        check.check()
        check.record({"hard": fine, "soft": fine / 0}, 4)
        check.record({"hard": fine * float("nan"), "soft": fine / 0}, 5)
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
        (run / "newer.ckpt").write_bytes(newest.read_bytes())  # damaged too, so it is no advice
        os.utime(newest, (time.time() + 9, time.time() + 9))  # still the one that is found first
        last = fails(command, "--config", "config.yaml", "--ckpt_path", "last")
        assert f"ckpt_path: {newest} is damaged or no checkpoint" in last
        assert "step=8.ckpt beside it can be read" in last
        (run / "last.ckpt").write_bytes(b"")
        assert "is damaged" in fails("fit", "--config", "config.yaml", "--ckpt_path", str(newest))

    def test_of_another_network(self, run, fails):
        wide = ["--model.init_args.student.init_args.width", "6"]
        last = fails("fit", "--config", "config.yaml", "--ckpt_path", str(run / "last.ckpt"), *wide)
        assert "ckpt_path: the checkpoint does not fit SupervisedModule: " in last
        assert "student.0.weight [4, 1, 3, 3] in the file, [6, 1, 3, 3] in the model" in last

    def test_of_another_student_of_a_distillation(self, quiet_trainer, tmp_path, loader, student, teacher):
        trainer = quiet_trainer()
        trainer.fit(DistillModule(student, teacher), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        other = DistillModule(DigitsCNN(6), teacher)
        with pytest.raises(InputError, match="the checkpoint does not fit DistillModule"):
            quiet_trainer(max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt")

    def test_that_could_run_code(self, tmp_path):
        torch.save({"state_dict": {}, "x": os.system}, tmp_path / "a.ckpt")
        with pytest.raises(InputError, match="could run code"):
            read_checkpoint(tmp_path / "a.ckpt")

    def test_the_last_is_the_last_though_an_earlier_one_was_better(self, config):
        config["checkpoint"] = {}
        config["trainer"]["max_epochs"] = 3
        config["model"]["init_args"]["student"] = {"class_path": f"{__name__}.Still"}  # so the first is the best
        Path("config.yaml").write_text(yaml.safe_dump(config))
        cli = DistillCLI(["fit", "--config", "config.yaml"])
        saved = {path.name for path in Path("runs/tiny/version_0/checkpoints").iterdir()}
        assert saved == {"epoch=0-step=4.ckpt", "last.ckpt"}
        assert read_checkpoint(Path("runs/tiny/version_0/checkpoints/last.ckpt"))["global_step"] == 12
        assert cli.trainer.checkpoint_callback.best_model_path.endswith("epoch=0-step=4.ckpt")
        # so does a run that goes on from there
        last = "runs/tiny/version_0/checkpoints/last.ckpt"
        DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", last, "--trainer.max_epochs", "4"])
        assert read_checkpoint(Path("runs/tiny/version_1/checkpoints/last.ckpt"))["global_step"] == 16

    def test_no_last_where_none_is_wanted(self, config):
        DistillCLI(["fit", "--config", "config.yaml", "--checkpoint.save_last", "false"])
        assert not list(Path("runs").rglob("last*.ckpt"))

    def test_without_a_logger_the_last_is_that_of_the_newest_run(self, config):
        DistillCLI(["fit", "--config", "config.yaml", "--trainer.max_epochs", "1"])
        plain = ["--config", "config.yaml", "--trainer.logger", "false"]
        DistillCLI(["fit", *plain])
        cli = DistillCLI(["fit", *plain, "--ckpt_path", "last"])
        assert cli.config["fit"].ckpt_path == "runs/tiny/version_1/checkpoints/last.ckpt"
        assert cli.run_folder == Path("runs/tiny/version_1")

    def test_extra_state_is_saved_and_left_out_of_the_deployed_file(self, quiet_trainer, tmp_path, loader):
        trainer = quiet_trainer(callbacks=[StudentWriter()])
        trainer.fit(SupervisedModule(WithExtraState()), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        quiet_trainer(max_epochs=2).fit(SupervisedModule(WithExtraState()), loader(), ckpt_path=tmp_path / "a.ckpt")
        assert load_file(tmp_path / "student.safetensors").keys() == {"1.weight", "1.bias"}

    def test_full_disk_leaves_the_file_that_is_overwritten(self, tmp_path, small_disk):
        io, path = SafeCheckpointIO(), tmp_path / "last.ckpt"
        io.save_checkpoint({"state_dict": {}, "global_step": 1}, path)
        with small_disk(), pytest.raises(InputError, match=r"last.ckpt cannot be written"):
            io.save_checkpoint({"state_dict": {}, "global_step": 2, "x": torch.zeros(100_000)}, path)
        assert read_checkpoint(path)["global_step"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    def test_full_disk_leaves_the_student_that_is_overwritten(self, tmp_path, quiet_trainer, loader, small_disk):
        (tmp_path / "student.safetensors").write_text("before")
        trainer = quiet_trainer(callbacks=[StudentWriter()])
        with small_disk(), pytest.raises(InputError, match=r"student.safetensors cannot be written"):
            trainer.fit(SupervisedModule(DigitsCNN(64)), loader())
        assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
        assert (tmp_path / "student.safetensors").read_text() == "before"

    def test_of_another_split(self, run, fails):
        path = str(run / "last.ckpt")
        last = fails("fit", "--config", "config.yaml", "--ckpt_path", path, "--data.init_args.labeled", "9")
        assert "the checkpoint was trained on another split" in last

    def test_split_file_of_other_data(self, run, fails):
        other = ["--data.init_args.source", "FakeData", "--data.init_args.labeled", str(run.parent / "split.json")]
        assert "split.json belongs to other data" in fails("fit", "--config", "config.yaml", *other)

    def test_full_disk_leaves_the_last_good_one(self, config, fails, small_disk):
        # a checkpoint has about 25 kB; the fifth is made larger than the disk
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Swell", "init_args": {"step": 5}}]
        Path("config.yaml").write_text(yaml.safe_dump(config))
        with small_disk():
            last = fails("fit", "--config", "config.yaml")
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


@pytest.mark.slow
@pytest.mark.dist
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


class Terminate(Callback):
    """Sends SIGTERM to its own process, as a scheduler does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)


class TerminateAtLast(Callback):
    """Sends SIGTERM where Lightning looks for none any more."""

    def on_train_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_at_the_end_begins_no_other_run(config, capsys):
    config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.TerminateAtLast"}]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["experiment", "config.yaml", "--seeds", "2"])
    assert end.value.code == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: stopped by SIGTERM"
    assert len([*Path("runs").rglob("student.safetensors")]) == 1


def test_sigterm_is_no_success(config, capsys):
    config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Terminate"}]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "config.yaml"])
    assert end.value.code == 143
    assert (
        capsys.readouterr().err.strip().splitlines()[-1]
        == "error: stopped by SIGTERM; --ckpt_path last resumes the run"
    )
    assert read_checkpoint(Path("runs/tiny/version_0/checkpoints/last.ckpt"))["global_step"] >= 6
    assert not Path("runs/tiny/version_0/student.safetensors").exists()


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_teacher_refusals_have_no_traceback(config, fails):
    """An error of a teacher during training reaches the shell as one line."""
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


def run(*args, code="", **options):
    """Run the command line in a process of its own."""
    start = f"{code}\nfrom kd_lightning.__main__ import main\nmain()" if code else None
    command = [sys.executable, *(["-c", start] if start else ["-m", "kd_lightning"]), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300, **options)


def fails_in_a_process(*args, **options):
    """Return the last line of a process that must end with status 2 and without a traceback."""
    done = run(*args, stdout=subprocess.PIPE, **options)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    return done.stderr.strip().splitlines()[-1]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


class TestProcess:
    """What surrounds the process: its folder, its output, its limits."""

    def test_deleted_folder(self, tmp_path, monkeypatch, fails):
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        try:
            assert "the working directory no longer exists" in fails("fit", "--config", "config.yaml")
        finally:
            os.chdir(tmp_path)

    def test_ascii_output(self, config, monkeypatch):
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
        monkeypatch.setattr(sys, "stdout", output)
        main(["layers", "--config", "config.yaml"])
        print("±")
        assert output.buffer.getvalue().endswith(b"?\n")

    @pytest.mark.slow
    def test_ascii_locale(self, config):
        done = run("fit", "--config", "config.yaml", "--trainer.enable_progress_bar", "true", env=ASCII)
        assert done.returncode == 0, done.stderr
        Path("grün.yaml").write_text(CONFIG.replace("tiny", "grün"), encoding="utf-8")
        last = fails_in_a_process("fit", "--config", "grün.yaml", env=ASCII)
        assert "set PYTHONUTF8=1" in last

    @pytest.mark.slow
    @pytest.mark.parametrize("bar", ["false", "true"])
    def test_output_that_nobody_reads(self, config, bar):
        """Like ``| head``: the reading end of the pipe is closed at once."""
        read, write = os.pipe()
        os.close(read)
        more = ["--trainer.enable_progress_bar", bar, "--trainer.enable_model_summary", "true"]
        done = run("fit", "--config", "config.yaml", *more, stdout=write)
        os.close(write)
        assert done.returncode == 141
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr

    @pytest.mark.slow
    def test_full_output(self, config):
        with Path("/dev/full").open("w") as full:
            done = run("layers", "--config", "config.yaml", stdout=full)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1] == "error: [Errno 28] No space left on device"

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [16, 28])
    def test_too_few_open_files(self, config, limit):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
        last = fails_in_a_process("fit", "--config", "config.yaml", "--data.num_workers", "2", code=code)
        assert "num_workers: 2 workers need about" in last
        assert f"open files, but the limit is {limit}" in last

    @pytest.mark.parametrize(
        ("error", "part"),
        [
            (OSError(24, "Too many open files"), "ulimit -n"),
            (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "num_workers"),
            (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. ... shared memory"), "/dev/shm"),
        ],
    )
    def test_errors_of_the_system(self, fails, monkeypatch, error, part):
        def fail(options):
            raise error

        monkeypatch.setattr("kd_lightning.cli.commands.layers.main", fail)
        assert part in fails("layers", "--name", "x")


class Mark(Callback):
    """Writes a file once the checkpoint of step 3 is there."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            Path(f"marked{trainer.global_rank}").touch()


class InterruptLogger(Callback):
    """Sends SIGINT while the logger of step 3 frees a lock, where an exception leaves it taken."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            sys.setprofile(self._interrupt)

    def _interrupt(self, frame, event, _):
        if event == "call" and frame.f_code is threading.Condition.__exit__.__code__:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)


class MarkPrediction(Callback):
    """Writes a file at the first batch of predictions; the others take their time."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Path("marked0").touch()
        time.sleep(1)


def command(args):
    """Arguments of subprocess for a command that gets SIGINT as a terminal leaves it."""
    return {
        "args": [sys.executable, "-m", "kd_lightning", *args],
        "env": os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        "text": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    }


def stop(args, number, when, group=False, twice=False, reader=True):
    """Start a command, send it a signal when a condition holds, and return its exit status and its output.

    Without a reader, nobody reads the output from the signal on.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(**command(args), **pipes, start_new_session=True) as process:  # a group of its own
        try:
            end = time.monotonic() + 120
            while (
                not (_catches(process.pid, signal.SIGTERM) and when())
                and process.poll() is None
                and time.monotonic() < end
            ):
                time.sleep(0.05)
            if not reader:
                process.stdout.close()
                process.stdout = None
            for _ in range(1 + twice):
                (os.killpg if group else os.kill)(process.pid, number)
            output, _ = process.communicate(timeout=60)
        finally:
            if _alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    status = process.returncode
    return (128 - status if status < 0 else status), output  # as a shell shows a process that ends by a signal


def _catches(pid, number):
    """Whether a process handles a signal: before, Python itself is loading, which takes long on a busy machine."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.slow
class TestStop:
    """Signals end a command in one line, with the status that shells and schedulers expect."""

    FIT = ["fit", "--config", "config.yaml", "--trainer.max_epochs", "100000"]
    FIT += ["--trainer.callbacks+", "test_faults.Mark"]

    @pytest.mark.parametrize(
        ("number", "seconds"),
        [(signal.SIGINT, 0.2), (signal.SIGTERM, 1.0), (signal.SIGINT, 2.5), (signal.SIGTERM, 4.0)],
    )
    def test_before_the_fit(self, config, number, seconds):
        """While libraries load, the config is parsed, and objects are built; no resume is promised."""
        status, output = stop([*self.FIT, "--checkpoint.every_n_train_steps", "1000000"], number, after(seconds))
        assert status == 128 + number
        assert output.strip().splitlines()[-1] == f"error: stopped by {number.name}"
        assert "Traceback" not in output

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize(("workers", "group"), [("0", False), ("2", True)])
    def test_in_a_fit(self, config, number, workers, group):
        args = [*self.FIT, "--data.init_args.num_workers", workers]
        status, output = stop(args, number, Path("marked0").exists, group=group)
        assert status == 128 + number
        assert output.strip().splitlines()[-1] == f"error: stopped by {number.name}; --ckpt_path last resumes the run"
        assert "Traceback" not in output
        assert read_checkpoint(Path("runs/tiny/version_0/checkpoints/last.ckpt"))["global_step"] >= 3

    def test_in_a_lock(self, config):
        args = [*self.FIT[:-1], "test_faults.InterruptLogger"]
        done = subprocess.run(**command(args), capture_output=True, timeout=60, check=False)
        assert done.returncode == 130
        assert done.stderr.strip().splitlines()[-1] == "error: stopped by SIGINT; --ckpt_path last resumes the run"
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_in_predictions(self, config, number):
        Path("a.safetensors").write_bytes(save(DigitsCNN(4).state_dict()))
        args = ["predict", "--config", "config.yaml", "--ckpt_path", "a.safetensors"]
        args += ["--data.init_args.batch_size", "4", "--trainer.callbacks+", "test_faults.MarkPrediction"]  # 90 batches
        status, output = stop(args, number, Path("marked0").exists)
        assert status == 128 + number
        assert output.strip().splitlines()[-1] == f"error: stopped by {number.name}"
        assert "Traceback" not in output

    def test_twice(self, config):
        status, output = stop(self.FIT, signal.SIGINT, Path("marked0").exists, twice=True)
        assert status == 130
        assert "error: stopped by SIGINT" in output
        assert "Traceback" not in output

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_output_that_nobody_reads(self, config, number):
        """Like ``2>&1 | tee``, which has got the signal, too."""
        status, _ = stop(self.FIT, number, Path("marked0").exists, reader=False)
        assert status == 128 + number

    @pytest.mark.dist
    @pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
    def test_two_processes(self, config, number, group):
        args = [*self.FIT, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
        status, output = stop(args, number, Path("marked0").exists, group=group)
        assert status == 128 + number
        assert f"error: stopped by {number.name}; --ckpt_path last resumes the run" in output
        assert "Traceback" not in output

    def test_another_command(self, config):
        args = ["experiment", "config.yaml", "--seeds", "1", "--trainer.max_epochs", "100000"]
        args += ["--trainer.callbacks+", "test_faults.Mark"]
        status, output = stop(args, signal.SIGINT, Path("marked0").exists)
        assert status == 130
        assert output.strip().splitlines()[-1] == "error: stopped by SIGINT"
        assert "Traceback" not in output
