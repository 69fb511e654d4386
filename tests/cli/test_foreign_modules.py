"""The command line with modules of other projects: as they are, and taught."""

import csv
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file

from kd_lightning import InputError, load_weights, teach
from kd_lightning.__main__ import main
from kd_lightning.cli.baseline import baseline_of
from kd_lightning.cli.main import DistillCLI
from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.stop_signals import StopSignals
from kd_lightning.deploy.export import read_file_metadata
from kd_lightning.runs.run import Run

PROJECT = '''
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning import Batch, SupervisedModule

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
SAMPLES = [(x, n % 3) for n, x in enumerate(X)]


class Data(LightningDataModule):
    def __init__(self, dicts: bool = False):
        super().__init__()
        self.samples = [{"image": x, "label": y, "bounds": torch.ones(2)} for x, y in SAMPLES] if dicts else SAMPLES

    def load(self):
        return DataLoader(self.samples, batch_size=6)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = load


def layers(width, inputs=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3))


def big(width: int = 9, inputs: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return layers(width, inputs)


class Lit(LightningModule):
    """As projects write it: all arguments are hyperparameters, read when the optimiser is built."""

    def __init__(self, width: int = 5, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = layers(width)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).softmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class DictLit(Lit):
    """Batches of dicts, of which the network gets one entry; class ids are its predictions."""

    def loss(self, batch):
        return F.cross_entropy(self.net(x=batch["image"]) if False else self.net(batch["image"]), batch["label"])

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", (self.net(batch["image"]).argmax(-1) == batch["label"]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self.net(batch["image"]).argmax(-1)


class Ours(SupervisedModule):
    """A module of ours, with a batch of theirs."""

    def unpack(self, batch):
        return Batch(batch["image"], batch["label"])


class Scores(nn.Module):
    def __init__(self, width: int = 9):
        super().__init__()
        self.layers = big(width)

    def forward(self, x):
        return {"feature": x, "scores": self.layers(x)}


class Turned(Lit):
    """Its steps turn the sign of what a batch holds."""

    def loss(self, batch):
        return F.cross_entropy(self.net(-batch[0]), batch[1])


class Parts(Lit):
    """Its network returns a feature beside its logits."""

    def __init__(self, width: int = 5, lr: float = 0.1):
        super().__init__(width, lr)
        self.net = Scores(width)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0])["scores"], batch[1])


class Late(Lit):
    """Builds its network late."""

    def __init__(self, width: int = 5, lr: float = 0.1):
        super(Lit, self).__init__()
        self.save_hyperparameters()

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = layers(self.hparams.width)


class Itself(Lit):
    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


class Flat(Lit):
    """On images of ours, of ten classes, of which it knows three."""

    def __init__(self, width: int = 5, lr: float = 0.1):
        super().__init__(width, lr)
        self.net = layers(width, 64)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y % 3)


class Judge(Lit):
    """Logs metrics of some names, which fall."""

    def __init__(self, logs: list[str], width: int = 5, lr: float = 0.1):
        super().__init__(width, lr)

    def validation_step(self, batch, batch_idx):
        self.log_dict(dict.fromkeys(self.hparams.logs, -float(self.global_step)))


class Silent(Lit):
    """Has no validation and no test."""

    validation_step = LightningModule.validation_step
    test_step = LightningModule.test_step
    predict_step = LightningModule.predict_step


class Stop(Callback):
    """Ends the first fit in the second epoch."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5 and not Path("go on").exists():
            raise RuntimeError("killed")


class Twins(LightningModule):
    """Holds another LightningModule; each has hyperparameters of its own."""

    def __init__(self, lr: float, inner: LightningModule):
        super().__init__()
        self.save_hyperparameters(ignore=["inner"])
        self.inner = inner

    def training_step(self, batch, batch_idx):
        assert self.hparams.lr == 0.3 and self.inner.hparams.lr == 0.1 and self.inner.hparams.width == 7
        return self.inner.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)
'''


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A file with another project's modules, in the working directory."""
    (tmp_path / "their_project.py").write_text(textwrap.dedent(PROJECT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("their_project", None)
    yield
    sys.modules.pop("their_project", None)


def write(module="Lit", taught=True, path="c.yaml", dicts=False, teacher=None, **arguments):
    inner = {"class_path": f"their_project.{module}", "init_args": {"width": 6}}
    teacher = teacher or {"class_path": "their_project.big"}
    model = {"class_path": "kd_lightning.teach", "init_args": {"module": inner, "teacher": teacher, **arguments}}
    config = {
        "name": "theirs",
        "seed_everything": 1,
        "trainer": {
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
        },
        "model": model if taught else inner,
        "data": {"class_path": "their_project.Data", "init_args": {"dicts": dicts}},
        "checkpoint": {"monitor": "val/loss", "mode": "min"},
    }
    if module == "Silent":
        config["checkpoint"]["monitor"] = None
        del config["checkpoint"]["mode"]
    Path(path).write_text(yaml.safe_dump(config))
    return path


RUN = Path("runs/theirs/version_0")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def printed(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*args])
    return capsys.readouterr().out


class TestAsTheyAre:
    @pytest.mark.parametrize("module", ["Lit", "DictLit", "Late", "Itself"])
    def test_every_verb(self, module):
        path = write(module, taught=False, dicts=module == "DictLit")
        for verb in ("fit", "validate", "test", "predict"):
            main([verb, "--config", path])
        assert not (RUN / "student.safetensors").exists()
        assert Run(RUN).result("test").figures.keys() == {"accuracy"}
        names = [*rows(RUN / "predictions.csv")[0]][3:]
        assert names == (["prediction"] if module == "DictLit" else ["prediction", "0", "1", "2"])

    def test_without_validation(self):
        main(["fit", "--config", write("Silent", taught=False)])
        assert Run(RUN).finished

    def test_an_installed_command_finds_them_in_the_working_directory(self, tmp_path, monkeypatch):
        """The path of its modules begins with the folder of its script, and lacks the working directory."""
        monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
        monkeypatch.setattr(sys, "argv", ["kd-lightning", "fit", write("Silent", taught=False)])
        monkeypatch.setattr(StopSignals, "install", lambda self: None)
        main()
        assert Run(RUN).finished

    def test_a_module_inside_another_has_its_own_hyperparameters(self):
        path = write(taught=False)
        config = yaml.safe_load(Path(path).read_text())
        inner = {"class_path": "their_project.Lit", "init_args": {"width": 7}}
        config["model"] = {"class_path": "their_project.Twins", "init_args": {"lr": 0.3, "inner": inner}}
        config["checkpoint"] = {"monitor": None}
        Path(path).write_text(yaml.safe_dump(config))
        main(["fit", "--config", path])

    def test_a_module_as_the_teacher_has_its_own_hyperparameters(self):
        """Of a student that is theirs, too: both are of one class, with other arguments."""
        teacher = {"class_path": "their_project.Itself", "init_args": {"width": 9}}
        main(["fit", "--config", write("Itself", teacher=teacher, network="")])
        saved = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
        assert saved["width"] == 6


class TestTaught:
    @pytest.mark.parametrize(
        ("module", "network"),
        [
            ("Lit", "net"),
            pytest.param("DictLit", "net", marks=pytest.mark.slow),
            pytest.param("Late", "net", marks=pytest.mark.slow),
            ("Itself", ""),
            pytest.param("Lit", "net.3", marks=pytest.mark.slow),
        ],
    )
    def test_the_whole_story(self, capsys, module, network):
        path = write(module, dicts=module == "DictLit", network=network)
        if network == "net.3":  # a part of the network: the teacher takes what this part gets
            teacher = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 6, "out_features": 3}}
            write(module, network=network, teacher=teacher)
        main(["fit", "--config", path])
        run = Run(RUN)
        prefix = f"{network}." if network else ""
        deployed = load_file(RUN / "student.safetensors")
        (best,) = (file for file in run.checkpoints() if file.stem != "last")
        state = torch.load(best, weights_only=True)["state_dict"]
        assert deployed.keys() == {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        assert all(torch.equal(value, state[prefix + key]) for key, value in deployed.items())
        assert {"teach/soft", "teach/hard"} <= {key for row in rows(RUN / "metrics.csv") for key in row}
        for verb in ("validate", "test", "predict"):
            main([verb, "--config", path])
        result = run.result("test")
        assert result.weights == run.weights_hash
        assert rows(RUN / "predictions.csv")
        x = torch.ones(2, 6 if network == "net.3" else 4)
        assert run.student()(x).shape == (2, 3)
        main(["compare", "runs/theirs", "--out", "compared"])
        (group,) = json.loads(Path("compared/comparison.json").read_text())["groups"]
        macs = {"net.3": 18}.get(network, 42)
        assert (group["macs"], group["parameters"]) == (macs, sum(p.numel() for p in run.student().parameters()))

    def test_deployed_weights_without_their_checkpoint(self):
        path = write()
        main(["fit", "--config", path])
        main(["test", "--config", path])
        before = Run(RUN).result("test").figures
        for file in Run(RUN).checkpoints():
            file.unlink()
        (RUN / "test.json").unlink()
        main(["test", "--config", path])
        assert Run(RUN).result("test").figures == before

    def test_resume_equals_an_unbroken_run(self):
        path = write(soft_weight=0.5)
        config = yaml.safe_load(Path(path).read_text())
        config["trainer"]["callbacks"] = [{"class_path": "their_project.Stop"}]
        Path(path).write_text(yaml.safe_dump(config))
        with pytest.raises(RuntimeError, match="killed"):
            main(["fit", "--config", path, "--name", "part"])
        Path("go on").touch()
        main(["fit", "--config", path, "--name", "part", "--ckpt_path", "last"])
        main(["fit", "--config", path])
        states = [
            torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for name in ("part", "theirs")
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
        assert [p.name for p in Path("runs/part").iterdir()] == ["version_0"]

    def test_another_teacher_is_refused(self):
        path = write()
        main(["fit", "--config", path])
        args = ["fit", "--config", path, "--model.init_args.teacher.init_args.width", "8", "--ckpt_path", "last"]
        with pytest.raises(InputError, match=r"another config: model.init_args.teacher.init_args.width: 8, not 9"):
            DistillCLI(args)

    def test_config_overrides_and_help(self, capsys):
        path = write()
        text = printed(
            capsys, "fit", "--config", path, "--model.init_args.module.init_args.width", "3", "--print_config"
        )
        arguments = yaml.safe_load(text)["model"]["init_args"]
        assert arguments["module"]["init_args"] == {"width": 3, "lr": 0.1}
        assert (arguments["network"], arguments["soft_weight"]) == ("net", 0.5)
        config = yaml.safe_load(Path(path).read_text())
        config["model"]["class_path"] = "teach"
        Path("short.yaml").write_text(yaml.safe_dump(config))
        assert (
            yaml.safe_load(printed(capsys, "fit", "--config", "short.yaml", "--print_config"))["model"]["class_path"]
            == "kd_lightning.teach"
        )
        main(["fit", "--model.help", "teach"])
        assert "  soft_weight " in capsys.readouterr().out

    def test_without_the_teachers_file(self):
        import their_project

        torch.save(their_project.big().state_dict(), "teacher.pt")
        teacher = {
            "class_path": "kd_lightning.load_weights",
            "init_args": {"model": {"class_path": "their_project.big"}, "path": "teacher.pt"},
        }
        path = write(teacher=teacher)
        main(["fit", "--config", path])
        Path("teacher.pt").unlink()
        for verb in ("test", "predict"):
            main([verb, "--config", path])
        assert Run(RUN).result("test").weights == Run(RUN).weights_hash

    def test_checkpoints_load_in_python(self):
        import their_project

        main(["fit", "--config", write()])
        last = RUN / "checkpoints/last.ckpt"
        module = their_project.Lit.load_from_checkpoint(last)
        assert type(module) is their_project.Lit
        assert dict(module.hparams) == {"width": 6, "lr": 0.1}
        other = load_weights(their_project.Lit(6), last)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in module.state_dict().items())
        with pytest.raises(InputError, match="by the module's own class"):
            teach.load_from_checkpoint(last)

    def test_their_own_lightning_cli(self):
        import their_project

        config = yaml.safe_load(Path(write()).read_text())
        options = {"logger": False, "enable_checkpointing": False}
        arguments = {
            "trainer": config["trainer"] | options,
            "model": config["model"]["init_args"],
            "data": {"dicts": False},
        }
        cli = LightningCLI(teach, their_project.Data, args=["fit", f"--config={yaml.safe_dump(arguments)}"])
        assert type(cli.model) is their_project.Lit
        assert {"teach/soft", "teach/hard", "val/loss"} <= cli.trainer.callback_metrics.keys()

    def test_a_network_that_is_not_there(self, capsys):
        text = main_fails(capsys, "fit", "--config", write(network="nett"))
        assert text.startswith("error: StudentWriter: network: Lit has no network 'nett'; nearest: net, ")
        assert not Path("runs").exists() or not any(Path("runs").rglob("config.yaml"))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["cache"], "error: cache: no teacher of Lit has a cache"),
        ],
    )
    def test_commands_that_cannot(self, capsys, args, message):
        assert main_fails(capsys, *args, "--config", write()).startswith(message)

    @pytest.mark.parametrize(
        ("module", "network"), [("Lit", "net"), ("DictLit", "net"), ("Late", "net"), ("Itself", "")]
    )
    def test_doctor(self, capsys, module, network):
        capsys.readouterr()
        main(["doctor", "--config", write(module, dicts=module == "DictLit", network=network)])
        text = capsys.readouterr().out
        assert "of 24 validation labels right" in text
        assert "6 of 6 samples of a training batch labeled, 3 of 3 classes" in text
        assert "gradients: norms on the student: hard " in text
        assert "(weight 0.5), soft " in text

    @pytest.mark.parametrize("dicts", [False, True])
    def test_layers(self, capsys, dicts):
        main(["layers", "--config", write("DictLit" if dicts else "Lit", dicts=dicts)])
        text = capsys.readouterr().out
        assert "1 (Linear)" in text
        assert "24" in text  # 4 * 6, of the student
        assert "36" in text  # 4 * 9, of the teacher

    def test_export(self):
        main(["fit", "--config", write()])
        main(["export", str(RUN), "--out", "student.pt2"])
        program = torch.export.load("student.pt2").module()
        x = torch.randn(3, 4)
        torch.testing.assert_close(program(x), Run(RUN).student().eval()(x))

    @pytest.mark.parametrize("taught", [True, False])
    def test_export_of_a_network_that_gets_a_part_of_a_batch(self, taught):
        """What it gets is what its step calls it with, and what the unpack of a module of ours returns."""
        path = write("DictLit", dicts=True)
        if not taught:
            config = yaml.safe_load(Path(path).read_text())
            config["model"] = {
                "class_path": "their_project.Ours",
                "init_args": {"student": {"class_path": "their_project.big"}},
            }
            Path(path).write_text(yaml.safe_dump(config))
        main(["fit", "--config", path])
        main(["export", str(RUN), "--out", "student.pt2"])
        x = torch.randn(3, 4)
        torch.testing.assert_close(torch.export.load("student.pt2").module()(x), Run(RUN).student().eval()(x))

    def test_export_of_a_part_of_the_outputs(self):
        main(["fit", "--config", write("Parts", output="scores")])
        student, x = Run(RUN).student().eval(), torch.randn(3, 4)
        for name in ("student.pt2", "student.safetensors"):
            main(["export", str(RUN), "--out", name])
        torch.testing.assert_close(torch.export.load("student.pt2").module()(x), student(x)["scores"])

    def test_export_is_examined_on_what_the_step_passes_on(self):
        """The network takes the plain inputs, too. The accuracy in the file is that of the step."""
        main(["fit", "--config", write("Turned")])
        main(["export", str(RUN), "--out", "student.pt2"])
        accuracy = json.loads(read_file_metadata(Path("student.pt2"))["accuracy"])
        import their_project

        x = torch.stack([x for x, _ in their_project.SAMPLES])
        y = torch.tensor([y for _, y in their_project.SAMPLES])
        student = Run(RUN).student().eval()
        right = [int((student(sign * x).argmax(-1) == y).sum()) for sign in (-1, 1)]
        assert right[0] != right[1]
        assert accuracy["correct"] == right[0]

    def test_its_baseline_is_the_module_alone(self):
        path = write()
        config = yaml.safe_load(Path(path).read_text())
        source = {"class_path": "kd_lightning.Digits"}
        config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source, "labeled": 2}}
        alone = baseline_of(parse_config(config, "experiment"))
        assert alone["model"] == {"class_path": "their_project.Lit", "init_args": {"width": 6, "lr": 0.1}}
        assert alone["name"] == "theirs_alone"
        config["model"] = alone["model"]
        with pytest.raises(InputError, match=r"experiment needs a model with a student, their_project.Lit has none"):
            baseline_of(parse_config(config, "experiment"))

    def test_its_teacher_can_have_a_cache(self, capsys):
        """``cache`` fills it, and the fit then reads it."""
        network = {"class_path": "their_project.big", "init_args": {"inputs": 64}}
        teacher = {"class_path": "kd_lightning.Teacher", "init_args": {"network": network, "cache": "stored"}}
        path = write("Flat", teacher=teacher)
        config = yaml.safe_load(Path(path).read_text())
        source = {"class_path": "kd_lightning.Digits"}
        data = {"source": source, "labeled": 60, "unlabeled": "none", "num_views": 1}
        config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": data}
        Path(path).write_text(yaml.safe_dump(config))
        main(["cache", path])
        assert "stored" in capsys.readouterr().out
        assert not list(Path("runs").rglob("config.yaml"))
        main(["fit", "--config", path])
        assert Run(RUN).student()(torch.zeros(1, 64)).shape == (1, 3)

    @pytest.mark.slow
    @pytest.mark.dist
    def test_two_processes(self, tmp_path, processes):
        """They learn what one process learns at the same global batch (all samples, since Lightning shuffles), write
        one student, and test it.
        """
        source = Path("their_project.py").read_text()
        Path("their_project.py").write_text(source.replace("batch_size=6", "batch_size=24"))
        path = write()
        main(["fit", "--config", path])
        one = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        config = yaml.safe_load(Path(path).read_text())
        config["name"] = "two"
        config["trainer"] |= {"devices": 2, "strategy": "ddp"}
        Path("two.yaml").write_text(yaml.safe_dump(config))
        Path("their_project.py").write_text(source.replace("batch_size=6", "batch_size=12"))
        for verb in ("fit", "test", "predict"):
            processes.run_ranks([verb, "--config", "two.yaml"], PYTHONPATH=str(tmp_path))
        run = Run("runs/two/version_0")
        assert run.result("test").weights == run.weights_hash
        two = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
        assert len(rows(run.folder / "predictions.csv")) == 24


