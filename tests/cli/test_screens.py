"""What a user sees: quiet runs with an introduction, short tables, next steps, and all of it with --verbose."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from rich.console import Console
from torch import nn
from torch.utils.data import IterableDataset

from kd_lightning import (
    Digits,
    DistillModule,
    FeatureDistillModule,
    SemiSupervisedDataModule,
    StreamDataModule,
    SupervisedModule,
    Teacher,
)
from kd_lightning.__main__ import main
from kd_lightning.cli.introduction import describe_network, known_accuracy, teachers_of
from kd_lightning.cli.outcome import print_figures, print_next_steps
from kd_lightning.cli.progress import OneLineProgress
from kd_lightning.cli.quiet import RANKS, format_warning, is_verbose, quiet, silence_lightning, take_verbose
from kd_lightning.data.sources.report_once import report_once
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.run import Run

ADVERTS = ("litlogger", "TPU available", "GPU available", "Total FLOPs", "Restoring states", "Loaded model weights")


@pytest.fixture
def handlers():
    """The stream handlers that Lightning installs where no other exist, as in a process of its own."""
    written = []

    class Written(logging.Handler):
        def emit(self, record):
            written.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch"), Written()
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


@pytest.fixture
def unranked(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("verbose", [False, True])
def test_a_message_that_comes_again_is_left_out(handlers, verbose):
    for _ in range(2):  # two commands of one process
        handlers.clear()
        with quiet(verbose):
            silence_lightning()
            for text in ("one", "two", "one"):
                report_once.__wrapped__(text)
        assert handlers == (["one", "two", "one"] if verbose else ["one", "two"])


def test_messages_of_the_user_come_each_time(handlers):
    """Such as one of each epoch, of a callback in their project."""
    with quiet():
        silence_lightning()
        for _ in range(2):
            rank_zero_info("the epoch ends")
    assert handlers == ["the epoch ends"] * 2


def test_a_run_is_introduced_and_quiet(config, capsys, handlers, unranked):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    before = warnings.formatwarning
    main(["fit", "config.yaml"])
    assert warnings.formatwarning is before
    run = Path("runs/tiny/version_0")
    lines = capsys.readouterr().out.splitlines()
    student = sum(p.numel() for p in DigitsCNN(4).parameters())
    assert lines[0] == "fit      tiny: DistillModule, 2 epochs, seed 1, on cpu"
    assert " ".join(" ".join(lines[1:3]).split()) == (
        "data Digits: 10 classes; 50 labeled (5 each), 1028 unlabeled, 119 validation (10 to 13 each), 600 test (49 to "
        "69 each)"
    )
    assert lines[3].startswith(f"student  DigitsCNN: {student / 1000:.3g} k parameters, ")
    assert lines[3].endswith(" MACs a sample")
    assert lines[4].startswith("teacher  DigitsCNN: ")
    assert lines[5] == f"folder   {run}"
    assert lines[6:] == [
        "next: kd-lightning test config.yaml",
        "      kd-lightning experiment config.yaml   # does the teacher help?",
        f"      kd-lightning export {run}",
    ]
    assert any(text.startswith("student written to") for text in handlers)
    assert not [text for text in handlers if any(advert in text for advert in ADVERTS)]
    assert not [text for text in handlers if "number of samples" in text]

    handlers.clear()
    main(["test", "config.yaml"])
    lines = capsys.readouterr().out.splitlines()
    figures = Run(run).result("test").figures
    assert lines[0] == f"test of {run}, 600 samples"
    assert lines[1].split() == ["accuracy", f"{figures['accuracy']:.3f}"]
    assert lines[9].split()[0] == "recall"
    assert len([line for line in lines if "recall" in line]) == 1
    recalls = [value for name, value in figures.items() if name.startswith("recall_")]
    assert f"{min(recalls):.3f} (" in lines[9] and f"to {max(recalls):.3f} (" in lines[9]
    assert not [text for text in handlers if any(advert in text for advert in ADVERTS)]
    assert known_accuracy(str(run / "student.safetensors")) == (
        f", test accuracy {figures['accuracy']:.3f} on 600 samples ({run})"
    )

    handlers.clear()
    main(["test", "config.yaml", "--verbose"])
    assert "Test metric" in capsys.readouterr().out
    assert [text for text in handlers if "TPU available" in text]


def test_teachers_of_features_are_introduced():
    module = FeatureDistillModule(DigitsCNN(2), [DigitsCNN(4), DigitsCNN(8)])
    assert [type(one) for one in teachers_of(module)] == [Teacher, Teacher]
    assert [one.network for one in teachers_of(module)] == [one.network for one in module.teachers]
    assert teachers_of(SupervisedModule(DigitsCNN(2))) == []


def test_the_introduction_changes_no_figure(config, monkeypatch):
    """Multiply-accumulates are counted with a validation sample; weights are those of a fit without it."""
    config["trainer"]["max_epochs"] = 1
    config["name"] = "with"
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "config.yaml"])
    monkeypatch.setattr("kd_lightning.cli.introduction.Introduction.setup", lambda *args, **kwargs: None)
    main(["fit", "config.yaml", "--name", "without"])
    one, other = (Run(f"runs/{name}/version_0").student().state_dict() for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_failure_leaves_no_next_step(config, fails, capsys):
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = -1.0
    Path("config.yaml").write_text(yaml.safe_dump(config))
    fails("fit", "config.yaml")
    assert "next:" not in capsys.readouterr().out


class TestQuiet:
    def test_flag(self):
        assert take_verbose(["fit", "--verbose", "a.yaml"]) == (["fit", "a.yaml"], True)
        assert take_verbose(["fit", "a.yaml", "--verbose"]) == (["fit", "a.yaml"], True)
        assert take_verbose(["test", "--verbose", "false"]) == (["test", "--verbose", "false"], False)
        assert take_verbose(["test", "--verbose=true"]) == (["test", "--verbose=true"], False)
        assert take_verbose([]) == ([], False)

    @pytest.mark.parametrize(
        ("category", "file", "printed"),
        [
            (UserWarning, "/x/site-packages/torch/nn.py", True),
            (UserWarning, "/home/me/net.py", True),
            (FutureWarning, "/home/me/net.py", True),
            (FutureWarning, "/x/site-packages/torch/nn.py", False),
            (DeprecationWarning, "/home/me/net.py", False),
            (PossibleUserWarning, "/x/site-packages/lightning/a.py", False),
        ],
    )
    def test_warnings(self, unranked, category, file, printed):
        text = format_warning(category("two\n  lines"), category, file, 3)
        assert text == ("warning: two lines\n" if printed else "")

    def test_warnings_of_rank_0_alone(self, unranked, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert format_warning("text", UserWarning, "a.py", 1) == ""
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert format_warning("text", UserWarning, "a.py", 1) == "warning: text\n"

    def test_all_is_as_before(self, handlers):
        before = warnings.formatwarning
        with contextlib.suppress(KeyError), quiet():
            silence_lightning()
            rank_zero_info("ours")
            logging.getLogger("lightning.pytorch").info("also ours")
            assert warnings.formatwarning is format_warning
            raise KeyError
        assert warnings.formatwarning is before
        assert not [f for handler in logging.getLogger("lightning.pytorch").handlers for f in handler.filters]
        assert handlers == ["ours", "also ours"]

    def test_verbose_changes_nothing(self, handlers):
        before = warnings.formatwarning
        with quiet(verbose=True):
            silence_lightning()
            assert is_verbose()
            assert warnings.formatwarning is before
        assert not is_verbose()

    def test_python_is_not_silenced(self, handlers, tmp_path):
        Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
        assert [text for text in handlers if "TPU available" in text]


class TestProgress:
    class _Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            loss = self.net(batch).mean()
            self.log("train/a_long_name_of_a_metric", loss, prog_bar=True)
            self.log("train/another_long_name_of_a_metric", loss, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def test_one_line(self, tmp_path, monkeypatch):
        console = Console(width=80, force_terminal=True, file=io.StringIO())
        monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
        bar = OneLineProgress()
        trainer = Trainer(
            max_epochs=2, callbacks=[bar], default_root_dir=tmp_path, accelerator="cpu", log_every_n_steps=1
        )
        trainer.fit(self._Module(), torch.utils.data.DataLoader(torch.ones(4, 1)))
        with console.capture() as captured:
            console.print(bar.progress.get_renderable())
        (line,) = [line for line in captured.get().splitlines() if line.strip()]
        text = "".join(part.partition("m")[2] if n else part for n, part in enumerate(line.split("\x1b[")))
        assert text.startswith("version_0 epoch 2/2 ")
        assert "4/4" in text
        assert "train/a_long" in text and text.rstrip().endswith("…")
        assert len(text) <= 80


class TestFigures:
    def test_other_parts_and_prefixes(self, capsys):
        print_figures("test", {"transductive/test/accuracy": 0.5, "val/accuracy": 0.1}, None)
        assert capsys.readouterr().out.splitlines() == ["transductive/test", "  accuracy  0.500"]

    def test_names_of_another_project(self, capsys):
        print_figures("test", {"test_acc": 0.5, "f1": 0.25}, None)
        assert capsys.readouterr().out.splitlines() == ["test", "  f1        0.250", "  test_acc  0.500"]

    def test_numbers(self, capsys):
        print_figures("val", {"val/loss": torch.tensor(123456.0), "val/mse": 1e-5, "val/miou": 0.0}, None)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert lines == [["miou", "0.000"], ["loss", "1.23e+05"], ["mse", "1e-05"]]


def test_next_steps_without_a_run(capsys):
    print_next_steps(["fit", "--config=a.yaml"], SimpleNamespace(run_folder=None))
    assert not capsys.readouterr().out


class NumberStream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(16), k % 3) for k in range(8)])


@pytest.mark.parametrize("has_test", [True, False])
def test_no_test_is_proposed_without_a_test_part(has_test, tmp_path, capsys):
    data = StreamDataModule(NumberStream(), test=NumberStream() if has_test else None)
    cli = SimpleNamespace(
        run_folder=tmp_path, trainer=Trainer(logger=False), model=SupervisedModule(nn.Linear(16, 3)), datamodule=data
    )
    print_next_steps(["fit", "a.yaml"], cli)
    lines = capsys.readouterr().out.splitlines()
    proposed = ["next: kd-lightning test a.yaml"] if has_test else []
    assert [line for line in lines if " test " in line] == proposed
    assert lines[0].startswith("next: ") and lines[-1].endswith(f"kd-lightning export {tmp_path}")


@pytest.mark.parametrize("module", [DistillModule, FeatureDistillModule])
def test_an_experiment_is_proposed_where_there_is_a_baseline(module, tmp_path, capsys):
    data = SemiSupervisedDataModule(Digits())
    model = module(DigitsCNN(2), DigitsCNN(4))
    cli = SimpleNamespace(run_folder=tmp_path, trainer=Trainer(logger=False), model=model, datamodule=data)
    print_next_steps(["fit", "a.yaml"], cli)
    assert ("experiment a.yaml" in capsys.readouterr().out) == (module is DistillModule)


class TestNetwork:
    def test_macs_against_the_formula(self):
        net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 8 * 8, 7))
        macs, parameters = 5 * 3 * 9 * 64 + 5 * 64 * 7, 5 * 27 + 5 + 320 * 7 + 7
        assert describe_network(net, torch.zeros(2, 3, 8, 8)) == (
            f"Sequential: {parameters / 1000:.3g} k parameters, {macs / 1000:.3g} k MACs a sample"
        )

    def test_without_an_input_and_with_a_wrong_one(self):
        assert describe_network(nn.Linear(3, 2), None) == "Linear: 8 parameters"
        assert describe_network(nn.Linear(3, 2), torch.zeros(1, 9)) == "Linear: 8 parameters"

    def test_parameters_that_do_not_exist_yet(self):
        assert describe_network(nn.LazyLinear(3), torch.zeros(1, 9)) == "LazyLinear"

    def test_weights_outside_of_runs(self, tmp_path):
        assert known_accuracy(str(tmp_path / "net.pt")) == ""
