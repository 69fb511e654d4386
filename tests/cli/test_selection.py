"""Which run and which weights a command line means."""

import csv
import gzip
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from kd_lightning.__main__ import main
from kd_lightning.cli.main import DistillCLI
from kd_lightning.data import Digits
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.run import Run

RUN = Path("runs/tiny/version_0")
NESTING = {"monitor": "val/accuracy", "filename": "{epoch}-{val/accuracy:.3f}"}


class Fail(Callback):
    """Fails at a step."""

    def __init__(self, step: int = 0):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InputError("the fault")


class Worsen(Callback):
    """Undoes the training in the last epoch."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.current_epoch == trainer.max_epochs - 1 and trainer.is_last_batch:
            for parameter in pl_module.student.parameters():
                parameter.data.neg_()


def write(config, path="config.yaml"):
    Path(path).write_text(yaml.safe_dump(config))
    return path


def failing(config, step):
    return config | {"trainer": config["trainer"] | {"callbacks": [{"class_path": f"{__name__}.Fail"} | step]}}


class TestFolders:
    def test_a_run_that_fails_before_its_first_step_leaves_none(self, config, fails):
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Fail"}]
        assert fails("fit", "--config", write(config)) == "error: the fault"
        assert not Path("runs/tiny").exists()
        config["model"]["init_args"]["teacher"]["init_args"]["path"] = "gone.pt"
        assert "gone.pt" in fails("fit", "--config", write(config))
        assert not Path("runs/tiny").exists()

    def test_nor_one_that_starts_from_the_checkpoint_of_another(self, config, fit_or_copy):
        fit_or_copy(config)
        path = str(RUN / "checkpoints/last.ckpt")
        longer = failing(config, {"init_args": {"step": 8}})
        longer["trainer"]["max_epochs"] = 3
        with pytest.raises(InputError, match="the fault") as fault:
            DistillCLI(["fit", "--config", write(longer), "--ckpt_path", path])
        assert not hasattr(fault.value, "__notes__")  # no resume is promised
        assert [folder.name for folder in Path("runs/tiny").iterdir()] == ["version_0"]

    def test_one_that_fails_later_is_not_finished(self, config, fails):
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Fail", "init_args": {"step": 6}}]
        fails("fit", "--config", write(config))
        run = Run(RUN)
        assert not run.finished
        assert run.checkpoints()
        with pytest.raises(InputError, match=r"--ckpt_path last|resume"):
            run.student()

    @pytest.mark.parametrize("name", ["../up", "/tmp/up", ".", "", "a/../../b", "a/../b", "..", "runs/.."])
    def test_a_name_stays_inside(self, name, config, fails):
        assert "name must be" in fails("fit", "--config", write(config), "--name", name)

    def test_a_name_of_two_folders(self, config):
        assert DistillCLI(["fit", "--config", write(config), "--name", "a/b"]).run_folder == Path("runs/a/b/version_0")
        main(["test", "--config", "config.yaml", "--name", "a/b"])
        assert [path.name for path in Path("runs/a/b").iterdir()] == ["version_0"]

    def test_a_config_of_several_files_is_saved_as_one(self, config):
        write(config["data"], "data.yaml")
        DistillCLI(["fit", "--config", write(config | {"data": "data.yaml"})])
        assert Run(RUN).config["data"]["init_args"]["labeled"] == 5


class TestResume:
    @pytest.mark.parametrize(
        ("override", "key"),
        [
            (["--trainer.precision", "bf16-mixed"], "trainer.precision"),
            (["--trainer.max_epochs", "3"], "trainer.max_epochs: 3, not 2"),
            (["--seed_everything", "2"], "seed_everything: 2, not 1"),
            (["--data.init_args.seed", "7"], "data.init_args.seed: 7, not 0"),
        ],
    )
    def test_another_config_is_not_resumed(self, override, key, config, fails, fit_or_copy):
        fit_or_copy(config)
        before = sorted(path.stat().st_mtime_ns for path in Path("runs").rglob("*"))
        for which in ("last", "best"):
            message = fails("fit", "--config", "config.yaml", "--ckpt_path", which, *override)
            assert key in message
            assert str(RUN) in message
        assert sorted(path.stat().st_mtime_ns for path in Path("runs").rglob("*")) == before

    def test_nor_one_with_another_teacher(self, config, fails, fit_or_copy):
        fit_or_copy(config)
        torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
        message = fails("fit", "--config", "config.yaml", "--ckpt_path", "last")
        assert "model.init_args.teacher.init_args.path" in message

    def test_what_changes_no_weight_may_differ(self, config, fit_or_copy):
        fit_or_copy(config)
        args = ["--trainer.log_every_n_steps", "3", "--data.init_args.num_workers", "1"]
        assert DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", "last", *args]).run_folder == RUN
        assert Run(RUN).finished

    @pytest.mark.slow
    def test_the_newest_of_this_seed(self, config, fails):
        for seed in ("1", "2"):
            main(["fit", "--config", write(config), "--seed_everything", seed])
        for which in ("last", "best"):
            assert DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", which]).run_folder == RUN
        main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "1"])
        assert "trainer.max_epochs: 2, not 1" in fails("fit", "--config", "config.yaml", "--ckpt_path", "last")

    def test_another_path_of_the_same_teacher(self, config, fit_or_copy):
        fit_or_copy(config)
        path = "--model.init_args.teacher.init_args.path"
        for command in (["fit", "--ckpt_path", "last"], ["test"]):
            command += ["--config", "config.yaml", path, str(Path("teacher.pt").resolve())]
            assert DistillCLI(command).run_folder == RUN

    def test_nothing_is_left_to_train(self, config, fit_or_copy):
        """The deployed file stays the same, so that its figures hold."""
        fit_or_copy(config)
        before = (RUN / "student.safetensors").read_bytes()
        main(["fit", "--config", "config.yaml", "--ckpt_path", "last"])
        assert (RUN / "student.safetensors").read_bytes() == before
        assert Run(RUN).metadata["input_shape"] == "[1, 8, 8]"

    def test_no_run(self, config, fails):
        assert "there is no run 'tiny' below runs" in fails("fit", "--config", write(config), "--ckpt_path", "last")

    @pytest.mark.parametrize(
        "checkpoint",
        [
            pytest.param(NESTING, id="", marks=pytest.mark.slow),
            pytest.param(NESTING | {"dirpath": "elsewhere"}, id="outside"),
        ],
    )
    def test_a_metric_in_the_filename(self, checkpoint, config, fails):
        """It nests folders: look-up and the run's folder do not depend on it."""
        config["checkpoint"] = checkpoint | {"save_top_k": -1}
        fit = ["fit", "--config", write(failing(config, {"init_args": {"step": 6}}))]
        fails(*fit)
        assert list(Path("elsewhere" if "dirpath" in checkpoint else RUN).rglob("accuracy=*.ckpt"))
        path = write(failing(config, {"init_args": {"step": 99}}), "other.yaml")
        assert "step: 99, not 6" in fails("fit", "--config", path, "--ckpt_path", "best")
        saved = Run(RUN).config
        saved["trainer"]["callbacks"] = None
        (RUN / "config.yaml").write_text(yaml.safe_dump(saved))  # without the fault, which is over
        for which in ("best", "last"):
            cli = DistillCLI(["fit", "--config", str(RUN / "config.yaml"), "--ckpt_path", which])
            assert cli.run_folder == RUN
            assert cli.trainer.global_step == 8
        assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]

    def test_a_moved_folder_has_its_best_value(self, config):
        config["checkpoint"] = NESTING | {"save_top_k": 2}
        whole = DistillCLI(["fit", "--config", write(config)])
        shutil.move("runs", "moved")
        args = ["--config", "config.yaml", "--trainer.default_root_dir", "moved", "--ckpt_path", "last"]
        resumed = DistillCLI(["fit", *args])
        before, after = (cli.trainer.checkpoint_callback for cli in (whole, resumed))
        assert after.best_model_score == before.best_model_score
        assert Path(after.best_model_path).is_file()
        assert len(after.best_k_models) == 2


