"""Checkpoints are read without running code; what they lack for a command ends in one line."""

import copy
import os
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from kd_lightning import InputError, SupervisedModule
from kd_lightning.__main__ import main
from kd_lightning.models import DigitsCNN
from kd_lightning.runs import checkpoints
from kd_lightning.runs.checkpoints import SafeCheckpointIO, follow_move, read_checkpoint

SGD = partial(torch.optim.SGD, lr=0.1)


class OddData(LightningDataModule):
    """Saves a path in its hyperparameters."""

    def __init__(self, loader=None, root=Path("a")):
        super().__init__()
        self.save_hyperparameters("root")
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class OddState(Callback):
    """Saves a path in its state."""

    def state_dict(self):
        return {"best": [Path("a")]}


class OddModule(SupervisedModule):
    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["of_module"] = {"path": Path("a")}


@pytest.fixture
def saved(quiet_trainer, loader, tmp_path):
    """Saves a checkpoint after one epoch; gives its path."""

    def fit(*callbacks, kind=SupervisedModule):
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[*callbacks])
        trainer.fit(kind(DigitsCNN(4), optimizer=SGD), datamodule=OddData(loader()))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return fit


@pytest.fixture
def whole(tmp_path):
    """The content of a checkpoint from which a fit can resume."""
    counters = {"total": {}, "current": {}}
    return {
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {"a": torch.ones(1)},
        "loops": {"fit_loop": {"epoch_progress": counters, "epoch_loop.batch_progress": counters}},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
    }


def write(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_command_works_with_odd_hyperparameters(quiet_trainer, loader, tmp_path, saved, stage, monkeypatch):
    path = saved()
    with pytest.raises(Exception, match="PosixPath"):
        torch.load(path, weights_only=True)
    read = []
    monkeypatch.setattr(
        checkpoints, "read_tensors", lambda *a, f=checkpoints.read_tensors, **k: read.append(a) or f(*a, **k)
    )
    module = SupervisedModule(DigitsCNN(4), optimizer=SGD)
    trainer = quiet_trainer(max_epochs=2, plugins=[SafeCheckpointIO(resume=stage == "fit")])
    getattr(trainer, stage)(module, datamodule=OddData(loader()), ckpt_path=path)
    assert len(read) == 1
    if stage == "fit":
        torch.manual_seed(0)
        unbroken = SupervisedModule(DigitsCNN(4), optimizer=SGD)
        quiet_trainer(max_epochs=2).fit(unbroken, datamodule=OddData(loader()))
        for key, value in unbroken.state_dict().items():
            assert torch.equal(value, module.state_dict()[key])


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("place", "callbacks", "kind"),
    [("callbacks.OddState.best.0", [OddState()], SupervisedModule), ("of_module.path", [], OddModule)],
)
def test_odd_objects_in_state_are_refused(saved, resume, place, callbacks, kind):
    path = saved(*callbacks, kind=kind)
    message = rf"a.ckpt: {place} holds an object of pathlib.*PosixPath, .* could run code; allowed: tensors"
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(path, resume=resume)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):
        SafeCheckpointIO(resume=resume).load_checkpoint(path)


@pytest.mark.parametrize("key", ["loops", "optimizer_states", "lr_schedulers"])
def test_an_evaluation_does_not_need_the_state_of_a_fit(tmp_path, whole, key):
    whole[key] = [Path("a")]
    path = write(tmp_path, whole)
    with pytest.raises(InputError, match=f"{key}.0 holds an object of pathlib"):
        read_checkpoint(path, resume=True)
    assert read_checkpoint(path)["global_step"] == 3
    assert key not in SafeCheckpointIO(resume=False).load_checkpoint(path)


def test_hyperparameters_may_be_odd(tmp_path, whole):
    odd = {"hyper_parameters": {"a": Path("a")}, "datamodule_hyper_parameters": Path("a"), "hparams_type": Path}
    path = write(tmp_path, whole | odd)
    assert read_checkpoint(path, resume=True).keys() == (whole | odd).keys()


def test_a_user_who_trusts_the_file(tmp_path, whole):
    path = write(tmp_path, whole | {"odd": Path("a")})
    assert SafeCheckpointIO().load_checkpoint(path, weights_only=False)["odd"] == Path("a")
    with pytest.raises(InputError, match="odd holds an object"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=True)


