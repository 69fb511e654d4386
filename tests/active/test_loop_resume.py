"""A loop in a folder that is stopped, killed and resumed."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import nn

from kd_lightning.active.loop import ActiveLearningLoop
from kd_lightning.active.loop_folder import LoopFolder
from kd_lightning.data import Digits, SemiSupervisedDataModule
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule

ROUNDS, EPOCHS = 2, 3


class Stop(Callback):
    """Raises an error, or kills the process, at a step of the training of a number of labels."""

    def __init__(self, labels, step, kill=False):
        self.place = labels, step
        self.kill = kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (len(trainer.datamodule.split.labeled), trainer.global_step) == self.place:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("stopped")


def make_module(width=2):
    return SupervisedModule(DigitsCNN(width, dropout=0.5), optimizer=partial(torch.optim.Adam, lr=0.01))


def make_data(change=None, **kwargs):
    plain = {"labeled": 2, "val_size": 0, "batch_size": 300, "train_transform": nn.Identity()}
    data = SemiSupervisedDataModule(Digits(), **(plain | kwargs))
    if change is not None:
        data.setup("")
        change(data)
    return data


def relabel_pool(data):
    data.samples.parts.train.targets[data.split.unlabeled[0]] += 1


def relabel_test(data):
    data.samples.parts.test.targets[0] += 1


def make_trainer(*callbacks, **kwargs):
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    kwargs = {"accelerator": "cpu", "max_epochs": EPOCHS, "limit_val_batches": 0} | kwargs
    # the callback that stops is added later, as it is no setting of the loop
    trainer = Trainer(**dict.fromkeys(switches, False), **kwargs)
    trainer.stops = callbacks
    return trainer


class Loop(ActiveLearningLoop):
    """Its trainings have callbacks that stop it, which do not count as settings."""

    stops = ()

    def _train(self, data, *, select):
        make = self.make_trainer
        try:
            self.make_trainer = lambda: added(make(), self.stops)
            return super()._train(data, select=select)
        finally:
            self.make_trainer = make


def added(trainer, callbacks):
    trainer.callbacks.extend(callbacks)
    return trainer


def make_loop(folder="loop", *stops, module=make_module, data=make_data, trainer=make_trainer, **kwargs):
    kwargs = {"strategy": "bald", "queries": 5, "rounds": ROUNDS, "seed": 3} | kwargs
    loop = Loop(module, data, trainer, folder=folder, **kwargs)
    loop.stops = stops
    return loop


def students(folder):
    return [load_file(Path(folder) / f"round_{number}/student.safetensors") for number in range(ROUNDS + 1)]


def check_same(folder, unbroken, results):
    assert results == unbroken[0]
    for state, expected in zip(students(folder), unbroken[1], strict=True):
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not [*Path(folder).rglob("*.ckpt")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "loop"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)  # a datamodule writes its split.json where the trainer is
        results = make_loop(folder).run()
    assert [result["labels"] for result in results] == [20, 25, 30]
    return results, students(folder)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_folder_of_an_unbroken_loop(unbroken):
    results = make_loop("loop").run()
    check_same("loop", unbroken, results)  # a loop repeats to the bit
    assert json.loads(Path("loop/loop.json").read_text())["results"] == results
    assert {path.name for path in Path("loop").iterdir()} == {"loop.json", ".lock", "round_0", "round_1", "round_2"}


def test_interrupted_within_fits_and_twice(unbroken):
    """In the first epoch of the first training; in the last epochs of the second one, twice."""
    steps = len(make_loop_data())
    places = [(20, 2), (25, steps + 1), (25, 3 * steps - 1), (30, 3 * steps)]
    for place in places:
        with pytest.raises(RuntimeError, match="stopped"):
            make_loop("loop", Stop(*place)).run()
    resumed = make_loop("loop")
    check_same("loop", unbroken, resumed.run())
    assert resumed.results == unbroken[0]


def make_loop_data():
    data = make_data()
    data.setup("")
    return data.train_dataloader()


@pytest.mark.parametrize("name", ["_select", "finish", "_write", "_reveal"])
def test_interrupted_between_fits(unbroken, monkeypatch, name):
    """After the test, the query, the student's file; before the labels."""
    owner = {"finish": LoopFolder, "_write": LoopFolder}.get(name, ActiveLearningLoop)
    real, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            make_loop("loop").run()
    check_same("loop", unbroken, make_loop("loop").run())