class TestSeedsOfEvaluation:
    """Runs of one config with the seeds 0 and 1 of both kinds, as ``experiment`` sets them, and one of 2 and 0."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        """Where the runs lie once the first test has trained them."""
        return tmp_path_factory.mktemp("seeds") / "runs"

    @pytest.fixture
    def runs(self, config, trained):
        config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 1}
        write(config)
        if trained.exists():
            shutil.copytree(trained, "runs")
        else:
            for seed, seed_of_data in ((0, 0), (1, 1), (2, 0)):
                seeds = ["--seed_everything", str(seed), "--data.init_args.seed", str(seed_of_data)]
                main(["fit", "--config", "config.yaml", *seeds])
            shutil.copytree("runs", trained)
        return [Run(f"runs/tiny/version_{number}") for number in range(3)]

    @pytest.mark.slow
    def test_the_run_of_the_seeds(self, runs):
        each = list(enumerate(([0], [1], [2], [0, 0], [1, 1], [2, 0])))
        for command, which, some in (
            ("validate", [], each),
            ("test", [], each[1::4]),
            ("validate", ["--ckpt_path", "last"], each[1::4]),
        ):
            for number, seeds in some:
                options = [f"--seed_everything={seeds[0]}", *(f"--data.init_args.seed={seed}" for seed in seeds[1:])]
                cli = DistillCLI([command, "--config", "config.yaml", *options, *which])
                assert cli.run_folder == runs[number % 3].folder
                assert cli.datamodule.seed == (0, 1, 0)[number % 3]

    def test_its_own_validation_part(self, runs):
        cli = DistillCLI(["validate", "--config", "config.yaml", "--seed_everything", "1"])
        split = Split.load(runs[1].split_file, Digits().load().train.targets)
        assert cli.datamodule.split.val == split.val
        assert runs[1].result("val") is not None

    def test_the_newest_of_them(self, runs):
        main(["fit", "--config", "config.yaml", "--seed_everything=1", "--data.init_args.seed=1"])
        main(["fit", "--config", "config.yaml", "--seed_everything=0"])
        cli = DistillCLI(["validate", "--config", "config.yaml", "--seed_everything", "1"])
        assert cli.run_folder == Path("runs/tiny/version_3")

    @pytest.mark.parametrize(
        ("options", "number", "text"),
        [
            (["--seed_everything=1", "--data.init_args.seed=5"], 1, "data.init_args.seed: 5, not 1"),
            (["--seed_everything=7"], 2, "seed_everything: 7, not 2"),
            (["--seed_everything=1", "--data.init_args.labeled=3"], 2, "data.init_args.labeled: 3, not 5"),
            (
                ["--seed_everything=1", "--data.init_args.seed=1", "--model.init_args.soft_weight=0.25"],
                1,
                "soft_weight",
            ),
        ],
    )
    def test_the_error_names_the_nearest_run(self, runs, fails, options, number, text):
        message = fails("validate", "--config", "config.yaml", *options)
        assert f"{runs[number].folder}, the nearest of its name, has another: " in message and text in message


class TestLoggersOfTheConfig:
    @pytest.mark.parametrize("logger", [pytest.param("TensorBoardLogger", marks=pytest.mark.slow), "CSVLogger"])
    def test_a_run_continues_in_its_folder(self, logger, config, fails):
        config["trainer"]["logger"] = {"class_path": logger, "init_args": {"save_dir": "logs", "name": "mine"}}
        main(["fit", "--config", write(config)])
        before = Run("logs/mine/version_0").rows()
        for command in (["fit", "--ckpt_path", "last"], ["test"], ["predict"]):
            cli = DistillCLI([*command, "--config", "config.yaml"])
            assert cli.run_folder == Path("logs/mine/version_0")
        assert [path.name for path in Path("logs/mine").iterdir()] == ["version_0"]
        assert Run("logs/mine/version_0").rows()[: len(before)] == before  # CSVLogger itself would delete them
        assert Run("logs/mine/version_0").result("test").samples == 600
        assert DistillCLI(["fit", "--config", "config.yaml"]).run_folder == Path("logs/mine/version_1")

    def test_two_runs_never_share_a_version(self, config, fails):
        arguments = {"save_dir": "logs", "name": "mine", "version": 7}
        config["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": arguments}
        main(["fit", "--config", write(config)])
        before = (folder := Path("logs/mine/version_7"), (folder / "student.safetensors").read_bytes())
        assert "trainer.logger" in fails("fit", "--config", "config.yaml", "--seed_everything", "2")
        assert (folder / "student.safetensors").read_bytes() == before[1]
        assert DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", "last"]).run_folder == folder

    def test_without_loggers_and_checkpoints(self, config):
        config["trainer"] |= {"logger": False, "enable_checkpointing": False}
        for number in range(2):
            cli = DistillCLI(["fit", "--config", write(config)])
            assert cli.run_folder == Path(f"runs/tiny/version_{number}")
            assert Run(cli.run_folder).finished and Run(cli.run_folder).weights.is_file()
        assert DistillCLI(["predict", "--config", "config.yaml"]).run_folder == cli.run_folder
        assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny"]


class TestFoldersOfCheckpoints:
    @pytest.mark.slow
    def test_two_runs_never_share_one(self, config, fails):
        config["checkpoint"] = {"dirpath": "outside"}
        main(["fit", "--config", write(config)])
        assert "checkpoint.dirpath" in fails("fit", "--config", "config.yaml", "--name", "other")
        assert not Path("runs/other").exists()
        assert DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", "last"]).run_folder == RUN

    def test_of_a_callback_beside_the_runs_own(self, config):
        arguments = {"monitor": "val/loss", "mode": "min", "dirpath": "outside"}
        config["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": arguments}]
        main(["fit", "--config", write(config)])
        assert Run(RUN).last_checkpoint() == RUN / "checkpoints/last.ckpt"
        assert any(path.parent.name == "outside" for path in Run(RUN).checkpoints())


class Foreign(LightningModule):
    """A module without a student."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch.x.flatten(1)), batch.y.clamp(min=0))

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_figures_of_a_foreign_module_end_with_its_next_step(config):
    config["model"] = {"class_path": f"{__name__}.Foreign"}
    config["checkpoint"] = {"save_top_k": -1}  # without a monitor there would be the last one alone
    main(["fit", "--config", write(config)])
    main(["test", "--config", "config.yaml"])
    assert Run(RUN).result("test").figures == {"accuracy": 0.5}
    first = min((RUN / "checkpoints").glob("epoch*.ckpt"))
    main(["fit", "--config", "config.yaml", "--ckpt_path", str(first)])
    assert Run(RUN).result("test") is None


