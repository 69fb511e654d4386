"""Fits that each lack a fold of the labels."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, SemiSupervisedDataModule
from kd_lightning.cli import fit_once
from kd_lightning.cli.commands import clean
from kd_lightning.cli.cross_fitting import (
    config_of_fold,
    fit_folds,
    labeled_classes,
    require_one_process,
    stratified_folds,
    weight_files,
    whole_groups,
)
from kd_lightning.cli.tuning.judge import find_judge
from kd_lightning.data import Digits
from kd_lightning.data.splits import Split, make_split
from kd_lightning.errors import InputError
from kd_lightning.runs.config_identity import hash_files
from kd_lightning.runs.run import Run

TARGETS = Digits().load().train.targets


@pytest.mark.parametrize("folds", [2, 3, 5, 11])
def test_folds(folds):
    sizes = {"a": 2, "b": 3, "c": 7, "d": 5}
    names = [name for name, size in sizes.items() for _ in range(size)]
    labels = {100 + 3 * number: name for number, name in enumerate(names)}
    dealt = stratified_folds(labels, folds, 1, "--folds")
    assert sorted(index for fold in dealt for index in fold) == sorted(labels)
    assert len(dealt) == folds and all(fold == sorted(fold) for fold in dealt)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for name, size in sizes.items():
        counts = [sum(labels[index] == name for index in fold) for fold in dealt]
        assert max(counts) - min(counts) <= 1
        assert sum(count > 0 for count in counts) == min(size, folds)
        assert all(size - count >= 1 for count in counts)
    assert stratified_folds(dict(reversed(labels.items())), folds, 1, "--folds") == dealt
    assert stratified_folds(labels, folds, 2, "--folds") != dealt


def test_folds_refused():
    with pytest.raises(InputError, match=r"--cross-fit needs 2 labels of each class, got 1 of b, c$"):
        stratified_folds({0: "a", 1: "c", 2: "a", 3: "b"}, 2, 0, "--cross-fit")
    for folds in (-1, 0, 1, 5):
        with pytest.raises(InputError, match=f"--folds must lie in 2 ... 4, the number of labels, got {folds}"):
            stratified_folds(dict.fromkeys(range(4), "a"), folds, 0, "--folds")


def test_labeled_classes():
    data = SimpleNamespace(visible_labels=lambda: torch.tensor([1, -100, 2, 0]), class_names=["cat", "dog"])
    assert labeled_classes(data) == {0: "dog", 2: "2", 3: "cat"}
    data.class_names = None
    assert labeled_classes(data) == {0: "1", 2: "2", 3: "0"}
    for several in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)):
        data.visible_labels = lambda several=several: several
        assert labeled_classes(data) is None
    assert labeled_classes(object()) is None


def test_require_one_process():
    config = {"trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1}}
    assert require_one_process(config, "clean", "devices") == torch.device("cpu")
    config["trainer"]["num_nodes"] = 3
    with pytest.raises(InputError, match="clean runs on one process, got 3; set devices"):
        require_one_process(config, "clean", "devices")


@pytest.fixture
def config(tmp_path):
    return {
        "name": "a",
        "ckpt_path": "runs/a/version_0/checkpoints/last.ckpt",
        "trainer": {"default_root_dir": "runs", "logger": {"class_path": "CSVLogger"}, "max_epochs": 3},
        "checkpoint": {"dirpath": "here", "monitor": None},
        "model": {"class_path": "SupervisedModule", "init_args": {"initial_weights": str(tmp_path / "start.pt")}},
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"labeled": 4, "seed": 2}},
    }


def test_config_of_a_fold(config, tmp_path):
    """Nothing of it writes into the run, and nothing starts from weights that knew the labels."""
    copy = json.loads(json.dumps(config))
    after = config_of_fold(config, tmp_path / "split_1.json", 1)
    assert config == copy
    assert after["name"] == "a_fold_1" and after["ckpt_path"] is None
    root = {"default_root_dir": str(tmp_path), "enable_model_summary": False}
    assert after["trainer"] == root | {"logger": True, "max_epochs": 3}
    assert after["checkpoint"] == {"dirpath": None, "monitor": None}
    assert after["data"]["init_args"] == {"labeled": str(tmp_path / "split_1.json"), "seed": 2}


def test_the_split_of_a_fold_has_the_labels_of_a_label_file(config, tmp_path):
    config["data"]["init_args"]["label_file"] = "labels.csv"
    assert config_of_fold(config, tmp_path / "split_1.json", 1)["data"]["init_args"]["label_file"] is None


@pytest.fixture
def fits(monkeypatch):
    """Takes the place of the CLI: leaves what a fit leaves; has the name and the checkpoint of each fit."""
    seen = []

    def fit(args):
        config = yaml.safe_load(Path(args[2]).read_text())
        root = Path(config["trainer"]["default_root_dir"], config["name"])
        folder = root / f"version_{len(list(root.glob('version_*')))}"
        if args[3:]:
            folder = Path(args[4]).parents[1]
        Split.load(Path(config["data"]["init_args"]["labeled"]), TARGETS).save(folder / "split.json")
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Run.write_state(folder, finished=True, files=hash_files(config))
        seen.append(" ".join([config["name"], *args[3:]]))
        return SimpleNamespace(run_folder=folder)

    monkeypatch.setattr(fit_once, "DistillCLI", fit)
    return seen


def test_fits(config, fits, tmp_path):
    """Each hides its fold, and what was hidden before; one at a time, and none twice."""
    split = make_split(TARGETS, 2, 0.1, 0)
    hidden, *rest = split.labeled
    split = Split(rest, split.unlabeled, split.val, 0, split.data, [hidden], [[rest[0], 3, "noisy", 0.5]])
    folds = [rest[::2], rest[1::2]]
    runs = fit_folds(config, split, folds, tmp_path / "folds")
    first = next(runs)
    assert fits == ["a_fold_0"]
    assert first.folder == tmp_path / "folds/a_fold_0/version_0"
    assert [run.folder.name for run in runs] == ["version_0"] and fits == ["a_fold_0", "a_fold_1"]
    for number, fold in enumerate(folds):
        one = Split.load(tmp_path / f"folds/a_fold_{number}/version_0/split.json", TARGETS)
        assert one.labeled == folds[1 - number] and one.held_out == sorted([hidden, *fold])
        same = ("unlabeled", "val", "seed", "label_rows")
        assert all(getattr(one, name) == getattr(split, name) for name in same)


def test_no_fit_is_repeated_but_one_that_would_be_another(config, fits, tmp_path, capsys):
    split = make_split(TARGETS, 2, 0.1, 0)
    folds = [split.labeled[::2], split.labeled[1::2]]

    def run(split=split, folds=folds):
        fits.clear()
        found = [run.folder for run in fit_folds(config, split, folds, tmp_path)]
        return found, len(fits)

    first, count = run()
    assert count == 2
    capsys.readouterr()
    assert run() == (first, 0)
    assert capsys.readouterr().out.count("is done: ") == 2
    assert run(split.with_label_rows([[split.unlabeled[0], 1, "noisy", 1.0]]))[1] == 2  # a label file has grown
    assert run() == (first, 0)
    assert run(folds=folds[::-1])[1] == 2
    Run.write_state(first[0], finished=False)  # it was killed before its first checkpoint
    assert run()[1] == 1
    config["trainer"]["max_epochs"] = 4
    assert run()[1] == 2
    for content in (b"first weights", b"others"):
        (tmp_path / "start.pt").write_bytes(content)
        assert run()[1] == 2
        assert run()[1] == 0


def test_other_samples_are_another_fit(config, fits, tmp_path):
    """The pool has changed, of which the split has no names."""
    split = make_split(TARGETS, 2, 0.1, 0)
    for samples, count in (("a", 1), ("a", 0), ("b", 1), ("a", 0)):
        fits.clear()
        (run,) = fit_folds(config, split, [split.labeled[:2]], tmp_path, {"samples": "same", "test": samples})
        Run.write_state(run.folder, samples="same", test=samples)
        assert len(fits) == count


def test_another_seed_is_another_fit(config, fits, tmp_path):
    split = make_split(TARGETS, 2, 0.1, 0)
    for seeds, count in (((0, 2), 1), ((0, 2), 0), ((1, 2), 1), ((0, 3), 1), ((1, 2), 0)):
        config["seed_everything"], config["data"]["init_args"]["seed"] = seeds
        fits.clear()
        [*fit_folds(config, split, [split.labeled[:2]], tmp_path)]
        assert len(fits) == count


def test_a_stopped_fit_is_resumed(config, fits, tmp_path, capsys):
    split = make_split(TARGETS, 2, 0.1, 0)
    folds = [split.labeled[:2]]
    (first,) = fit_folds(config, split, folds, tmp_path)
    Run.write_state(first.folder, finished=False)
    (first.folder / "checkpoints").mkdir()
    (first.folder / "checkpoints/last.ckpt").touch()
    (again,) = fit_folds(config, split, folds, tmp_path)
    assert again.folder == first.folder and again.finished
    assert fits[1] == f"a_fold_0 --ckpt_path {first.folder / 'checkpoints/last.ckpt'}"
    assert "is resumed" in capsys.readouterr().out


def test_names_with_characters_of_patterns(config, fits, tmp_path):
    config["name"] = "a[1]*"
    split = make_split(TARGETS, 2, 0.1, 0)
    for _ in range(2):
        [*fit_folds(config, split, [split.labeled[:2]], tmp_path)]
    assert fits == ["a[1]*_fold_0"]


def test_weight_files():
    loaded = {"class_path": "kd_lightning.load_weights", "init_args": {"model": {}, "path": "teacher.pt"}}
    model = {"init_args": {"teacher": loaded, "initial_weights": None, "student": {"init_args": {"path": "other"}}}}
    assert weight_files({"model": model}) == ["teacher.pt"]
    model["init_args"] |= {"initial_weights": "start.pt", "teacher": [loaded, loaded]}
    assert sorted(weight_files({"model": model})) == ["start.pt", "teacher.pt"]
    model["init_args"] |= {"initial_weights": None, "teacher": None}
    assert weight_files({"model": model}) == []


def merged(groups, contents, labeled):
    data = SimpleNamespace(
        sample_groups=lambda: groups,
        identities=lambda part: SimpleNamespace(contents=contents if part == "train" else []),
    )
    return whole_groups(data, labeled)


def test_groups_and_copies_are_merged():
    groups = merged(["a", "a", "b", "c", "c", "d"], ["x#0", "y", "y#1", "z", "w", "w"], range(6))
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4] == groups[5] != groups[0]
    assert merged(None, ["x", "y", "y"], [0, 1]) is None
    groups = merged(None, ["x", "y", "x"], range(3))
    assert groups[0] == groups[2] != groups[1]
    assert merged(None, ["", "", ""], range(3)) is None  # of a dataset that returns another item each time


@pytest.fixture
def copied():
    """Ten samples of each of four classes, of which the last four of a class are copies of its first four."""
    x = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[24:] = x[:16]
    source = DatasetSource(TensorDataset(x, torch.arange(40) % 4))
    data = SemiSupervisedDataModule(source, val_size=0)
    data.setup("fit")
    return data


def assert_copies_are_together(folds):
    fold_of = {index: number for number, fold in enumerate(folds) for index in fold}
    assert len(fold_of) == 40 and len({*fold_of.values()}) == len(folds)
    assert all(fold_of[index] == fold_of[index + 24] for index in range(16))


def test_copies_are_a_group_and_others_are_alone(copied):
    groups = whole_groups(copied, range(40))
    assert all(groups[index] == groups[index + 24] for index in range(16)) and len({*groups}) == 24
    assert whole_groups(copied, range(24)) is None


def test_a_copy_is_not_in_another_fold_of_a_search(copied, tmp_path):
    judge = find_judge(copied, tmp_path)
    assert_copies_are_together([json.loads(split.read_text())["val"] for split in judge.splits])


def test_a_copy_is_not_in_another_fold_of_clean(copied, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(clean, "fit_folds", lambda config, split, folds, *rest: found.extend(folds) or 1 / 0)
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1},
        "model": {"class_path": "kd_lightning.SupervisedModule", "init_args": {"student": {"class_path": "DigitsCNN"}}},
    }
    with pytest.raises(ZeroDivisionError):
        clean.review(config, copied, 3, tmp_path, tmp_path)
    assert_copies_are_together(found)
