"""A run's folder, read by hand-made ones."""

import csv
import gzip
import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.config_identity import differing_keys, hash_files, identity_of, seeds_of
from kd_lightning.runs.results import Prediction, Result, write_result
from kd_lightning.runs.run import Run, find_runs, register_run, run_of
from kd_lightning.runs.weights import save_weights

CONFIG = {
    "name": "tiny",
    "seed_everything": 3,
    "trainer": {"max_epochs": 2, "precision": None, "callbacks": [{"class_path": "X", "init_args": {"a": 1}}]},
    "checkpoint": {"monitor": None, "dirpath": None},
    "model": {
        "class_path": "SupervisedModule",
        "init_args": {"student": {"class_path": "DigitsCNN", "init_args": {"width": 4}}},
    },
    "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"source": {"class_path": "Digits"}, "seed": 3}},
}


def changed(**values):
    """The config with other values, by dotted path with ``__`` for dots."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in values.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def make(folder, config=CONFIG, student=None, **state):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    Run.write_state(folder, **state)
    if student is not None:
        save_weights(student.state_dict(), folder / "student.safetensors", {"weights": "step 4"})
    return Run(folder)


class TestIdentity:
    @pytest.mark.parametrize(
        "values",
        [
            {"name": "other"},
            {"seed_everything": 4},
            {"data__init_args__seed": 5},
            {"trainer__default_root_dir": "elsewhere"},
            {"trainer__enable_progress_bar": False},
            {"checkpoint__dirpath": "elsewhere"},
            {"trainer__precision": None},
        ],
    )
    def test_seeds_names_and_folders_are_no_part_of_it(self, values):
        assert identity_of(changed(**values), {}) == identity_of(CONFIG, {})
        assert differing_keys(changed(**values), CONFIG) == []

    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ({"trainer__precision": "16-mixed"}, "trainer.precision"),
            ({"trainer__max_epochs": 3}, "trainer.max_epochs"),
            ({"trainer__callbacks": []}, "trainer.callbacks[0].class_path"),
            ({"checkpoint__monitor": "val/loss"}, "checkpoint.monitor"),
            ({"model__init_args__student": {"class_path": "DigitsCNN", "init_args": {"width": 8}}}, "width"),
        ],
    )
    def test_anything_else_is(self, values, key):
        assert identity_of(changed(**values), {}) != identity_of(CONFIG, {})
        assert any(key in text for text in differing_keys(changed(**values), CONFIG))

    def test_the_content_of_files_is(self, tmp_path):
        path = tmp_path / "teacher.pt"
        path.write_text("one")
        config = changed(model__init_args__path=str(path))
        before = hash_files(config)
        assert list(before) == ["model.init_args.path"]
        path.write_text("two")
        assert identity_of(config, hash_files(config)) != identity_of(config, before)
        run = make(tmp_path / "run", config, files=before)
        assert run.differing_keys(config, before) == []
        assert "content" in run.differing_keys(config, hash_files(config))[0]

    def test_a_path_is_not(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("teacher.pt", "copy.pt"):
            Path(name).write_text("one")
        Path("images").mkdir()
        config = changed(model__init_args__path="teacher.pt", data__init_args__root="images")
        run = make(tmp_path / "run", config, files=hash_files(config))
        for path in ("./teacher.pt", str(tmp_path / "teacher.pt"), "copy.pt"):
            other = changed(model__init_args__path=path, data__init_args__root=str(tmp_path / "images"))
            assert run.identity == identity_of(other, hash_files(other))
            assert run.differing_keys(other, hash_files(other)) == []
            assert run.differing_keys(other) == []
        Path("copy.pt").write_text("two")
        (text,) = run.differing_keys(changed(model__init_args__path="copy.pt", data__init_args__root="images"))
        assert text.startswith('model.init_args.path: "copy.pt", not "teacher.pt"')

    def test_one_batch_is_not_all_batches(self):
        one, all_batches = changed(trainer__limit_train_batches=1), changed(trainer__limit_train_batches=1.0)
        assert differing_keys(one, all_batches) == ["trainer.limit_train_batches: 1, not 1.0"]
        assert identity_of(one, {}) != identity_of(all_batches, {})

    def test_a_long_text_is_no_file(self):
        text = "x" * 300  # longer than the name of a file may be
        assert hash_files(changed(model__init_args__path=text)) == {}
        assert differing_keys(changed(model__init_args__path=text), CONFIG)

    def test_no_seed_is_not_seed_zero(self, tmp_path):
        run = make(tmp_path / "run", changed(seed_everything=False))
        assert run.seed is None
        assert run.seeds != seeds_of(changed(seed_everything=0))
        assert run.differing_keys(changed(seed_everything=0)) == ["seed_everything: 0, not null"]

    def test_the_machine_is_none_of_an_evaluation(self):
        other = changed(trainer__devices=4)
        assert differing_keys(other, CONFIG)
        assert not differing_keys(other, CONFIG, evaluation=True)

    def test_a_seed_is_named_but_is_no_identity(self, tmp_path):
        run, other = make(tmp_path / "run"), changed(seed_everything=9)
        assert run.seed == 3
        assert run.identity == identity_of(other, {})
        assert run.differing_keys(other) == ["seed_everything: 9, not 3"]


class TestFolder:
    def test_no_run(self, tmp_path):
        make(tmp_path / "a" / "version_0")
        make(tmp_path / "a" / "version_10")
        with pytest.raises(InputError, match=r"a is no run: it has no config.yaml.*version_0, version_10"):
            Run(tmp_path / "a")
        with pytest.raises(InputError, match="does not exist"):
            Run(tmp_path / "b")

    @pytest.mark.parametrize("text", ["a: [", "[]", "model: x", ": : :"])
    def test_damaged_config(self, text, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=r"config.yaml"):
            _ = Run(tmp_path).name

    def test_damaged_state_and_figures(self, tmp_path):
        run = make(tmp_path / "run")
        (run.folder / "run.json").write_text("{")
        (run.folder / "metrics.csv").write_text("step,val/accuracy\n1,x\n")
        with pytest.raises(InputError, match=r"run.json"):
            _ = run.finished
        with pytest.raises(InputError, match=r"metrics.csv"):
            run.rows()

    def test_finished(self, tmp_path):
        run = make(tmp_path / "run", finished=False)
        assert not run.finished
        Run.write_state(run.folder, finished=True, step=4)
        assert run.finished
        assert run.state["step"] == 4
        assert run.state["started"]

    def test_the_newest_comes_first(self, tmp_path):
        for number in (2, 10, 9):
            make(tmp_path / "tiny" / f"version_{number}", started=100 + number)
        make(tmp_path / "other" / "version_0", changed(name="other"))
        elsewhere = make(tmp_path / "project" / "wandb_id", started=500)  # of a logger that names its own folder
        assert len(find_runs(tmp_path, "tiny")) == 3
        register_run(elsewhere.folder, tmp_path, "tiny")
        register_run(tmp_path / "tiny" / "version_2", tmp_path, "tiny")
        register_run(tmp_path / "gone", tmp_path, "tiny")
        assert [run.folder.name for run in find_runs(tmp_path, "tiny")] == [
            "wandb_id",
            "version_10",
            "version_9",
            "version_2",
        ]

    def test_folders_of_two_loggers_with_the_same_name(self, tmp_path):
        runs = [make(tmp_path / logs / "version_0", started=k) for k, logs in enumerate(("a", "b"), 1)]
        for run in (*runs, runs[0]):
            register_run(run.folder, tmp_path / "runs", "tiny")
        found = find_runs(tmp_path / "runs", "tiny")
        assert [run.folder for run in found] == [run.folder for run in reversed(runs)]


class TestStudent:
    def test_it_is_built_and_loaded(self, tmp_path):
        student = DigitsCNN(4)
        run = make(tmp_path / "run", student=student)
        state = run.student().state_dict()
        assert all(torch.equal(state[key], value) for key, value in student.state_dict().items())
        assert run.metadata["weights"] == "step 4"

    def test_a_killed_run_has_none(self, tmp_path):
        run = make(tmp_path / "run", finished=False)
        with pytest.raises(InputError, match=r"no student.safetensors; train it first"):
            run.student()

    def test_a_module_without(self, tmp_path):
        run = make(tmp_path / "run", changed(model__init_args={"net": 1}))
        with pytest.raises(InputError, match="has no student"):
            run.build_student()


class TestResults:
    PREDICTIONS = (Prediction(0, "a", "a", 1.0), Prediction(1, "b", "a", 0.0), Prediction(2, "", "a", float("nan")))

    def test_round_trip(self, tmp_path):
        run = make(tmp_path / "run", student=DigitsCNN(4))
        for part in ("test", "transductive/test"):
            write_result(Result(part, 2, {"accuracy": 0.5}, run.weights_hash, run.folder), self.PREDICTIONS)
            result = run.result(part)
            assert (result.samples, result.figures, result.part) == (2, {"accuracy": 0.5}, part)
            assert result.predictions()[:2] == list(self.PREDICTIONS[:2])
        assert run.result("val") is None

    def test_names_of_samples(self, tmp_path):
        """Files of older versions have none."""
        run = make(tmp_path / "run")
        rows = [Prediction(0, "a", "a", 1.0, "a/0.png", "00ff"), Prediction(1, "b", "a", 0.0, "b/1.png", "00ff#2")]
        write_result(Result("test", 2, {"accuracy": 0.5}, None, run.folder), rows)
        path = run.folder / "test_predictions.csv.gz"
        with gzip.open(path, "rt", newline="") as file:
            table = [*csv.reader(file)]
        assert table[0] == ["index", "path", "content", "label", "prediction", "correct"]
        assert table[2] == ["1", "b/1.png", "00ff#2", "b", "a", "0"]
        assert run.result("test").predictions() == rows
        with gzip.open(path, "wt") as file:
            file.write("index,label,prediction,correct\n1,b,a,0\n")
        assert run.result("test").predictions() == [Prediction(1, "b", "a", 0.0)]

    def test_those_of_other_weights_do_not_count(self, tmp_path):
        run = make(tmp_path / "run", student=DigitsCNN(4))
        write_result(Result("test", 2, {"accuracy": 0.5}, run.weights_hash, run.folder), self.PREDICTIONS)
        save_weights(DigitsCNN(4).state_dict(), run.weights, {})  # trained further
        assert run.result("test") is None

    def test_damaged(self, tmp_path):
        run = make(tmp_path / "run")
        write_result(Result("test", 2, {"accuracy": 0.5}, None, run.folder), self.PREDICTIONS)
        (run.folder / "test_predictions.csv.gz").write_bytes(b"x")
        with pytest.raises(InputError, match="damaged"):
            run.result("test").predictions()
        (run.folder / "test.json").write_text("{}")
        with pytest.raises(InputError, match=r"test.json is damaged"):
            run.result("test")


class TestCheckpoints:
    @staticmethod
    def save(path, student, callbacks=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {f"student.{key}": value for key, value in student.state_dict().items()} | {"teacher.x": torch.ones(1)}
        content = {"state_dict": state, "callbacks": callbacks or {}, "loops": {"fit_loop": {}}}
        content |= {"optimizer_states": [], "lr_schedulers": [], "global_step": 1, "epoch": 0}
        content |= {"pytorch-lightning_version": "2.6.6"}
        torch.save(content, path)
        now = time.time_ns() + TestCheckpoints.clock
        TestCheckpoints.clock += 10**9
        os.utime(path, ns=(now, now))

    clock = 0

    def test_names_that_nest_folders(self, tmp_path):
        run = make(tmp_path / "run", student=(student := DigitsCNN(4)))
        folder = run.folder / "checkpoints"
        best = folder / "epoch=0-val" / "accuracy=0.900.ckpt"
        self.save(best, student)
        self.save(folder / "epoch=1-val" / "accuracy=0.800.ckpt", DigitsCNN(4))
        state = {
            "monitor": "val/accuracy",
            "best_model_path": f"/moved/{best.relative_to(folder)}",
            "dirpath": "/moved",
        }
        self.save(folder / "last.ckpt", DigitsCNN(4), {"ModelCheckpoint": state})
        assert run.last_checkpoint() == folder / "last.ckpt"
        assert run.best_checkpoint() == best  # not the newest one, and found in the moved folder
        assert run.deployed_checkpoint() == best

    def test_the_best_is_gone(self, tmp_path):
        run = make(tmp_path / "run")
        state = {"monitor": "val/accuracy", "best_model_path": "/x/a.ckpt", "dirpath": "/x"}
        self.save(run.folder / "checkpoints" / "last.ckpt", DigitsCNN(4), {"ModelCheckpoint": state})
        with pytest.raises(InputError, match=r"best.*a.ckpt.*is gone"):
            run.best_checkpoint()

    def test_the_last_one_is_the_best_without_a_monitor_alone(self, tmp_path):
        """A monitored value that was never measured has no best checkpoint; ``last.ckpt`` itself has no monitor."""
        last, best = {"monitor": None, "best_model_path": "last.ckpt"}, {"monitor": "val/loss", "best_model_path": ""}
        run = make(tmp_path / "run")
        path = run.folder / "checkpoints" / "last.ckpt"
        self.save(path, DigitsCNN(4), {"LastCheckpoint": last})
        assert run.best_checkpoint() == path
        self.save(path, DigitsCNN(4), {"ModelCheckpoint": best, "LastCheckpoint": last})
        with pytest.raises(InputError, match="has no checkpoint of a best value"):
            run.best_checkpoint()

    def test_none(self, tmp_path):
        run = make(tmp_path / "run")
        for find in (run.last_checkpoint, run.best_checkpoint):
            with pytest.raises(InputError, match=r"ckpt_path: .*has no checkpoint"):
                find()
        assert run.deployed_checkpoint() is None

    def test_in_a_folder_outside(self, tmp_path):
        run = make(tmp_path / "run", checkpoints=str(tmp_path / "elsewhere"))
        self.save(tmp_path / "elsewhere" / "last.ckpt", nn.Linear(1, 1))
        assert run.last_checkpoint() == tmp_path / "elsewhere" / "last.ckpt"

    def test_in_several_folders(self, tmp_path):
        outside = [tmp_path / "a", tmp_path / "b"]
        run = make(tmp_path / "run", checkpoints=[str(folder) for folder in outside])
        paths = [folder / "x.ckpt" for folder in (run.folder / "checkpoints", *outside)]
        for path in paths:
            self.save(path, nn.Linear(1, 1))
        assert run.checkpoints() == paths[::-1]

    def test_the_best_of_weights_alone_is_the_deployed_one(self, tmp_path):
        run = make(tmp_path / "run", student=(student := DigitsCNN(4)))
        for name, network in (("best", student), ("newer", DigitsCNN(4))):
            self.save(run.folder / "checkpoints" / f"{name}.ckpt", network)
        assert run.best_checkpoint().stem == "best"
        run.weights.unlink()
        with pytest.raises(InputError, match="best"):
            run.best_checkpoint()

    def test_whose_it_is(self, tmp_path, monkeypatch):
        run = make(tmp_path / "runs" / "a" / "version_0", student=DigitsCNN(4))
        path = run.folder / "checkpoints" / "x" / "y.ckpt"
        self.save(path, DigitsCNN(4))
        assert run_of(path).folder == run_of(run.weights).folder == run.folder
        (run.folder / "copied.ckpt").write_bytes(path.read_bytes())
        assert run_of(run.folder / "copied.ckpt") is None
        monkeypatch.chdir(run.folder / "checkpoints")
        assert run_of(path.relative_to(run.folder / "checkpoints")).folder.samefile(run.folder)
