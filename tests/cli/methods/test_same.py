"""Samples that differ are refused, and other differences are named."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from kd_lightning.cli.methods.read import MethodConfig
from kd_lightning.cli.methods.same import (
    check_same_samples,
    check_same_splits,
    describe_differences,
    describe_steps,
)
from kd_lightning.cli.parse import parse_config
from kd_lightning.data import Digits, SemiSupervisedDataModule, SymmetricNoise
from kd_lightning.data.transforms import strong_digits
from kd_lightning.errors import InputError
from kd_lightning.runs.run import Run


@pytest.fixture
def method(config):
    return MethodConfig("a.yaml", parse_config(config, "experiment"))


def changed(method, **changes):
    """Another method, whose data have other arguments."""
    config = deepcopy(method.config)
    config["name"] = "b"
    config["data"]["init_args"] |= changes
    return MethodConfig("b.yaml", config)


def data_of(**changes):
    return SemiSupervisedDataModule(**{"source": Digits(), "labeled": 5, "seed": 0} | changes)


def test_batches_views_and_the_pool_may_differ(method):
    other = {"batch_size": 96, "labeled_batch_size": 32, "strong_transform": strong_digits()}
    others = [data_of(**other), data_of(unlabeled="none"), data_of(unlabeled="test")]
    check_same_samples([method, *[method] * 3], [data_of(), *others])


class Fewer(Digits):
    def load(self):
        parts = super().load()
        test = parts.test
        return parts._replace(test=test._replace(images=_first(test.images), targets=test.targets[:-1]))


def _first(images):
    return type(images)(images.tensors[0][:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labeled": 4}, "other labeled samples or labels than a.yaml (40, not 50): data.labeled: 4, not 5"),
        ({"val_size": 0.2}, "data.val_size: 0.2, not "),
        ({"seed": 1}, "other labeled samples or labels than a.yaml: "),
        ({"label_noise": SymmetricNoise(0.5)}, "other labeled samples or labels than a.yaml: data.label_noise"),
        ({"source": Fewer()}, "other test samples or labels than a.yaml (599, not 600): data.source"),
    ],
)
def test_other_samples_or_labels_are_refused_by_their_key(method, changes, message):
    """Whatever the configs look like, the samples decide."""
    written = {"label_noise": {"class_path": "SymmetricNoise"}, "source": {"class_path": "Fewer"}}
    other = changed(method, **{key: written.get(key, value) for key, value in changes.items()})
    with pytest.raises(InputError) as error:
        check_same_samples([method, other], [data_of(), data_of(**changes)])
    assert str(error.value).startswith("b.yaml has ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_task_is_refused(method):
    other = changed(method)
    other.config["model"]["init_args"]["task"] = "binary"
    with pytest.raises(InputError, match="b.yaml has another metric than a.yaml: model.task: binary, not multiclass"):
        check_same_samples([method, other], [data_of(), data_of()])


def test_splits_that_runs_have_written_are_compared(tmp_path):
    """By content: the same samples at other indices are the same ones."""
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {class_path: SupervisedModule}")
        runs.append(Run(tmp_path / name))
    split = {"labeled": [0, 2], "val": [1], "label_rows": [], "samples": {"contents": ["a", "b", "c"]}}
    moved = {"labeled": [1, 0], "val": [2], "label_rows": [], "samples": {"contents": ["c", "a", "b"]}}
    first, second = (Path(run.folder / "split.json") for run in runs)
    first.write_text(json.dumps(split))
    second.write_text(json.dumps(moved))
    check_same_splits(runs)
    for wrong, text in (
        (moved | {"labeled": [0]}, "other labeled samples"),
        (moved | {"val": [1], "labeled": [2, 0]}, "other labeled and validation samples"),
        (moved | {"label_rows": [[0, 3, "clean", 1.0]]}, "other labeled samples"),
    ):
        second.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=text):
            check_same_splits(runs)
    second.unlink()
    with pytest.raises(InputError, match=r"two has no readable split.json"):
        check_same_splits(runs)


def test_other_students_and_selections_are_named(method):
    other = changed(method)
    assert describe_differences([method, other]) == []
    other.config["model"]["init_args"]["student"]["init_args"]["width"] = 8
    method.config["checkpoint"]["monitor"], other.config["checkpoint"]["monitor"] = "val/accuracy", None
    student, selection = describe_differences([method, other])
    assert "b has another student than tiny: student.width: 8, not 4; 6,274 trainable parameters, not " in student
    assert selection == "Deployed are the weights with the best val/accuracy of tiny, the last weights of b."


def test_other_numbers_of_steps_are_named(tmp_path):
    runs = []
    for name, step in (("one", 680), ("two", 1020)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("model: {class_path: SupervisedModule}")
        Run.write_state(tmp_path / name, step=step)
        runs.append(Run(tmp_path / name))
    assert describe_steps(["a", "b"], [runs[0], runs[0]]) == []
    assert describe_steps(["a", "b"], runs) == ["The methods have other numbers of steps: a 680, b 1,020."]
