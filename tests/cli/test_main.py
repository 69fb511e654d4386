"""The command line as a user meets it, in one process."""

import csv
import itertools
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning.__main__ import main
from kd_lightning.cli.main import DistillCLI
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.build import build


def write(config, path="config.yaml"):
    Path(path).write_text(yaml.safe_dump(config))
    return path


def rows(run):
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(run):
    (board,) = {path.parent for path in Path(run).rglob("events.*")}
    events = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload()
    return events.Tags()


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


class TestStory:
    def test_fit_validate_test_predict(self, config):
        main(["fit", "--config", write(config)])
        run = Path("runs/tiny/version_0")
        left = {path.name for path in run.iterdir()}
        assert {"config.yaml", "metrics.csv", "split.json", "student.safetensors", "checkpoints"} <= left
        saved_config = (run / "config.yaml").read_bytes()

        main(["validate", "--config", "config.yaml", "--ckpt_path", "last"])
        main(["test", "--config", "config.yaml", "--ckpt_path", "best"])
        main(["predict", "--config", "config.yaml", "--ckpt_path", str(run / "checkpoints/last.ckpt")])
        assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]  # all in the run's own folder
        assert (run / "config.yaml").read_bytes() == saved_config

        last = {key: row[key] for row in rows(run) for key in row if row[key]}
        expected = {"train/loss", "train/hard", "train/soft", "soft_weight", "val/accuracy", "val/f1", "val/agreement"}
        expected |= {"val/calibration_error", "val/teacher_accuracy", "val/teacher_kl", "test/accuracy", "test/f1"}
        assert expected <= set(last)
        tags = scalars(run)
        assert expected <= set(tags["scalars"])
        pictures = {"samples/augmentation", "samples/teacher_and_student", "test/confusion_matrix"}
        assert {*tags["images"]} == pictures and "config/text_summary" in tags["tensors"]
        (step,) = {row["step"] for row in rows(run) if row["test/accuracy"]}  # that of the best checkpoint
        assert step in {row["step"] for row in rows(run) if row["val/accuracy"]} - {"0"}

        with (run / "predictions.csv").open() as file:
            predictions = list(csv.DictReader(file))
        assert len(predictions) == 600
        assert list(predictions[0]) == ["index", "path", "content", "prediction", *"0123456789"]
        for row in predictions[:20]:
            probabilities = {name: float(row[name]) for name in "0123456789"}
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
            assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)

        with safe_open(run / "student.safetensors", "pt") as file:
            assert yaml.safe_load(file.metadata()["classes"]) == list("0123456789")
            assert yaml.safe_load(file.metadata()["input_shape"]) == [1, 8, 8]

    def test_saved_config_reruns_to_the_same_weights(self, config, fit_or_copy):
        fit_or_copy(config)
        main(["fit", "--config", "runs/tiny/version_0/config.yaml"])
        first, second = (weights(f"runs/tiny/version_{k}/checkpoints/last.ckpt") for k in (0, 1))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_student_is_tested_without_the_teachers_file(self, config, fit_or_copy):
        fit_or_copy(config)
        Path("teacher.pt").unlink()
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        main(["predict", "--config", "config.yaml", "--ckpt_path", "last"])
        assert any(row.get("test/accuracy") for row in rows("runs/tiny/version_0"))

    def test_student_of_several_is_tested_without_a_teachers_file(self, config):
        arguments = config["model"]["init_args"]
        teacher = arguments.pop("teacher")
        torch.save(DigitsCNN(8).state_dict(), "second.pt")
        second = deepcopy(teacher)
        second["init_args"]["path"] = "second.pt"
        arguments["teachers"] = [teacher, {"class_path": "Teacher", "init_args": {"network": second}}]
        config["model"]["class_path"] = "EnsembleDistillModule"
        main(["fit", "--config", write(config)])
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        assert rows("runs/tiny/version_0")[-1]["test/teacher_1_accuracy"]
        Path("second.pt").unlink()
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        last = rows("runs/tiny/version_0")[-1]
        assert last["test/accuracy"]
        assert not last["test/teacher_0_accuracy"]

    def test_composition_and_overrides(self, config, capsys):
        data = config.pop("data")
        write(config, "model.yaml")
        write({"data": data}, "data.yaml")
        args = ["fit", "--config", "model.yaml", "--config", "data.yaml", "--model.init_args.soft_weight", "0.25"]
        with pytest.raises(SystemExit) as end:
            main([*args, "--print_config"])
        assert not end.value.code
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["init_args"]["soft_weight"] == 0.25
        assert printed["data"]["init_args"]["labeled"] == 5

    def test_nested_files(self, config, capsys):
        write(config["data"], "data.yaml")
        config["data"] = "data.yaml"
        with pytest.raises(SystemExit):
            main(["fit", "--config", write(config), "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["labeled"] == 5


class TestResume:
    def test_goes_on_in_its_folder_and_ends_the_same(self, config):
        config["checkpoint"] = {"every_n_train_steps": 3, "save_top_k": -1, "monitor": None}
        path = write(config)
        main(["fit", "--config", path])
        run = Path("runs/tiny/version_0")
        whole, before = weights(run / "checkpoints/last.ckpt"), rows(run)
        middle = next(run.glob("checkpoints/*step=3.ckpt"))
        # the command line wins over the hyperparameters in the checkpoint, here with the same values
        main(["fit", "--config", path, "--ckpt_path", str(middle)])
        assert [p.name for p in Path("runs/tiny").iterdir()] == ["version_0"]
        resumed = weights(max(run.glob("checkpoints/last*.ckpt"), key=os.path.getmtime))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
        steps = [(row["step"], row["train/loss_step"]) for row in before if row["train/loss_step"]]
        assert [(row["step"], row["train/loss_step"]) for row in rows(run) if row["train/loss_step"]] == steps

    @pytest.mark.parametrize(
        ("more", "written"),
        [
            ({}, ["last.ckpt"]),
            ({"filename": "own"}, ["last.ckpt", "own.ckpt"]),
            ({"save_last": False}, ["epoch=1-step=8.ckpt"]),
        ],
    )
    def test_without_a_monitor_the_last_weights_are_written_once(self, more, written, config):
        config["checkpoint"] = {"monitor": None, **more}
        main(["fit", "--config", write(config)])
        assert sorted(path.name for path in Path("runs/tiny/version_0/checkpoints").iterdir()) == written
        cli = DistillCLI(["fit", "--config", "config.yaml", "--ckpt_path", "best"])  # nothing is left to train
        assert (cli.trainer.global_step, cli.run_folder) == (8, Path("runs/tiny/version_0"))

    def test_command_line_wins_over_the_checkpoints_hyperparameters(self, config, fit_or_copy):
        fit_or_copy(config)
        args = ["fit", "--config", "config.yaml", "--model.init_args.soft_weight", "0.75", "--trainer.max_epochs", "3"]
        cli = DistillCLI([*args, "--ckpt_path", "runs/tiny/version_0/checkpoints/last.ckpt"])
        assert cli.run_folder == Path("runs/tiny/version_1")  # with another config it is another run
        assert cli.model.soft_weight == 0.75
        assert float(cli.trainer.callback_metrics["soft_weight"]) == 0.75


class Wandbish(Logger):
    """W&B's interface, as far as a run meets it: no TensorBoard writer behind ``experiment``."""

    def __init__(self, project: str = "p"):
        super().__init__()
        self.seen = {}

    name = property(lambda self: "wandbish")
    version = property(lambda self: "0")

    @property
    @rank_zero_experiment
    def experiment(self):
        return object()

    def log_metrics(self, metrics, step=None):
        self.seen |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class NewEachTime(Wandbish):
    """A logger whose version is another one in each command."""

    versions = itertools.count()

    def __init__(self):
        super().__init__()
        self.own = f"id{next(self.versions)}"

    version = property(lambda self: self.own)


class TestLoggers:
    def test_no_logger(self, config):
        config["trainer"]["logger"] = False
        main(["fit", "--config", write(config)])
        run = Path("runs/tiny/version_0")
        saved = (run / "config.yaml").read_bytes()
        main(["test", "--config", "config.yaml", "--ckpt_path", "last"])
        main(["predict", "--config", "config.yaml"])
        assert (run / "config.yaml").read_bytes() == saved  # a test does not overwrite the fit's config
        assert (run / "predictions.csv").is_file()
        main(["fit", "--config", "config.yaml"])
        assert {p.name for p in Path().iterdir()} == {"config.yaml", "teacher.pt", "runs"}
        assert {p.name for p in Path("runs/tiny").iterdir()} == {"version_0", "version_1"}
        assert (run / "student.safetensors").is_file()

    def test_another_logger(self, config):
        config["trainer"]["logger"] = {"class_path": f"{__name__}.Wandbish"}
        cli = DistillCLI(["fit", "--config", write(config)])
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        assert {"train/loss", "val/accuracy", "test/accuracy"} <= set(cli.trainer.logger.seen)
        assert {p.name for p in Path().iterdir()} == {"config.yaml", "teacher.pt", "runs"}

    def test_results_lie_in_the_run_where_a_logger_begins_a_new_one_for_each_command(self, config, capsys):
        """As Weights & Biases and MLflow: ``test`` and ``predict`` have another version than the fit."""
        config["trainer"]["logger"] = {"class_path": f"{__name__}.NewEachTime"}
        main(["fit", "--config", write(config)])
        (run,) = Path("runs/wandbish").iterdir()
        for command in ("test", "validate", "predict"):
            capsys.readouterr()
            main([command, "--config", "config.yaml"])
            assert command == "predict" or str(run) in capsys.readouterr().out
        assert {path.name for path in run.iterdir()} >= {"test.json", "val.json", "predictions.csv"}
        assert [*Path("runs/wandbish").iterdir()] == [run]


class TheirModule(LightningModule):
    """Somebody's own."""

    def __init__(self, net: nn.Module, rate: float = 0.1):
        super().__init__()
        self.net = net
        self.rate = rate

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class TheirData(LightningDataModule):
    """Plain ``(x, y)``."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10), 8)

    val_dataloader = test_dataloader = train_dataloader


class TestTheirOwn:
    def test_module_and_data(self, config):
        config["model"] = {
            "class_path": f"{__name__}.TheirModule",
            "init_args": {"net": {"class_path": "DigitsCNN"}, "rate": 0.05},
        }
        config["data"] = {"class_path": f"{__name__}.TheirData"}
        cli = DistillCLI(["fit", "--config", write(config)])
        assert cli.trainer.global_step == 8
        assert list(Path("runs/tiny/version_0/checkpoints").glob("*.ckpt"))

    def test_their_data_with_our_module(self, config):
        config["data"] = {"class_path": f"{__name__}.TheirData"}
        cli = DistillCLI(["fit", "--config", write(config)])
        assert "val/accuracy" in cli.trainer.callback_metrics

    @pytest.mark.parametrize(
        ("teacher", "student"),
        [
            (
                {"class_path": "torchvision.models.resnet18", "dict_kwargs": {"num_classes": 3}},
                {"class_path": "torchvision.models.squeezenet1_1", "dict_kwargs": {"num_classes": 3}},
            ),
            (
                {"class_path": "timm.create_model", "dict_kwargs": {"model_name": "resnet10t", "num_classes": 3}},
                {"class_path": "timm.create_model", "dict_kwargs": {"model_name": "test_resnet", "num_classes": 3}},
            ),
        ],
    )
    def test_factory_functions(self, config, teacher, student):
        config["model"]["init_args"] |= {"teacher": teacher, "student": student}
        source = {"class_path": "FakeData", "init_args": {"size": 24, "image_size": [3, 64, 64], "num_classes": 3}}
        config["data"]["init_args"] = {"source": source, "labeled": 0.5, "batch_size": 8}
        config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2}
        main(["fit", "--config", write(config)])
        assert Path("runs/tiny/version_0/student.safetensors").is_file()

    @pytest.mark.parametrize("interval", ["step", "epoch"])
    def test_scheduler_interval(self, config, interval):
        config["model"]["init_args"] |= {
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}},
            "lr_interval": interval,
        }
        cli = DistillCLI(["fit", "--config", write(config)])
        rate = cli.trainer.optimizers[0].param_groups[0]["lr"]
        assert rate == pytest.approx(0.01 * 0.5 ** (8 if interval == "step" else 2))

    def test_plateau_follows_its_monitor(self, config):
        config["model"]["init_args"]["lr_scheduler"] = {
            "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
            "init_args": {"monitor": "soft_weight", "patience": 0},  # never improves
        }
        cli = DistillCLI(["fit", "--config", write(config), "--trainer.max_epochs", "3"])
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] < 0.01

    def test_early_stopping_watches_the_checkpoints_monitor(self, config):
        config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
        config["model"]["init_args"]["student"]["class_path"] = f"{__name__}.still"
        config["model"]["init_args"]["student"].pop("init_args")
        cli = DistillCLI(["fit", "--config", write(config), "--early_stopping", "2", "--trainer.max_epochs", "9"])
        assert cli.trainer.current_epoch == 3  # the first is the best, then two without a better one

    def test_no_validation_part(self, config):
        config["data"]["init_args"]["val_size"] = 0
        main(["fit", "--config", write(config)])
        assert Path("runs/tiny/version_0/student.safetensors").is_file()


def still() -> nn.Module:
    """A network whose output never changes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_labels_outside_the_classes(config, fails):
    for role in ("student", "teacher"):
        network = config["model"]["init_args"][role]
        network = network["init_args"].get("model", network)
        network["init_args"] = {"width": 4, "num_classes": 7}
    torch.save(DigitsCNN(4, num_classes=7).state_dict(), "teacher.pt")
    assert "at least 10, the classes in the data, got 7" in fails("fit", "--config", write(config))


def test_sigterm_also_ends_processes_that_start_up(config, monkeypatch):
    launcher = Mock()

    def fit(trainer, *args, **kwargs):
        trainer.strategy._launcher = launcher
        raise SystemExit(143)

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(SystemExit):
        DistillCLI(["fit", "--config", write(config)])
    launcher.kill.assert_called_once_with(signal.SIGTERM)


@pytest.mark.slow
def test_from_the_shell(config):
    config["model"]["init_args"]["soft_wieght"] = 1
    command = [sys.executable, "-m", "kd_lightning", "fit", "--config", write(config)]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 2
    assert "Traceback" not in end.stderr + end.stdout
    assert "did you mean soft_weight?" in end.stderr.strip().splitlines()[-1]


class TestBuild:
    def test_classes_and_functions(self):
        assert build(nn.Module, {"class_path": "DigitsCNN", "init_args": {"width": 5}})[0].out_channels == 5
        made = {"class_path": "torchvision.models.squeezenet1_1", "dict_kwargs": {"num_classes": 3}}
        assert build(nn.Module, made).num_classes == 3
        source = {"class_path": "FakeData", "init_args": {"size": 9}}
        data = build(LightningDataModule, {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source}})
        assert type(data.source).__name__ == "FakeData"

    @pytest.mark.parametrize(
        ("class_path", "arguments", "message"),
        [
            ("DigitsCN", {}, "^class_path: no class 'DigitsCN'; did you mean DigitsCNN"),
            ("nowhere.Net", {}, "'nowhere.Net': No module named 'nowhere'"),
            ("DigitsCNN", {"widht": 4}, "^widht: no such key; did you mean width"),
            ("DigitsCNN", {"width": "x"}, "^width: Expected a int, got x"),
            ("torch.nn.Linear", {"in_features": -1, "out_features": 3}, "negative dimension -1"),
            ("kd_lightning.load_weights", {"model": {"class_path": "DigitsCNN"}, "path": "gone"}, "file at gone"),
        ],
    )
    def test_what_cannot_be(self, class_path, arguments, message):
        with pytest.raises(InputError, match=message):
            build(nn.Module, {"class_path": class_path, "init_args": arguments})