def test_a_finished_loop_is_not_repeated(unbroken, monkeypatch):
    make_loop("loop").run()
    before = Path("loop/loop.json").read_bytes()
    monkeypatch.setattr(Loop, "_train", None)
    check_same("loop", unbroken, make_loop("loop").run())
    assert Path("loop/loop.json").read_bytes() == before


SCRIPT = "tests_of_a_killed_loop.py"


@pytest.mark.dist
def test_killed(unbroken, processes):
    """A process of its own is killed within the first training, and one within the second; the third one ends."""
    here, steps = str(Path(__file__).parent), len(make_loop_data())
    text = f"import sys\nsys.path.insert(0, {here!r})\nfrom test_loop_resume import *\n"
    for place in ((20, steps + 2), (25, 2 * steps + 1)):
        Path(SCRIPT).write_text(f"{text}make_loop('loop', Stop({place[0]}, {place[1]}, kill=True)).run()\n")
        codes, outputs = processes.run(([SCRIPT], {}))
        assert codes == [-signal.SIGKILL], outputs
        assert Path("loop/loop.json").is_file()
    check_same("loop", unbroken, make_loop("loop").run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"strategy": "entropy"},
            "strategy: it was bald, got entropy; the loop in loop goes on with the same",
        ),
        ({"queries": 6}, "queries: it was 5, got 6"),
        ({"rounds": 3}, "rounds: it was 2, got 3"),
        ({"seed": 4}, "seed: it was 3, got 4"),
        ({"module": lambda: make_module(3)}, "make_module: weights, attributes or code of SupervisedModule have chan"),
        ({"trainer": lambda: make_trainer(max_epochs=5)}, "make_trainer: max_epochs was 3, got 5"),
        ({"trainer": lambda: make_trainer(limit_test_batches=1)}, "make_trainer: limit_test_batches was 1.0, got 1"),
        ({"data": lambda: make_data(relabel_pool)}, "make_data: .* the true labels of the pool have changed"),
        ({"data": lambda: make_data(relabel_test)}, "make_data: .* the labels of the test images have changed"),
        ({"data": lambda: make_data(eval_transform=nn.Flatten(0, 0))}, "make_data: .* eval_transform: .* got Flatten"),
        ({"data": lambda: make_data(labeled=3)}, "make_data: loop has a loop on other data: .* another split"),
        (
            {"data": lambda: make_data(batch_size=60)},
            "make_data: .* on other data: batch_size: .* 300, got",
        ),
    ],
)
def test_other_settings_are_refused(change, message):
    with pytest.raises(RuntimeError, match="stopped"):
        make_loop("loop", Stop(20, 1)).run()
    before = Path("loop/loop.json").read_bytes()
    with pytest.raises(InputError, match=message) as caught:
        make_loop("loop", **change).run()
    assert "\n" not in str(caught.value)
    assert Path("loop/loop.json").read_bytes() == before


def test_folders_that_are_none():
    Path("file").touch()
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    Path("damaged").mkdir()
    Path("damaged/loop.json").write_text("{")
    for folder, message in (
        ("file", "folder: file must be new, empty, or of an earlier loop, got a file"),
        ("full", "folder: full must be new, empty, or of an earlier loop, got notes.txt"),
        ("damaged", "folder: damaged/loop.json is not the state of a loop: .*; name another folder"),
    ):
        with pytest.raises(InputError, match=message):
            make_loop(folder).run()