def main_fails(capsys, *args):
    """Run a command that fails, and return its last line."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*args])
    return capsys.readouterr().err.strip().splitlines()[-1]


class TestTheDefaultMonitor:
    @pytest.fixture
    def fit(self, recwarn):
        def run(taught, logs, *options):
            path = write("Judge", taught=taught)
            config = yaml.safe_load(Path(path).read_text())
            inner = config["model"]["init_args"]["module"] if taught else config["model"]
            inner["init_args"] = {"logs": logs}
            del config["checkpoint"]
            Path(path).write_text(yaml.safe_dump(config))
            recwarn.clear()
            main(["fit", "--config", path, *options])
            return [str(one.message) for one in recwarn if "checkpoint.monitor" in str(one.message)]

        return run

    @pytest.mark.parametrize("taught", [True, False])
    @pytest.mark.parametrize(("logs", "names"), [(["val_acc", "val_loss"], "val_acc, val_loss"), (["score"], "score")])
    def test_that_was_never_logged(self, fit, taught, logs, names):
        (message,) = fit(taught, logs)
        start = "checkpoint.monitor: val/accuracy was never logged, so that the last weights are deployed"
        assert message.startswith(start) and f": {names}" in message
        assert [path.name for path in RUN.rglob("*.ckpt")] == ["last.ckpt"]
        if taught:
            assert Run(RUN).metadata["weights"] == "step 8"

    @pytest.mark.parametrize("options", [[], ["--early_stopping", "1"], ["--checkpoint.monitor", "val/accuracy"]])
    def test_that_is_logged(self, fit, options):
        """The first value is the best one."""
        assert fit(True, ["val/accuracy"], *options) == []
        assert Run(RUN).metadata["weights"] == "epoch=0-step=4.ckpt"
        assert Run(RUN).best_checkpoint().name == "epoch=0-step=4.ckpt"

    def test_that_early_stopping_needs(self, fit, capsys):
        with pytest.raises(SystemExit):
            fit(False, ["val_acc"], "--early_stopping", "1")
        assert "on metric `val/accuracy` which is not available" in capsys.readouterr().err.splitlines()[-1]
