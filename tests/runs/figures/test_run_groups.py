"""Which runs are compared, in which groups, and what is left out. Folders are made by hand."""

import json

import pytest
import yaml

from kd_lightning.errors import InputError
from kd_lightning.runs.figures.run_groups import find_groups
from kd_lightning.runs.results import Result, write_result
from kd_lightning.runs.run import Run

STARTED = iter(range(1, 1000))


@pytest.fixture
def make(tmp_path):
    """Makes a run below ``runs``, later than all before, with an accuracy on some parts."""

    def make(name, seed=0, parts=("test",), finished=True, files=None, precision=None, student=None, n=200):
        version = len([*tmp_path.glob(f"runs/{name}/*")])
        folder = tmp_path / "runs" / name / f"version_{version}"
        folder.mkdir(parents=True)
        config = {
            "name": name,
            "seed_everything": seed,
            "trainer": {"precision": precision, "max_epochs": 2},
            "model": {"class_path": "SomeModule", "init_args": {"width": student}},
            "data": {"class_path": "SomeData", "init_args": {"seed": seed}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Run.write_state(folder, finished=finished, started=next(STARTED), files=files or {})
        for part in parts:
            write_result(Result(part, n, {"accuracy": 0.5}, None, folder), [])
        return folder

    return make


def names(folders):
    return [path.name for path in folders]


def test_a_seed_counts_once_and_the_newest_wins(make, tmp_path):
    """README's own order: fit of seed 0, then the experiment's seeds 0 to 2."""
    old = make("a")
    rest = [make("a", seed) for seed in (0, 1, 2)]
    (group,), left_out = find_groups([tmp_path / "runs/a"], "test")
    assert [run.folder for run in group.runs.values()] == rest
    assert [run.seed for run in group.runs.values()] == [0, 1, 2]
    assert len(group.values("accuracy")) == 3
    assert [(one.folder, str(rest[0]) in one.reason) for one in left_out] == [(old, True)]


def test_a_run_given_twice_is_one(make, tmp_path):
    folder = make("a")
    (group,), left_out = find_groups([folder, tmp_path / "runs/a", folder], "test")
    assert len(group.runs) == 1 and left_out == []


def test_the_seed_of_the_data_is_part_of_the_seed(make):
    one, other = make("a"), make("a")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["init_args"]["seed"] = 5
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (group,), left_out = find_groups([one, other], "test")
    assert len(group.runs) == 2 and left_out == []


@pytest.mark.parametrize("seed", [None, False])
def test_runs_without_a_seed_are_all_different(make, tmp_path, seed):
    for _ in range(2):
        make("a", seed=seed)
    (group,), left_out = find_groups([tmp_path / "runs/a"], "test")
    assert len(group.runs) == 2 and left_out == []


def test_another_config_is_a_group_named_by_what_differs(make, tmp_path):
    for seed in (0, 1):
        make("a", seed)
    make("a", 0, precision="16-mixed")
    make("b")
    groups, left_out = find_groups([tmp_path / "runs/a", tmp_path / "runs/b"], "test")
    assert [group.name for group in groups] == ["a (precision: null)", 'a (precision: "16-mixed")', "b"]
    assert [len(group.runs) for group in groups] == [2, 1, 1]
    assert left_out == []


def test_many_or_long_settings_are_shortened(make):
    folders = [make("a"), make("a", precision="x" * 100, student=3)]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    config["trainer"]["max_epochs"] = 9
    (folders[0] / "config.yaml").write_text(yaml.safe_dump(config))
    groups, _ = find_groups(folders, "test")
    assert all(group.name.endswith(", ...)") and len(group.name) < 80 for group in groups)


def test_other_content_of_a_file_is_another_config(make):
    key = "model.init_args.teacher.init_args.path"
    folders = [make("a", files={key: letter * 64}) for letter in "fe"]
    groups, _ = find_groups(folders, "test")
    assert [group.name for group in groups] == [f'a (content of teacher.path: "{letter * 8}")' for letter in "ef"]


def test_unfinished_runs_and_other_folders_are_left_out(make, tmp_path):
    make("a")
    unfinished = make("a", finished=False)
    (tmp_path / "runs/a/version_2").mkdir()
    (group,), left_out = find_groups([tmp_path / "runs/a"], "test")
    assert names(run.folder for run in group.runs.values()) == ["version_0"]
    assert [(one.folder, word in one.reason) for one, word in zip(left_out, ("config", "finished"), strict=True)] == [
        (tmp_path / "runs/a/version_2", True),
        (unfinished, True),
    ]


def test_a_folder_that_is_no_run_is_an_error(make, tmp_path):
    make("a")
    with pytest.raises(InputError, match="is no run"):
        find_groups([tmp_path / "runs/a", tmp_path], "test")
    with pytest.raises(InputError, match="is no run"):
        find_groups([tmp_path / "missing"], "test")


def test_only_unfinished_runs_are_an_error(make):
    folder = make("a", finished=False)
    with pytest.raises(InputError, match="no finished run") as error:
        find_groups([folder], "test")
    assert str(folder) in str(error.value)


def test_the_current_folder_is_a_folder_of_runs(make, monkeypatch):
    folder = make("a")
    monkeypatch.chdir(folder.parent)
    (group,), _ = find_groups([type(folder)(".")], "test")
    assert len(group.runs) == 1
    monkeypatch.chdir(folder)
    assert len(find_groups([type(folder)(".")], "test")[0]) == 1


class TestPart:
    def test_an_untested_run_changes_no_other_part(self, make):
        tested, fitted = make("a", parts=("test", "val")), make("b", parts=("val",))
        groups, _ = find_groups([tested, fitted], "test")
        assert [group.part for group in groups] == ["test", None]
        assert groups[1].values("accuracy") == []
        assert [group.part for group in find_groups([tested, fitted], "val")[0]] == ["val", "val"]

    def test_a_transductive_test_stands_beside_a_test(self, make):
        groups, _ = find_groups([make("a"), make("b", parts=("transductive/test",))], "test")
        assert [group.part for group in groups] == ["test", "transductive/test"]

    def test_figures_of_other_weights_do_not_count(self, make):
        folder = make("a")
        path = folder / "test.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 64}))
        (group,), _ = find_groups([folder], "test")
        assert group.results == {}

    def test_samples(self, make):
        (group,), _ = find_groups([make("a", n=120), make("a", 1, n=119)], "test")
        assert group.samples == [119, 120]
