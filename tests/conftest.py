"""What many tests share."""

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from torchvision.io import write_png

from kd_lightning.__main__ import main
from kd_lightning.data import Digits
from kd_lightning.models import DigitsCNN

sys.path.insert(0, str(Path(__file__).parent / "processes"))
sys.path.insert(0, str(Path(__file__).parent / "parsing"))
from blank_figures import CONFUSION, SAMPLES, leave_blank
from forked import Processes
from parse_once import parse_once

torch.set_num_threads(1)  # the networks are tiny
gc.disable()  # until all tests are collected
for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():  # torch.manual_seed formats the call stack for them, which takes half a millisecond
        devices.manual_seed_all = lambda seed: None


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Let the garbage collector leave out the libraries and the tests, and run seldom: it took a sixth of a fit."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


DRAWING = {"test_sample_figures", "test_supervised", "test_evaluation", "test_ensemble_evaluation"}
"""Files that look at pictures of samples or at confusion matrices."""


@pytest.fixture(scope="module", autouse=True)
def _blank_figures(request):
    """Leaves pictures of samples and confusion matrices blank, but where they are tested."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in DRAWING:
            leave_blank(patch, [*SAMPLES, *CONFUSION])
        yield


@pytest.fixture(scope="module")
def parsed_once():
    """Parses the arguments of each object once, in files whose tests start the same config again and again."""
    with parse_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_timed_calls():
    """Times a few calls of a network where a command times many, for up to a second: no test looks at their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timer, "blocked_autorange", lambda timer, **kwargs: timer.timeit(2))
        patch.setattr("kd_lightning.deploy.latency._SECONDS", 0)
        yield


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Makes a temporary folder the current one, with ``photos``: 18 of 3 classes in each of three parts."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test", "unlabeled"):
        for number in range(18):
            image = tmp_path / "photos" / part / f"class{number % 3}" / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            write_png(torch.randint(256, (3, 70, 80), dtype=torch.uint8), str(image))
    return tmp_path / "photos"


@pytest.fixture
def quiet_trainer(tmp_path):
    """Makes a Trainer that writes nothing but what a test asks for."""

    def make(**kwargs):
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(defaults | kwargs))

    return make


@pytest.fixture
def loader():
    """Makes a plain loader of ``(x, y)`` of the digits' shape, the same in every test."""

    def make(count=12, batch=4, labels=None):
        x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        return DataLoader(TensorDataset(x, torch.arange(count) % 10 if labels is None else labels), batch)

    return make


@pytest.fixture
def student():
    """A tiny student, the same in every test."""
    torch.manual_seed(0)
    return DigitsCNN(width=4)


@pytest.fixture
def teacher():
    """A wider network, untrained."""
    torch.manual_seed(1)
    return DigitsCNN(width=8)


@pytest.fixture(scope="session")
def train_digits():
    """Trains a network to more than 90 % on the digits, whose images a function may change first; quick."""

    def train(network, change=lambda x: x):
        part = Digits().load().train
        x, y = change(part.images.tensors[0]), part.targets
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(6):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
        return network.eval()

    return train


@pytest.fixture(scope="session")
def healthy(train_digits):
    """A good teacher for the digits; not to be changed."""
    torch.manual_seed(0)
    return train_digits(DigitsCNN(16))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny distillation as a dict, and a folder of its own where its teacher's weights lie."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
    teacher = {"model": {"class_path": "DigitsCNN", "init_args": {"width": 8}}, "path": "teacher.pt"}
    return {
        "name": "tiny",
        "seed_everything": 1,
        "trainer": {
            "max_epochs": 2,
            "limit_train_batches": 4,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
        "model": {
            "class_path": "DistillModule",
            "init_args": {
                "student": {"class_path": "DigitsCNN", "init_args": {"width": 4, "dropout": 0.2}},
                "teacher": {"class_path": "kd_lightning.load_weights", "init_args": teacher},
                "soft_weight": 0.5,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {"source": {"class_path": "Digits"}, "labeled": 5, "batch_size": 32},
        },
    }


@pytest.fixture(scope="session")
def runs_of_configs():
    """The folders of runs, by their config."""
    return {}


@pytest.fixture
def fit_or_copy(runs_of_configs, tmp_path_factory):
    """Fits a config in a folder that has no run yet; the same config is trained once, and its run is copied then."""

    def run(config, path="config.yaml"):
        text = yaml.safe_dump(config)
        Path(path).write_text(text)
        assert not Path("runs").exists()
        if text not in runs_of_configs:
            main(["fit", "--config", path])
            runs_of_configs[text] = tmp_path_factory.mktemp("run")
            shutil.copytree("runs", runs_of_configs[text], dirs_exist_ok=True)
        else:
            shutil.copytree(runs_of_configs[text], "runs")
        return path

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with status 2 and without a traceback; gives the last line."""

    def run(*args):
        with pytest.raises(SystemExit) as end:
            main(list(args))
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        last = error.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


@pytest.fixture(scope="session")
def processes():
    """Starts commands and scripts in processes of their own that need no imports."""
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return Path(__file__).parent.parent


@pytest.fixture
def alone():
    """Leaves nothing of a process group."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