def without(*keys):
    return lambda content: [content.pop(key) for key in keys]


def with_(**values):
    return lambda content: content.update(values)


# a change of a whole checkpoint, what a fit reports, and whether an evaluation works with it
CHANGES = {
    "no state_dict": (without("state_dict"), "it holds no state_dict", False),
    "list": (with_(state_dict=[]), "state_dict must be a mapping, got list", False),
    "null": (with_(state_dict=None), "state_dict must be a mapping, got NoneType", False),
    "empty": (with_(state_dict={}), "state_dict is empty", False),
    "loops": (with_(loops={}), "loops.fit_loop.epoch_progress, .* is missing", True),
    "fit_loop": (with_(loops={"fit_loop": {}}), "loops.fit_loop.epoch_progress, .* is missing", True),
    "fit_loop list": (with_(loops={"fit_loop": []}), "loops.fit_loop.epoch_progress, .* is missing", True),
    "loops list": (with_(loops=[]), "loops must be a mapping, got list", True),
    "no loops": (without("loops"), "loops must be a mapping, it is missing", True),
    "optimizers": (without("optimizer_states"), "optimizer_states must be a list, it is missing", True),
    "optimizers null": (with_(optimizer_states=None), "optimizer_states must be a list, got NoneType", True),
    "schedulers": (without("lr_schedulers"), "lr_schedulers must be a list, it is missing", True),
    "weights": (without("optimizer_states", "lr_schedulers", "callbacks"), "weights alone .save_weights_only.", True),
    "version": (without("pytorch-lightning_version"), "pytorch-lightning_version must .* got None", True),
    "version text": (with_(**{"pytorch-lightning_version": "new"}), "version must .* got 'new'", True),
    "callbacks": (without("callbacks"), "callbacks must be a mapping, it is missing", True),
    "callbacks null": (with_(callbacks=None), "callbacks must be a mapping, got NoneType", True),
    "callbacks list": (with_(callbacks=[]), "callbacks must be a mapping, got list", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_checkpoint_must_hold(tmp_path, whole, name):
    change, message, is_enough = CHANGES[name]
    assert read_checkpoint(write(tmp_path, whole), resume=True)
    content = copy.deepcopy(whole)
    change(content)
    path = write(tmp_path, content)
    for read in (partial(read_checkpoint, resume=True), SafeCheckpointIO().load_checkpoint):
        with pytest.raises(InputError, match=rf"^ckpt_path: \S*a.ckpt.*{message}") as error:
            read(path)
        assert "\n" not in str(error.value)
    evaluation = SafeCheckpointIO(resume=False)
    if is_enough:
        assert evaluation.load_checkpoint(path)["pytorch-lightning_version"]
        assert read_checkpoint(path)
    else:
        with pytest.raises(InputError, match=message):
            evaluation.load_checkpoint(path)


FILES = {
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "plain": lambda path: torch.save(DigitsCNN(4).state_dict(), path),
    "older": lambda path: torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False),
    "tensor": lambda path: torch.save(torch.ones(1), path),
    "odd": lambda path: torch.save(Path("a"), path),
    "safetensors": lambda path: save_file({"a": torch.ones(1)}, path),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "read", [read_checkpoint, partial(read_checkpoint, resume=True), SafeCheckpointIO().load_checkpoint]
)
def test_files_that_are_no_checkpoint(tmp_path, name, read):
    path = tmp_path / ("a.safetensors" if name == "safetensors" else "a.ckpt")
    if name in ("cut", "half"):
        torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    FILES[name](path)
    with pytest.raises(InputError, match=rf"ckpt_path: .*{path.name}") as error:
        read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"ckpt_path: no checkpoint at .*gone.ckpt"):
        read(tmp_path / "gone.ckpt")


def test_names_a_whole_one_beside(tmp_path, whole):
    path = write(tmp_path, whole)
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:-100])
    torch.save(Path("a"), tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match=r"cut.ckpt is damaged .*; .*a.ckpt beside it can be read"):
        read_checkpoint(tmp_path / "cut.ckpt")