class TestDirection:
    def test_it_follows_from_the_name(self, config):
        config["checkpoint"] = {"monitor": "val/loss"}
        cli = DistillCLI(["fit", "--config", write(config), "--early_stopping", "3"])
        modes = [c.mode for c in cli.trainer.callbacks if getattr(c, "monitor", None) == "val/loss"]
        assert modes == ["min", "min"]
        assert Run(RUN).config["checkpoint"]["mode"] == "min"

    def test_terms_of_the_config_are_losses(self, config, fails):
        loss = {"class_path": "kd_lightning.losses.AttentionTransferLoss"}
        term = {"class_path": "kd_lightning.FeatureTerm", "init_args": {"layers": {"5": "5"}, "loss": loss}}
        config["model"]["init_args"]["features"] = {"attention": term}
        path = write(config)
        assert "mode must be min" in fails(
            "fit", "--config", path, "--checkpoint.monitor", "val/attention", "--checkpoint.mode", "max"
        )
        config["checkpoint"] = {"monitor": "val/attention"}
        cli = DistillCLI(["fit", "--config", write(config), "--trainer.max_epochs", "1"])
        assert [c.mode for c in cli.trainer.callbacks if getattr(c, "monitor", None) == "val/attention"] == ["min"]

    @pytest.mark.parametrize(
        ("override", "key"),
        [
            (["--checkpoint.monitor", "val/loss", "--checkpoint.mode", "max"], "checkpoint"),
            (["--checkpoint.mode", "min"], "checkpoint"),
            (["--checkpoint.monitor", "val/mine"], "checkpoint.mode"),
            (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy"], "EarlyStopping"),
        ],
    )
    def test_or_is_refused(self, override, key, config, fails):
        message = fails("fit", "--config", write(config), *override)
        assert key in message
        assert "mode" in message
        assert not Path("runs").exists() or not list(Path("runs").iterdir())

    def test_a_name_that_is_not_known(self, config):
        args = ["--config", write(config), "--trainer.max_epochs", "1", "--checkpoint.monitor", "val/mine"]
        with pytest.raises(MisconfigurationException, match="val/mine"):  # Lightning's: it is never logged
            DistillCLI(["fit", *args, "--checkpoint.mode", "max"])


class TestDeployedWeights:
    @pytest.fixture
    def best(self, config, fit_or_copy):
        """A run whose best checkpoint is not its last one."""
        config["checkpoint"] = NESTING | {"monitor": "val/loss", "save_top_k": 1}
        config["trainer"]["max_epochs"] = 4
        config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Worsen"}]
        fit_or_copy(config)
        last = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        deployed = load_file(RUN / "student.safetensors")
        assert not all(torch.equal(deployed[key], last[f"student.{key}"]) for key in deployed)

    def test_they_are_tested_and_predicted_by_default(self, best, capsys):
        cli = DistillCLI(["test", "--config", "config.yaml"])
        deployed = load_file(RUN / "student.safetensors")
        assert all(torch.equal(cli.model.student.state_dict()[key], deployed[key]) for key in deployed)
        assert cli.run_folder == RUN
        main(["predict", "--config", "config.yaml"])
        with (RUN / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        cli.datamodule.trainer = None
        student, loader = Run(RUN).student().eval(), cli.datamodule.test_dataloader()
        with torch.no_grad():
            expected = torch.cat([student(batch.x).softmax(dim=1) for batch in loader])
        found = torch.tensor([[float(row[name]) for name in "0123456789"] for row in rows])
        assert torch.allclose(found, expected, atol=1e-5)

    def test_also_without_their_checkpoint(self, best):
        shutil.rmtree(RUN / "checkpoints")
        cli = DistillCLI(["test", "--config", "config.yaml"])
        deployed = load_file(RUN / "student.safetensors")
        assert all(torch.equal(cli.model.student.state_dict()[key], deployed[key]) for key in deployed)

    def test_by_their_path(self, best):
        path = RUN / "student.safetensors"
        cli = DistillCLI(["test", "--config", "config.yaml", "--ckpt_path", str(path)])
        assert cli.run_folder == RUN
        shutil.copy(path, "copy.safetensors")
        other = DistillCLI(["test", "--config", "config.yaml", "--ckpt_path", "copy.safetensors"])
        assert other.run_folder == Path("runs/tiny/version_1")
        for one in (cli, other):
            assert torch.equal(one.trainer.callback_metrics["test/loss"], cli.trainer.callback_metrics["test/loss"])

    def test_only_figures_of_theirs_are_the_runs(self, best):
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        assert Run(RUN).result("test") is None
        cli = DistillCLI(["test", "--config", "config.yaml"])
        result = Run(RUN).result("test")
        assert result.samples == 600
        assert result.figures["accuracy"] == pytest.approx(float(cli.trainer.callback_metrics["test/accuracy"]))
        predictions = result.predictions()
        assert sum(p.correct for p in predictions) / 600 == pytest.approx(result.figures["accuracy"], abs=1e-6)
        with gzip.open(RUN / "test_predictions.csv.gz", "rt") as file:
            assert len(file.readlines()) == 601
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        assert Run(RUN).result("test") == result

    def test_of_the_newest_run_of_this_config(self, config, fails, fit_or_copy):
        fit_or_copy(config)
        main(["fit", "--config", "config.yaml", "--trainer.max_epochs", "1"])
        assert DistillCLI(["test", "--config", "config.yaml"]).run_folder == RUN
        message = fails("test", "--config", "config.yaml", "--trainer.max_epochs", "5")
        assert "trainer.max_epochs: 5, not 1" in message

    def test_of_an_unfinished_run(self, config, fails):
        failed = failing(config, {"init_args": {"step": 6}})
        fails("fit", "--config", write(failed))
        assert "not finished" in fails("test", "--config", "config.yaml")

    def test_without_a_run_those_of_the_config_are_tested(self, config):
        cli = DistillCLI(["test", "--config", write(config)])
        assert "test/accuracy" in cli.trainer.callback_metrics
        assert not (RUN / "config.yaml").exists()

    def test_data_of_another_config_does_not_count(self, config, fit_or_copy):
        fit_or_copy(config)
        args = ["--ckpt_path", str(RUN / "student.safetensors"), "--data.init_args.labeled", "7"]
        cli = DistillCLI(["test", "--config", "config.yaml", *args])
        assert cli.run_folder != RUN
        assert Run(RUN).result("test") is None

    def test_a_teacher_that_was_trained_beside_it(self, config, fails):
        arguments = config["model"]["init_args"]
        config["model"]["class_path"] = "ApprenticeModule"
        arguments |= {"scheme": "joint", "teacher": {"class_path": "DigitsCNN", "init_args": {"width": 8}}}
        main(["fit", "--config", write(config)])
        cli = DistillCLI(["test", "--config", "config.yaml"])  # by the checkpoint that holds both
        last = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert cli.run_folder == RUN
        assert any(key.startswith("teacher.") for key in last)
        shutil.rmtree(RUN / "checkpoints")
        assert "name a checkpoint" in fails("test", "--config", "config.yaml")


@pytest.mark.slow
@pytest.mark.dist
class TestProcesses:
    @pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
    def test_ranks_share_one(self, launcher, config, processes):
        """Those of ``torchrun`` are forked; tests/contract/test_processes.py starts ``torchrun`` itself."""
        names = ["version_0"]
        if launcher == "torchrun":
            main(["fit", "--config", write(config)])
            names.append("version_1")
        config["trainer"] |= {"devices": 2, "strategy": "ddp"}
        command = ["fit", "--config", write(config)]
        if launcher == "torchrun":
            processes.run_ranks(command)
        else:
            command = [sys.executable, "-m", "kd_lightning", *command]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        folders = sorted(Path("runs/tiny").iterdir())
        assert [path.name for path in folders] == names
        assert Run(folders[-1]).finished
        assert {path.name for path in Path().iterdir()} - {"output_0.txt", "output_1.txt"} == {
            "config.yaml",
            "teacher.pt",
            "runs",
        }


class Flat(nn.Sequential):
    """Two logits of an 8x8 colour image."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 2))


def contents(part):
    """{content: path} of the samples of a file of predictions."""
    with gzip.open(RUN / f"{part}_predictions.csv.gz", "rt", newline="") as file:
        return {row["content"]: row["path"] for row in csv.DictReader(file)}


class TestDataThatChanged:
    """Files are added, removed and renamed after the fit."""

    PIXELS = torch.randint(256, (200, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, tmp_path_factory):
        """The folder of a fit that has been validated."""
        folder = tmp_path_factory.mktemp("trained")
        with chdir(folder):
            cls.fit_and_validate()
        return folder

    @classmethod
    def fit_and_validate(cls):
        for number in range(60):
            part, name = ("train", "test")[number >= 40], ("cats", "dogs")[number % 2]
            Path(part, name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(cls.PIXELS[number]).save(f"{part}/{name}/{number:02}.png")
        source = {"train": "train", "test": "test", "image_size": 8}
        data = {"source": {"class_path": "ImageFolder", "init_args": source}, "labeled": 5, "val_size": 0.25}
        config = {
            "name": "tiny",
            "seed_everything": 1,
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            "model": {"class_path": "SupervisedModule", "init_args": {"student": {"class_path": f"{__name__}.Flat"}}},
            "data": {"class_path": "SemiSupervisedDataModule", "init_args": data | {"batch_size": 4}},
        }
        main(["fit", "--config", write(config)])
        main(["validate", "--config", "config.yaml"])

    @pytest.fixture
    def fitted(self, trained, tmp_path, monkeypatch):
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        before = contents("val")
        assert len(before) == 10
        for number in range(60, 68):
            Image.fromarray(self.PIXELS[number]).save(f"train/cats/{number - 60:02}_new.png")
        Image.fromarray(self.PIXELS[70]).save("test/cats/00_new.png")
        first = next(path for path in before.values() if "cats" in path)
        Path("train", first).rename("train/cats/zz.png")
        Path("train", next(path for path in before.values() if "dogs" in path)).unlink()
        return before

    @pytest.mark.parametrize("override", [(), ("--data.init_args.batch_size", "5")])
    def test_validation_has_the_samples_of_the_fit(self, fitted, override):
        """A new split of 5 labels for each class would validate on samples that the fit was trained on."""
        args = ["validate", "--config", "config.yaml", *override]
        cli = DistillCLI([*args, "--ckpt_path", str(RUN / "student.safetensors")] if override else args)
        names = cli.datamodule.identities("train")
        now = {names.contents[index] for index in cli.datamodule.split.val}
        assert now < fitted.keys() and len(now) == 9
        if not override:
            assert contents("val").keys() == now and "cats/zz.png" in contents("val").values()

    def test_other_validation_on_request(self, fitted):
        args = ["validate", "--config", "config.yaml", "--ckpt_path", str(RUN / "student.safetensors")]
        cli = DistillCLI([*args, "--data.init_args.val_size", "0.5"])
        assert len(cli.datamodule.split.val) == 24

    def test_test_and_predict_name_their_samples(self, fitted):
        main(["test", "--config", "config.yaml"])
        main(["predict", "--config", "config.yaml"])
        with (RUN / "predictions.csv").open(newline="") as file:
            predicted = {row["content"]: row["path"] for row in csv.DictReader(file)}
        assert predicted == contents("test") and len(predicted) == 21
        assert sorted(predicted.values()) == sorted(str(p.relative_to("test")) for p in Path("test").rglob("*.png"))

    def test_test_needs_no_training_sample(self, fitted):
        for path in sorted(Path("train").rglob("*.png"))[1:-1]:
            path.unlink()
        main(["test", "--config", "config.yaml"])
        assert Run(RUN).result("test").samples == 21

    @pytest.mark.parametrize("command", ["test", "predict", "validate"])
    def test_classes_that_moved_are_refused(self, fitted, fails, command):
        """Dogs are class 0 then, which was the number of the cats."""
        for part in ("train", "test"):
            Path(part, "cats").rename(Path(part, "felines"))
        assert "gone: ['cats']" in fails(command, "--config", "config.yaml")
        args = ["--ckpt_path", str(RUN / "student.safetensors"), "--data.init_args.batch_size", "5"]
        assert "gone: ['cats']" in fails(command, "--config", "config.yaml", *args)