def test_nothing_runs(tmp_path, whole):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'evil'}",)

    path = write(tmp_path, whole | {"hyper_parameters": {"a": Evil()}})
    assert read_checkpoint(path, resume=True)
    assert SafeCheckpointIO().load_checkpoint(path)
    path = write(tmp_path, whole | {"callbacks": {"a": Evil()}})
    with pytest.raises(InputError, match=r"callbacks.a holds an object of posix.system, .* could run code"):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()


class TestCommandLine:
    @pytest.fixture
    def path(self, config):
        """The last checkpoint of a run, whose content each test changes."""
        Path("config.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", "config.yaml"])
        return Path("runs/tiny/version_0/checkpoints/last.ckpt")

    def test_broken_checkpoints(self, path, fails, capsys):
        content = torch.load(path, weights_only=True)
        commands = {"empty": ["fit", "test"], "loops": ["fit", "predict"], "version text": ["fit"], "weights": ["test"]}
        for name, stages in commands.items():
            change, _, is_enough = CHANGES[name]
            changed = copy.deepcopy(content)
            change(changed)
            torch.save(changed, path)
            for stage in stages:
                command = [stage, "--config", "config.yaml", "--ckpt_path", str(path)]
                if is_enough and stage != "fit":
                    main(command)
                    capsys.readouterr()
                else:
                    assert "ckpt_path: " in fails(*command)

    def test_odd_hyperparameters(self, path):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"datamodule_hyper_parameters": {"root": Path("a")}}, path)
        for stage in ("test", "predict"):
            main([stage, "--config", "config.yaml", "--ckpt_path", "last"])
        main(["fit", "--config", "config.yaml", "--ckpt_path", "last"])
        assert [folder.name for folder in Path("runs/tiny").iterdir()] == ["version_0"]


class TestMovedFolder:
    def state(self, old):
        return {
            "dirpath": str(old),
            "best_model_path": str(old / "val/best.ckpt"),
            "kth_best_model_path": str(old / "k.ckpt"),
            "last_model_path": "",
            "best_k_models": {str(old / "val/best.ckpt"): torch.tensor(0.5)},
            "best_model_score": torch.tensor(0.5),
        }

    def test_paths_follow(self, tmp_path):
        new = tmp_path / "new"
        (new / "val").mkdir(parents=True)
        (new / "val/best.ckpt").touch()
        state = self.state(tmp_path / "old")
        follow_move(state, new)
        assert state == self.state(new)

    @pytest.mark.parametrize("folder", ["old", "other", None])
    def test_other_folders_do_not(self, tmp_path, folder):
        state = self.state(tmp_path / "old")
        follow_move(state, folder and tmp_path / folder)
        assert state == self.state(tmp_path / "old")

    def test_a_resumed_run_has_its_best_value(self, quiet_trainer, loader, tmp_path):
        def fit(folder, epochs, path=None):
            torch.manual_seed(0)
            checkpoint = ModelCheckpoint(tmp_path / folder, monitor="val/loss", mode="min", save_last=True)
            trainer = quiet_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[checkpoint])
            trainer.fit(SupervisedModule(DigitsCNN(4), optimizer=SGD), loader(), loader(), ckpt_path=path)
            return checkpoint

        first = fit("old", 2)
        (tmp_path / "old").rename(tmp_path / "new")
        again = fit("new", 2, tmp_path / "new/last.ckpt")
        assert again.best_model_score == first.best_model_score
        assert Path(again.best_model_path) == tmp_path / "new" / Path(first.best_model_path).name


@pytest.mark.parametrize("compiled", [(True, False), (False, True), (True, True)])
def test_compiled_students_resume_each_others_checkpoints(quiet_trainer, loader, tmp_path, compiled):
    def fit(is_compiled, epochs, path=None):
        torch.manual_seed(0)
        net = DigitsCNN(4)
        student = torch.compile(net, backend="eager") if is_compiled else net
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(SupervisedModule(student, optimizer=SGD), loader(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return net.state_dict()

    unbroken = fit(False, 2)
    fit(compiled[0], 1)
    for key, value in fit(compiled[1], 2, tmp_path / "a.ckpt").items():
        assert torch.equal(value, unbroken[key])
